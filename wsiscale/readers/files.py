"""What the readers of slide files share: checks before native code sees the file, the lazy handle, windows, pickling."""

from __future__ import annotations

import math
import os
import re
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from wsiscale.calibration import calibrate
from wsiscale.errors import OptionError, SlideError
from wsiscale.geometry import nominal_downsamples
from wsiscale.readers.tiffcheck import check_size, check_tiff
from wsiscale.types import Calibration, Pyramid, ScaleTags, SlideSource

MAX_LEVELS = 64  # halving a side of 2**32 px takes 32, and "jpegtiff-fast" adds its own in between

# What pure Python parsers of image files raise on broken ones; none of them promises anything narrower.
BROKEN_FILE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    StopIteration,
    SyntaxError,  # of XML
    TypeError,
    ValueError,
    struct.error,
)

_WHITE = 255
_ASSOCIATED = 1  # TIFF's ExtraSamples: alpha that is multiplied into the colours; 2 is straight alpha
_ALPHA = ((1,), (2,))

_Handle = TypeVar("_Handle")


class FileReader(ABC, Generic[_Handle]):
    """A slide file, opened lazily and once per process. `close` lets go of the file; a later read opens it again.

    Pickles as what is known of the slide, never as a handle: unpickling touches no file, and gives the same reader each
    time while the process keeps it (the last 8 slides). Reads may come from several threads.
    """

    name: ClassVar[str]
    reads: int  # windows that were asked for
    _handle: _Handle | None
    _lock: threading.RLock
    _pid: int

    def __init__(self, path: str | os.PathLike[str], *, mpp: float | None = None) -> None:
        file = check_file(path)
        status = file.stat()
        source = SlideSource(
            name=file.name, path=str(file), size=status.st_size, mtime_ns=status.st_mtime_ns, vendor="", reader=self.name
        )
        self._prepare(source)
        try:
            scan = self._describe(self._opened())
            _check_shapes(file.name, scan.shapes)
        except BaseException:
            self.close()
            raise
        shapes = tuple(scan.shapes)
        self._calibration = calibrate(scan.tags, override=mpp)
        self._pyramid = Pyramid(
            shapes=shapes,
            downsamples=scan.downsamples or nominal_downsamples(shapes),
            mpp=self._calibration.mpp,
            bounds=_proper(scan.bounds, shapes[0]),
        )
        self._source = replace(source, vendor=scan.vendor)

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
        """Pixels of `level`, counted in that level's own pixels, white outside of the scan: (height, width, 3)."""
        check_window(self._pyramid, level=level, height=height, width=width, name=self._source.name)
        self._notice_fork()
        with self._lock:
            self.reads += 1
        top, left, bottom, right = self._scanned(level)
        y0, y1 = max(y, top), min(y + height, bottom)
        x0, x1 = max(x, left), min(x + width, right)
        pixels = np.empty((height, width, 3), np.uint8)
        if (y0, x0, y1, x1) != (y, x, y + height, x + width):
            pixels[:] = _WHITE
        if y0 < y1 and x0 < x1:
            self._read_into(pixels[y0 - y : y1 - y, x0 - x : x1 - x], level=level, y=y0, x=x0)
        return pixels

    def close(self) -> None:
        with self._lock:
            handle, self._handle = self._handle, None
            if handle is not None:
                self._release(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _remembered, (type(self), self._pyramid, self._calibration, self._source)

    @abstractmethod
    def _open(self, path: str) -> _Handle:
        """A handle of the slide. Raises SlideError."""

    @abstractmethod
    def _describe(self, handle: _Handle) -> Scan:
        """What the slide says of itself. Raises SlideError where it is no 8-bit RGB slide."""

    @abstractmethod
    def _read_into(self, pixels: NDArray[np.uint8], *, level: int, y: int, x: int) -> None:
        """Fills the (height, width, 3) `pixels` from a window that lies within the level. Raises SlideError."""

    def _release(self, handle: _Handle) -> None:
        """Most handles close when nothing refers to them any more."""

    def _prepare(self, source: SlideSource) -> None:
        self._source = source
        self._handle = None
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self.reads = 0

    def _opened(self) -> _Handle:
        self._notice_fork()
        with self._lock:
            handle = self._handle
            if handle is None:
                handle = self._handle = self._open(str(self._source.path))
            return handle

    def _notice_fork(self) -> None:
        if self._pid != os.getpid():
            # The parent's handle shares its position in the file, and its lock may be held for ever.
            self._lock, self._handle, self._pid = threading.RLock(), None, os.getpid()

    def _scanned(self, level: int) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) of the pixels of `level` that show any of the scan."""
        height, width = self._pyramid.shapes[level]
        if self._pyramid.bounds is None:
            return 0, 0, height, width
        downsample = self._pyramid.downsamples[level]
        y, x, bounds_height, bounds_width = self._pyramid.bounds
        bottom, right = math.ceil((y + bounds_height) / downsample), math.ceil((x + bounds_width) / downsample)
        return math.floor(y / downsample), math.floor(x / downsample), min(height, bottom), min(width, right)

    def _failed(self, error: BaseException, *, level: int, y: int, x: int, shape: Sequence[int]) -> SlideError:
        return SlideError(
            f"{self._source.name}: {self.name} cannot read level {level}, {shape[0]} x {shape[1]} px at (y, x) = ({y}, {x}): "
            f"{one_line(error)}; the file may be truncated or damaged, copy it again",
            code="READ_FAILED",
        )


@dataclass(frozen=True)
class Scan:
    """What a reader finds in a file when it opens it."""

    shapes: Sequence[tuple[int, int]]  # (height, width) of each level, finest first
    tags: ScaleTags
    vendor: str
    bounds: tuple[int, int, int, int] | None = None  # (y, x, height, width) in level-0 px
    downsamples: tuple[float, ...] = ()  # of each level where they are known better than from its rounded shape


@dataclass(frozen=True)
class TiffHeader:
    """What tifffile says of a TIFF before native code opens it."""

    compression: int  # of level 0
    premultiplied: bool  # by its alpha
    is_ome: bool
    tags: ScaleTags  # from OME-XML, or else from the resolution tags


def check_file(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a slide. Raises SlideError where nothing readable is there."""
    file = Path(path).absolute()
    if not file.exists():
        raise SlideError(f"{file} does not exist; check the path", code="NOT_FOUND")
    if file.is_file() and file.stat().st_size == 0:
        raise SlideError(f"{file.name} is empty (0 bytes); copy it again", code="EMPTY")
    return file


