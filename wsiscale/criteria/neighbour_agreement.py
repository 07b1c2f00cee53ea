"""Stability between neighbouring scales: where the scale suits, a little more or less of it changes nothing.

    score(s) = 1 - mean over places and neighbours t of JS(p_s, p_t) / ln 2

JS is the Jensen-Shannon divergence (nats, at most ln 2) of a place's class probabilities. Neighbours are the scales within a
quarter of an octave on either side, on a coarser grid the next one; at an end of the range those on one side. A segmenter's
probabilities are its mean over pixels, so that for it this is the stability of the areas. Needs no views.

Fails where the network collapses, like `agreement`: constant answers are the stablest. Flanks of the true peak are where it is
lowest, so that a weak peak between flat ends is a local maximum, not the highest. On uneven grids neighbours further apart
look less stable. A tile's neighbour at another scale also shows another field, so that mixed tissue looks unstable at
coarse scales.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.needs import outputs_of
from wsiscale.types import ScaleResponse

SOURCE = "ours; Jensen-Shannon divergence: Lin, IEEE Trans. Inf. Theory 37(1), 1991"

OCTAVES = 1 / 4  # how far a neighbour may be: further, a network that is right at both need not be at what lies between


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) one minus the mean divergence from the neighbouring scales, 0..1; NaN where there is only one scale."""
    p = outputs_of(response, "neighbour_agreement").probabilities.astype(np.float64)  # (N, S, C)
    p = np.where(np.isfinite(p), p, np.nan)  # infinity less infinity would warn
    octaves = np.log2(response.scales)
    total, count = np.zeros(len(octaves)), np.zeros(len(octaves))
    for step in range(1, len(octaves)):
        near = np.diff(octaves) >= 0 if step == 1 else octaves[step:] - octaves[:-step] <= OCTAVES + 1e-9  # (S - step,)
        if not near.any():
            break
        stable = np.where(near, 1 - _divergence(p[:, :-step], p[:, step:]).mean(axis=0) / np.log(2), 0)
        for side in (slice(None, -step), slice(step, None)):
            total[side] += stable
            count[side] += near
    mean: NDArray[np.float64] = np.divide(total, count, out=np.full(len(octaves), np.nan), where=count > 0)
    return mean


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Jensen-Shannon of the last axis, in nats."""
    middle = (p + q) / 2
    apart: NDArray[np.float64] = _entropy(middle) - (_entropy(p) + _entropy(q)) / 2
    return apart


def _entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
    return found
