"""Distance to the nearest boundary between two classes: penkin2023 with what it leaves out.

    d(s) = min over c' != c of (z_c(s) - z_c'(s)) / ||W_c - W_c'||,   z = W f + b, c the likeliest class
    score(s) = trimmed mean over places of d(s) / median over s of ||f(s)||

penkin2023 measures how far f reaches along W_c; a class decision is about the *difference* to the runner-up, bias included,
and that distance cannot grow for all classes at once. The nearest plane is not always the second likeliest class's. Dividing
by a place's own typical length lets strongly stained places not speak for all; trimming (a tenth at either end) drops those
that are far from everything. Dividing at each scale by the length *there* was tried and flattens the curve: off its scale a
network's features shrink, and so does their length.

Fails where a network is sure and wrong, as every criterion of confidence, though it saturates less than a probability. A
trend over scale of the features' length, as networks without normalisation have, is a trend of the score. It takes the input
of the last linear layer as the whole truth: for heads that are not linear there is none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.needs import bias_of, head_of
from wsiscale.criteria.shares import jackknife, leave_one_out, with_gaps
from wsiscale.types import ScaleResponse

SOURCE = "ours, after penkin2023; distance to pairwise hyperplanes: Elsayed et al., NeurIPS 2018 (arXiv:1803.05598)"

TRIMMED = 0.1  # of the places, at either end: survives a pen mark or a fold, and loses little where all are well


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) typical distance to the nearest boundary, in lengths of the features; never negative."""
    return _typical(_distances(response))


def shares(response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S) what each place adds, to first order."""
    distance = _distances(response)
    finite = np.isfinite(distance).all(axis=1)
    distance = distance[finite]
    without = np.array([_typical(distance[rest]) for rest in leave_one_out(len(distance))])
    return with_gaps(jackknife(_typical(distance), without), finite)


def _distances(response: ScaleResponse) -> NDArray[np.float64]:
    """To the nearest boundary, in typical lengths of the place's features: (N, S)."""
    features, weight = head_of(response, "hyperplane")
    with np.errstate(invalid="ignore"):  # infinite features come out as NaN, which is told on
        logits = features @ weight.T + bias_of(response)  # (N, S, C)
        likeliest = np.argmax(logits, axis=2)[..., None]
        gap = np.take_along_axis(logits, likeliest, axis=2) - logits
        unit = np.median(np.linalg.norm(features, axis=2), axis=1)[:, None, None]  # (N, 1, 1)
    square = np.square(weight).sum(axis=1)
    between = np.sqrt(np.maximum(square[:, None] + square - 2 * weight @ weight.T, 0))  # (C, C)
    # Two classes with the same weights have no boundary; the class itself is one of them.
    between[between <= 1e-6 * np.sqrt(square.max(initial=0))] = np.inf
    apart = between[likeliest[..., 0]] * np.where(unit > 0, unit, np.inf)
    ratio: NDArray[np.float64] = np.where(np.isinf(apart), np.inf, gap / np.where(np.isinf(apart), 1, apart))
    distance: NDArray[np.float64] = ratio.min(axis=2)
    distance[np.isinf(distance)] = 0  # one class, or nothing but zeros
    distance[~np.isfinite(gap).all(axis=2)] = np.nan
    return distance


def _typical(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """(S,) the trimmed mean over places."""
    cut = int(TRIMMED * len(distance))
    mean: NDArray[np.float64] = np.sort(distance, axis=0)[cut : len(distance) - cut].mean(axis=0)
    return mean
