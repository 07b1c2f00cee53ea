"""How cost grows: with tiles, scales, places, slide area and threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

import wsiscale as ws
from benchmarks.performance import slides, stacks, tiles, writing
from benchmarks.performance.measure import Cost, interleaved
from wsiscale.places import tile_grid
from wsiscale.stacks import read_place
from wsiscale.tissue import find_tissue

COUNTS = {"tiles": (45, 90, 180, 360, 720), "scales": (3, 6, 12, 24, 48), "places": (4, 8, 16, 32, 64), "threads": (1, 2, 4, 8)}
SIDES = (4_000, slides.SMALL, slides.LARGE, slides.HUGE)  # px


def grown(path: Path, *, rounds: int, cores: int) -> dict[str, dict[int, list[Cost]]]:
    """What grows -> how much of it there was -> costs, of one thing each."""
    with ws.open_slide(path) as slide:
        grid = tile_grid(find_tissue(slide), mpp=0.5, size=tiles.SIZE)
    centres = stacks.places(path, max(COUNTS["places"]))

    def some_tiles(count: int, threads: int = 1) -> int:
        part = replace(grid, origins=grid.origins[:count], tissue=grid.tissue[:count])
        return sum(1 for _ in tiles.ours(path, part, threads=threads))

    def some_places(count: int, scales: int) -> int:
        some = centres[:count]
        with ws.open_slide(path) as slide:
            stack = ws.scale_stack(slide, some, scales=2.0 ** (np.arange(scales) * 3 / scales), size=stacks.SIZE)
            for place in range(len(some)):
                read_place(stack, place)
        return len(some)

    of: dict[str, Callable[[int], Callable[[], int]]] = {
        "tiles": lambda n: lambda: some_tiles(n),
        "scales": lambda n: lambda: some_places(16, n),
        "places": lambda n: lambda: some_places(n, 24),
        "threads": lambda n: lambda: some_tiles(360, n),
    }
    return {
        what: _by_number(interleaved({str(n): way(n) for n in COUNTS[what] if what != "threads" or n <= cores}, rounds=rounds))
        for what, way in of.items()
    }


def areas(cache: Path, data: Path | None) -> dict[int, writing.Written]:
    """Side of a slide in px -> what writing it at 0.5 µm/px cost, once."""
    return {
        side: writing.written("wsiscale tile", slides.slide(cache, side, data=data), cache / "out.zarr", 0.5) for side in SIDES
    }


def _by_number(found: dict[str, list[Cost]]) -> dict[int, list[Cost]]:
    return {int(name): costs for name, costs in found.items()}
