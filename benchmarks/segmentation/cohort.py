"""A cohort as cohorts are: slides of mixed scales, whose tags are right, missing or wrong. What masks does a user get?

Every image is copied with a random number of pixels, 1/2.5 to 2.5 times as many a side, and segmented by the bundled network at
the scale that each way of choosing finds. Nothing but the tag and the pixels is known to any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import wsiscale as ws
from benchmarks.recovery.real import MONUSEG, _monuseg, _rng, monuseg_mpp
from benchmarks.segmentation.quality import dice
from benchmarks.segmentation.segmenters import Segmenter

LARGEST = 2.5
COPIES = 3  # of each image
GUESS = 0.25  # µm/px that is taken for granted where there is no tag: what most of the originals have
TAGS = ("right", "missing", "wrong")
# µm/px by the truth, among which the oracle chooses by its labels.
ORACLE = tuple(0.5 * 2 ** (step / 4) for step in range(-4, 5))


@dataclass(frozen=True)
class Copy:
    """One image of the cohort."""

    name: str
    pixels: NDArray[np.uint8]  # (H, W, 3)
    truth: NDArray[np.bool_]  # (H, W)
    mpp: float  # the truth, which nobody is told
    tags: dict[str, float | None]  # what its file says, by how good the tags are


@dataclass(frozen=True)
class Masks:
    """What one way of choosing the scale made of one copy."""

    copy: str
    tags: str
    way: str
    dice: float
    mpp: float | None = None  # µm/px, by the truth, that it is segmented at
    abstained: str | None = None


def copies(data: Path, slides: tuple[str, ...] = MONUSEG, count: int = COPIES) -> Iterator[Copy]:
    for slide in slides:
        image, mask = _monuseg(data, slide)
        rng = _rng("cohort", slide)
        for number in range(count):
            factor, error = LARGEST ** rng.uniform(-1, 1, 2)
            side = round(len(image) * factor)
            mpp = monuseg_mpp(slide) * len(image) / side
            # Box: the area mean, as a scanner with larger pixels would see.
            kernel = Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC
            pixels = np.asarray(Image.fromarray(image).resize((side, side), kernel))
            share = Image.fromarray(mask.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
            tags = {"right": mpp, "missing": None, "wrong": mpp * error}
            yield Copy(f"{slide}/{number}", pixels, np.asarray(share) > 0.5, mpp, tags)


def masks(segmenter: Segmenter, copy: Copy) -> Iterator[Masks]:
    """Each way of choosing, with each kind of tag."""
    known: dict[float, float] = {}

    def at(scale: float) -> float:
        if scale not in known:
            known[scale] = dice(segmenter.probability(copy.pixels, scale) > segmenter.threshold, copy.truth)
        return known[scale]

    best = max(at(mpp / copy.mpp) for mpp in ORACLE)
    alone = _estimated(segmenter, copy, None, trust_tag=False)
    for tags, tag in copy.tags.items():
        by_tag = segmenter.training_mpp / (tag or GUESS)
        trusted = alone if tag is None else _estimated(segmenter, copy, tag, trust_tag=True)
        yield Masks(copy.name, tags, "as it is", at(1.0), copy.mpp)
        yield Masks(copy.name, tags, "trust the tag", at(by_tag), by_tag * copy.mpp)
        for way, (scale, why) in (("wsiscale", alone), ("wsiscale, tags trusted", trusted)):
            taken = by_tag if scale is None else scale
            yield Masks(copy.name, tags, way, at(taken), taken * copy.mpp, why)
        yield Masks(copy.name, tags, "oracle", best)


def by_truth(segmenter: Segmenter, copy: Copy) -> dict[float, float]:
    """Dice at each of ORACLE µm/px by the truth."""
    found = {mpp: segmenter.probability(copy.pixels, mpp / copy.mpp) > segmenter.threshold for mpp in ORACLE}
    return {mpp: dice(mask, copy.truth) for mpp, mask in found.items()}


Estimated = tuple[float | None, str | None]  # the scale, or why there is none


def _estimated(segmenter: Segmenter, copy: Copy, tag: float | None, *, trust_tag: bool) -> Estimated:
    found = ws.estimate(ws.ArrayReader(copy.pixels, mpp=tag), segmenter.network, trust_tag=trust_tag)
    return found.scale, None if found.abstained is None else found.abstained.reason


def mean_dice(found: list[Masks], way: str, tags: str) -> float:
    return float(np.mean([m.dice for m in found if (m.way, m.tags) == (way, tags)]))
