"""ScaleResponse -> score over scale. One file per method, each pure numpy; docs/methods.md compares them.

A criterion is a value: a score that is higher where a scale suits the network better, and where the method has one its own
rule for the best scale. New ones need no registration: any callable ScaleResponse -> (S,) will do, see `find_criterion`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria import (
    agreement,
    bagamaev2022,
    batchnorm_distance,
    batchnorm_tangent,
    combining,
    confidence,
    effective_rank,
    energy,
    hyperplane,
    mutual_information,
    neighbour_agreement,
    nuclear_norm,
    object_size,
    over_null,
    penkin2022,
    penkin2023,
    pixel_entropy,
    reference,
)
from wsiscale.criteria.bagamaev2022 import bagamaev2022_grid, bagamaev2022_with_labels
from wsiscale.criteria.batchnorm_distance import batchnorm_trust
from wsiscale.criteria.penkin2022 import penkin2022_grid
from wsiscale.errors import OptionError
from wsiscale.plugins import load_object
from wsiscale.types import ScaleResponse

__all__ = [
    "CRITERIA",
    "DEFAULT_CRITERION",
    "Criterion",
    "bagamaev2022_grid",
    "bagamaev2022_with_labels",
    "batchnorm_trust",
    "combined",
    "default_criterion",
    "find_criterion",
    "peak",
    "penkin2022_grid",
]

Score = Callable[[ScaleResponse], NDArray[np.float64]]


@dataclass(frozen=True)
class Criterion:
    """How to tell from a network's answers which scale suits it, and what has to be asked of the network for that.

    NaN in the response gives NaN from `score` and None from `decide`. A response that lacks what the criterion needs is an
    OptionError.
    """

    name: str
    score: Score  # (S,) over response.scales: higher is better
    # The method's own rule for the best scale, level-0 px per px; it may say None, "no answer". Where there is no rule, it
    # is the `peak` of the score.
    decide: Callable[[ScaleResponse], float | None] | None = None
    # Where `decide` only combines what each place alone would decide, (N,) with NaN for None: how, which spares a bootstrap
    # over places from asking the response again.
    combine: Callable[[NDArray[np.float64]], float | None] | None = None
    # What each place adds to the score where that is not the score of the place alone: (N, S) rows whose mean is the score, to
    # first order what a resample of the places would change. NaN rows for places whose answers are not finite.
    shares: Score | None = None
    # Of several criteria joined: what each place adds to each of them, (K, N, S); the score is the sum over parts of the mean
    # over places.
    rows: Score | None = None
    views: tuple[str, ...] = ()  # which views respond() must take
    layers: Literal["none", "stages", "batchnorm", "auto"] = "none"  # what respond() must watch
    source: str = ""  # paper, equation
    # The score of a scale depends on the answers at that scale alone, so that a search may leave scales out.
    pointwise: bool = False
    # Octaves on either side that hold nine of ten scales that labels find best: how far off its optimum usually is, however
    # alike the places are. Measured on the development half of the benchmark; 0 where it was not.
    usual_error: float = 0.0


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("confidence", confidence.score, source=confidence.SOURCE, pointwise=True),
        Criterion(
            "penkin2022",
            penkin2022.score,
            penkin2022.decide,
            penkin2022.combine,
            layers="stages",
            source=penkin2022.SOURCE,
        ),
        Criterion("penkin2023", penkin2023.score, penkin2023.decide, penkin2023.combine, source=penkin2023.SOURCE),
        Criterion("bagamaev2022", bagamaev2022.score, bagamaev2022.decide, bagamaev2022.combine, source=bagamaev2022.SOURCE),
        Criterion("margin_over_null", over_null.margin_score, views=(over_null.VIEW,), source=over_null.SOURCE, pointwise=True),
        Criterion(
            "confidence_over_null", over_null.confidence_score, views=(over_null.VIEW,), source=over_null.SOURCE, pointwise=True
        ),
        Criterion("agreement", agreement.score, views=agreement.VIEWS, source=agreement.SOURCE, pointwise=True),
        Criterion("neighbour_agreement", neighbour_agreement.score, source=neighbour_agreement.SOURCE),
        Criterion(
            "batchnorm_distance",
            batchnorm_distance.score,
            shares=batchnorm_distance.shares,
            layers="batchnorm",
            source=batchnorm_distance.SOURCE,
        ),
        # Its `decide` stays out of the table: it is where the score peaks, and a peak can be held against the range's ends.
        Criterion(
            "batchnorm_tangent",
            batchnorm_tangent.score,
            shares=batchnorm_tangent.shares,
            layers="batchnorm",
            source=batchnorm_tangent.SOURCE,
        ),
        Criterion("hyperplane", hyperplane.score, shares=hyperplane.shares, source=hyperplane.SOURCE),
        Criterion("energy", energy.score, source=energy.SOURCE, pointwise=True),
        Criterion("nuclear_norm", nuclear_norm.score, shares=nuclear_norm.shares, source=nuclear_norm.SOURCE, pointwise=True),
        Criterion(
            "mutual_information",
            mutual_information.score,
            shares=mutual_information.shares,
            source=mutual_information.SOURCE,
            pointwise=True,
        ),
        Criterion("object_size", object_size.score, shares=object_size.shares, source=object_size.SOURCE),
        # Nine of ten answers of the development half of benchmarks/calibration.py are within 0.17 of the training scale.
        Criterion(
            "reference", reference.score, shares=reference.shares, layers="auto", source=reference.SOURCE, usual_error=0.2
        ),
        Criterion("pixel_entropy", pixel_entropy.score, source=pixel_entropy.SOURCE, pointwise=True),
        Criterion(
            "effective_rank", effective_rank.score, shares=effective_rank.shares, source=effective_rank.SOURCE, pointwise=True
        ),
    )
}


# Where a network's card has no reference of its training tiles.
DEFAULT_CRITERION = "consensus"


def default_criterion(card: Mapping[str, object]) -> str:
    """The name of the criterion to go by where none is asked for: the training tiles where the network's card has them."""
    return "reference" if card.get("reference") is not None else DEFAULT_CRITERION


