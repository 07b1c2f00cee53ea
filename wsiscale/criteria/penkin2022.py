"""Votes of a network's blocks: Penkin, Khvostikov & Krylov, GraphiCon 2022.

Each block's channels, pooled, are curves over scale. Channels are filtered (F) and averaged (M); the extremum of the average
is the block's vote; the mean of the votes is the answer. As published, quirks included:

* F drops a channel that is constant, or whose maximum *and* minimum both lie at the ends of the range. It is no test of
  monotony: one interior extremum is enough, and noise passes.
* A block votes for the *minimum* of its curve where only that is interior. (The paper says argmax; its program does this.)
* Votes are averaged on the axis of `signed`, where x1/2 is -2 and x2 is +2: together they say "leave it as it is".
* "Linear regression minimising l2" is that mean.

What differs here, and has to: a view keeps its number of pixels and sees more or less of the slide, where the paper resizes
one whole image, so that its padding weighs differently at each scale. The curves are the pooled means of the network's own
`stages`, not of VGG19's five blocks: where a stage's watched layer is a ReLU, that is the paper's AvgPool(ReLU(.)); where it
is a convolution the ReLU is missing, and the curves may be negative. The published program pooled twice before block 5;
that is not imitated. A slide is many images: each place is one of the paper's, and the slide's answer continues its least
squares, the mean of the places' answers on the same axis.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import OptionError
from wsiscale.types import ScaleResponse

SOURCE = "Penkin, Khvostikov, Krylov, GraphiCon 2022, section 3"

# The published grid. Between -1.25 and 1.25 there is only 0, the original size; means that fall there are read so too.
GRID = (*np.arange(-3, -1, 0.25), 0.0, *np.arange(1.25, 4.25, 0.25))
DEAD_ZONE = 1.25

_SLACK = 1e-9  # for magnifications that went through a division and back


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) mean over places of the mean over blocks of their merged curves, each scaled to 0..1.

    Zero for a place at which F leaves no channel. It shows what the votes come from; the answer is `decide`'s.
    """
    if not _finite(response):
        return np.full(len(response.scales), np.nan)
    curves = np.stack(_merged_curves(response))  # (B, N, S)
    base = curves - curves.min(axis=2, keepdims=True)
    height = base.max(axis=2, keepdims=True)
    scaled = np.divide(base, height, out=np.zeros_like(base), where=height > 0)
    blocks = np.isfinite(curves).all(axis=2).sum(axis=0)[:, None]  # (N, 1)
    mean: NDArray[np.float64] = (scaled.sum(axis=0) / np.maximum(blocks, 1)).mean(axis=0)
    return mean[::-1]


def decide(response: ScaleResponse, *, reference: float = 1.0) -> float | None:
    """The mean of the places' answers on the signed axis, level-0 px per px; None where no block of any place votes.

    `reference` is the scale of the "original" image, level 0 if not said otherwise. On a grid other than
    `penkin2022_grid` the rule works with the scales that it gets.
    """
    return combine(place_votes(response, reference=reference), reference=reference) if _finite(response) else None


def combine(votes: NDArray[np.float64], *, reference: float = 1.0) -> float | None:
    """The mean of scales (N,), NaN for none, on the signed axis."""
    axis = [signed(float(scale), reference=reference) for scale in votes[np.isfinite(votes)]]
    return unsigned(float(np.mean(axis)), reference=reference) if axis else None


def place_votes(response: ScaleResponse, *, reference: float = 1.0) -> NDArray[np.float64]:
    """Each place's answer, the mean of its blocks' votes: (N,) level-0 px per px, NaN where no block votes."""
    axis = np.array([signed(float(scale), reference=reference) for scale in response.scales[::-1]])
    votes = np.stack([block_votes(axis, curve) for curve in _merged_curves(response)], axis=1)  # (N, B)
    cast = [v[np.isfinite(v)] for v in votes]
    return np.array([unsigned(float(v.mean()), reference=reference) if len(v) else np.nan for v in cast])


def penkin2022_grid(*, reference: float = 1.0) -> NDArray[np.float64]:
    """The 21 published scales, a third to four times the original size, as level-0 px per px, ascending: (21,).

    Exact ratios: the program truncates to whole pixels (74 of 224 for a third).
    """
    return np.array([unsigned(value, reference=reference) for value in reversed(GRID)])


def signed(scale: float, *, reference: float = 1.0) -> float:
    """The paper's coordinate of a scale: +m for m times the original size, -1/m for m < 1, 0 within a factor 1.25."""
    magnification = reference / scale
    if magnification >= DEAD_ZONE - _SLACK:
        return magnification
    return -1 / magnification if 1 / magnification >= DEAD_ZONE - _SLACK else 0.0


def unsigned(value: float, *, reference: float = 1.0) -> float:
    """The scale of a signed coordinate; all between -1.25 and 1.25 is the original size."""
    if abs(value) < DEAD_ZONE - _SLACK:
        return reference
    return reference / value if value > 0 else reference * -value


def block_votes(axis: NDArray[np.float64], curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """One block's vote at each place from its merged curves (N, S), magnification ascending: (N,), NaN for none."""
    high, low = curves.argmax(axis=1), curves.argmin(axis=1)
    largest, smallest = np.abs(curves.max(axis=1)), np.abs(curves.min(axis=1))
    ends = (0, curves.shape[1] - 1)
    inside_high, inside_low = ~np.isin(high, ends), ~np.isin(low, ends)
    # Of two interior extrema the one further from zero; after a ReLU that is always the maximum.
    vote_high = inside_high & (~inside_low | (largest > smallest))
    return np.where(vote_high, axis[high], np.where(inside_low, axis[low], np.nan))


def kept_channels(curves: NDArray[np.float64]) -> NDArray[np.bool_]:
    """F, for curves (N, S, K), magnification ascending: (N, K)."""
    constant: NDArray[np.bool_] = np.isclose(curves.max(axis=1), curves.min(axis=1))
    ends = (0, curves.shape[1] - 1)
    at_ends = np.isin(curves.argmax(axis=1), ends) & np.isin(curves.argmin(axis=1), ends)
    kept: NDArray[np.bool_] = ~(constant | at_ends)
    return kept


def _merged_curves(response: ScaleResponse) -> list[NDArray[np.float64]]:
    """M of F for each stage: (N, S) with magnification ascending, as the paper counts; NaN where F keeps no channel."""
    merged = []
    for mean in _stage_means(response):
        curves = mean[:, ::-1].astype(np.float64)  # (N, S, K)
        kept = kept_channels(curves)[:, None]  # (N, 1, K)
        total, count = np.where(kept, curves, 0).sum(axis=2), kept.sum(axis=2)
        merged.append(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))
    return merged


def _finite(response: ScaleResponse) -> bool:
    return all(np.isfinite(mean).all() for mean in _stage_means(response))


def _stage_means(response: ScaleResponse) -> list[NDArray[np.float32]]:
    if not response.stages:
        raise OptionError("penkin2022 needs the answers of the network's stages, and none was watched; name layers to watch")
    return [response.layers[stage].mean for stage in response.stages]
