"""Where to read for what is wanted: pyramids, levels, windows. Pure, no pixels.

Positions are continuous level-0 coordinates in which pixel i covers [i, i + 1): a view with `scale` s and origin o has
its pixel (r, c) cover level-0 [o + r*s, o + (r+1)*s). That convention is exact to the half pixel at every scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import MppError, OptionError, ScaleError
from wsiscale.types import Calibration, Pyramid

# Scanners report 0.2498 for a nominal 0.25; a difference this small is not a resampling.
TOLERANCE = 0.01

# Float slack when comparing scales that went through a multiplication by mpp and back.
_EPSILON = 1e-6


@dataclass(frozen=True)
class View:
    """A rectangle of the slide at one scale: what is wanted."""

    y: float  # level-0 px, top edge
    x: float  # level-0 px, left edge
    height: int  # px of the view
    width: int
    scale: float  # level-0 px per px of the view


@dataclass(frozen=True)
class ReadPlan:
    """How to get a view: one window of one level, and where the view lies in it."""

    level: int
    y: int  # of the window, in the level's own pixels; may be negative or beyond: that is white
    x: int
    height: int
    width: int
    offset_y: float  # of the view's top edge, in window pixels
    offset_x: float
    factor: float  # window px per px of the view; 1 means that the window is the view
    out_height: int
    out_width: int

    @property
    def native(self) -> bool:
        """The window is the view: nothing is resampled."""
        return (
            self.factor == 1
            and self.offset_y == 0
            and self.offset_x == 0
            and (self.height, self.width) == (self.out_height, self.out_width)
        )


def nominal_downsamples(shapes: tuple[tuple[int, int], ...]) -> tuple[float, ...]:
    """Level-0 pixels per pixel of each level.

    Scanners halve exactly and round the size, so 4.0003 = 46000/11499 means 4. The integer is taken where it explains both
    sides to within a pixel; otherwise the mean ratio.
    """
    height, width = shapes[0]
    downsamples: list[float] = []
    for h, w in shapes:
        ratio = (height / h + width / w) / 2
        whole = round(ratio)
        explains = abs(height / whole - h) < 1 and abs(width / whole - w) < 1 if whole else False
        downsamples.append(float(whole) if explains else ratio)
    return tuple(downsamples)


def scale_for_mpp(mpp: float, slide_mpp: float | None, calibration: Calibration | None = None) -> float:
    """Level-0 pixels per pixel at `mpp`. Raises MppError where the slide's own µm/px is unknown or refused."""
    if not (math.isfinite(mpp) and mpp > 0):
        raise OptionError(f"{mpp:g} is not a magnification; give µm/px above 0")
    if slide_mpp is None:
        raise mpp_error(f"{mpp:g} µm/px was asked for", calibration)
    return mpp / slide_mpp


def mpp_error(asked: str, calibration: Calibration | None) -> MppError:
    """The error for work that needs the slide's µm/px where there is none to be believed."""
    way_out = "give it with --slide-mpp UM (mpp= in Python), or work in relative scale (--scale-range, --scale)"
    if calibration is not None and calibration.verdict == "refused":
        return MppError(
            f"{asked}, but the slide's µm/px is implausible: {calibration.detail}; {way_out}", code="MPP_IMPLAUSIBLE"
        )
    return MppError(f"{asked}, but the slide does not say its µm/px; {way_out}", code="MPP_MISSING")


def level_for(pyramid: Pyramid, scale: float, *, tolerance: float = TOLERANCE) -> int:
    """The coarsest level that is still as fine as `scale`, or level 0 where `scale` is finer than that.

    Averaging down from a finer level keeps the texture that a network reacts to; interpolating up from a coarser one
    would invent it.
    """
    fine_enough = [i for i, d in enumerate(pyramid.downsamples) if d <= scale * (1 + tolerance + _EPSILON)]
    return fine_enough[-1] if fine_enough else 0


