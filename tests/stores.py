"""Small stores of slides without symmetry, for tests of what reads and writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsiscale.readers.array import ArrayReader
from wsiscale.store import Ngff, write_store
from wsiscale.types import Tissue

SCALE = 1.46  # 0.73 µm/px of a slide of 0.5


def scan(height: int, width: int) -> NDArray[np.uint8]:
    """A texture of which no two places, axes or channels look alike, and nothing is white."""
    y, x = np.ogrid[:height, :width]
    planes = [y * 200 // height + 0 * x, x * 200 // width + 0 * y, (y // 7 + x // 3) % 5 * 40]
    return np.stack(planes, axis=-1).astype(np.uint8) + np.random.default_rng(0).integers(0, 40, (height, width, 1), np.uint8)


def tissue(height: int, width: int, *boxes: tuple[int, int, int, int], step: int = 10, mpp: float | None = 0.5) -> Tissue:
    """Tissue in boxes of level-0 (y, x, height, width)."""
    mask = np.zeros((-(-height // step), -(-width // step)), bool)
    for y, x, h, w in boxes:
        mask[y // step : -(-(y + h) // step), x // step : -(-(x + w) // step)] = True
    return Tissue(mask=mask, step=step, shape=(height, width), mpp=mpp)


def written(path: Path, *, ngff: Ngff = "0.5", name: str = "slide_7.svs", **options: Any) -> Path:
    """A store of a slide of 900 x 1500 px at 0.5 µm/px, of which two corners have tissue, at 0.73 µm/px."""
    slide = ArrayReader(scan(900, 1500), mpp=0.5, name=name)
    there = tissue(900, 1500, (100, 900, 500, 500), (700, 0, 200, 300))
    given: dict[str, Any] = {"mpp": 0.73, "tissue": there, "ngff": ngff, "tile_size": 128, "halo_um": 0} | options
    write_store(path, slide, **given)
    return path
