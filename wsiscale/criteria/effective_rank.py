"""Effective rank of the features: in how many directions the places differ. For feature extractors, which have no classes.

    score(s) = exp(H(sigma / sum sigma)), sigma the singular values of the N x F features of all places at s

RankMe: Garrido, Balestriero, Najman & LeCun, ICML 2023 (arXiv:2210.02885), after Roy & Vetterli, EUSIPCO 2007.

Fails on noise, whose rank is full: where a network answers at random it beats every scale that means something. It is
bounded by the number of places, so that scores of 16 and of 64 places do not compare; prefers coarse scales, whose tiles
have more in them; and says nothing of any task. A common vector that all places share (features after a ReLU) hides how the
others rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.shares import jackknife, singular_values, singular_values_without, with_gaps
from wsiscale.errors import OptionError
from wsiscale.types import ScaleResponse

SOURCE = "RankMe: Garrido, Balestriero, Najman & LeCun, ICML 2023 (arXiv:2210.02885), eq. 1"


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) effective rank, 1..min(N, F); 0 where all features are zero."""
    features = _features(response)
    if not np.isfinite(features).all():
        return np.full(features.shape[1], np.nan)
    return _rank(singular_values(features.transpose(1, 0, 2)))


def shares(response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S) what each place adds, to first order."""
    features = _features(response)
    finite = np.isfinite(features).all(axis=(1, 2))
    tables = features[finite].transpose(1, 0, 2)  # (S, N, F)
    return with_gaps(jackknife(_rank(singular_values(tables)), _rank(singular_values_without(tables))), finite)


def _features(response: ScaleResponse) -> NDArray[np.float64]:
    if response.features is None:
        raise OptionError("effective_rank works on pooled features, and this network gave none; choose another criterion")
    return response.features.astype(np.float64)


def _rank(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(...,) of singular values (..., r)."""
    total = values.sum(axis=-1, keepdims=True)
    share = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    rank: NDArray[np.float64] = np.exp(-(share * np.log(np.where(share > 0, share, 1))).sum(axis=-1))
    return np.where(total[..., 0] > 0, rank, 0)
