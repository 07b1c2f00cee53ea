"""Confidence times dispersity by one number: the nuclear norm of the table of answers.

    score(s) = ||P(s)||_* / sqrt(N min(N, C)), P(s) the N x C softmax of all places; 1 = sure and perfectly dispersed

Deng, Kuang & Zheng, "Confidence and Dispersity Speak", ICML 2023 (arXiv:2302.01094), for accuracy without labels.

Fails as mutual_information does: on slides of one tissue dispersity is rightly low (the norm then is the length of p, a
confidence, and only the bound is out of reach), and coarse scales, with more in a tile, look better than they are. An
over-confident network that spreads its errors is praised. It changes with the mix of tissue, so that curves of two slides do
not compare.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.needs import outputs_of
from wsiscale.criteria.shares import jackknife, singular_values, singular_values_without, with_gaps
from wsiscale.types import ScaleResponse

SOURCE = "Deng, Kuang & Zheng, ICML 2023 (arXiv:2302.01094), eq. 2"


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) nuclear norm of the places' class probabilities, 0..1."""
    p = outputs_of(response, "nuclear_norm").probabilities.astype(np.float64)
    if not np.isfinite(p).all():
        return np.full(p.shape[1], np.nan)
    return _relative(singular_values(p.transpose(1, 0, 2)), len(p), p.shape[2])


def shares(response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S) what each place adds, to first order."""
    p = outputs_of(response, "nuclear_norm").probabilities.astype(np.float64)
    finite = np.isfinite(p).all(axis=(1, 2))
    tables = p[finite].transpose(1, 0, 2)  # (S, N, C)
    _, places, classes = tables.shape
    whole = _relative(singular_values(tables), places, classes)
    return with_gaps(jackknife(whole, _relative(singular_values_without(tables), max(places - 1, 1), classes)), finite)


def _relative(values: NDArray[np.float64], places: int, classes: int) -> NDArray[np.float64]:
    """(...,) the sum of singular values (..., r) over the largest that there can be."""
    norm: NDArray[np.float64] = values.sum(axis=-1) / np.sqrt(places * min(places, classes))
    return norm
