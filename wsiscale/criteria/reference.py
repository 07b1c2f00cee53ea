"""Held against the network's own training tiles: where a slide looks as they did.

    L(s) = mean over places of log of the squared distance of a tile's layers from the training tiles'
    g(s) = mean over places of what the ridge says: octaves from the training scale, 0 at the right one
    c(s) = mean over the scales t from s to 1.5 octaves coarser of [g(t) - log2(t / s)]^2
    score(s) = - 1/2 [ (L(s) - floor) / (bend e_d^2) + log(c(s) + e_g^2) ]

Both are log-likelihoods in octaves. The distance (Mahalanobis, with the covariance from tile to tile, so that a mix of tissue
costs little) is divided by its own bend and weighs as much as left-out tiles say that it errs, e_d. The ridge has to be right
not at one scale but along 1.5 octaves, with a slope of one; what it misses there on this very slide is its variance, and the
logarithm (a normal likelihood whose variance is not known, maximised over it) takes its say away where it makes no sense. Both
errors count as no less than 0.1 octave. `wsiscale.training_tiles` makes references. Prior art: Cellpose's size model
(Stringer et al., 2021) for the ridge; a normal distribution of layers to detect foreign inputs: Lee et al., NeurIPS 2018
(arXiv:1807.03888).

Fails where the slide is of tissue or colours that are not in the tiles, gradually: the ridge first, the distance later. Where
even at its nearest scale the slide is `FOREIGN` away, the score is NaN, and there is no estimate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.shares import with_gaps
from wsiscale.errors import OptionError
from wsiscale.training_tiles import Reference, distances, offsets
from wsiscale.types import ScaleResponse

SOURCE = "ours; ridge: Stringer et al. (Cellpose), 2021; distance: Lee et al., NeurIPS 2018 (arXiv:1807.03888)"

# Of the log squared distance above that of left-out training tiles: tiles whose typical channel is seven times as far out as
# a training tile's (e^(4/2)). The embedded network, which has seen no real tissue, is 0.5 to 2.9 away from it at best.
FOREIGN = 4.0
ALONG = 1.5  # octaves over which the ridge has to be right: as far as it was fitted
_SLACK = 0.13  # octaves, half a step of the coarsest grid: the training scale itself is among the scales


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) log-likelihood of each scale, up to a constant; NaN where the slide looks like no training tile at any scale."""
    found = shares(response)
    return found.mean(axis=0) if len(found) else np.full(len(response.scales), np.nan)


def shares(response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S) what each place adds, the ridge's part to first order."""
    reference = _reference_of(response)
    far, away = distances(reference, response), offsets(reference, response)  # (N, S)
    finite = np.isfinite(far).all(axis=1) & np.isfinite(away).all(axis=1)
    empty = np.full(far.shape, np.nan)
    if not finite.any():
        return empty
    far, away = far[finite], away[finite]
    if far.mean(axis=0).min() - reference.distance_floor > FOREIGN:
        return empty
    near = (far - reference.distance_floor) / (reference.distance_bend * reference.distance_error**2)
    octaves = np.log2(response.scales)
    apart = octaves - octaves[:, None]  # (S, S): of each scale, how much coarser the others are
    weight = np.where((apart >= -_SLACK) & (apart <= ALONG), _width(octaves), 0)
    weight /= weight.sum(axis=1, keepdims=True)
    missed = away.mean(axis=0) - apart  # (S, S)
    variance = (weight * missed**2).sum(axis=1) + reference.ridge_error**2  # (S,)
    # d log(variance) of one place's own offset.
    own = (away - away.mean(axis=0)) @ (2 * weight * missed).T / variance  # (N, S)
    return with_gaps(-(near + np.log(variance) + own) / 2, finite)


def _reference_of(response: ScaleResponse) -> Reference:
    if response.reference is None:
        raise OptionError(
            "the criterion reference needs training tiles, and the network's card has none; "
            "make one with wsiscale calibrate --model M TILES -o card.json"
        )
    return response.reference


def _width(octaves: NDArray[np.float64]) -> NDArray[np.float64]:
    """(S,) the octaves that each scale stands for."""
    return np.gradient(octaves) if len(octaves) > 1 else np.ones(1)
