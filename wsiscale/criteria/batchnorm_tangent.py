"""The BatchNorm layers' memory along the direction in which scale moves them: what moves them elsewhere drops out.

    r_l(s) = (mu_l(s) - m_l) / sqrt(v_l)            residual of the pooled mean, u = log2 s
    t_l(s) = dr_l / du                              the tangent, from the slide's own pyramid
    z(s)   = sum_l w_l <r_l, C_l t_l> / sum_l w_l <t_l, C_l t_l>       how many octaves s is off; zero at the answer
    score(s) = - 1/2 sum_l w_l <r_l, C_l r_l>

C_l is the inverse of the covariance of r_l from tile to tile, so that <t, C t> is the Fisher information that one tile has
about u: layers weigh as much as they know, and directions in which tiles of one scale differ anyway (tissue, stain) count
little. With one C_l for all scales the score's slope is -<r, C t>: its peak *is* the upward zero crossing of z, found by a
Gauss-Newton step from anywhere near, and unlike z it cannot be fooled by crossings the wrong way round, nor by scales where
nothing moves. A shift that is the same at all scales and orthogonal to the path adds a constant.

The covariance is shrunk: its diagonal is the mean over scales of the variance from tile to tile; off the diagonal is that of
the tiles' means over scales, times N / (N + K), because there are K directions to learn and N tiles to learn from. w_l is 1,
or less where even the nearest scale is further than a tile's own scatter, K / min_s <r, C r>: the Birge ratio, by which
metrology widens what does not fit.

Fails as batchnorm_distance does, though later: a mix of tissue that moves the layers *along* the tangent is taken for scale.
Layers are taken as independent, which they are not, so that `offset`'s standard error is too small; the interval comes from
the places. The score is NaN where `batchnorm_trust` is below `TRUSTED`, and for a single place, which has no scatter, the
covariance is the training's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.batchnorm_distance import TRUSTED
from wsiscale.criteria.fingerprint import SMALLEST_SPREAD, Standardised, finite_places, standardised, within_reach
from wsiscale.criteria.shares import with_gaps
from wsiscale.types import ScaleResponse

SOURCE = "ours; Gauss-Newton on the moments of BatchNorm, Fisher weights; Birge, Phys. Rev. 40, 1932"


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) log-likelihood of each scale from one tile's worth of evidence; NaN if the fingerprint is not trusted."""
    found = shares(response)
    return found.mean(axis=0) if len(found) else np.full(len(response.scales), np.nan)


def shares(response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S) what each place adds: its own residual along that of all. A row's peak is about where the place alone would be."""
    layers = standardised(response, "batchnorm_tangent")
    finite = finite_places(response)
    empty = np.full((len(finite), len(response.scales)), np.nan)
    if not finite.any():
        return empty
    total = np.zeros((int(finite.sum()), len(response.scales)))
    reached = []
    for layer in layers:
        used = layer.at(finite)
        residual = used.mean.mean(axis=0)  # (S, K)
        pulled = _metric(used).solve(residual)
        distance = (pulled * residual).sum(axis=1)
        # To first order in the place's weight; the mean over places is minus half the distance.
        own = distance / 2 - np.einsum("sk,nsk->ns", pulled, used.mean)
        total += _weight(distance, residual.shape[1]) * own
        reached.append(within_reach(used))
    return with_gaps(total, finite) if np.mean(reached, axis=0).max() >= TRUSTED else empty


def offset(response: ScaleResponse) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many octaves each scale is above the one remembered, and its standard error, both (S,); NaN where nothing moves.

    Near the answer the distance to it, further away its direction: scale * 2 ** -offset is the next scale to try.
    """
    octaves = np.log2(response.scales)
    along, information = np.zeros(len(octaves)), np.zeros(len(octaves))
    for layer in standardised(response, "batchnorm_tangent"):
        metric = _metric(layer)
        residual = layer.mean.mean(axis=0)  # (S, K)
        tangent = np.gradient(residual, octaves, axis=0) if len(octaves) > 1 else np.zeros_like(residual)
        pulled = metric.solve(residual)
        weight = _weight((pulled * residual).sum(axis=1), residual.shape[1])
        along += weight * (pulled * tangent).sum(axis=1)
        information += weight * (metric.solve(tangent) * tangent).sum(axis=1)
    known = information > 0
    unit = np.where(known, information, 1)
    return np.where(known, along / unit, np.nan), np.where(known, 1 / np.sqrt(response.places * unit), np.nan)


def decide(response: ScaleResponse) -> float | None:
    """Where `offset` crosses zero upwards, nearest to the highest score; None where it nowhere does or is not trusted."""
    likelihood = score(response)
    if not np.isfinite(likelihood).all():
        return None
    z, _ = offset(response)
    octaves = np.log2(response.scales)
    before = np.flatnonzero((z[:-1] < 0) & (z[1:] >= 0))
    if not len(before):
        return None
    crossing = octaves[before] - z[before] * (octaves[before + 1] - octaves[before]) / (z[before + 1] - z[before])
    best = crossing[np.argmin(np.abs(crossing - octaves[np.argmax(likelihood)]))]
    return float(np.exp2(best))


@dataclass(frozen=True)
class _Metric:
    """A covariance as diagonal plus loadings' loadings: (K,) and (N, K). Its inverse needs N x N numbers, not K x K."""

    diagonal: NDArray[np.float64]
    loadings: NDArray[np.float64]

    def solve(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """The inverse times each of (S, K), by Woodbury's identity."""
        scaled = vectors / self.diagonal
        spanned = self.loadings / self.diagonal
        inner = np.eye(len(self.loadings)) + spanned @ self.loadings.T
        solved: NDArray[np.float64] = scaled - np.linalg.solve(inner, self.loadings @ scaled.T).T @ spanned
        return solved


def _metric(layer: Standardised) -> _Metric:
    """The shrunken covariance from tile to tile."""
    count, _, channels = layer.mean.shape
    if count == 1:
        return _Metric(np.ones(channels), np.zeros((1, channels)))
    scatter = layer.mean - layer.mean.mean(axis=0)  # (N, S, K)
    variance = np.maximum((scatter**2).sum(axis=0).mean(axis=0) / (count - 1), SMALLEST_SPREAD**2)  # (K,)
    loadings = np.sqrt(count / (count + channels) / (count - 1)) * scatter.mean(axis=1)
    return _Metric(variance - (loadings**2).sum(axis=0), loadings)


def _weight(distance: NDArray[np.float64], channels: int) -> float:
    """1, or less for a layer that is nowhere within a tile's scatter of its fingerprint."""
    return channels / max(channels, float(distance.min()))
