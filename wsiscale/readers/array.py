"""A slide in memory: tests, examples, images that are loaded already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from wsiscale.calibration import calibrate
from wsiscale.errors import SlideError
from wsiscale.geometry import nominal_downsamples
from wsiscale.readers.files import check_window
from wsiscale.types import Calibration, Pyramid, ScaleTags, SlideSource


class ArrayReader:
    """One (H, W, 3) uint8 array, or one per level, finest first, as a slide."""

    def __init__(
        self, levels: NDArray[np.uint8] | Sequence[NDArray[np.uint8]], *, mpp: float | None = None, name: str = "array"
    ) -> None:
        arrays = (levels,) if isinstance(levels, np.ndarray) else tuple(levels)
        for array in arrays:
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
                raise SlideError(f"a level is {array.dtype} {array.shape}; give (height, width, 3) uint8 RGB", code="NOT_RGB8")
        self._levels = arrays
        self._calibration = calibrate(ScaleTags(), override=mpp)
        shapes = tuple((a.shape[0], a.shape[1]) for a in arrays)
        self._pyramid = Pyramid(shapes=shapes, downsamples=nominal_downsamples(shapes), mpp=self._calibration.mpp)
        self._source = SlideSource(name=name, path=None, size=None, mtime_ns=None, vendor="array", reader="array")

    @property
    def pyramid(self) -> Pyramid:
        return self._pyramid

    @property
    def calibration(self) -> Calibration:
        return self._calibration

    @property
    def source(self) -> SlideSource:
        return self._source

    def read(self, *, level: int, y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
        """Pixels of `level`, counted in that level's own pixels: (height, width, 3)."""
        check_window(self._pyramid, level=level, height=height, width=width, name=self._source.name)
        pixels = np.full((height, width, 3), 255, np.uint8)
        full = self._levels[level]
        y0, x0 = max(y, 0), max(x, 0)
        inside = full[y0 : max(y + height, 0), x0 : max(x + width, 0)]
        pixels[y0 - y : y0 - y + inside.shape[0], x0 - x : x0 - x + inside.shape[1]] = inside
        return pixels

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()
