"""What a network's answers on a slide say: a scale with its interval, or a named abstention. Pure numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from wsiscale.criteria import DEFAULT_CRITERION, Criterion, find_criterion, peak
from wsiscale.criteria.mutual_information import dispersed, kept, of_pixels
from wsiscale.search import STRUCTURE_VIEW, Judged
from wsiscale.types import Abstention, ScaleCurve, ScaleEstimate, ScaleResponse

# Fewer places than this make neither an interval nor a test.
MIN_PLACES = 8
# A curve is flat unless chance would give one as marked less than once in a hundred slides.
SIGNIFICANCE = 0.01
# Several criteria that have to agree hold each other in check, and are tested less hard.
JOINED_SIGNIFICANCE = 0.05
RESAMPLES = 400
# Noise moves a network's answers over scale by its contrast alone. What the arrangement of the pixels adds has to be at least
# this share of what is seen.
STRUCTURE_SHARE = 0.2
# Two peaks are two answers when they are this far apart and each wins in this share of the resamples.
BIMODAL_OCTAVES = 0.75
BIMODAL_SHARE = 0.15
# A classifier that is right keeps its answers when the scale changes a little; one that is lost answers by chance, and places
# then differ by that. Cohen's kappa from which on agreement is called substantial (Landis & Koch, Biometrics 33, 1977).
SETTLED = 0.6
# An interval wider than this tells a user nothing.
WIDEST_OCTAVES = 2.0
# That of joined criteria holds their disagreement too.
JOINED_WIDEST_OCTAVES = 3.0
# A range that begins here or finer has all that the slide has.
FINEST = 1.01


def estimate_response(
    response: ScaleResponse,
    criterion: str | Criterion | Callable[[ScaleResponse], NDArray[np.float64]] = DEFAULT_CRITERION,
    *,
    guard: ScaleResponse | None = None,
    seed: int = 0,
) -> ScaleEstimate:
    """The scale that `criterion` finds best in `response`, with a 90 % bootstrap interval over places, or an abstention.

    Pure numpy. Places with non-finite answers are left out, and counted: above a tenth of them there is no estimate. `guard`
    is a response with the view "pixel_shuffled", at some of the places and scales; without one, `response` is where it has it.
    """
    return judged(response, find_criterion(criterion), guard=guard, seed=seed).estimate


def judged(response: ScaleResponse, rule: Criterion, *, guard: ScaleResponse | None, seed: int) -> Judged:
    rows = rule.rows(response) if rule.rows is not None else place_scores(response, rule)[None]  # (K, N, S)
    finite = np.asarray(np.isfinite(rows).all(axis=(0, 2)))
    if response.outputs is not None:  # which not every part of a sum looks at
        finite &= np.isfinite(response.outputs.confidence).all(axis=1)
    used = np.flatnonzero(finite)
    scores, flat = rows[0], True

    def no(reason: str, detail: str, **found: Any) -> Judged:
        why = Abstention(reason, detail)
        return Judged(abstain(rule, response.slide_mpp, why, seed=seed, places=len(used), **found), scores, flat)

    if len(finite) and (~finite).sum() > 0.1 * len(finite):
        if (rule.shares is not None or rule.rows is not None) and not finite.any():
            return no("non_finite", f"{rule.name} says nothing of these answers: NaN or infinity, or not to be trusted")
        return no("non_finite", f"the network answered NaN or infinity at {(~finite).sum()} of {len(finite)} places")
    if len(used) < MIN_PLACES:
        return no("too_few_places", f"{len(used)} places on tissue; an estimate needs {MIN_PLACES}")
    guard = response if guard is None else guard
    response, rows = response.take(used), rows[:, used]
    scales = response.scales
    rng = np.random.default_rng(seed)
    joined = rule.rows is not None
    if not joined:
        scores = rows[0]
        pooled = rule.score(response)
        votes = _votes(response, rule, scores)
        draws, curves = _bootstrap(response, rule, scores, votes, pooled, rng)  # (B,) scales, (B, S)
        of_places = draws
    else:
        scores = rows.sum(axis=0)
        pooled = scores.mean(axis=0)
        votes = np.array([peak(scales, row) for row in scores])
        draws, curves = _bootstrap_joined(rows, scales, rng)
        of_places, _ = _bootstrap_joined(scores[None], scales, rng)
    band = np.percentile(curves, [5, 95], axis=0)
    found: dict[str, Any] = {"curve": ScaleCurve(scales=scales, score=pooled, lo=band[0], hi=band[1]), "votes": votes}
    best = _decide(response, rule, pooled)

    significance = JOINED_SIGNIFICANCE if joined else SIGNIFICANCE
    flat = _flip_test(_centred(scales, scores), rng) > significance
    if flat:
        if (split := _modes(np.log2(votes[np.isfinite(votes)]))) is not None:
            return no("bimodal", _two(split, response.slide_mpp), **found)
        return no("flat_curve", "the score does not change over scale by more than chance between places would", **found)
    if best is None or not np.isfinite(best):
        return no("no_optimum", f"the rule of {rule.name} finds no optimum in this range", **found)
    if joined and not identifies(response, best):
        detail = (
            "the network answers nearly the same everywhere on this slide, of which it can be as sure at a wrong scale; "
            "give a profile or training tiles, or name a criterion"
        )
        return no("one_tissue", detail, **found)
    if _lacks_structure(guard, rule, rng):
        detail = "the network answers the slide's colours alone, not their arrangement: shuffled pixels give the same curve"
        return no("no_structure", detail, **found)
    octaves = np.log2(draws[np.isfinite(draws)])
    if not joined:
        end = _end_reached(scales, scores, best, own_rule=rule.decide is not None)
    else:
        end = _joined_end_reached(scales, best)
    if end is not None:
        detail = f"the {end} end of the range is about as good as anything in it; the optimum may lie beyond"
        return no("boundary_optimum", detail, **found)
    if (split := _modes(octaves)) is not None:
        return no("bimodal", _two(split, response.slide_mpp), **found)
    if joined and (kappa := _keeps_classes(response, best)) < SETTLED:
        detail = (
            "the classes that places have at the best scale and a quarter of an octave on agree too little (Cohen's kappa "
            f"{kappa:.2f}): the network answers by chance more than by tissue; give a profile or training tiles, or name a "
            "criterion"
        )
        return no("unsettled", detail, **found)
    finest, coarsest = _indistinct(scales, pooled, best, own_rule=rule.decide is not None)
    answer = float(np.log2(best))

    def reach(drawn: NDArray[np.float64]) -> tuple[float, float]:
        """The octaves down and up from the answer that hold 90 % of what was drawn, and all that is as good."""
        low, high = np.percentile(np.log2(drawn[np.isfinite(drawn)]), [5, 95])
        return float(min(low, finest)) - answer, float(max(high, coarsest)) - answer

    lo, hi = reach(draws)
    lo, hi = -np.hypot(lo, rule.usual_error), np.hypot(hi, rule.usual_error)
    # Nothing was asked beyond the ends.
    lo, hi = max(lo, np.log2(scales[0]) - answer), min(hi, np.log2(scales[-1]) - answer)
    if hi - lo > (JOINED_WIDEST_OCTAVES if joined else WIDEST_OCTAVES):
        return no("wide_interval", f"the places disagree: the interval is {hi - lo:.1f} octaves wide", **found)
    result = ScaleEstimate(
        scale=float(best),
        ci90=(float(best * 2**lo), float(best * 2**hi)),
        slide_mpp=response.slide_mpp,
        abstained=None,
        criterion=rule.name,
        places=len(used),
        seed=seed,
        curve=found["curve"],
        votes=votes,
    )
    # More places can narrow what they differ by, not what the criteria do.
    return Judged(result, scores, flat, reach(of_places))


def abstain(
    rule: Criterion,
    slide_mpp: float | None,
    why: Abstention,
    *,
    seed: int,
    places: int = 0,
    curve: ScaleCurve | None = None,
    votes: NDArray[np.float64] | None = None,
) -> ScaleEstimate:
    return ScaleEstimate(
        scale=None,
        ci90=None,
        slide_mpp=slide_mpp,
        abstained=why,
        criterion=rule.name,
        curve=curve,
        votes=np.empty(0) if votes is None else votes,
        places=places,
        seed=seed,
    )


def named(scale: float, mpp: float | None) -> str:
    return f"{scale * mpp:.3g} µm/px" if mpp is not None else f"scale {scale:.3g}"


def place_scores(response: ScaleResponse, rule: Criterion) -> NDArray[np.float64]:
    """(N, S): the criterion on each place alone, or what the place adds to it; NaN where a place's answers are not finite."""
    if response.places == 0:
        return np.empty((0, len(response.scales)))
    if rule.rows is not None:
        total: NDArray[np.float64] = rule.rows(response).sum(axis=0)
        return total
    if rule.shares is not None:
        return rule.shares(response)
    return np.stack([rule.score(response.take(np.array([i]))) for i in range(response.places)])