def check_window(pyramid: Pyramid, *, level: int, height: int, width: int, name: str) -> None:
    """Raises SlideError for a level that the slide does not have, OptionError for a negative size."""
    if not 0 <= level < len(pyramid.shapes):
        raise SlideError(f"{name} has no level {level}; it has levels 0 to {len(pyramid.shapes) - 1}", code="NO_SUCH_LEVEL")
    if height < 0 or width < 0:
        raise OptionError(f"a window of {height} x {width} px makes no sense; give a height and a width of 0 or more")


def _check_shapes(name: str, shapes: Sequence[tuple[int, int]]) -> None:
    if not 0 < len(shapes) <= MAX_LEVELS:
        raise SlideError(
            f"{name} has {len(shapes)} levels, and a slide has 1 to {MAX_LEVELS}; its header is damaged or hostile",
            code="TOO_LARGE" if shapes else None,
        )
    for number, (height, width) in enumerate(shapes):
        if height < 1 or width < 1:
            raise SlideError(f"{name} has a level {number} of {height} x {width} px; its header is damaged, copy it again")
        check_size(name, height, width)


def tiff_header(file: Path) -> TiffHeader | None:
    """What a TIFF says of itself, None for any other file.

    Raises SlideError for what native code must not see or would silently destroy: what `check_tiff` refuses, broken
    headers, and pixels that are not 8-bit RGB (16-bit gray comes back with 16 grey values).
    """
    import tifffile  # here, because it takes longer to import than all of the package

    try:
        if not check_tiff(file):
            return None
    except OSError as error:
        raise SlideError(f"{file.name} cannot be read: {one_line(error)}; check its permissions", code="READ_FAILED") from error
    try:
        with tifffile.TiffFile(file) as tiff:
            first = tiff.pages[0]
            samples, extra = first.samplesperpixel, tuple(first.extrasamples)
            kind = f"{first.dtype} {first.photometric.name} with {samples} samples a pixel"
            colors = samples == 3 or (samples == 4 and extra in _ALPHA)
            rgb = first.dtype == np.uint8 and first.photometric.name in ("RGB", "YCBCR") and colors
            header = TiffHeader(
                compression=int(first.compression),
                premultiplied=extra == (_ASSOCIATED,),
                is_ome=bool(tiff.is_ome),
                tags=_ome_tags(tiff.ome_metadata) if tiff.is_ome else _resolution_tags(first.tags),
            )
    except BROKEN_FILE as error:
        raise SlideError(f"{file.name} has a broken TIFF header ({one_line(error)}); copy it again") from error
    if not rgb:
        raise SlideError(
            f"{file.name} holds {kind}, and a slide here is 8-bit RGB; convert it on purpose, choosing channels and range",
            code="NOT_RGB8",
        )
    return header


