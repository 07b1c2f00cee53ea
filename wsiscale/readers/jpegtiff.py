"""Tiled TIFF slides read tile by tile: compressed bytes straight from the file, each decoded once, no canvas in between.

Most scanners' files are TIFF with plain grids of JPEG or JPEG 2000 tiles. What such a file says of itself (levels, scale,
vendor) is left to the compatibility readers, OpenSlide or TiffSlide; this one only fetches their pixels, at about a quarter of
OpenSlide's cost. Files that are not of this kind it refuses, and `open_slide` stays with the compatibility reader.

`JpegTiffFastReader` has more levels than the file: JPEG tiles decoded at a half, a quarter and an eighth of their size, where
libjpeg leaves out the fine part of each block's transform instead of averaging pixels. That takes about half the time, and is
not the same picture: some grey levels off, and sharper than a mean.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from wsiscale.errors import SlideError
from wsiscale.geometry import nominal_downsamples
from wsiscale.readers.files import BROKEN_FILE, FileReader, Scan, one_line, tiff_header
from wsiscale.readers.tiffcheck import CODECS, check_frame
from wsiscale.timing import timed

# Decoded tiles that are kept: two rows of the widest level, so that a grid that cuts them decodes each once; no more bytes than
CACHE = 64_000_000
WHOLE = 12_000_000  # bytes of tiles that a window has used whole, and only windows that overlap it ask for again

_JPEG = 7  # TIFF's number for it
_REDUCED = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
_END = b"\xff\xd9"  # of a JPEG
# An APP14 segment by which libjpeg knows that three components are red, green and blue.
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"

# Vendors whose levels are plain grids of tiles without overlap.
PLAIN = ("aperio", "generic-tiff")


class JpegTiffReader(FileReader["_Tiff"]):
    """A tiled TIFF, its tiles decoded by libjpeg-turbo and its kin. Reads may come from several threads at once."""

    name = "jpegtiff"
    _reduced: ClassVar[tuple[int, ...]] = ()  # by how much JPEG tiles are decoded coarser, for further levels

    def _open(self, path: str) -> _Tiff:
        if not hasattr(os, "pread"):
            raise SlideError(f"{self._source.name}: jpegtiff needs os.pread, which this system lacks; leave the reader to auto")
        if tiff_header(Path(path)) is None:
            raise SlideError(f"{self._source.name}: jpegtiff does not open it (not a TIFF file); leave the reader to auto")
        try:
            return _Tiff(path, reduced=self._reduced)
        except BROKEN_FILE as error:
            raise SlideError(f"{self._source.name}: jpegtiff does not open it ({one_line(error)})") from error

    def _describe(self, handle: _Tiff) -> Scan:
        scan = described(Path(str(self._source.path)))
        if scan.vendor not in PLAIN:
            raise SlideError(f"{self._source.name}: {scan.vendor} slides are not one plain grid of tiles a level")
        for number, shape in enumerate(scan.shapes):
            grid = handle.grids.get(shape)
            if grid is None:
                raise SlideError(f"{self._source.name}: level {number} is not stored as plain 8-bit RGB tiles")
            if number and not grid.sizes.all():
                # OpenSlide makes a tile that is missing from a coarser level of the finer one.
                raise SlideError(f"{self._source.name}: level {number} lacks tiles")
        return scan

    def _read_into(self, pixels: NDArray[np.uint8], *, level: int, y: int, x: int) -> None:
        handle = self._opened()
        grid = handle.grids[self._pyramid.shapes[level]]
        height, width = pixels.shape[:2]
        for number, top, left in grid.touching(y, x, height, width):
            y0, x0 = max(y, top), max(x, left)
            y1, x1 = min(y + height, top + grid.tile[0]), min(x + width, left + grid.tile[1])
            try:
                tile = handle.tile(grid, number, whole=(y1 - y0, x1 - x0) == grid.tile)
            except BROKEN_FILE as error:
                raise self._failed(error, level=level, y=top, x=left, shape=grid.tile) from error
            part = pixels[y0 - y : y1 - y, x0 - x : x1 - x]
            part[:] = 255 if tile is None else tile[y0 - top : y1 - top, x0 - left : x1 - left]


class JpegTiffFastReader(JpegTiffReader):
    """The same with levels in between that are decoded coarser: see the module."""

    name = "jpegtiff-fast"
    _reduced = (2, 4, 8)

    def _describe(self, handle: _Tiff) -> Scan:
        scan = super()._describe(handle)
        downsamples = nominal_downsamples(tuple(scan.shapes))
        levels = dict(zip(downsamples, scan.shapes, strict=True))
        for (finer, shape), coarser in zip(list(levels.items()), (*downsamples[1:], math.inf), strict=True):
            for factor in self._reduced:
                grid = handle.grids.get(_divided(shape, factor))
                if grid is not None and grid.reduced == factor and finer * factor < 0.9 * coarser:
                    levels[finer * factor] = _divided(shape, factor)
        if len(levels) == len(scan.shapes):
            raise SlideError(f"{self._source.name}: no level is stored as JPEG tiles, which alone decode coarser; use jpegtiff")
        downsamples = tuple(sorted(levels))
        return replace(scan, shapes=[levels[d] for d in downsamples], downsamples=downsamples)


def described(file: Path) -> Scan:
    """What the compatibility readers say of a TIFF. Raises SlideError where neither opens it."""
    from wsiscale.readers import compatible

    with compatible(file) as reader:
        return reader._describe(reader._opened())


@dataclass(frozen=True)
class _Grid:
    """The tiles of one level."""

    decode: Callable[..., Any]  # tifffile's: bytes, number, jpegtables -> (1, h, w, 3)
    tables: bytes | None  # JPEG tables that its tiles share
    tile: tuple[int, int]  # (height, width)
    across: int  # tiles in a row
    offsets: NDArray[np.int64]  # (tiles,) in the file
    sizes: NDArray[np.int64]  # (tiles,) bytes; 0 for one that was not scanned
    first: int  # of its tiles, among all of the file
    jpeg: bool
    compression: int
    reduced: int = 1  # how much coarser than in the file they are decoded

    def touching(self, y: int, x: int, height: int, width: int) -> Iterator[tuple[int, int, int]]:
        """(number, top, left) of the tiles under a window."""
        tile_height, tile_width = self.tile
        rows = range(y // tile_height, (y + height - 1) // tile_height + 1)
        columns = range(x // tile_width, (x + width - 1) // tile_width + 1)
        for row, column in itertools.product(rows, columns):
            yield row * self.across + column, row * tile_height, column * tile_width


class _Tiff:
    """The open file, where its tiles are, and the last ones decoded."""

    def __init__(self, path: str, *, reduced: Sequence[int] = ()) -> None:
        self.grids: dict[tuple[int, int], _Grid] = {}
        ambiguous: set[tuple[int, int]] = set()
        decoders: dict[tuple[tuple[int, int], int], Callable[..., Any]] = {}
        first = 0
        with tifffile.TiffFile(path) as tiff:
            for page in _pages(tiff):
                shape = (int(page.imagelength), int(page.imagewidth))
                if not _is_plain(page):
                    continue
                if shape in self.grids:
                    ambiguous.add(shape)  # focal planes, channels, or two regions: not for here to choose
                page.nodata = 255
                self.grids[shape] = _Grid(
                    decode=page.decode,
                    tables=page.jpegtables,
                    tile=(int(page.tilelength), int(page.tilewidth)),
                    across=-(-shape[1] // int(page.tilewidth)),
                    offsets=np.array(page.dataoffsets, np.int64),
                    sizes=np.array(page.databytecounts, np.int64),
                    first=first,
                    jpeg=int(page.compression) == _JPEG,
                    compression=int(page.compression),
                )
                first += len(page.dataoffsets)
                if self.grids[shape].jpeg and all(side % 8 == 0 for side in self.grids[shape].tile):
                    rgb = page.photometric.name == "RGB" and not page.is_jfif
                    decoders |= {(shape, factor): partial(_decoded_coarser, factor=factor, rgb=rgb) for factor in reduced}
        for shape in ambiguous:
            del self.grids[shape]
        for (shape, factor), decode in sorted(decoders.items(), key=lambda item: item[0][1]):  # the least reduced first
            grid = self.grids.get(shape)
            if grid is not None and _divided(shape, factor) not in self.grids:
                self.grids[_divided(shape, factor)] = replace(
                    grid, decode=decode, tile=_divided(grid.tile, factor), first=first, reduced=factor
                )
                first += len(grid.sizes)
        rows = (2.2 * grid.across * grid.tile[0] * grid.tile[1] * 3 for grid in self.grids.values())
        self._cut = _Recent(min(CACHE, round(max(rows, default=0))))
        self._whole = _Recent(WHOLE)
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))

    def tile(self, grid: _Grid, number: int, *, whole: bool) -> NDArray[np.uint8] | None:
        """A tile's pixels (h, w, 3), None where the file has none; `whole` if all of it is used. Raises what decoders raise."""
        size = int(grid.sizes[number])
        if size == 0:
            return None
        key = grid.first + number
        pixels = self._cut.get(key)
        if pixels is None:
            pixels = self._whole.get(key)
        if pixels is None:
            with timed("read"):
                data = os.pread(self._file, size, int(grid.offsets[number]))
            if len(data) < size:
                raise EOFError(f"the file ends {size - len(data)} bytes before the tile does")
            if grid.jpeg and _END not in data[-64:]:
                raise EOFError("its JPEG data ends early")  # of which libjpeg would make a tile that is grey from there on
            height, width = (side * grid.reduced for side in grid.tile)
            check_frame(data, height, width, compression=grid.compression)
            with timed("decode"):
                decoded, *_ = grid.decode(data, number, jpegtables=grid.tables)
            pixels = decoded[0] if decoded.shape[1:3] == grid.tile else _padded(decoded[0], grid.tile)
            (self._whole if whole else self._cut).put(key, pixels)
        return pixels

    def __del__(self) -> None:
        # Not when the reader is closed, since another thread may be reading: when the last of them has let go.
        file = getattr(self, "_file", None)
        if file is not None:
            os.close(file)