def find_criterion(spec: str | Criterion | Score) -> Criterion:
    """The criterion meant by a known name, "file.py:name", "package.module:name", a Criterion or a callable.

    A bare callable ScaleResponse -> (S,) score gets every layer that the network is watched at; wrap it in a Criterion to
    ask for less, for views, or to bring a rule of its own. Raises OptionError.
    """
    if isinstance(spec, Criterion):
        return spec
    if not isinstance(spec, str):
        return _from_callable(getattr(spec, "__name__", type(spec).__name__), spec)
    if spec in CRITERIA:
        return CRITERIA[spec]
    if ":" not in spec:
        known = ", ".join(CRITERIA)
        raise OptionError(f"no criterion {spec!r}; there are {known}, or give file.py:name or package.module:name")
    found = load_object(spec)
    if isinstance(found, Criterion):
        return found
    if not callable(found):
        raise OptionError(f"{spec} is a {type(found).__name__}; a criterion is a callable ScaleResponse -> (S,) score")
    return _from_callable(spec, found)


def combined(*parts: str | Criterion, optional: Sequence[str | Criterion] = (), name: str | None = None) -> Criterion:
    """Several criteria in one: the sum of the mean ranks that they give the scales, place by place.

    It goes by the sum's peak, whatever rules the parts bring. A part whose score is NaN over the whole range (a fingerprint
    that is not trusted) is left out; one of `optional` also where the network cannot give what it needs (BatchNorm, a head).
    Where no part is left the score is NaN; what a part of `parts` lacks is an OptionError.
    """
    needed, extra = tuple(map(find_criterion, parts)), tuple(map(find_criterion, optional))
    every = (*needed, *extra)
    if not every:
        raise OptionError("a combination has at least one part; known are " + ", ".join(CRITERIA))
    watched = {part.layers for part in every} - {"none"}
    return Criterion(
        name=name or "+".join(part.name for part in every),
        score=partial(combining.score, parts=needed, optional=extra),
        rows=partial(combining.rows, parts=needed, optional=extra),
        views=tuple(dict.fromkeys(view for part in every for view in part.views)),
        layers="none" if not watched else watched.pop() if len(watched) == 1 else "auto",
        source="; ".join(part.source for part in every),
        # Ranks are shares of octaves, whatever the grid.
        pointwise=all(part.pointwise for part in every),
    )


# The default: what the arrangement of the tissue makes a network sure of, how far from its class boundaries that is, and, each
# only where it can be believed, whether the answers are dispersed and whether BatchNorm recognises its training.
CRITERIA["consensus"] = replace(
    combined(
        optional=(
            "margin_over_null",
            "hyperplane",
            Criterion(
                "dispersity",
                mutual_information.gated,
                shares=mutual_information.gated_shares,
                source=mutual_information.SOURCE,
                pointwise=True,
            ),
            "batchnorm_tangent",
        ),
        name="consensus",
    ),
    # Nearly so: of neighbours it sees no more than what all scales share, a unit of length and their ranks.
    pointwise=True,
    # With it 86 % of 87 intervals of the development half hold the scale that labels find best, without it 39 %.
    usual_error=0.6,
)


# Octaves on either side of the highest score that the parabola is fitted to: wide enough to average the places' noise over
# several scales of the grid, narrow enough for the curve to be a parabola there.
_NEAR = 3 / 8


def peak(scales: NDArray[np.float64], score: NDArray[np.float64]) -> float:
    """The scale of the highest score, refined by a parabola fitted to its neighbourhood on the log2 axis.

    `scales` (S,) ascend, evenly spaced or not. At an end of the range it is that end, on a plateau the plateau's middle.
    NaN where a score is not finite or all are equal: nothing stands out.
    """
    if not np.isfinite(score).all():
        return float("nan")
    if len(score) == 1:
        return float(scales[0])
    top = int(np.argmax(score))
    # A saturated score ties at its top, and its first maximum would be the plateau's finest end.
    below = np.flatnonzero(score[top:] < score[top])
    last = top + int(below[0]) - 1 if len(below) else len(score) - 1
    if top == 0:
        return float("nan") if last == len(score) - 1 else float(scales[0])
    if last == len(score) - 1:
        return float(scales[last])
    octaves = np.log2(scales)
    if last > top:
        return float(np.exp2((octaves[top] + octaves[last]) / 2))
    near = np.abs(octaves - octaves[top]) <= _NEAR + 1e-9
    near[top - 1 : top + 2] = True
    offset = octaves[near] - octaves[top]
    bend, slope, _ = np.polyfit(offset, score[near], 2)
    if bend >= 0:
        return float(scales[top])
    return float(scales[top] * np.exp2(np.clip(-slope / (2 * bend), offset.min(), offset.max())))


def _from_callable(name: str, score: Score) -> Criterion:
    return Criterion(name, partial(_checked, name, score), layers="auto", source="user")


def _checked(name: str, score: Score, response: ScaleResponse) -> NDArray[np.float64]:
    result = np.asarray(score(response), np.float64)
    if result.shape != response.scales.shape:
        raise OptionError(
            f"criterion {name} returned shape {result.shape}; one score for each of the {len(response.scales)} scales is needed"
        )
    return result
