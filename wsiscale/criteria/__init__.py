"""ScaleResponse -> score over scale. One file per method, each pure numpy; docs/methods.md compares them.

A criterion is a value: a score that is higher where a scale suits the network better, and where the method has one its own
rule for the best scale. New ones need no registration: any callable ScaleResponse -> (S,) will do, see `find_criterion`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria import bagamaev2022, confidence, penkin2022, penkin2023
from wsiscale.criteria.bagamaev2022 import bagamaev2022_grid, bagamaev2022_with_labels
from wsiscale.criteria.penkin2022 import penkin2022_grid
from wsiscale.errors import OptionError
from wsiscale.plugins import load_object
from wsiscale.types import ScaleResponse

__all__ = [
    "CRITERIA",
    "Criterion",
    "bagamaev2022_grid",
    "bagamaev2022_with_labels",
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
    views: tuple[str, ...] = ()  # which views respond() must take
    layers: Literal["none", "stages", "batchnorm", "auto"] = "none"  # what respond() must watch
    source: str = ""  # paper, equation


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("confidence", confidence.score, source=confidence.SOURCE),
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
    )
}


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