def _decide(response: ScaleResponse, rule: Criterion, score: NDArray[np.float64]) -> float | None:
    return rule.decide(response) if rule.decide is not None else peak(response.scales, score)


def _votes(response: ScaleResponse, rule: Criterion, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) the scale that each place alone would choose; NaN where it would choose none."""
    if rule.decide is None:
        return np.array([peak(response.scales, row) for row in scores])
    one = [_decide(response.take(np.array([i])), rule, scores[i]) for i in range(len(scores))]
    return np.array([np.nan if scale is None else scale for scale in one])


def _bootstrap(
    response: ScaleResponse,
    rule: Criterion,
    scores: NDArray[np.float64],
    votes: NDArray[np.float64],
    pooled: NDArray[np.float64],
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Decisions (B,) and score curves (B, S) on places drawn with replacement."""
    draws = rng.integers(len(scores), size=(RESAMPLES, len(scores)))
    mean_of_places = rule.shares is not None or np.allclose(pooled, scores.mean(axis=0), rtol=1e-5, atol=1e-8)
    if mean_of_places and (rule.decide is None or rule.combine is not None):
        # Most criteria are means over places; their resamples are means of rows, and need no second look at the response.
        curves = scores[draws].mean(axis=1)
        if rule.combine is None:
            return np.array([peak(response.scales, c) for c in curves]), curves
        combined = [rule.combine(v) for v in votes[draws]]
        return np.array([np.nan if d is None else d for d in combined]), curves
    resampled = [response.take(places) for places in draws]
    curves = np.stack([rule.score(r) for r in resampled])
    decided = [_decide(r, rule, c) for r, c in zip(resampled, curves, strict=True)]
    return np.array([np.nan if d is None else d for d in decided]), curves


