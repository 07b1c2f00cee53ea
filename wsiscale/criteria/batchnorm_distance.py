"""Distance from the BatchNorm layers' memory: at the training scale a layer's input looks as it did in training.

    D_l(s) = mean over channels of [(mu - m)^2 / v + (sigma / sqrt(v) - 1)^2] - floor,   v = stored variance + eps
    score(s) = - mean over the middle half of the layers of D_l(s) / median over s of D_l

mu and sigma^2 are mean and variance over places and positions of the layer's input, m and v what BatchNorm stored: D is the
squared 2-Wasserstein distance between two normal distributions, in the layer's own units. The floor is what as many tiles
drawn from the training set would have by chance: var(mu) / v + var(sigma^2) / (4 sigma^2 v), from tile to tile. Dividing by
the median makes deep and shallow layers count alike; the middle half leaves out layers that go their own way at that scale.
BatchNorm statistics as a fingerprint of a domain: Li et al. (AdaBN), 2016 (arXiv:1603.04779).

Fails where the slide's mix of tissue is not the training's (deep layers; 2-3 octaves off on slides of one class), where its
stain is not (first layers), where BatchNorm was frozen while the rest was trained, so that the memory is another data set's,
and where tiles have another number of pixels than in training (padding is part of the memory). `batchnorm_trust` tells the
worst of these: below `TRUSTED` the score is NaN. It cannot tell a memory of the right tissue at the wrong scale.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.fingerprint import Standardised, finite_places, standardised, within_reach
from wsiscale.criteria.shares import jackknife, with_gaps
from wsiscale.types import ScaleResponse

SOURCE = "ours; moments as a domain's fingerprint: Li et al. (AdaBN), 2016 (arXiv:1603.04779)"

# The default network, trained on made-up tissue, reaches 0.95 on real tissue, and ImageNet's DenseNet121 0.99 on photos. On
# tissue, of which its memory has none, that DenseNet reaches 0.78.
TRUSTED = 0.85


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) minus the distance, 1 at a typical scale and 0 where nothing tells the tiles from training; NaN if not trusted."""
    standard = standardised(response, "batchnorm_distance")
    silent = np.full(len(response.scales), np.nan)
    if not finite_places(response).all():
        return silent
    layers, reached = [], []
    for layer in standard:
        distance = _distance(layer)
        layers.append(distance / _typical(distance))
        reached.append(within_reach(layer))
    return -_middle_half(np.array(layers)) if _trust(reached) >= TRUSTED else silent


def shares(response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S) what each place adds, to first order."""
    standard = standardised(response, "batchnorm_distance")
    finite = finite_places(response)
    silent = np.full((len(finite), len(response.scales)), np.nan)
    if not finite.any():
        return silent
    whole, without, reached = [], [], []
    for every in standard:
        layer = every.at(finite)
        distance = _distance(layer)
        whole.append(distance / _typical(distance))
        without.append(_without_each(layer) / _typical(distance))
        reached.append(within_reach(layer))
    if _trust(reached) < TRUSTED:
        return silent
    return with_gaps(jackknife(-_middle_half(np.array(whole)), -_middle_half(np.array(without))), finite)


def batchnorm_trust(response: ScaleResponse) -> float:
    """Whether the BatchNorm layers remember anything like these tiles, at any scale: 0 (nothing) to 1; NaN if not finite.

    The share of channels, mean over layers, that reach their fingerprint at the scale where most do: see `within_reach`. Low
    where the memory is another data set's, was never trained (0), or is of tissue that is not on this slide. High does not say
    that the scale is right.
    """
    layers = standardised(response, "batchnorm_trust")
    return _trust([within_reach(layer) for layer in layers]) if finite_places(response).all() else float("nan")


def _trust(reached: list[NDArray[np.float64]]) -> float:
    return float(np.mean(reached, axis=0).max())


def _typical(distance: NDArray[np.float64]) -> float:
    """The median over scales; 1 for a layer whose tiles are nearer than chance at most scales, which is blind to scale."""
    median = float(np.median(distance))
    return median if median > 0 else 1.0


def _distance(layer: Standardised) -> NDArray[np.float64]:
    """(S,) of all places."""
    mean, square = layer.mean.mean(axis=0), layer.square.mean(axis=0)  # (S, K)
    return _wasserstein(mean, square) - _floor(layer, mean, square)


def _without_each(layer: Standardised) -> NDArray[np.float64]:
    """(N, S) without each of the places; for one place, which then is all there is, with it."""
    count = len(layer.mean)
    mean, square = layer.mean.mean(axis=0), layer.square.mean(axis=0)
    if count == 1:
        return _wasserstein(mean, square)[None]
    rest = count - 1
    without = _wasserstein((count * mean - layer.mean) / rest, (count * square - layer.square) / rest)
    return without - _floor(layer, mean, square) * count / rest


def _floor(layer: Standardised, mean: NDArray[np.float64], square: NDArray[np.float64]) -> NDArray[np.float64]:
    """(S,) the distance that chance makes, from how the tiles differ."""
    count = len(layer.mean)
    if count == 1:
        return np.zeros(len(mean))
    central = layer.square - 2 * mean * layer.mean + mean**2  # (N, S, K): each tile's spread about the mean of all
    variance = np.maximum(square - mean**2, 1e-12)
    chance = layer.mean.var(axis=0, ddof=1) + central.var(axis=0, ddof=1) / (4 * variance)
    floor: NDArray[np.float64] = chance.mean(axis=1) / count
    return floor


def _wasserstein(mean: NDArray[np.float64], square: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distance from mean 0 and variance 1, mean over the last axis."""
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    distance: NDArray[np.float64] = (mean**2 + (spread - 1) ** 2).mean(axis=-1)
    return distance


def _middle_half(layers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over (L, ...) without the lowest and the highest quarter."""
    cut = len(layers) // 4
    mean: NDArray[np.float64] = np.sort(layers, axis=0)[cut : len(layers) - cut].mean(axis=0)
    return mean
