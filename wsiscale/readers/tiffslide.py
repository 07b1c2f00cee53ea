"""Slides through TiffSlide: what OpenSlide refuses, such as OME-TIFF and WebP or JPEG 2000 in TIFF."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiffslide
from numpy.typing import NDArray

from wsiscale.errors import SlideError
from wsiscale.readers.files import (
    BROKEN_FILE,
    FileReader,
    Scan,
    composed,
    number,
    one_line,
    resolution_scale,
    stated_bounds,
    tiff_header,
)
from wsiscale.readers.tiffcheck import CODECS, check_frame
from wsiscale.timing import timed
from wsiscale.types import ScaleTags


class TiffSlideReader(FileReader[tiffslide.TiffSlide]):
    """A slide through TiffSlide. Its handles do not stand threads, so that reads queue."""

    name = "tiffslide"

    def _open(self, path: str) -> tiffslide.TiffSlide:
        header = tiff_header(Path(path))
        if header is None:
            raise SlideError(f"{self._source.name}: TiffSlide does not open it (not a TIFF file)")
        if header.compression not in CODECS:
            raise SlideError(
                f"{self._source.name}: TiffSlide does not decode TIFF compression {header.compression}; store it as JPEG",
                code="UNSUPPORTED_COMPRESSION",
            )
        try:
            handle = tiffslide.TiffSlide(path)
        except BROKEN_FILE as error:
            raise self._refused(error) from error
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TiffSlide warns that it reads a vendor's tags only in part
                axes = handle.properties["tiffslide.series-axes"]
            if axes not in ("YXS", "CYX"):
                raise SlideError(f"{self._source.name} has the axes {axes}, and a slide here is 8-bit RGB", code="NOT_RGB8")
            for series in handle.ts_tifffile.series:
                for level in series.levels:
                    page = level.keyframe
                    page.nodata = 255  # a tile without bytes was not scanned; tifffile would make it black
                    page.decode = _checked(page)
        except BROKEN_FILE as error:
            handle.close()
            raise self._refused(error) from error
        except SlideError:
            handle.close()
            raise
        self._premultiplied = header.premultiplied
        return handle

    def _refused(self, error: BaseException) -> SlideError:
        return SlideError(f"{self._source.name}: TiffSlide does not open it ({one_line(error)})")

    def _describe(self, handle: tiffslide.TiffSlide) -> Scan:
        properties = handle.properties
        return Scan(
            shapes=[(height, width) for width, height in handle.level_dimensions],
            tags=_scale_tags(properties, Path(str(self._source.path))),
            vendor=str(properties.get("tiffslide.vendor") or "generic-tiff"),
            bounds=stated_bounds(properties, "tiffslide.bounds"),
        )

    def _read_into(self, pixels: NDArray[np.uint8], *, level: int, y: int, x: int) -> None:
        height, width = pixels.shape[:2]
        with self._lock:
            handle = self._opened()
            downsample = handle.level_downsamples[level]
            location = (_location(x, downsample), _location(y, downsample))
            try:
                with timed("decode"):
                    window = handle.read_region(location, level, (width, height), as_array=True, padding=False)
            except BROKEN_FILE as error:
                raise self._failed(error, level=level, y=y, x=x, shape=(height, width)) from error
        pixels[:] = window if window.shape[2] == 3 else _on_white(window, premultiplied=self._premultiplied)

    def _release(self, handle: tiffslide.TiffSlide) -> None:
        handle.close()


def _checked(page: Any) -> Callable[..., Any]:
    """The decoder of a page's tiles or strips, which looks at what they say of themselves first."""
    decode = page.decode
    height, width = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)

    def checked(data: bytes | None, *args: Any, **kwargs: Any) -> Any:
        if int(page.compression) not in CODECS:
            raise ValueError(f"its compression {int(page.compression)} is none that slides have")
        if data is not None:
            check_frame(data, height, width, compression=int(page.compression))
        return decode(data, *args, **kwargs)

    return checked


def _location(pixel: int, downsample: float) -> int:
    """The first level-0 pixel that TiffSlide, which divides and cuts off, maps to `pixel` of the level."""
    location = math.ceil(pixel * downsample)
    return location if int(location / downsample) == pixel else location + 1


def _on_white(rgba: NDArray[np.uint8], *, premultiplied: bool) -> NDArray[np.uint8]:
    return rgba[..., :3] + (255 - rgba[..., 3:]) if premultiplied else composed(rgba, (255, 255, 255))


def _scale_tags(properties: Mapping[str, Any], path: Path) -> ScaleTags:
    power = number(properties.get("tiffslide.objective-power"))
    header = tiff_header(path)
    if header is not None and header.is_ome and header.tags.tag is not None:
        return replace(header.tags, objective_power=power)
    x, y = number(properties.get("tiffslide.mpp-x")), number(properties.get("tiffslide.mpp-y"))
    if x is None and y is None:
        return ScaleTags(objective_power=power)
    if "tiff.XResolution" in properties:
        return replace(resolution_scale(x, y), objective_power=power)
    return ScaleTags(
        mpp_x=x, mpp_y=y, tag="aperio.MPP" if "aperio.MPP" in properties else "tiffslide.mpp-x", objective_power=power
    )
