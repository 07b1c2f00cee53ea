"""Procedural tissue beside real tissue, to be looked at: `python training/compare_tissue.py DATA OUT.png`.

DATA is a folder with patches/monuseg and slides/CMU-1-Small-Region.svs. All at 0.5 µm/px, 128 µm a side. The picture holds
third-party pixels and stays out of the repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from wsiscale.testing.procedural import random_stain, tissue

SIDE, COUNT = 256, 6  # px of a field, fields a row
CMU = ((200, 1200), (1000, 800), (600, 1500), (1400, 1600), (2300, 900), (1800, 1700))  # corners with tissue


def main() -> None:
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    slide = tifffile.imread(data / "slides" / "CMU-1-Small-Region.svs")
    monuseg = sorted((data / "patches" / "monuseg" / "images").glob("*.png"))[: 2 * COUNT : 2]
    rows = [
        [tissue(SIDE, SIDE, mpp=0.5, seed=90_100 + seed, stain=random_stain(seed))[0] for seed in range(COUNT)],
        [tissue(SIDE, SIDE, mpp=0.5, seed=90_200 + i, stain=random_stain(100 + i), hard=True)[0] for i in range(COUNT)],
        [halved(path) for path in monuseg],
        [slide[y : y + SIDE, x : x + SIDE] for y, x in CMU],
    ]
    Image.fromarray(np.vstack([np.hstack(row) for row in rows])).save(out)
    print(f"{out}: a row of procedural tissue, one of hard, one of MoNuSeg, one of CMU-1")


def halved(path: Path) -> NDArray[np.uint8]:
    """0.25 -> 0.5 µm/px by the area mean."""
    image = np.asarray(Image.open(path).convert("RGB"))
    return image.reshape(500, 2, 500, 2, 3).mean(axis=(1, 3)).astype(np.uint8)[:SIDE, :SIDE]


if __name__ == "__main__":
    main()
