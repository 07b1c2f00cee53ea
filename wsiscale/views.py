"""Reader x view -> pixels, for any scale, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from wsiscale.geometry import View, plan_read
from wsiscale.resample import blocks, resample
from wsiscale.types import Reader, TileGrid

# A window larger than this is read and resampled piece by piece: 64 MP is 192 MB of pixels.
MAX_WINDOW = 64_000_000


def read_view(slide: Reader, view: View, *, level: int | None = None) -> NDArray[np.uint8]:
    """The pixels of `view`, white outside the slide: (height, width, 3). From `level`, or the best one."""
    plan = plan_read(slide.pyramid, view, level=level)
    if plan.height * plan.width <= MAX_WINDOW or view.height * view.width == 1:
        window = slide.read(level=plan.level, y=plan.y, x=plan.x, height=plan.height, width=plan.width)
        return resample(plan, window)
    pixels = np.empty((view.height, view.width, 3), np.uint8)
    size = max(1, math.floor(math.sqrt(MAX_WINDOW) / max(plan.factor, 1)) - 2)
    for y, x, height, width in blocks(view.height, view.width, min(size, max(view.height, view.width) - 1)):
        part = View(y=view.y + y * view.scale, x=view.x + x * view.scale, height=height, width=width, scale=view.scale)
        pixels[y : y + height, x : x + width] = read_view(slide, part, level=plan.level)
    return pixels


def read_tiles(slide: Reader, grid: TileGrid, *, batch: int = 64) -> Iterator[NDArray[np.uint8]]:
    """The tiles of `grid` in grid order, `batch` at a time: (B, size, size, 3); the last batch may be smaller."""
    for start in range(0, len(grid), batch):
        tiles = [
            read_view(slide, View(y=float(y), x=float(x), height=grid.size, width=grid.size, scale=grid.scale))
            for y, x in grid.origins[start : start + batch]
        ]
        yield np.stack(tiles)


def thumbnail(slide: Reader, *, step: float) -> NDArray[np.uint8]:
    """The whole slide at `step` level-0 pixels per pixel: (h, w, 3)."""
    height, width = slide.pyramid.shape
    view = View(y=0, x=0, height=math.ceil(height / step), width=math.ceil(width / step), scale=step)
    return read_view(slide, view)