def check_upsampling(pyramid: Pyramid, scale: float, *, max_upsample: float = 1.0, tolerance: float = TOLERANCE) -> bool:
    """Whether `scale` is finer than level 0. Raises ScaleError where it is finer by more than `max_upsample`."""
    if scale * (1 + tolerance + _EPSILON) >= 1:
        return False
    if scale * max_upsample * (1 + tolerance + _EPSILON) < 1:
        if pyramid.mpp is None:
            asked, there, least = f"scale {scale:.4g}", "level 0 (scale 1)", f"{1 / max_upsample:.4g}"
        else:
            asked, there = f"{scale * pyramid.mpp:.4g} µm/px", f"level 0, {pyramid.mpp:.4g} µm/px"
            least = f"{pyramid.mpp / max_upsample:.4g} µm/px"
        raise ScaleError(
            f"{asked} is finer than the slide's finest level, {there}; ask for {least} or more, "
            f"or allow upsampling with --max-upsample {1 / scale:.3g}"
        )
    return True


def snapped_scale(pyramid: Pyramid, scale: float, *, tolerance: float = TOLERANCE) -> float:
    """The scale of a level where `scale` is within `tolerance` of it, so that its pixels are taken as they are."""
    nearest = min(pyramid.downsamples, key=lambda d: abs(math.log(d / scale)))
    return nearest if abs(nearest / scale - 1) <= tolerance + _EPSILON else scale


def plan_read(pyramid: Pyramid, view: View, *, level: int | None = None) -> ReadPlan:
    """The window to read for `view`, with a margin of what the area kernel needs, from `level` or the best one."""
    source = level_for(pyramid, view.scale, tolerance=_EPSILON) if level is None else level
    downsample = pyramid.downsamples[source]
    factor = view.scale / downsample
    if abs(factor - 1) < _EPSILON:
        factor = 1.0
    # Upsampling interpolates between pixel centres, and so needs a pixel more on either side.
    margin = 0 if factor >= 1 else 1
    y0, y1, offset_y = _span(view.y / downsample, view.height * factor, margin)
    x0, x1, offset_x = _span(view.x / downsample, view.width * factor, margin)
    return ReadPlan(
        level=source,
        y=y0,
        x=x0,
        height=y1 - y0,
        width=x1 - x0,
        offset_y=offset_y,
        offset_x=offset_x,
        factor=factor,
        out_height=view.height,
        out_width=view.width,
    )


def _span(start: float, length: float, margin: int) -> tuple[int, int, float]:
    """Whole pixels covering [start, start + length), and where start lies in them."""
    first = math.floor(start + _EPSILON) - margin
    last = math.ceil(start + length - _EPSILON) + margin
    offset = start - first
    return first, last, 0.0 if abs(offset) < _EPSILON else offset


def centered_view(center: tuple[float, float], *, size: int, scale: float) -> View:
    """The square view of `size` px whose middle is `center`, level-0 (y, x)."""
    half = size * scale / 2
    return View(y=center[0] - half, x=center[1] - half, height=size, width=size, scale=scale)


def canvas_shape(pyramid: Pyramid, scale: float) -> tuple[int, int]:
    """(height, width) of the whole slide at `scale`."""
    height, width = pyramid.shape
    return max(1, math.ceil(height / scale - _EPSILON)), max(1, math.ceil(width / scale - _EPSILON))


def scale_grid(lo: float, hi: float, *, per_octave: int = 8) -> NDArray[np.float64]:
    """Scales from `lo` to `hi`, evenly spaced in log2, at least `per_octave` an octave; both ends included: (S,)."""
    if not (math.isfinite(lo) and math.isfinite(hi) and 0 < lo < hi):
        raise OptionError(f"a range of scales runs from low to high, above 0; got {lo:g}:{hi:g}")
    count = math.ceil(math.log2(hi / lo) * per_octave - _EPSILON) + 1
    return np.exp2(np.linspace(math.log2(lo), math.log2(hi), max(count, 2)))


def blocks(height: int, width: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """(y, x, height, width) of blocks of at most `size` px that cover the rectangle, in reading order."""
    for y in range(0, height, size):
        for x in range(0, width, size):
            yield y, x, min(size, height - y), min(size, width - x)
