"""Make the embedded network's profile: `python training/profile_default.py [--real SLIDE...] [--keep FOLDER] [--card CARD]`.

Reference slides are procedural, each of another laboratory and tissue, at 0.25 and 0.5 µm/px, after a scanner of its own. Real
slides whose licence lets numbers made from them be shipped may be given beside them; they are named in the card.
docs/profiles.md says what the profile is worth on slides that it is not made of.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from train_default import HARD, scanned

from wsiscale.profile import save_profile
from wsiscale.readers import ArrayReader
from wsiscale.reference_slides import DEFAULT_CARD, profile_slides
from wsiscale.testing.procedural import random_stain, slide_image
from wsiscale.types import Reader

SEED = 75_000  # of the first slide; the network was trained on fields from seeds above 20 million
# Side in px: 768 µm, and 1024 µm at the coarser one, which lets tiles of 128 px reach 6 and 8 µm/px.
KINDS = ((0.25, 3072), (0.5, 2048))
COUNT = 20
PLACES = 24
# Octaves by which the slides that methods may be developed on (benchmarks/recovery/split.json: seven MoNuSeg images and copies
# of them at 0.375 and 0.42 µm/px; CMU-1, OS-1) come out too coarse: what is drawn here is a little larger than real nuclei.
OFFSET = 0.06


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", nargs="*", default=[], help="slides to take beside the procedural ones")
    parser.add_argument("--keep", type=Path, help="folder for what the network answers, to go on from")
    parser.add_argument("--card", type=Path, default=DEFAULT_CARD)
    options = parser.parse_args()

    def slides() -> Iterator[Reader | str]:
        yield from options.real
        for number in range(COUNT):
            mpp, side = KINDS[number % len(KINDS)]
            yield procedural(SEED + number, mpp, side, hard=number % 10 < 10 * HARD)

    made = profile_slides(
        slides(), places=PLACES, keep=options.keep, seed=0, told=lambda name, why: print(name, why or "", flush=True)
    )
    fields = json.loads(DEFAULT_CARD.read_text(encoding="utf-8"))
    source = f"{COUNT} procedural slides (training/profile_default.py)"
    real = [Path(name).name for name in options.real]
    save_profile(
        replace(made.profile, offset=OFFSET), options.card, fields=fields | {"profile_data": "; ".join([source, *real])}
    )
    print(made.sentence())
    print("off by, registered to the others:", np.round(made.profile.errors, 2).tolist())
    print(f"{options.card}: {options.card.stat().st_size / 1000:.0f} kB")


def procedural(seed: int, mpp: float, side: int, *, hard: bool) -> Reader:
    image = slide_image(side, side, mpp, seed, stain=random_stain(seed), hard=hard)
    return ArrayReader(scanned(image, np.random.default_rng([seed, 5])), mpp=mpp, name=f"procedural-{seed}")


if __name__ == "__main__":
    main()
