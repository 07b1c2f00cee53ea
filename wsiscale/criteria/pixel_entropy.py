"""Entropy of the answer, pixel by pixel: a segmenter at its scale is unsure at borders only.

    score(s) = - mean over places and pixels of H(p(pixel)), in nats

For a classifier, which has one answer a tile, it is minus the entropy of that. Grandvalet & Bengio, NIPS 2004; as a measure of
shift without labels: Wang et al. (TENT), ICLR 2021 (arXiv:2006.10726).

Fails where a network finds nothing and is sure of it: all background has no borders, and its entropy is the lowest there is.
At coarse scales there are more borders in a tile, and at fine ones fewer, so that the fine end is favoured whatever the
network.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.needs import outputs_of
from wsiscale.types import ScaleResponse

SOURCE = "Grandvalet & Bengio, NIPS 2004; Wang et al. (TENT), ICLR 2021 (arXiv:2006.10726); averaged over places"


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) minus the mean entropy over places and pixels, in nats."""
    mean: NDArray[np.float64] = outputs_of(response, "pixel_entropy").entropy.mean(axis=0, dtype=np.float64)
    return -mean
