"""Make the sample slides anew, byte for byte: `python sample_slides/make.py [FOLDER]`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from wsiscale.testing.procedural import Stain, random_stain, slide_image
from wsiscale.testing.slides import write_svs


def main(folder: Path) -> None:
    # Little sensor noise: it is what JPEG spends most of its bytes on, and the slides are to stay small.
    image = slide_image(2816, 3072, mpp=0.25, seed=1, stain=Stain(noise=0.7))
    write_svs(folder / "tissue_mpp0.25.svs", image, mpp=0.25, power=40, levels=(1, 4, 16), quality=80)

    image = slide_image(1408, 1536, mpp=0.35, seed=2, stain=replace(random_stain(3), noise=0.7))
    write_svs(folder / "no_mpp.svs", image, mpp=None, power=None, levels=(1, 4), quality=80)

    # A hundredth of the truth: a factor of a unit gone wrong, as converters leave it in the wild.
    image = slide_image(1280, 1408, mpp=0.25, seed=4, stain=replace(random_stain(7), noise=0.7))
    write_svs(folder / "wrong_mpp.svs", image, mpp=0.0025, power=40, levels=(1, 4), quality=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
