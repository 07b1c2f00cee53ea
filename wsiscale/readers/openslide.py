"""Slides through OpenSlide: most scanners' own formats."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from numpy.typing import NDArray

from wsiscale.errors import SlideError
from wsiscale.geometry import blocks
from wsiscale.readers.files import FileReader, Scan, composed, number, one_line, resolution_scale, stated_bounds, tiff_header
from wsiscale.timing import timed
from wsiscale.types import ScaleTags

# Read in pieces of this many pixels a side: 16 MB of what OpenSlide hands over.
_BLOCK = 2048

# Where each vendor says its µm/px; OpenSlide's own name where it derives the value from several tags.
_MPP_TAGS = (
    "aperio.MPP",
    "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X",
    "philips.DICOM_PIXEL_SPACING",
    "ventana.ScanRes",
)

# Formats whose tiles lie on one plain grid, so that OpenSlide's interpolation is one linear filter over the level.
_PLAIN_GRID = {"aperio", "dicom", "generic-tiff", "philips"}
# Grey levels of 255 that a shift by so much of a pixel can make are below rounding.
_NO_SHIFT = 1 / 512
# Pixels after which the recursion in `_at_pixel_centres` has forgotten its start: (0.37 / 0.63)**12 is 0.002.
_MARGIN = 12


def library_version() -> str:
    """Of OpenSlide itself, not of its Python binding."""
    return str(openslide.__library_version__)


class OpenSlideReader(FileReader[openslide.OpenSlide]):
    """A slide through OpenSlide. Transparent pixels show the slide's background colour, or white."""

    name = "openslide"

    def _open(self, path: str) -> openslide.OpenSlide:
        tiff_header(Path(path))
        try:
            return openslide.OpenSlide(path)
        except openslide.OpenSlideError as error:
            compression = re.search(r"TIFF compression: (\d+)", str(error))
            if compression:
                raise SlideError(
                    f"{self._source.name}: OpenSlide does not decode TIFF compression {compression[1]}; try --reader tiffslide",
                    code="UNSUPPORTED_COMPRESSION",
                ) from error
            raise SlideError(f"{self._source.name}: OpenSlide does not open it ({one_line(error)})") from error

    def _describe(self, handle: openslide.OpenSlide) -> Scan:
        properties = handle.properties
        vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        return Scan(
            shapes=[(height, width) for width, height in handle.level_dimensions],
            tags=_scale_tags(dict(properties), vendor, Path(str(self._source.path))),
            vendor=vendor,
            bounds=stated_bounds(properties, "openslide.bounds"),
        )

    def _read_into(self, pixels: NDArray[np.uint8], *, level: int, y: int, x: int) -> None:
        for top, left, height, width in blocks(pixels.shape[0], pixels.shape[1], _BLOCK):
            pixels[top : top + height, left : left + width] = self._block(level, y + top, x + left, height, width)

    def _block(self, level: int, y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
        handle = self._opened()
        try:
            return _window(handle, level, y, x, height, width)
        except openslide.OpenSlideError:
            # A handle that has failed once fails for ever. It is not closed here, because another thread may be inside of
            # it: it closes itself when the last of them lets go.
            with self._lock:
                if self._handle is handle:
                    self._handle = None
        # Perhaps another thread's window was the broken one, so this one gets a try on a handle that no one else has.
        handle = self._open(str(self._source.path))
        try:
            pixels = _window(handle, level, y, x, height, width)
        except openslide.OpenSlideError as error:
            raise self._failed(error, level=level, y=y, x=x, shape=(height, width)) from error
        with self._lock:
            if self._handle is None:
                self._handle = handle
        return pixels


def _window(handle: openslide.OpenSlide, level: int, y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
    """A window that lies within the level, on the level's own pixel grid: (height, width, 3).

    OpenSlide takes level-0 integers and divides them by its own downsample, 4.0003 where the scanner meant 4. So most windows
    of a coarser level come back shifted by up to half a level-0 pixel, interpolated. (Measured on white noise: a mean error
    of up to 26 grey levels at a downsample of 2.0008, 15 at 4.003; 0.4, and 4 at most, with the shift undone.)
    """
    downsample = handle.level_downsamples[level]
    shift_y, shift_x = (round(start * downsample) / downsample - start for start in (y, x))
    if max(abs(shift_y), abs(shift_x)) < _NO_SHIFT or handle.properties.get(openslide.PROPERTY_NAME_VENDOR) not in _PLAIN_GRID:
        return _region(handle, level, y, x, height, width)
    # Never before the level's start: OpenSlide is off by a pixel there. Beyond its end all is transparent, as it should be.
    before_y, before_x = min(_MARGIN, y), min(_MARGIN, x)
    top, left = y - before_y, x - before_x
    shift_y, shift_x = (round(start * downsample) / downsample - start for start in (top, left))
    wide = _region(handle, level, top, left, before_y + height + _MARGIN, before_x + width + _MARGIN)
    sharp = _at_pixel_centres(_at_pixel_centres(wide.astype(np.float32), shift_y, axis=0), shift_x, axis=1)
    inner = sharp[before_y : before_y + height, before_x : before_x + width]
    return np.clip(np.rint(inner), 0, 255).astype(np.uint8)


def _region(handle: openslide.OpenSlide, level: int, y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
    downsample = handle.level_downsamples[level]
    with timed("decode"):
        rgba = np.asarray(handle.read_region((round(x * downsample), round(y * downsample)), level, (width, height)))
    return composed(rgba, _background(handle))


def _at_pixel_centres(image: NDArray[np.float32], shift: float, *, axis: int) -> NDArray[np.float32]:
    """Undoes linear interpolation at `shift` pixels, |shift| < 0.5, along an axis.

    Each sample is (1 - s) of its pixel and s of a neighbour; solving for the pixel from the neighbour's side is a stable
    recursion of ratio s / (1 - s). The first pixel's neighbour is taken to be like it, and the recursion soon forgets.
    """
    s = abs(shift)
    if s < _NO_SHIFT:
        return image
    from scipy.signal import lfilter  # here, because it takes longer to import than all else that opens a slide

    ahead = np.flip(image, axis) if shift > 0 else image  # so that the neighbour comes first
    start = -s / (1 - s) * np.take(ahead, [0], axis)
    solved, _ = lfilter([1 / (1 - s)], [1, s / (1 - s)], ahead, axis=axis, zi=start)
    return np.asarray(np.flip(solved, axis) if shift > 0 else solved, np.float32)


def _background(handle: openslide.OpenSlide) -> tuple[int, int, int]:
    color = handle.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "")
    if not re.fullmatch(r"[0-9A-Fa-f]{6}", color):
        return 255, 255, 255
    return int(color[0:2], 16), int(color[2:4], 16), int(color[4:6], 16)


def _scale_tags(properties: dict[str, Any], vendor: str, path: Path) -> ScaleTags:
    x = number(properties.get(openslide.PROPERTY_NAME_MPP_X))
    y = number(properties.get(openslide.PROPERTY_NAME_MPP_Y))
    if x is None and y is None:
        header = tiff_header(path)
        tags = header.tags if header is not None else ScaleTags()
    elif vendor in ("generic-tiff", "hamamatsu", "leica", "trestle") and "tiff.XResolution" in properties:
        tags = resolution_scale(x, y)
    else:
        tags = ScaleTags(
            mpp_x=x, mpp_y=y, tag=next((tag for tag in _MPP_TAGS if tag in properties), openslide.PROPERTY_NAME_MPP_X)
        )
    return replace(tags, objective_power=number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)))
