"""The slides that are timed: ten pieces of H&E, turned and mirrored, inside a smooth half of a canvas of real size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from wsiscale.testing.procedural import random_stain, tissue
from wsiscale.testing.slides import write_svs

BLOCK = 512  # px
BLOCKS = 10
MPP = 0.25
SMALL, LARGE, HUGE = 8_000, 20_000, 35_840  # px on a side: 64, 400 and 1,280 MP
QUALITY = 85


def slide(folder: Path, side: int, *, data: Path | None = None) -> Path:
    """An Aperio SVS of `side` x `side` px, made once: 256 px JPEG tiles, 4:2:0, levels 1, 4 and 16.

    Its blocks are of the CMU-1-Small-Region slide where `data` holds it, else procedural.
    """
    source = None if data is None else data / "slides" / "CMU-1-Small-Region.svs"
    real = source is not None and source.exists()
    path = folder / f"{'real' if real else 'procedural'}-{side}.svs"
    if not path.exists():
        rng = np.random.default_rng(0)
        blocks, glass = _real(source, rng) if real and source is not None else _procedural()
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        write_svs(partial, _canvas(blocks, glass, side, rng), mpp=MPP, power=40, quality=QUALITY)
        partial.replace(path)
    return path


def _canvas(
    blocks: list[NDArray[np.uint8]], glass: NDArray[np.uint8], side: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    across = -(-side // BLOCK)
    field = ndimage.gaussian_filter(rng.standard_normal((across, across)), 3, mode="wrap")
    there = field > np.median(field)
    canvas = np.empty((across * BLOCK, across * BLOCK, 3), np.uint8)
    for (row, column), is_tissue in np.ndenumerate(there):
        block = np.rot90(blocks[rng.integers(len(blocks))] if is_tissue else glass, rng.integers(4))
        block = block[:, :: rng.choice([-1, 1])]
        canvas[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] = block
    return canvas[:side, :side]


def _real(source: Path, rng: np.random.Generator) -> tuple[list[NDArray[np.uint8]], NDArray[np.uint8]]:
    image = tifffile.imread(source)
    coloured = (np.ptp(image.astype(np.int16), axis=2) > 40).astype(np.float32)
    density = ndimage.uniform_filter(coloured, BLOCK)[BLOCK // 2 : -BLOCK // 2 : 32, BLOCK // 2 : -BLOCK // 2 : 32]

    def cut(corner: NDArray[np.int64]) -> NDArray[np.uint8]:
        y, x = (int(c) * 32 for c in corner)
        block: NDArray[np.uint8] = image[y : y + BLOCK, x : x + BLOCK]
        return block

    full = np.argwhere(density > 0.8)
    empty = np.array(np.unravel_index(density.argmin(), density.shape))
    return [cut(full[i]) for i in rng.choice(len(full), BLOCKS, replace=False)], cut(empty)


def _procedural() -> tuple[list[NDArray[np.uint8]], NDArray[np.uint8]]:
    blocks = [tissue(BLOCK, BLOCK, mpp=MPP, seed=i, stain=random_stain(i), hard=True)[0] for i in range(BLOCKS)]
    rng = np.random.default_rng(1)
    return blocks, np.clip(rng.normal(243, 1.5, (BLOCK, BLOCK, 3)), 0, 255).astype(np.uint8)
