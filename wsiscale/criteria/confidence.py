"""Mean maximum softmax: the network is surest where the scale suits it. Simple, and wrong where a network collapses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.needs import outputs_of
from wsiscale.types import ScaleResponse

SOURCE = "maximum softmax probability: Hendrycks & Gimpel, ICLR 2017 (arXiv:1610.02136), averaged over places"


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) mean over places of the largest class probability, 1/C..1."""
    mean: NDArray[np.float64] = outputs_of(response, "confidence").confidence.mean(axis=0, dtype=np.float64)
    return mean
