"""Where, and at which scales, a network is asked: coarse to fine, a few places first, more as long as they are needed. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsiscale.responses import merge_responses, without_view
from wsiscale.types import ScaleEstimate, ScaleResponse

STRUCTURE_VIEW = "pixel_shuffled"

# Half an octave is narrower than the peaks of networks are, and four times as cheap as the grid of 8 per octave.
COARSE_OCTAVES = 0.5
FIRST_PLACES = 16
# Standard errors of the difference over places within which a scale may be the best: to be looked at closer, and to be ruled
# out before the search ends early. Few places of a slide with two kinds of tissue are easily of one kind.
PLAUSIBLE, RULED_OUT = 2.0, 3.0
# Of the places, in which case the slide may hold two kinds of tissue whose shares a few places do not tell.
DISSENT = 0.15
# Scales that may be the best and lie further apart than this may be two modes.
ONE_MODE = 1.0

# (places, scales, guarded): the response of these places at these scales, by their numbers; guarded: with STRUCTURE_VIEW.
Ask = Callable[[NDArray[np.intp], NDArray[np.intp], bool], ScaleResponse]


@dataclass(frozen=True)
class Judged:
    """What a response says so far."""

    estimate: ScaleEstimate
    scores: NDArray[np.float64]  # (N, S) of each place that counts alone; empty where nothing was scored
    flat: bool  # the places have no curve over scale in common, so far
    # Octaves from the answer that more places could narrow; without what the criterion is usually off by.
    sampled: tuple[float, float] | None = None


Judge = Callable[[ScaleResponse, ScaleResponse | None], Judged]


@dataclass(frozen=True)
class Searched:
    """The response that the search ended with, and its answer."""

    estimate: ScaleEstimate
    response: ScaleResponse
    guard: ScaleResponse | None


def full_grid(ask: Ask, judge: Judge, scales: NDArray[np.float64], *, places: int, guarded: bool) -> Searched:
    """Every place at every scale."""
    response = ask(np.arange(places), np.arange(len(scales)), guarded)
    return Searched(judge(response, None).estimate, response, None)


def adaptive(
    ask: Ask,
    judge: Judge,
    scales: NDArray[np.float64],
    *,
    places: int,
    precision: float,
    guarded: bool,
    refine: bool = True,
) -> Searched:
    """The answer of the full grid to within `precision` octaves, from a part of it.

    1. FIRST_PLACES places at scales half an octave apart; every other of these with shuffled pixels beside them, for the
       test of structure, where `guarded`.
    2. Where the curve is not flat: the scales between, around every scale that may be the best. All modes are kept.
    3. Half as many places again, at all scales so far, until the interval is within `precision` octaves on either side, or
       the places run out. Every abstention is put to this, but for an optimum that is plainly at an end of the range.

    The response stays a rectangle, places x scales. A criterion that does not look at each scale by itself is not to be
    given an uneven grid: without `refine` every scale is asked, and only places are spared.
    """
    step = float(np.log2(scales[1] / scales[0]))
    stride = max(1, round(COARSE_OCTAVES / step))
    coarse = _spread(len(scales), stride)
    watched = coarse[_spread(len(coarse), 2)] if guarded else coarse[:0]
    columns = coarse if refine else np.arange(len(scales))

    def look(new: NDArray[np.intp], *, guarding: bool) -> tuple[ScaleResponse, ScaleResponse | None]:
        """New places at all scales so far, and their guard."""
        if not guarding:
            return ask(new, columns, False), None
        part = ask(new, watched, True)
        plain, rest = without_view(part, STRUCTURE_VIEW), np.setdiff1d(columns, watched)
        return (merge_responses(plain, ask(new, rest, False), along="scales") if len(rest) else plain), part

    used = min(FIRST_PLACES, places)
    response, guard = look(np.arange(used), guarding=guarded)
    while True:
        judged = judge(response, guard)
        reason = None if judged.estimate.abstained is None else judged.estimate.abstained.reason
        best = _best(judged)
        ended = reason == "boundary_optimum" and best in (0, len(columns) - 1)
        near = _plausible(judged, PLAUSIBLE)
        # While more places may still narrow the choice, finer scales everywhere would be wasted.
        if best is not None and not judged.flat and reason != "no_structure" and (used == places or _one_mode(judged, near)):
            # Where the end is best, what else may be would have to beat it by more than noise: that takes places, not scales.
            modes = columns[near[:0] if ended else near]
            wanted = _around(modes, coarse, best=int(columns[best]), reach=stride - 1, count=len(scales))
            missing = np.setdiff1d(wanted, columns)
            if len(missing):
                response = merge_responses(response, ask(np.arange(used), missing, False), along="scales")
                columns = np.union1d(columns, missing)
                continue
        if used == places or _settled(judged, precision, ended=ended):
            return Searched(judged.estimate, response, guard)
        new = np.arange(used, min(used + used // 2, places))
        more, more_guard = look(new, guarding=guarded and reason == "no_structure")
        response = merge_responses(response, more, along="places")
        if guard is not None and more_guard is not None:
            guard = merge_responses(guard, more_guard, along="places")
        used += len(new)


def _spread(count: int, stride: int) -> NDArray[np.intp]:
    """0 to count - 1, both included, evenly spread with steps of at most `stride`."""
    steps = -(-(count - 1) // stride)
    return np.unique(np.round(np.linspace(0, count - 1, steps + 1)).astype(np.intp))


def _best(judged: Judged) -> int | None:
    """The column with the highest score, where there is one."""
    curve = judged.estimate.curve
    return None if curve is None or not np.isfinite(curve.score).all() else int(np.argmax(curve.score))


def _plausible(judged: Judged, errors: float) -> NDArray[np.intp]:
    """The columns whose score is within so many standard errors over places of the best one's, itself included."""
    best = _best(judged)
    if best is None:
        return np.empty(0, np.intp)
    behind = judged.scores[:, [best]] - judged.scores  # (N, S)
    noise = behind.std(axis=0, ddof=1) / np.sqrt(len(behind))
    return np.flatnonzero(behind.mean(axis=0) <= errors * noise)


def _one_mode(judged: Judged, near: NDArray[np.intp]) -> bool:
    """Whether all that may be the best lies together."""
    curve = judged.estimate.curve
    return curve is not None and len(near) > 0 and bool(np.ptp(np.log2(curve.scales[near])) <= ONE_MODE)


def _around(near: NDArray[np.intp], coarse: NDArray[np.intp], *, best: int, reach: int, count: int) -> NDArray[np.intp]:
    """All scales within `reach` of the plausible ones of the coarse grid and of the best one.

    Not of every plausible scale: each round would then widen the region that the last one has made finer.
    """
    middle = np.append(np.intersect1d(near, coarse), best)
    wanted = middle[:, None] + np.arange(-reach, reach + 1)
    return np.unique(wanted[(wanted >= 0) & (wanted < count)])


def _settled(judged: Judged, precision: float, *, ended: bool) -> bool:
    """Whether more places are not worth their cost: the interval is narrow enough, and no second mode is left."""
    if not _one_mode(judged, _plausible(judged, RULED_OUT)):
        return False
    found = judged.estimate
    if judged.sampled is None or found.scale is None:
        return ended
    far = np.abs(np.log2(found.votes / found.scale)) > ONE_MODE  # NaN, a place without a vote, is not
    lo, hi = judged.sampled
    return bool(max(hi, -lo) <= precision and far.mean() < DISSENT)