def composed(rgba: NDArray[np.uint8], background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """(H, W, 4) straight alpha on an opaque background: (H, W, 3)."""
    alpha = rgba[..., 3:]
    if (alpha == 255).all():
        return rgba[..., :3]
    weight = alpha.astype(np.uint32)
    mixed = rgba[..., :3] * weight + np.array(background, np.uint32) * (255 - weight)
    return ((mixed + 127) // 255).astype(np.uint8)


def number(text: object) -> float | None:
    """A float from a metadata value, None where there is none to read."""
    try:
        return float(str(text))
    except ValueError:
        return None


def stated_bounds(properties: Mapping[str, Any], prefix: str) -> tuple[int, int, int, int] | None:
    """(y, x, height, width) of the scan in level-0 px, from OpenSlide's or TiffSlide's properties; None where not said."""
    values = [number(properties.get(f"{prefix}-{side}")) for side in ("y", "x", "height", "width")]
    y, x, height, width = (None if value is None or not math.isfinite(value) else int(value) for value in values)
    return None if y is None or x is None or height is None or width is None else (y, x, height, width)


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__


_MICROMETERS = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "in": 25_400.0}
_DOTS_PER_UNIT = {"INCH": 25_400.0, "CENTIMETER": 1e4, "MILLIMETER": 1e3, "MICROMETER": 1.0}  # µm


def _ome_tags(xml: str) -> ScaleTags:
    # Only one element's attributes are wanted, and a pattern cannot be made to expand entities as a parser can.
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", xml)
    attributes = dict(re.findall(r'(\w+)\s*=\s*"([^"]*)"', pixels[0])) if pixels else {}

    def size(axis: str) -> float | None:
        value = number(attributes.get(f"PhysicalSize{axis}"))
        unit = _MICROMETERS.get(attributes.get(f"PhysicalSize{axis}Unit", "µm"))
        return None if value is None or unit is None else value * unit

    x, y = size("X"), size("Y")
    return ScaleTags() if x is None and y is None else ScaleTags(mpp_x=x, mpp_y=y, tag="ome.PhysicalSizeX")


def _resolution_tags(tags: Any) -> ScaleTags:
    """From the TIFF tags XResolution, YResolution and ResolutionUnit."""
    unit = tags.valueof("ResolutionUnit")
    micrometers = _DOTS_PER_UNIT.get(getattr(unit, "name", ""))
    if micrometers is None:
        return ScaleTags()
    mpps = []
    for axis in "XY":
        dots, per = tags.valueof(f"{axis}Resolution", (0, 0))
        mpps.append(micrometers * per / dots if dots else None)  # 0 dots is how some writers say nothing
    x, y = mpps
    if x is None and y is None:
        return ScaleTags()
    return resolution_scale(x, y)


def resolution_scale(mpp_x: float | None, mpp_y: float | None) -> ScaleTags:
    """The scale tags of a µm/px that comes from the TIFF resolution tag, and so may be a default in dots per inch."""
    dpi = 25_400 / mpp_x if mpp_x else None
    return ScaleTags(mpp_x=mpp_x, mpp_y=mpp_y, tag="tiff.XResolution", resolution_dpi=dpi)


def _proper(bounds: tuple[int, int, int, int] | None, shape: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """`bounds` where they lie within the canvas and do not cover all of it, else None."""
    if bounds is None:
        return None
    y, x = max(bounds[0], 0), max(bounds[1], 0)
    height, width = min(bounds[0] + bounds[2], shape[0]) - y, min(bounds[1] + bounds[3], shape[1]) - x
    return (y, x, height, width) if height > 0 and width > 0 and (height, width) != shape else None


_remembering = threading.Lock()


def _remembered(
    kind: type[FileReader[Any]], pyramid: Pyramid, calibration: Calibration, source: SlideSource
) -> FileReader[Any]:
    with _remembering:
        return _reader(kind, pyramid, calibration, source)


@lru_cache(maxsize=8)
def _reader(kind: type[FileReader[Any]], pyramid: Pyramid, calibration: Calibration, source: SlideSource) -> FileReader[Any]:
    reader = kind.__new__(kind)
    reader._prepare(source)
    reader._pyramid, reader._calibration = pyramid, calibration
    return reader
