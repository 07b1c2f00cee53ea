"""Extrema of the pooled features: M. A. Bagamaev's thesis, Moscow State University 2022.

For each place, a "pyramid" of one centre at every scale:

1. a channel's weight is |mean over scales of dp_c/da_k|, a the pooled input of the head, p_c the probability of class c;
2. the round(K * 50 / 100) channels of largest weight stay;
3. their curves over scale are smoothed by a Gaussian of 8 grid steps, the ends reflected;
4. the scales of all extrema of the curves and of their derivatives are pooled, and their median is the place's answer;

and the median over places is the slide's. As published, quirks included: maxima, minima and inflections count alike, whatever
their height; the probability is differentiated (the thesis says the value before softmax, its program does not), so that scales
at which the network is sure hardly count; the smoothing reaches 32 of 95 samples, beyond either end. A channel that is
constant, such as a dead one, has an extremum at every scale, and votes for the middle of the range.

**It cannot be trusted**: the median of extrema that lie anywhere is the middle of the range. On noise it answers 5.2 on its
grid of 0.5 to 9.9, and the one true scale that it was published with is 5. Here for comparison.

What differs: the thesis gives it the *true* class. Here c is the class that the network finds likeliest, on average over
the scales of the place; `bagamaev2022_with_labels` takes labels, for benchmarks.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from wsiscale.criteria.needs import head_of, outputs_of
from wsiscale.errors import OptionError
from wsiscale.types import ScaleResponse

SOURCE = "M. A. Bagamaev, graduation thesis, Lomonosov Moscow State University 2022, section 5"

SIGMA = 8.0  # grid steps, whatever they measure
PERCENT = 50  # of the channels

Pool = Literal["all", "one", "global"]


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) minus the mean distance to the places' answers, level-0 px per px: what their median minimises.

    The method has no score of its own. Zero for a place without an extremum.
    """
    if not _finite(response):
        return np.full(len(response.scales), np.nan)
    votes = place_votes(response, _predicted(response))
    distance: NDArray[np.float64] = np.nan_to_num(np.abs(response.scales - votes[:, None])).mean(axis=0)
    return -distance


def decide(response: ScaleResponse) -> float | None:
    """The median over places of their medians, level-0 px per px; None where no place has an extremum.

    On a grid other than `bagamaev2022_grid` derivatives are taken on the spacing there is, and the smoothing stays 8 steps.
    """
    return bagamaev2022_with_labels(response, _predicted(response))


def bagamaev2022_with_labels(
    response: ScaleResponse, labels: NDArray[np.intp], *, pool: Pool = "all", sigma: float = SIGMA, percent: float = PERCENT
) -> float | None:
    """`decide` with the true class of each place, `labels` (N,), as published; for benchmarks.

    `sigma`, grid steps, and `percent` of the channels are what the thesis tried other values of, on its test.
    """
    if not _finite(response):
        return None
    return combine(place_votes(response, labels, pool=pool, sigma=sigma, percent=percent))


def combine(votes: NDArray[np.float64]) -> float | None:
    """The median of votes (N,), NaN for none."""
    votes = votes[np.isfinite(votes)]
    return float(np.median(votes)) if len(votes) else None


def bagamaev2022_grid() -> NDArray[np.float64]:
    """The published grid, 0.5 to 9.9 in linear steps of 0.1: (95,) level-0 px per px."""
    return np.arange(5, 100) / 10


def place_votes(
    response: ScaleResponse, classes: NDArray[np.intp], *, pool: Pool = "all", sigma: float = SIGMA, percent: float = PERCENT
) -> NDArray[np.float64]:
    """Each place's answer, the median of its extrema: (N,) level-0 px per px, NaN where it has none.

    `pool` is which extrema count: "all" (the published results), "one" (of channels that have just one; where the curve has
    more, its derivative's if that has just one), "global" (those as far from zero as the curve ever gets).
    """
    counts = extrema_counts(response, classes, pool=pool, sigma=sigma, percent=percent)
    return np.array([np.median(np.repeat(response.scales, c)) if c.any() else np.nan for c in counts])


