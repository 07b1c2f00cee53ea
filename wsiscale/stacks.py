"""Reader x places x scales -> a lazy stack. Tasks carry coordinates; the worker that runs one opens the slide."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import OptionError
from wsiscale.geometry import centered_view, check_upsampling, level_for, plan_read, scale_for_mpp
from wsiscale.resample import resample_stack
from wsiscale.types import Reader, ScaleStack, Window, Windows
from wsiscale.views import read_view

# Of more px than this, 192 MB, no window is held: each view is then read by itself.
MAX_WINDOW = 64_000_000


def scale_stack(
    slide: Reader,
    places: NDArray[np.floating],
    *,
    mpps: Sequence[float] | NDArray[np.floating] | None = None,
    scales: Sequence[float] | NDArray[np.floating] | None = None,
    size: int = 224,
    max_upsample: float = 1.0,
    level: int | None = None,
) -> ScaleStack:
    """Tiles of `size` px around each place (level-0 (y, x)) at each of `mpps` µm/px, or of `scales` level-0 px per px.

    All scales of the stack come from one level through one kernel: mixing native levels would measure the scanner's filter.
    It is the coarsest that is as fine as the finest of the scales, or `level`.
    Nothing is read until the images are computed. Raises ScaleError where a scale is finer than level 0 allows.
    """
    if (mpps is None) == (scales is None):
        raise OptionError("a scale stack needs either mpps or scales")
    if size < 1:
        raise OptionError(f"tiles have at least 1 px a side, not {size}")
    pyramid = slide.pyramid
    if mpps is not None:
        wanted = np.array([scale_for_mpp(float(m), pyramid.mpp, slide.calibration) for m in mpps])
    else:
        wanted = np.asarray(scales, float)
    if wanted.ndim != 1 or len(wanted) == 0 or np.any(np.diff(wanted) <= 0) or not wanted[0] > 0:
        raise OptionError("scales are a list of different magnifications above 0, from fine to coarse")
    upsampled = np.array([check_upsampling(pyramid, s, max_upsample=max_upsample) for s in wanted])
    centers = np.asarray(places, float).reshape(-1, 2)
    level = level_for(pyramid, float(wanted[0])) if level is None else level
    shape = (len(wanted), size, size, 3)
    images = da.from_array(centers, chunks=(1, 2)).map_blocks(
        _read_places,
        slide=slide,
        scales=tuple(wanted.tolist()),
        size=size,
        level=level,
        dtype=np.uint8,
        drop_axis=1,
        new_axis=(1, 2, 3, 4),
        chunks=((1,) * len(centers), *((n,) for n in shape)),
        meta=np.empty((0, 0, 0, 0, 0), np.uint8),
    )
    return ScaleStack(
        images=images,
        scales=wanted,
        centers=centers,
        slide_mpp=pyramid.mpp,
        source_level=level,
        upsampled=upsampled,
        windows=Windows(images.name, partial(_window_of, slide, centers, tuple(wanted.tolist()), size, level)),
    )


def read_place(stack: ScaleStack, place: int) -> NDArray[np.uint8]:
    """One place of a stack at every scale, now and here, without dask's 10 ms: (S, H, W, 3)."""
    window = stack.window(place)
    if window is None:
        return np.asarray(stack.images[place].compute(scheduler="synchronous"))
    return resample_stack(window.plans, window.pixels, y=window.y, x=window.x)


def _window_of(
    slide: Reader, centers: NDArray[np.float64], scales: tuple[float, ...], size: int, level: int, place: int
) -> Window | None:
    y, x = centers[place].tolist()
    return _window(slide, (y, x), scales=scales, size=size, level=level)


def _read_places(
    centers: NDArray[np.float64], *, slide: Reader, scales: tuple[float, ...], size: int, level: int
) -> NDArray[np.uint8]:
    """(n, 2) centres -> (n, S, size, size, 3)."""
    return np.stack([_read_place(slide, (float(y), float(x)), scales=scales, size=size, level=level) for y, x in centers])


def _read_place(
    slide: Reader, center: tuple[float, float], *, scales: tuple[float, ...], size: int, level: int
) -> NDArray[np.uint8]:
    """One place at every scale: (S, size, size, 3). The widest view's window is read once and holds all others."""
    window = _window(slide, center, scales=scales, size=size, level=level)
    if window is None:
        views = (centered_view(center, size=size, scale=scale) for scale in scales)
        return np.stack([read_view(slide, view, level=level) for view in views])
    return resample_stack(window.plans, window.pixels, y=window.y, x=window.x)


def _window(slide: Reader, center: tuple[float, float], *, scales: tuple[float, ...], size: int, level: int) -> Window | None:
    """What one place's views are made from; None where it would be too large to hold."""
    views = [centered_view(center, size=size, scale=scale) for scale in scales]
    plans = tuple(plan_read(slide.pyramid, view, level=level) for view in views)
    top, left = min(p.y for p in plans), min(p.x for p in plans)
    bottom, right = max(p.y + p.height for p in plans), max(p.x + p.width for p in plans)
    if (bottom - top) * (right - left) > MAX_WINDOW:
        return None
    pixels = slide.read(level=level, y=top, x=left, height=bottom - top, width=right - left)
    return Window(pixels=pixels, plans=plans, y=top, x=left)
