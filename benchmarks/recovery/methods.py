"""What is compared: answers that know nothing, answers that know too much, and every criterion of wsiscale.criteria.

A criterion has two rows: by its own rule, which always answers, and "+ abstains", as `wsiscale estimate` would say it. Those
added to CRITERIA appear by themselves.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.recovery.cases import Case
from wsiscale.criteria import CRITERIA, Criterion, peak
from wsiscale.errors import OptionError
from wsiscale.judging import STRUCTURE_VIEW, estimate_response
from wsiscale.testing.responses import noise_response
from wsiscale.types import ScaleResponse

ABSTAINS = " + abstains"


@dataclass(frozen=True)
class Answer:
    """What one method says of one case."""

    scale: float | None  # level-0 px per px; None where it abstains
    ci90: tuple[float, float] | None = None
    abstained: str | None = None  # the reason
    forwards: int = 0  # tiles through the network


class NotApplicableError(Exception):
    """A method that this case gives nothing to work on."""


Method = Callable[[Case], Answer]  # raises NotApplicableError


def methods(criteria: dict[str, Criterion] | None = None) -> dict[str, Method]:
    """Every row of the tables, in order. `criteria` is CRITERIA unless it is given."""
    found: dict[str, Method] = {
        "range centre (log)": log_centre,
        "range centre (linear)": linear_centre,
        "noise answers": noise,
        "do nothing": do_nothing,
        "training µm/px": training,
        "oracle": oracle,
    }
    for name, criterion in (CRITERIA if criteria is None else criteria).items():
        found[name] = _own_rule(criterion)
        found[name + ABSTAINS] = _with_abstention(criterion)
    return found


def log_centre(case: Case) -> Answer:
    """The middle of the range, in octaves."""
    scales = case.response.scales
    return Answer(float(np.sqrt(scales[0] * scales[-1])))


def linear_centre(case: Case) -> Answer:
    """The middle of the range, in level-0 px per px."""
    scales = case.response.scales
    return Answer(float(scales[0] + scales[-1]) / 2)


def noise(case: Case) -> Answer:
    """Where `confidence` peaks for a network that answers white noise."""
    response = noise_response(seed=zlib.crc32(case.name.encode()), places=case.response.places, scales=case.response.scales)
    return Answer(peak(response.scales, CRITERIA["confidence"].score(response)))


def do_nothing(case: Case) -> Answer:
    """The slide as it was scanned, or the end of the range that is nearest to that."""
    return Answer(_clipped(case, 1.0))


def training(case: Case) -> Answer:
    """Where the network was trained, from knowledge of the network and a right tag; or the range's end nearest to it."""
    if case.train_scale is None:
        raise NotApplicableError("its training scale is unknown")
    return Answer(_clipped(case, case.train_scale))


def oracle(case: Case) -> Answer:
    """The peak of the quality that labels give. Smoothed by a parabola, so that its regret is not always zero."""
    return Answer(case.oracle.best)


def _clipped(case: Case, scale: float) -> float:
    return float(np.clip(scale, case.response.scales[0], case.response.scales[-1]))


def _own_rule(rule: Criterion) -> Method:
    def answer(case: Case) -> Answer:
        response = _seen_by(rule, case.response, rule.views)
        try:
            found = rule.decide(response) if rule.decide is not None else peak(response.scales, rule.score(response))
        except OptionError as error:
            raise NotApplicableError(str(error)) from error
        forwards = _forwards(response)
        if found is None or not np.isfinite(found):
            return Answer(None, abstained="no_optimum", forwards=forwards)
        return Answer(float(found), forwards=forwards)

    return answer


def _with_abstention(rule: Criterion) -> Method:
    def answer(case: Case) -> Answer:
        guard = (STRUCTURE_VIEW,) if STRUCTURE_VIEW in case.response.views else ()
        response = _seen_by(rule, case.response, tuple(dict.fromkeys((*rule.views, *guard))))
        try:
            found = estimate_response(response, rule, seed=0)
        except OptionError as error:
            raise NotApplicableError(str(error)) from error
        reason = None if found.abstained is None else found.abstained.reason
        return Answer(found.scale, ci90=found.ci90, abstained=reason, forwards=_forwards(response))

    return answer


def _seen_by(rule: Criterion, response: ScaleResponse, views: tuple[str, ...]) -> ScaleResponse:
    """What `estimate` would have asked the network for: neither layers nor views that the criterion does not look at."""
    if missing := sorted(set(rule.views) - set(response.views)):
        raise NotApplicableError(f"the network was not asked about {', '.join(missing)}")
    if rule.layers == "batchnorm" and rule.rows is None and not response.batchnorm:
        raise NotApplicableError("the network has no BatchNorm")
    wanted = {"none": (), "stages": response.stages, "batchnorm": tuple(response.batchnorm), "auto": tuple(response.layers)}
    layers = wanted[rule.layers]

    def cut(part: ScaleResponse, of: tuple[str, ...]) -> ScaleResponse:
        return replace(
            part,
            layers={name: moments for name, moments in part.layers.items() if name in layers},
            stages=part.stages if rule.layers in ("stages", "auto") else (),
            views={name: cut(part.views[name], ()) for name in of},
            agreement={name: value for name, value in part.agreement.items() if name in of},
        )

    return cut(response, views)


def _forwards(response: ScaleResponse) -> int:
    return response.places * len(response.scales) * (1 + len(response.views))
