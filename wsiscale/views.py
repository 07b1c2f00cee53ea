"""Reader x view -> pixels, for any scale, in bounded memory."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import SlideError
from wsiscale.geometry import View, blocks, plan_read
from wsiscale.resample import resample
from wsiscale.types import Reader, TileGrid

log = logging.getLogger(__name__)

# A window of more px than this is read and resampled piece by piece: 24 MB of pixels.
MAX_WINDOW = 8_000_000

# Tiles that a thread reads one after another: handing each over by itself would cost a fifth of what reading it does.
_RUN = 8

# Of a thumbnail of a damaged slide.
_LARGEST_PIECE, _PIECE = 128, 8  # px a side that are read at once: halved around the damage, so that little is lost with it
MOST_UNREAD = 0.1  # of it


def read_view(
    slide: Reader, view: View, *, level: int | None = None, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """The pixels of `view`, white outside the slide: (height, width, 3), in contiguous `out` if it is given.

    From `level`, or the best one.
    """
    plan = plan_read(slide.pyramid, view, level=level)
    if plan.height * plan.width <= MAX_WINDOW or view.height * view.width == 1:
        window = slide.read(level=plan.level, y=plan.y, x=plan.x, height=plan.height, width=plan.width)
        return resample(plan, window, out=out)
    pixels = np.empty((view.height, view.width, 3), np.uint8) if out is None else out
    size = max(1, math.floor(math.sqrt(MAX_WINDOW) / max(plan.factor, 1)) - 2)
    for y, x, height, width in blocks(view.height, view.width, min(size, max(view.height, view.width) - 1)):
        part = View(y=view.y + y * view.scale, x=view.x + x * view.scale, height=height, width=width, scale=view.scale)
        pixels[y : y + height, x : x + width] = read_view(slide, part, level=plan.level)
    return pixels


def read_tiles(slide: Reader, grid: TileGrid, *, batch: int = 16, threads: int | None = None) -> Iterator[NDArray[np.uint8]]:
    """The tiles of `grid` in grid order, `batch` at a time: (B, size, size, 3); the last batch may be smaller.

    `threads` (None: one a core that this process may use) read ahead, some `2 * 8` tiles each, and at least two batches: memory
    does not grow with the slide. Batches of a few MB stay in the processor's cache, larger ones cost a tenth more.
    """
    threads = cores() if threads is None else threads
    batches = max(2, math.ceil(2 * threads * _RUN / batch))  # ahead

    def read(into: NDArray[np.uint8], start: int) -> None:
        for tile, (y, x) in zip(into, grid.origins[start : start + len(into)].tolist(), strict=True):
            read_view(slide, View(y=y, x=x, height=grid.size, width=grid.size, scale=grid.scale), out=tile)

    with ThreadPoolExecutor(threads, thread_name_prefix="tiles") as pool:

        def submitted(start: int) -> tuple[NDArray[np.uint8], list[Future[None]]]:
            tiles = np.empty((min(batch, len(grid) - start), grid.size, grid.size, 3), np.uint8)
            return tiles, [pool.submit(read, tiles[n : n + _RUN], start + n) for n in range(0, len(tiles), _RUN)]

        starts = iter(range(0, len(grid), batch))
        ahead = deque(submitted(start) for start in itertools.islice(starts, batches))
        try:
            while ahead:
                tiles, runs = ahead.popleft()
                for run in runs:
                    run.result()
                ahead.extend(submitted(start) for start in itertools.islice(starts, 1))
                yield tiles
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thumbnail(slide: Reader, *, step: float) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The whole slide at `step` level-0 pixels per pixel, (h, w, 3), and where it could not be read, (h, w).

    Where a level is damaged a finer one is read; what none has is white. Raises SlideError where that is more than a tenth.
    """
    height, width = slide.pyramid.shape
    view = View(y=0, x=0, height=math.ceil(height / step), width=math.ceil(width / step), scale=step)
    unread = np.zeros((view.height, view.width), bool)
    try:
        return read_view(slide, view), unread
    except SlideError as error:
        if error.code != "READ_FAILED":
            raise
        damage = error
    log.warning("%s; looking at it piece by piece", damage)
    pixels = np.full((view.height, view.width, 3), 255, np.uint8)
    best = plan_read(slide.pyramid, view).level

    def fill(y: int, x: int, height: int, width: int, levels: Sequence[int]) -> bool:
        part = View(y=y * step, x=x * step, height=height, width=width, scale=step)
        for level in levels:
            with suppress(SlideError):
                pixels[y : y + height, x : x + width] = read_view(slide, part, level=level)
                return True
        return False

    waiting = list(blocks(view.height, view.width, _LARGEST_PIECE))
    while waiting:
        y, x, height, width = piece = waiting.pop()
        if max(height, width) <= _PIECE:
            if not fill(*piece, range(best, -1, -1)):
                unread[y : y + height, x : x + width] = True
                if unread.mean() > MOST_UNREAD:
                    raise damage
        elif not fill(*piece, [best]):
            half = max(height, width) // 2
            waiting += [(y + dy, x + dx, h, w) for dy, dx, h, w in blocks(height, width, half)]
    return pixels, unread
