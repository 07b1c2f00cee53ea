"""Whether the answer follows the pixels: real images and copies of them with 0.6 to 1.67 times the pixels, without a tag.

    python benchmarks/rescaled.py --data DIR [--half develop]

What a network works best at is a size in tissue. On a copy with f times as many pixels a side, the estimate in level-0 px per
px has to be f times as large, whatever the metadata say; the table shows how many octaves it is from that. With the embedded
network's own profile, and without. Ten seconds a copy.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a script

import wsiscale as ws
from benchmarks.recovery.cases import drawn
from benchmarks.recovery.real import MONUSEG

FACTORS = (0.6, 1.5, 1 / 0.6)
WITHIN = 0.1  # octaves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    data = os.environ.get("WSISCALE_DATA")
    parser.add_argument("--data", type=Path, required=data is None, default=None if data is None else Path(data))
    parser.add_argument("--half", choices=("develop", "report"), default="report")
    options = parser.parse_args()
    network = ws.load_network()
    off: dict[str, list[float]] = {"auto": [], "none": []}
    silent = beyond = 0
    print(f"{'image':<26}{'profile':<9}{'scale':>24}" + "".join(f"{f'x {factor:.2f}':>24}" for factor in FACTORS))
    for name in drawn("monuseg slides", MONUSEG)[options.half]:
        image = Image.open(next((options.data / "patches" / "monuseg" / "images").glob(f"{name}*.png"))).convert("RGB")
        for profile, found in off.items():
            own = asked(image, network, profile)
            cells = []
            for factor in FACTORS:
                side = round(image.width * factor)
                how = Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC
                copy = asked(image.resize((side, side), how), network, profile)
                if own.scale is None or copy.scale is None:
                    silent += 1
                    cells.append(said(copy))
                    continue
                expected = own.scale * side / image.width
                if expected < 1:  # finer than the copy's pixels: its finest is all that can be answered
                    beyond += 1
                    cells.append(f"beyond: {copy.scale:.3f}")
                    continue
                found.append(float(np.log2(copy.scale / expected)))
                cells.append(f"{found[-1]:+.3f}")
            print(f"{name:<26}{profile:<9}{said(own):>24}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
    for profile, found in off.items():
        near = np.abs(found) <= WITHIN
        print(
            f"profile {profile}: {near.sum()} of {len(near)} copies within {WITHIN} octave, "
            f"median {np.median(np.abs(found)):.3f}, largest {np.abs(found).max():.3f}"
        )
    print(f"{silent} copies without an estimate, or of an image without one; {beyond} whose pixels are too coarse for it")


def asked(image: Image.Image, network: ws.Network, profile: str) -> ws.ScaleEstimate:
    return ws.estimate(ws.ArrayReader(np.asarray(image)), network, profile=None if profile == "none" else profile)


def said(found: ws.ScaleEstimate) -> str:
    if found.scale is None:
        assert found.abstained is not None
        return found.abstained.reason
    return f"{found.scale:.3f}"


if __name__ == "__main__":
    main()
