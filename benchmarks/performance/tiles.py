"""W1: every 256 px tissue tile of a 0.25 µm/px slide at 0.5 and at 0.37 µm/px, in memory, mask and grid included."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import openslide
import tifffile
import tiffslide
from numpy.typing import NDArray

import wsiscale as ws
from wsiscale.places import tile_grid
from wsiscale.tissue import find_tissue
from wsiscale.types import TileGrid

SIZE = 256


def ways(path: Path, *, mpp: float, tiles: int | None) -> dict[str, Callable[[], int]]:
    """Name -> a function that makes the tiles and says how many. Mask and grid are given where the name says nothing else."""
    with ws.open_slide(path) as slide:
        grid = _first(tile_grid(find_tissue(slide), mpp=mpp, size=SIZE), tiles)
    ways: dict[str, Callable[[], int]] = {
        "limit: decode each JPEG tile once, area mean": lambda: _count(limit(path, grid)),
        "OpenSlide read_region, cv2 INTER_AREA": lambda: _count(by_openslide(path, grid)),
        "TiffSlide read_region, cv2 INTER_AREA": lambda: _count(by_tiffslide(path, grid)),
        "wsiscale, one thread": lambda: _count(ours(path, grid, threads=1)),
        "wsiscale, mask and grid too, one thread": lambda: _count(ours(path, None, threads=1, mpp=mpp, tiles=tiles)),
        "wsiscale, two threads": lambda: _count(ours(path, grid, threads=2)),
        "wsiscale, mask and grid too, two threads": lambda: _count(ours(path, None, threads=2, mpp=mpp, tiles=tiles)),
        "wsiscale, jpegtiff-fast, one thread": lambda: _count(ours(path, grid, threads=1, reader="jpegtiff-fast")),
    }
    if find_spec("cucim") is not None:
        ways["cuCIM read_region, cv2 INTER_AREA"] = lambda: _count(by_cucim(path, grid))
    if find_spec("lazyslide") is not None:
        ways["LazySlide, its own mask and grid"] = lambda: _count(by_lazyslide(path, mpp=mpp))
    return ways


def ours(
    path: Path, grid: TileGrid | None, *, threads: int, mpp: float = 0.5, tiles: int | None = None, reader: str = "auto"
) -> Iterator[NDArray[np.uint8]]:
    with ws.open_slide(path, reader=reader) as slide:
        if grid is None:
            grid = _first(tile_grid(find_tissue(slide), mpp=mpp, size=SIZE), tiles)
        for batch in ws.read_tiles(slide, grid, threads=threads):
            yield from batch


def limit(path: Path, grid: TileGrid) -> Iterator[NDArray[np.uint8]]:
    """What no exact reader can undercut: the JPEG tiles that the grid touches, each decoded once, and their area mean.

    At a whole factor the tiles come out right; else the area mean of so many pixels stands for the resampling.
    """
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offsets, sizes, side = page.dataoffsets, page.databytecounts, page.tilewidth
        across = math.ceil(page.imagewidth / side)
    descriptor = os.open(path, os.O_RDONLY)
    seen: set[int] = set()
    span = grid.size * grid.scale
    try:
        for y, x in grid.origins:
            rows = range(int(y) // side, math.ceil((y + span) / side))
            columns = range(int(x) // side, math.ceil((x + span) / side))
            tile = np.empty((grid.size, grid.size, 3), np.uint8)
            part = side * grid.size // round(span)
            for row in rows:
                for column in columns:
                    number = row * across + column
                    if number in seen or number >= len(offsets):
                        continue
                    seen.add(number)
                    decoded = imagecodecs.jpeg8_decode(os.pread(descriptor, sizes[number], offsets[number]))
                    small = cv2.resize(decoded, (part, part), interpolation=cv2.INTER_AREA)
                    top, left = (row - rows.start) * part, (column - columns.start) * part
                    place = tile[top : top + part, left : left + part]
                    place[:] = small[: place.shape[0], : place.shape[1]]
            yield tile
    finally:
        os.close(descriptor)


def by_openslide(path: Path, grid: TileGrid) -> Iterator[NDArray[np.uint8]]:
    side = round(grid.size * grid.scale)
    with openslide.OpenSlide(path) as slide:
        for y, x in grid.origins:
            region = np.asarray(slide.read_region((round(x), round(y)), 0, (side, side)))[..., :3]
            yield cv2.resize(np.ascontiguousarray(region), (grid.size, grid.size), interpolation=cv2.INTER_AREA)


def by_tiffslide(path: Path, grid: TileGrid) -> Iterator[NDArray[np.uint8]]:
    side = round(grid.size * grid.scale)
    with tiffslide.TiffSlide(path) as slide:
        for y, x in grid.origins:
            region = slide.read_region((round(x), round(y)), 0, (side, side), as_array=True, padding=False)
            yield cv2.resize(region, (grid.size, grid.size), interpolation=cv2.INTER_AREA)


def by_cucim(path: Path, grid: TileGrid) -> Iterator[NDArray[np.uint8]]:
    from cucim import CuImage

    side = round(grid.size * grid.scale)
    slide = CuImage(str(path))
    for y, x in grid.origins:
        region = np.asarray(slide.read_region((round(x), round(y)), (side, side), level=0))
        yield cv2.resize(region, (grid.size, grid.size), interpolation=cv2.INTER_AREA)


def by_lazyslide(path: Path, *, mpp: float) -> Iterator[NDArray[np.uint8]]:
    """The complete tool as its documentation has it, on its fastest reader here."""
    import lazyslide
    from wsidata import open_wsi

    slide = open_wsi(str(path), reader="tiffslide", store=None)
    lazyslide.pp.find_tissues(slide)
    lazyslide.pp.tile_tissues(slide, SIZE, mpp=mpp)
    for tile in slide.iter.tile_images("tiles"):
        yield np.asarray(tile.image)


def exactness(path: Path, *, mpp: float, tiles: int = 24) -> tuple[float, float]:
    """(mean, largest) absolute difference of our tiles to the exact area mean, in grey levels."""
    with ws.open_slide(path) as slide, openslide.OpenSlide(path) as raw:
        grid = tile_grid(find_tissue(slide), mpp=mpp, size=SIZE)
        inside = np.flatnonzero((grid.origins + (grid.size + 2) * grid.scale < slide.pyramid.shape).all(axis=1))
        picked = inside[np.linspace(0, len(inside) - 1, tiles).astype(int)]
        grid = replace(grid, origins=grid.origins[picked], tissue=grid.tissue[picked])
        off = []
        for (y, x), tile in zip(grid.origins, next(ws.read_tiles(slide, grid, batch=tiles)), strict=True):
            top, left = math.floor(y), math.floor(x)
            side = math.ceil(grid.size * grid.scale) + 2
            pixels = np.asarray(raw.read_region((left, top), 0, (side, side)))[..., :3]
            off.append(np.abs(tile - exact(pixels, (y - top, x - left), grid.scale, grid.size)))
    return float(np.mean(off)), float(np.max(off))


def exact(pixels: NDArray[np.uint8], start: tuple[float, float], scale: float, size: int) -> NDArray[np.float64]:
    """The area mean in float64, from differences of the integral image: (size, size, 3)."""
    integral = np.zeros((pixels.shape[0] + 1, pixels.shape[1] + 1, 3))
    integral[1:, 1:] = pixels.astype(np.float64).cumsum(axis=0).cumsum(axis=1)
    for axis in (0, 1):
        edges = start[axis] + np.arange(size + 1) * scale
        first = np.minimum(edges.astype(int), integral.shape[axis] - 2)
        share = np.expand_dims(edges - first, [i for i in range(3) if i != axis])
        integral = (1 - share) * integral.take(first, axis) + share * integral.take(first + 1, axis)
    means: NDArray[np.float64] = np.diff(np.diff(integral, axis=0), axis=1) / scale**2
    return means


def _first(grid: TileGrid, tiles: int | None) -> TileGrid:
    return grid if tiles is None else replace(grid, origins=grid.origins[:tiles], tissue=grid.tissue[:tiles])


def _count(tiles: Iterator[NDArray[np.uint8]]) -> int:
    return sum(1 for _ in tiles)
