"""What the adaptive search costs, and whether it finds what the full grid does: the embedded network on real and sample slides.

    python benchmarks/search.py [--data DIR] [--slides N] [--criterion NAME]

Each slide is asked twice: 64 places at 8 scales an octave, and coarse to fine to a precision of 0.1 octave; without a profile,
so that the slide's own curve decides. The share of forward passes and the distance of the answers are what docs/decisions/0005
quotes. A minute or two a slide.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a script

import wsiscale as ws
from benchmarks.recovery.cases import drawn
from benchmarks.recovery.real import MONUSEG, monuseg_mpp
from wsiscale.types import Reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    data = os.environ.get("WSISCALE_DATA")
    parser.add_argument("--data", type=Path, default=None if data is None else Path(data))
    parser.add_argument("--slides", type=int, default=12)
    parser.add_argument("--criterion", default=None)
    options = parser.parse_args()
    network = ws.load_network()
    shares, away = [], []
    print(f"{'slide':<34}{'full grid':>28}{'search':>28}{'share':>8}{'octaves':>9}")
    for number, (name, slide) in enumerate(slides(options.data)):
        if number >= options.slides:
            break
        with slide:
            full, found = (
                ws.estimate(slide, network, criterion=options.criterion, precision=precision, profile=None, tile_size=64)
                for precision in (None, 0.1)
            )
        share = found.forwards / full.forwards
        shares.append(share)
        off = abs(np.log2(found.scale / full.scale)) if found.scale is not None and full.scale is not None else None
        if off is not None:
            away.append(off)
        print(
            f"{name[:33]:<34}{said(full):>28}{said(found):>28}{share:>8.2f}{'-' if off is None else f'{off:.3f}':>9}",
            flush=True,
        )
    print(f"median share of the forward passes {np.median(shares):.2f}, largest {max(shares):.2f}", end="")
    if away:
        print(
            f"; of {len(away)} answered twice, {np.mean(np.array(away) <= 0.1):.0%} within 0.1 octave, largest {max(away):.2f}"
        )


def said(found: ws.ScaleEstimate) -> str:
    if found.scale is None:
        assert found.abstained is not None
        return f"{found.abstained.reason} ({found.forwards})"
    return f"{found.scale:.3f} ({found.forwards})"


def slides(data: Path | None) -> Iterator[tuple[str, Reader]]:
    for path in sorted((ROOT / "sample_slides").glob("*.svs")):
        if (slide := ws.open_slide(path)).calibration.verdict != "refused":
            yield path.name, slide
    if data is None:
        return
    for name, reader in (("CMU-1-Small-Region.svs", "auto"), ("OS-1-detail.ome.tif", "tiffslide")):
        yield name, ws.open_slide(data / "slides" / name, reader=reader)
    # Of the half that methods may be developed on.
    for name in drawn("monuseg slides", MONUSEG)["develop"]:
        image = np.asarray(Image.open(next((data / "patches" / "monuseg" / "images").glob(f"{name}*.png"))).convert("RGB"))
        yield name, ws.ArrayReader(image, mpp=monuseg_mpp(name), name=name)


if __name__ == "__main__":
    main()
