"""Slides as DICOM whole-slide images, through wsidicom: a folder that holds one slide, or one of its files."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import SlideError
from wsiscale.readers.files import BROKEN_FILE, FileReader, Scan, one_line
from wsiscale.types import ScaleTags

try:
    import wsidicom
    import wsidicom.errors
except ImportError as error:
    raise SlideError(
        "reading DICOM slides needs wsidicom; install it with pip install 'wsiscale[dicom]'", code="MISSING_EXTRA"
    ) from error

_NAMED = [kind for kind in vars(wsidicom.errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
_ERRORS: tuple[type[Exception], ...] = (*BROKEN_FILE, *_NAMED)


class DicomReader(FileReader[wsidicom.WsiDicom]):
    """A DICOM slide. Labels and overviews, which can show a patient's name, are never opened as pixels."""

    name = "dicom"

    def _open(self, path: str) -> wsidicom.WsiDicom:
        try:
            return wsidicom.WsiDicom.open(path)
        except _ERRORS as error:
            raise SlideError(
                f"{self._source.name}: wsidicom finds no slide in it ({one_line(error)}); "
                f"give the folder or a file of a whole-slide image (VOLUME)"
            ) from error

    def _describe(self, handle: wsidicom.WsiDicom) -> Scan:
        first = handle.pyramids[0].base_level.datasets[0]
        if first.bits != 8 or first.samples_per_pixel != 3:
            raise SlideError(
                f"{self._source.name} holds {first.bits}-bit pixels of {first.samples_per_pixel} samples, "
                f"and a slide here is 8-bit RGB; convert it on purpose, choosing channels and range",
                code="NOT_RGB8",
            )
        levels = list(handle.pyramids[0])
        spacing = levels[0].mpp
        return Scan(
            shapes=[(level.size.height, level.size.width) for level in levels],
            tags=ScaleTags(mpp_x=spacing.width, mpp_y=spacing.height, tag="dicom.PixelSpacing"),
            vendor="dicom",
        )

    def _read_into(self, pixels: NDArray[np.uint8], *, level: int, y: int, x: int) -> None:
        height, width = pixels.shape[:2]
        with self._lock:
            pyramid = self._opened()
            number = list(pyramid.pyramids[0])[level].level  # wsidicom counts octaves and makes up those that are not there
            try:
                pixels[:] = pyramid.read_region((x, y), number, (width, height), pyramid=0, as_array=True)
            except _ERRORS as error:
                raise self._failed(error, level=level, y=y, x=x, shape=(height, width)) from error

    def _release(self, handle: wsidicom.WsiDicom) -> None:
        handle.close()