def _bootstrap_joined(
    rows: NDArray[np.float64], scales: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same of several criteria (K, N, S), drawn as well: which of them weighs how much is as uncertain as which place.

    Weights of criteria are those of the Bayesian bootstrap (Rubin, Annals of Statistics 9, 1981).
    """
    draws = rng.integers(rows.shape[1], size=(RESAMPLES, rows.shape[1]))
    weights = rng.exponential(size=(len(rows), RESAMPLES)) if len(rows) > 1 else np.ones((1, RESAMPLES))
    curves = sum(w[:, None] * part[draws].mean(axis=1) for w, part in zip(weights, rows, strict=True))
    curves = np.asarray(curves / weights.sum(axis=0)[:, None] * len(rows))
    return np.array([peak(scales, c) for c in curves]), curves


def _centred(scales: NDArray[np.float64], curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Curves (N, S) without their means, each scale weighing as much as the octaves it stands for.

    So a search that looked closer at some scales tests the same curve as an even grid does.
    """
    weight = _weight(scales)
    centred: NDArray[np.float64] = (curves - (curves * weight).mean(axis=1, keepdims=True)) * np.sqrt(weight)
    return centred


def _weight(scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """(S,) the octaves that each scale stands for, 1 on average."""
    share = np.gradient(np.log2(scales))
    weight: NDArray[np.float64] = share / share.mean()
    return weight


def _flip_test(curves: NDArray[np.float64], rng: np.random.Generator, resamples: int = 999) -> float:
    """The p-value of (N, S) curves' mean being no more marked than places with nothing in common would give.

    A sign-flip test: each place's centred curve is as likely as its mirror image if the places share no trend. It keeps
    each curve's smoothness over scale, which shuffling the scales would destroy.
    """
    seen = np.square(curves.mean(axis=0)).sum()
    if seen == 0:
        return 1.0
    signs = rng.choice([-1.0, 1.0], size=(resamples, len(curves)))
    chance = np.square(signs @ curves / len(curves)).sum(axis=1)
    return float((1 + (chance >= seen * (1 - 1e-12)).sum()) / (1 + resamples))


def identifies(response: ScaleResponse, best: float) -> bool:
    """Whether there is more to go by than how sure a classifier is: at `best`, where it is surest, it tells places apart.

    A segmenter always does, what it looks for from what is beside that.
    """
    return response.outputs is None or of_pixels(response) or dispersed(response, best)


def _keeps_classes(response: ScaleResponse, best: float) -> float:
    """How far a small change of scale leaves places their class, -1..1; 1 where places have no class."""
    return 1.0 if response.outputs is None or of_pixels(response) else kept(response, best)


def _lacks_structure(guard: ScaleResponse, rule: Criterion, rng: np.random.Generator) -> bool:
    """Whether tiles with their pixels shuffled - the same colours, no structure - would have given the same curve."""
    scrambled = guard.views.get(STRUCTURE_VIEW)
    if scrambled is None:
        return False
    # What a criterion with views of its own would say of a view is not known, and a sum of criteria has other units there; the
    # network's confidence has to do, and only for whether there is structure at all.
    own = rule.rows is None and not set(rule.views) - {STRUCTURE_VIEW}
    if not own and guard.outputs is None:
        return False
    judge = rule if own else find_criterion("confidence")
    seen = place_scores(guard, judge)
    null = place_scores(replace(scrambled, views={STRUCTURE_VIEW: scrambled}), judge)
    finite = np.isfinite(seen).all(axis=1) & np.isfinite(null).all(axis=1)
    if not finite.any():
        return False  # of shuffled tiles the criterion has nothing to say: what it says comes from their arrangement
    added = (seen - null)[finite]  # (N, S)
    # Signed ranks, as Wilcoxon's: a few places where much is added tell less than many where a little is.
    signed = np.sign(added) * stats.rankdata(np.abs(added), axis=1)
    significance = SIGNIFICANCE if rule.rows is None else JOINED_SIGNIFICANCE
    if _flip_test(signed * np.sqrt(_weight(guard.scales)), rng) > significance:
        return True
    return own and bool(np.ptp(added.mean(axis=0)) < STRUCTURE_SHARE * np.ptp(seen[finite].mean(axis=0)))


def _end_reached(scales: NDArray[np.float64], scores: NDArray[np.float64], best: float, *, own_rule: bool) -> str | None:
    """The end of the range, "finest" or "coarsest", at which `best` lies or from which its score does not stand out.

    A paired t test over places, one-sided, at `SIGNIFICANCE` shared among the scales that the best was chosen from. Methods
    with a rule of their own do not go by the height of the score, and are only held to not choosing an end.
    """
    octaves = np.log2(scales)
    steps = np.diff(octaves)
    # A search that looked closer at some scales has chosen them: it might have looked that close anywhere.
    candidates = round(float((octaves[-1] - octaves[0]) / steps.min())) + 1
    for end, step, name in ((0, steps[0], "finest"), (-1, steps[-1], "coarsest")):
        if abs(np.log2(best / scales[end])) < step / 2:
            return name
        top = int(np.abs(np.log2(scales / best)).argmin())
        gain = scores[:, top] - scores[:, end]
        if not own_rule and not stats.ttest_1samp(gain, 0, alternative="greater").pvalue < SIGNIFICANCE / candidates:
            return name
    return None


def _joined_end_reached(scales: NDArray[np.float64], best: float) -> str | None:
    """The same of several criteria joined: whether `best` is that end. An interval may well end there.

    The finest end, smooth and surely classified by colour, is where single scores peak without a cause. Joined ones hold a null
    against it, and where the range begins at level 0 or finer it is an answer: that is all there is of the slide.
    """
    octaves = np.log2(scales)
    if np.log2(best) > octaves[-1] - (octaves[-1] - octaves[-2]) / 2:
        return "coarsest"
    if scales[0] > FINEST and np.log2(best) < octaves[0] + (octaves[1] - octaves[0]) / 2:
        return "finest"
    return None


def _indistinct(
    scales: NDArray[np.float64], pooled: NDArray[np.float64], best: float, *, own_rule: bool
) -> tuple[float, float]:
    """The octaves around `best` that the criterion cannot tell from it, however alike the places are.

    A parabola through the scales of the grid is good to about a quarter of a step. A rule of its own votes for scales of the
    grid, and so is good to half a step. Scales that tie at the top are all as good as their middle.
    """
    octaves, answer = np.log2(scales), float(np.log2(best))
    nearest = int(np.abs(octaves - answer).argmin())
    step = float(np.diff(octaves[max(nearest - 1, 0) : nearest + 2]).max())
    lo, hi = answer - step / 4, answer + step / 4
    if own_rule:
        return answer - step / 2, answer + step / 2
    tied = octaves[pooled == pooled.max()]
    return (min(lo, float(tied[0])), max(hi, float(tied[-1]))) if len(tied) > 1 else (lo, hi)


def _two(split: tuple[float, float], slide_mpp: float | None) -> str:
    low, high = (named(2**octave, slide_mpp) for octave in split)
    return f"two scales are about as good: {low} and {high}"


def _modes(octaves: NDArray[np.float64]) -> tuple[float, float] | None:
    """The two medians, if the resampled answers (B,) fall into two groups far apart."""
    ordered = np.sort(octaves)
    gaps = np.diff(ordered)
    if len(gaps) == 0 or gaps.max() < BIMODAL_OCTAVES:
        return None
    cut = int(gaps.argmax()) + 1
    if min(cut, len(ordered) - cut) < BIMODAL_SHARE * len(ordered):
        return None
    return float(np.median(ordered[:cut])), float(np.median(ordered[cut:]))
