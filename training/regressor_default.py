"""Put the regressor of µm/px into the embedded network's card: `python training/regressor_default.py --keep FOLDER`.

FOLDER holds what the network answered to the procedural slides of training/profile_default.py, which is run before with the
same --keep. docs/slide-mpp.md says what the regressor is worth on slides that it is not made of.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from wsiscale.networks import load_network, network_digest
from wsiscale.probe import Answers
from wsiscale.reference_slides import DEFAULT_CARD
from wsiscale.regressor import fit_regressor, save_regressor
from wsiscale.store import read_response

MPP_RANGE = (0.25, 4.0)
# The layer and the penalty that are best on the real images that methods may be developed on (the nine of docs/profiles.md and
# copies of them). The best penalty on procedural slides is a million times smaller and off by half an octave on real ones.
LAYER = "to_middle"
PENALTY = 10.0
# Octaves. It is off by 0.19 on those images, and they are few; procedural slides held out, which are alike, are off by 0.16.
SLIDE_SD = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, required=True, help="folder of the answers that training/profile_default.py kept")
    parser.add_argument("--card", type=Path, default=DEFAULT_CARD)
    options = parser.parse_args()

    answers = [answers_of(folder) for folder in sorted(options.keep.iterdir()) if folder.is_dir()]
    network = load_network(None)
    made = fit_regressor(answers, LAYER, tile_size=network.tile_size, network=network_digest(network), penalty=PENALTY)
    print(f"{len(answers)} procedural slides, held out: off by {made.slide_sd:.2f} octaves; the card says {SLIDE_SD}")
    save_regressor(replace(made, slide_sd=SLIDE_SD), options.card)


def answers_of(folder: Path) -> Answers:
    response = read_response(folder).response
    mpp = response.scales * response.slide_mpp
    used = (response.scales >= 1 - 1e-6) & (mpp >= MPP_RANGE[0] * 0.99) & (mpp <= MPP_RANGE[1] * 1.01)
    layers = {LAYER: response.layers[LAYER].mean[:, used]}
    return Answers(folder.name, np.log2(mpp[used]), layers)


if __name__ == "__main__":
    main()
