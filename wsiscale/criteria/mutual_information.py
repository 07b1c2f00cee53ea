"""Confidence times dispersity, in nats: sure of each place, and not of the same thing everywhere.

    score(s) = H(mean_i p_i) - mean_i H(p_i) = mean_i KL(p_i || mean_j p_j)

p_i are the class probabilities of place i. Between places and classes: Bridle, Heading & MacKay, NIPS 1991; as a measure of
quality without labels: Hu et al., ICML 2017. The second form says what each place adds.

Fails on a slide of one tissue, where the right answer is the same everywhere: it is then flat or turned round. It prefers
coarse scales, where fields are larger and tiles more unlike each other, and networks that answer at random but surely. A
segmenter's p_i is the mean over its pixels, so that places count as alike that have equal areas of everything.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.needs import outputs_of
from wsiscale.criteria.shares import with_gaps
from wsiscale.types import ScaleResponse

SOURCE = "Bridle, Heading & MacKay, NIPS 1991; over places"


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) mutual information of place and class, 0..ln C, in nats."""
    mean: NDArray[np.float64] = _divergences(outputs_of(response, "mutual_information").probabilities).mean(axis=0)
    return mean


def shares(response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S) how far each place's answer is from the average answer, in nats."""
    p = outputs_of(response, "mutual_information").probabilities
    finite = np.isfinite(p).all(axis=(1, 2))
    return with_gaps(_divergences(p[finite]), finite)


def _divergences(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    p = probabilities.astype(np.float64)  # (N, S, C)
    # Of a class that no place ever gets both logarithms are of 0, and it adds nothing.
    with np.errstate(invalid="ignore"):
        surprise = np.log(np.where(p > 0, p, 1)) - np.log(np.where(p > 0, p.mean(axis=0), 1))
        found: NDArray[np.float64] = (p * surprise).sum(axis=2)
    return found
