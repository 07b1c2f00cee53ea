"""A BatchNorm layer remembers what its input looked like in training: the tiles in its units, and whether to believe it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import OptionError
from wsiscale.types import BatchNormStatistics, LayerMoments, ScaleResponse

# A channel that hardly varied in training, a thousandth of the typical one's variance, is a dead one: all it would tell is
# rounding, in huge units.
DEAD = 1e-3
# Tile to tile a channel may vary so little that any difference would look certain. Less than a tenth of the spread in
# training is what another resampler or JPEG quality does.
SMALLEST_SPREAD = 0.1


@dataclass(frozen=True)
class Standardised:
    """One layer's input in units of its training: (x - stored mean) / sqrt(stored variance + eps)."""

    mean: NDArray[np.float64]  # (N, S, K)
    square: NDArray[np.float64]  # (N, S, K)
    untrained: bool  # every stored mean is 0 and every variance 1: what a layer begins with

    def at(self, places: NDArray[np.bool_]) -> Standardised:
        return Standardised(self.mean[places], self.square[places], self.untrained)


def standardised(response: ScaleResponse, criterion: str) -> Iterator[Standardised]:
    """The layers one by one (all together can be gigabytes), without channels that were dead in training."""
    if not response.batchnorm:
        raise OptionError(f"{criterion} needs BatchNorm layers, and none was watched in this network; choose another criterion")
    return (_in_units(response.layers[name], stored) for name, stored in response.batchnorm.items())


def finite_places(response: ScaleResponse) -> NDArray[np.bool_]:
    """(N,) places at which every BatchNorm layer's moments are finite."""
    finite = np.ones(response.places, bool)
    for name in response.batchnorm:
        moments = response.layers[name]
        finite &= np.isfinite(moments.mean).all(axis=(1, 2)) & np.isfinite(moments.square).all(axis=(1, 2))
    return finite


def spread_of_tiles(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """(S, K) standard deviation from tile to tile of (N, S, K), at least `SMALLEST_SPREAD`; one tile says 1."""
    if len(mean) == 1:
        return np.ones(mean.shape[1:])
    spread: NDArray[np.float64] = np.maximum(mean.std(axis=0, ddof=1), SMALLEST_SPREAD)
    return spread


def within_reach(layer: Standardised) -> NDArray[np.float64]:
    """(S,) the share of channels whose fingerprint these tiles reach at each scale.

    Reached: the stored mean lies within two standard deviations, tile to tile, of the tiles' mean, and the stored spread
    within a factor of two of theirs.
    """
    if layer.untrained:
        return np.zeros(layer.mean.shape[1])
    mean, square = layer.mean.mean(axis=0), layer.square.mean(axis=0)  # (S, K)
    variance = np.maximum(square - mean**2, 0)
    reached = (np.abs(mean) <= 2 * spread_of_tiles(layer.mean)) & (variance >= 0.25) & (variance <= 4)
    share: NDArray[np.float64] = reached.mean(axis=1)
    return share


def _in_units(moments: LayerMoments, stored: BatchNormStatistics) -> Standardised:
    alive = stored.var >= DEAD * np.median(stored.var)
    unit = np.sqrt(stored.var[alive].astype(np.float64) + stored.eps)
    center = stored.mean[alive].astype(np.float64)
    mean, square = moments.mean[..., alive].astype(np.float64), moments.square[..., alive].astype(np.float64)
    return Standardised(
        mean=(mean - center) / unit,
        square=(square - 2 * center * mean + center**2) / unit**2,
        untrained=bool((stored.mean == 0).all() and (stored.var == 1).all()),
    )