def extrema_counts(
    response: ScaleResponse, classes: NDArray[np.intp], *, pool: Pool = "all", sigma: float = SIGMA, percent: float = PERCENT
) -> NDArray[np.intp]:
    """How many extrema of the kept channels and their derivatives lie at each scale: (N, S)."""
    features, _ = head_of(response, "bagamaev2022")
    scales = response.scales
    if len(scales) < 2:
        return np.zeros(features.shape[:2], np.intp)
    kept = kept_channels(channel_weights(response, classes), percent=percent)[:, None]  # (N, 1, F)
    curves = gaussian_filter1d(features, sigma, axis=1)
    slopes = _derivative(curves, scales)
    of_curves, of_slopes = extrema(curves, scales), extrema(slopes, scales)
    if pool == "one":
        single = of_curves.sum(axis=1, keepdims=True) == 1
        of_curves *= single
        of_slopes *= ~single & (of_slopes.sum(axis=1, keepdims=True) == 1)
    elif pool == "global":
        for found, values in ((of_curves, np.abs(curves)), (of_slopes, np.abs(slopes))):
            found *= values.max(axis=1, keepdims=True) - values <= 1e-10
    counts: NDArray[np.intp] = ((of_curves + of_slopes) * kept).sum(axis=2)
    return counts


def channel_weights(response: ScaleResponse, classes: NDArray[np.intp]) -> NDArray[np.float64]:
    """|mean over scales of dp_c/da_k| of each place for its class: (N, F)."""
    _, weight = head_of(response, "bagamaev2022")
    probabilities = _probabilities(response)  # (N, S, C)
    chosen = np.take_along_axis(probabilities, classes[:, None, None], axis=2)  # (N, S, 1)
    # dp_c/da = p_c (W_c - sum_j p_j W_j); only the mean over scales of p_c (1[j=c] - p_j) depends on the place.
    share = (chosen * ((np.arange(len(weight)) == classes[:, None, None]) - probabilities)).mean(axis=1)  # (N, C)
    weights: NDArray[np.float64] = np.abs(share @ weight)
    return weights


def kept_channels(weights: NDArray[np.float64], *, percent: float = PERCENT) -> NDArray[np.bool_]:
    """The half of the channels with the largest weights, and all that tie with the smallest of them: (N, F)."""
    count = round(weights.shape[1] * percent / 100)
    if count == 0:
        return np.zeros_like(weights, bool)
    return weights >= np.sort(weights, axis=1)[:, -count, None]


def extrema(curves: NDArray[np.float64], scales: NDArray[np.float64]) -> NDArray[np.intp]:
    """How many extrema curves (N, S, K) have at each scale: (N, S, K).

    One where the derivative is zero, the last scale excepted, and one where it changes sign, at the scale on whose side it
    is nearer to zero. A scale between two changes can get both.
    """
    slope = _derivative(curves, scales)
    here, there = slope[:, :-1], slope[:, 1:]
    crossing = here * there < 0
    nearer = np.abs(here) < np.abs(there)
    found = np.zeros(curves.shape, np.intp)
    found[:, :-1] += (here == 0) | (crossing & nearer)
    found[:, 1:] += crossing & ~nearer
    return found


def _derivative(curves: NDArray[np.float64], scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """Central differences over scale, one-sided at the ends: (N, S, K)."""
    steps = np.diff(scales)
    # One step for an even grid: the general formula would leave rounding where a constant curve has exact zeros.
    spacing = steps.mean() if np.allclose(steps, steps[0], rtol=1e-6, atol=0) else scales
    slope: NDArray[np.float64] = np.gradient(curves, spacing, axis=1)
    return slope


def _predicted(response: ScaleResponse) -> NDArray[np.intp]:
    likeliest: NDArray[np.intp] = _probabilities(response).mean(axis=1).argmax(axis=1)
    return likeliest


def _probabilities(response: ScaleResponse) -> NDArray[np.float64]:
    probabilities = outputs_of(response, "bagamaev2022").probabilities.astype(np.float64)
    _, weight = head_of(response, "bagamaev2022")
    if probabilities.shape[2] != len(weight):
        raise OptionError(
            f"bagamaev2022: the head has {len(weight)} classes and the network answers {probabilities.shape[2]}; "
            "choose another criterion"
        )
    return probabilities


def _finite(response: ScaleResponse) -> bool:
    features, _ = head_of(response, "bagamaev2022")
    return bool(np.isfinite(features).all() and np.isfinite(_probabilities(response)).all())
