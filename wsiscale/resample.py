"""One anti-aliased kernel, exact to the half pixel: the area mean, as sparse matrices along both axes.

A pixel of the result is the mean of the rectangle that it covers in the source, fractional edges weighted by their share.
That is what a sensor with larger pixels would have seen, has no free parameter and does not ring. Where a view is finer than
its source (upsampling has to be asked for), the kernel becomes linear interpolation between pixel centres.

The sums are scipy's sparse products, which take a fifth of a millisecond for a tile of 224 px; around them, OpenCV turns and
rounds, at a tenth of what numpy takes (docs/decisions/0007).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from wsiscale.geometry import ReadPlan
from wsiscale.timing import timed

if TYPE_CHECKING:
    from scipy import sparse

KERNEL = "area"  # how stores and reports name it

# Window px per px of a view beyond which a stack's view is averaged from halved windows.
_EXACT = 3.5
# How much narrower the box then is: of the variance that halving has added, so much is taken off again. 1 would keep the
# kernel's width; on real tissue 1.5 keeps the variance of the Laplacian within 5 % of the exact mean's.
_SHARPER = 1.5

# Elements that are turned to float32 at a time: near the cache, and few enough for memory that is handed out again.
_CHUNK = 400_000


@timed("resample")
def resample(plan: ReadPlan, window: NDArray[np.uint8], *, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """The planned view from its window: (out_height, out_width, 3); contiguous `out`, filled, if it is given."""
    if plan.native and out is None:
        return window
    view = np.empty((plan.out_height, plan.out_width, 3), np.uint8) if out is None else out
    whole = round(plan.factor)
    if plan.native:
        view[:] = window
    elif plan.factor == whole and window.shape[:2] == (whole * plan.out_height, whole * plan.out_width):
        # Halves are rounded up at a factor of 2, an eighth of a grey level on average.
        cv2.resize(window, (plan.out_width, plan.out_height), dst=view, interpolation=cv2.INTER_AREA)
    else:
        _resize(view, window, plan.factor, offset=(plan.offset_y, plan.offset_x), box=plan.factor)
    return view


@timed("resample")
def resample_stack(plans: Sequence[ReadPlan], window: NDArray[np.uint8], *, y: int, x: int) -> NDArray[np.uint8]:
    """Views of one size at several scales from one window of their common level: (S, H, W, 3).

    `y` and `x` are where the window lies in its level. Up to a factor of 3.5 a view is the exact area mean; beyond, it is
    averaged from 2 x 2 means of the window that are 1.75 to 3.5 times as fine as the view, by a box that is narrower by about
    what halving has blurred.
    """
    mips = [window]
    views = np.empty((len(plans), plans[0].out_height, plans[0].out_width, 3), np.uint8)
    for view, part in zip(views, parts(plans, window.shape[:2], y=y, x=x), strict=True):
        while len(mips) <= part.octave:
            mips.append(_halved_up(mips[-1]))
        mip = mips[part.octave][part.rows, part.columns]
        _resize(view, mip, part.factor, offset=part.offset, box=part.box, brighter=part.brighter)
    return views


@dataclass(frozen=True)
class Part:
    """What a view of a stack is averaged from: a part of the window, halved `octave` times, and how."""

    octave: int
    rows: slice  # px of the halved window
    columns: slice
    factor: float  # those px per px of the view
    offset: tuple[float, float]  # of the view, from the first of them
    shape: tuple[int, int]  # (height, width) of the view
    box: float  # px over which the mean is taken

    @property
    def brighter(self) -> float:
        """Grey levels that halving has added, since it rounds halves up."""
        return self.octave / 8

    @property
    def weights(self) -> tuple[sparse.csr_array, sparse.csr_array]:
        """Of the rows, (height, source rows), and of the columns; each row sums to 1."""
        heights = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        rows, columns = (
            _weights(source, target, self.factor, offset, self.box)
            for source, target, offset in zip(heights, self.shape, self.offset, strict=True)
        )
        return rows, columns


def parts(plans: Sequence[ReadPlan], shape: tuple[int, ...], *, y: int, x: int) -> Iterator[Part]:
    """How the views of a stack are made from one window of `shape` at (y, x) of their level."""
    for plan in plans:
        octave = max(0, math.ceil(math.log2(plan.factor / _EXACT)))
        step = 2**octave
        top, left = (plan.y + plan.offset_y - y) / step, (plan.x + plan.offset_x - x) / step
        factor = plan.factor / step
        first, last = _reach(top, plan.out_height * factor, -(-shape[0] // step), factor)
        begin, end = _reach(left, plan.out_width * factor, -(-shape[1] // step), factor)
        yield Part(
            octave=octave,
            rows=slice(first, last),
            columns=slice(begin, end),
            factor=factor,
            offset=(top - first, left - begin),
            shape=(plan.out_height, plan.out_width),
            box=factor if octave == 0 else math.sqrt(factor**2 - _SHARPER * (1 - 4.0**-octave)),
        )


@timed("resample")
def halve(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """2 x 2 means, halves to even; an odd last row or column is repeated.

    Rounding halves up would brighten every octave by an eighth of a grey level.
    """
    image = _evened(image)
    half = np.empty((image.shape[0] // 2, image.shape[1] // 2, 3), np.uint8)
    rows = max(1, _CHUNK // image[0].size)
    for start in range(0, len(half), rows):
        part = half[start : start + rows]
        whole = image[2 * start : 2 * (start + rows)].astype(np.float32)
        cv2.convertScaleAbs(cv2.resize(whole, part.shape[1::-1], interpolation=cv2.INTER_AREA), dst=part)
    return half


def _halved_up(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """2 x 2 means, halves up: an eighth of a grey level brighter, and seven times as fast."""
    image = _evened(image)
    return np.asarray(cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_AREA), np.uint8)


def _evened(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """With an odd last row or column twice."""
    odd = [(0, n % 2) for n in image.shape[:2]]
    return np.pad(image, [*odd, (0, 0)], mode="edge") if any(pad for _, pad in odd) else image


def _reach(start: float, length: float, available: int, factor: float) -> tuple[int, int]:
    margin = 0 if factor >= 1 else 1
    first = max(0, math.floor(start + 1e-9) - margin)
    return first, min(available, math.ceil(start + length - 1e-9) + margin)


def _resize(
    result: NDArray[np.uint8],
    image: NDArray[np.uint8],
    factor: float,
    *,
    offset: tuple[float, float],
    box: float,
    brighter: float = 0.0,
) -> None:
    """Fills (h, w, 3) from (H, W, 3): means over `box` px, `factor` px apart, from `offset` on, less `brighter`."""
    (height, width), shape = image.shape[:2], result.shape[:2]
    columns = _weights(width, shape[1], factor, offset[1], box)
    size = math.ceil(min(shape[0], _CHUNK / (3 * width * max(factor, 1))))  # rows of the result, at a time
    for start in range(0, shape[0], size):
        count = min(size, shape[0] - start)
        edge = offset[0] + start * factor
        first, last = _reach(edge, count * factor, height, factor)
        rows = _weights(last - first, count, factor, edge - first, box)
        down = rows @ image[first:last].astype(np.float32).reshape(last - first, width * 3)
        turned = cv2.transpose(down.reshape(count, width, 3)).reshape(width, count * 3)
        across = (columns @ turned).reshape(shape[1], count, 3)
        # Rounds to the nearest, halves to even.
        cv2.transpose(cv2.convertScaleAbs(across, beta=-brighter), dst=result[start : start + count])


@lru_cache(maxsize=512)
def _weights(source: int, target: int, factor: float, offset: float, box: float) -> sparse.csr_array:
    """(target, source) weights of the kernel along one axis; every row sums to 1."""
    # Here, since it takes a tenth of a second, and at a whole factor nobody needs it.
    from scipy import sparse

    centre = offset + (np.arange(target) + 0.5) * factor
    if factor >= 1:
        low, high = centre - box / 2, centre + box / 2
        taps = math.ceil(box) + 1
        index = np.floor(low + 1e-9).astype(np.int32)[:, None] + np.arange(taps, dtype=np.int32)  # (target, taps)
        weight = np.minimum(index + 1, high[:, None]) - np.maximum(index, low[:, None])
        np.clip(weight, 0, None, out=weight)
    else:
        taps = 2
        index = np.floor(centre - 0.5).astype(np.int32)[:, None] + np.arange(taps, dtype=np.int32)
        weight = 1 - np.abs(index + 0.5 - centre[:, None])
    weight /= weight.sum(axis=1, keepdims=True)
    np.clip(index, 0, source - 1, out=index)
    pointers = np.arange(0, taps * target + 1, taps, dtype=np.int32)
    return sparse.csr_array((weight.astype(np.float32).ravel(), index.ravel(), pointers), shape=(target, source))