class _Recent:
    """Arrays by number, the least recently used forgotten beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._arrays: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: int) -> NDArray[np.uint8] | None:
        with self._lock:
            array = self._arrays.get(key)
            if array is not None:
                self._arrays.move_to_end(key)
            return array

    def put(self, key: int, array: NDArray[np.uint8]) -> None:
        with self._lock:
            if key in self._arrays:  # another thread was as fast
                return
            self._arrays[key] = array
            self._held += array.nbytes
            while self._held > self._limit:
                _, old = self._arrays.popitem(last=False)
                self._held -= old.nbytes


def _decoded_coarser(data: bytes, number: int, *, jpegtables: bytes | None, factor: int, rgb: bool) -> tuple[Any, int, Any]:
    """A JPEG tile at 1 / `factor` of its size, as tifffile's decoders give it: (1, h, w, 3), number, shape."""
    tables = b"" if jpegtables is None else jpegtables[2:-2]  # without their own start and end
    whole = data[:2] + (_ADOBE_RGB if rgb else b"") + tables + data[2:]
    # Where colour is halved in one direction alone, libjpeg would leave it at half of the coarser resolution, too.
    mean = 1 if _is_evenly_subsampled(data) else 2
    pixels = cv2.imdecode(np.frombuffer(whole, np.uint8), _REDUCED[factor // mean] | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise ValueError("it is no JPEG that OpenCV decodes")
    if mean > 1:
        pixels = cv2.resize(pixels, (pixels.shape[1] // mean, pixels.shape[0] // mean), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)[None], number, (1, *pixels.shape)


def _is_evenly_subsampled(jpeg: bytes) -> bool:
    """Whether a JPEG's first component is as much finer than the others across as it is down."""
    at = 2
    while jpeg[at + 1] not in (0xC0, 0xC1, 0xC2):  # the start of the frame, after other segments
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    across, down = divmod(jpeg[at + 11], 16)
    return across == down


def _divided(shape: tuple[int, int], factor: int) -> tuple[int, int]:
    return -(-shape[0] // factor), -(-shape[1] // factor)


def _pages(tiff: tifffile.TiffFile) -> Iterator[Any]:
    for page in tiff.pages:
        full = page.aspage()
        yield full
        for sub in full.pages or ():
            yield sub.aspage()


def _is_plain(page: Any) -> bool:
    """Whether a page is a grid of 8-bit RGB tiles of a known codec."""
    return (
        page.is_tiled
        and page.samplesperpixel == 3
        and page.dtype == np.uint8
        and page.planarconfig == 1
        and page.imagedepth == page.tiledepth == 1
        and page.photometric.name in ("RGB", "YCBCR")
        and int(page.compression) in CODECS
    )


def _padded(pixels: NDArray[np.uint8], tile: tuple[int, int]) -> NDArray[np.uint8]:
    """A tile that was stored cut at the image's edge, whole again."""
    whole = np.full((*tile, 3), 255, np.uint8)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return whole
