"""Estimates with a profile: made of the network's other slides of the half, unlabelled, and the slide registered to it.

Every slide of a half starts and ends at the same µm/px, which the ends of the ranges would give away. So each slide to test
is a window of its own scales, two octaves or more, drawn at random: as if it had been scanned coarser, and with another range.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.recovery.cases import Case, Half, MissingDataError, Oracle, Setting, cut_oracle
from benchmarks.recovery.tables import markdown
from wsiscale.errors import OptionError
from wsiscale.estimation import _settled
from wsiscale.judging import estimate_response
from wsiscale.plugins import load_object
from wsiscale.profile import Profile, Registration, make_profile, register
from wsiscale.registration import REGISTRATION_SHARE
from wsiscale.responses import at_scales
from wsiscale.types import ScaleEstimate, ScaleResponse

FAMILIES = {
    "nuclei32": "benchmarks.recovery.real:nuclei32",
    "embedded": "benchmarks.recovery.real:embedded",
    "tissue": "benchmarks.recovery.tissue:cases",
    "thesis": "benchmarks.recovery.thesis:cases",
}
LEAST = 2.0  # octaves of a window
FEWEST_PLACES = 64  # of default_places
WRONG = 2.5  # tags are off by up to so much, either way


@dataclass(frozen=True)
class Tested:
    """What became of one slide. Regrets are None where there is no answer."""

    half: Half
    group: str
    case: str
    refused: str | None
    error: float | None  # octaves, of the registered µm/px
    covered: bool | None  # by its 90 % interval
    regrets: dict[str, float | None]  # by row
    native: float  # regret of doing nothing


def section(setting: Setting, halves: Sequence[Half]) -> str:
    """The report's tables, in markdown, with what they mean."""
    found, end = [], ""
    for family, function in FAMILIES.items():
        try:
            slides: dict[tuple[str, Half], dict[str, Case]] = {}
            for case in load_object(function)(setting):
                if case.half in halves:
                    kept = slides.setdefault((case.network, case.half), {})
                    if case.slide not in kept or _native(case).size > _native(kept[case.slide]).size:
                        kept[case.slide] = case  # of its ranges the one that has most scales from level 0 on
            for cases in slides.values():
                found += list(tested(list(cases.values())))
        except (MissingDataError, OptionError) as error:
            end += f"\n**Not in here, or not to its end**: {family}: {error}\n"
        setting.log(f"profiles/{family}: {len(found)} slides so far")
    return "\n".join([_MEANING + end, *(table([t for t in found if t.half == half], half) for half in halves)])


_MEANING = """A profile of a half's other slides, tags right, no labels; the slide to test is a random window of its scales, so
that the ends of ranges give nothing away. Registration: share refused; of the others the share within 1/4 octave of the true
µm/px, and of 90 % intervals that hold it. Then mean regret of answers, and in brackets the share without one: of the slide's
own curve; with the profile and a right tag; with the profile and no tag, or one that is not trusted; with the profile and a
tag up to 2.5 times off that is trusted; of doing nothing. *Class not in the bank*: the thesis's slides of one class, which
are to be refused where the bank has other classes alone.
"""

ROWS = ("own curve", "right tag", "no tag", "wrong tag")


def tested(cases: Sequence[Case]) -> Iterator[Tested]:
    """Each slide of one network, a case each, against the others."""
    for case in cases:
        others = [other for other in cases if other.slide != case.slide]
        kind = "single-class" if "single-class" in case.tags else "mixed" if "mixed" in case.tags else ""
        group = " ".join(part for part in (case.family, kind) if part)
        yield from _tested(case, others, group)
        if case.family == "thesis" and kind == "single-class":
            yield from _tested(case, [o for o in others if "single-class" in o.tags], f"{case.family}, class not in the bank")


def _tested(case: Case, others: Sequence[Case], group: str) -> Iterator[Tested]:
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    drawn = window(case, rng)
    if drawn is None or len(others) < 2:
        return
    response, oracle, mpp = drawn
    try:
        profile = make_profile([replace(other.response, slide_mpp=_mpp(other)) for other in others])
    except OptionError:
        return
    # As many as `estimate` asks about, where there are as many to begin with.
    count = max(round(REGISTRATION_SHARE * response.places), round(REGISTRATION_SHARE * FEWEST_PLACES))
    found = register(profile, response.take(np.arange(min(count, response.places))))
    own = estimate_response(response)
    wrong = mpp * WRONG ** rng.uniform(-1, 1)
    answers = {
        "own curve": own,
        "right tag": _with(profile, found, own, tag=mpp, response=response),
        "no tag": _with(profile, found, own, tag=None, response=response),
        "wrong tag": _with(profile, found, own, tag=wrong, response=response),
    }
    yield Tested(
        half=case.half,
        group=group,
        case=case.name,
        refused=None if found.refused is None else found.refused.reason,
        error=None if found.mpp is None else float(np.log2(found.mpp / mpp)),
        covered=None if found.ci90 is None else found.ci90[0] <= mpp <= found.ci90[1],
        regrets={name: None if a.scale is None else oracle.regret(a.scale) for name, a in answers.items()},
        native=oracle.regret(1.0),
    )


def _with(
    profile: Profile, found: Registration, own: ScaleEstimate, *, tag: float | None, response: ScaleResponse
) -> ScaleEstimate:
    """As `estimate` would answer with that tag, or without one."""
    registration = replace(found, claimed=tag)
    mpp = tag if tag is not None else found.mpp
    source = "metadata" if tag is not None else "none" if mpp is None else "estimated"
    own = replace(own, slide_mpp=mpp, mpp_source=source)
    return _settled(own, profile, registration, float(response.scales[0]), float(response.scales[-1]))


def window(case: Case, rng: np.random.Generator) -> tuple[ScaleResponse, Oracle, float] | None:
    """The case as a slide scanned coarser and asked over another range: response, labels, its µm/px. None where too narrow."""
    octaves, native = np.log2(case.response.scales), _native(case)
    fits = [(a, b) for a in native for b in native if octaves[b] - octaves[a] >= LEAST - 0.01]
    if not fits:
        return None
    first, last = fits[int(rng.integers(len(fits)))]
    index = np.arange(first, last + 1)
    factor = float(case.response.scales[first])
    mpp = _mpp(case) * factor
    labels = cut_oracle(case.oracle, _between(case.oracle.scales, case.response.scales[[first, last]]))
    return _coarser(at_scales(case.response, index), factor), replace(labels, scales=labels.scales / factor), mpp


def _coarser(response: ScaleResponse, factor: float) -> ScaleResponse:
    """The same answers on a slide whose pixels are `factor` times as large, and without a tag."""
    views = {name: _coarser(view, factor) for name, view in response.views.items()}
    return replace(response, scales=response.scales / factor, slide_mpp=None, views=views)


def _between(scales: NDArray[np.float64], ends: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.flatnonzero((scales >= ends[0] * 0.999) & (scales <= ends[1] * 1.001))


def _native(case: Case) -> NDArray[np.intp]:
    return np.flatnonzero(case.response.scales >= 0.99)


def _mpp(case: Case) -> float:
    """Slides without a unit of length are all of one scale."""
    return case.response.slide_mpp or 1.0


def table(found: Sequence[Tested], half: Half) -> str:
    """Markdown, a row a group."""
    titles = ["", "slides", "refused", "≤ 1/4", "covers", *ROWS, "do nothing"]
    lines = []
    for group in dict.fromkeys(t.group for t in found):
        mine = [t for t in found if t.group == group]
        errors = [abs(t.error) for t in mine if t.error is not None]
        held = [t.covered for t in mine if t.covered is not None]
        cells = [f"{np.mean([t.refused is not None for t in mine]):.0%}"]
        cells += [f"{np.mean([e <= 0.25 for e in errors]):.0%}" if errors else "-", f"{np.mean(held):.0%}" if held else "-"]
        for row in ROWS:
            given = [r for t in mine if (r := t.regrets[row]) is not None]
            cells.append(f"{np.mean(given):.3f} ({1 - len(given) / len(mine):.0%})" if given else f"- ({1:.0%})")
        lines.append([group, str(len(mine)), *cells, f"{np.mean([t.native for t in mine]):.3f}"])
    return f"\n### {'Reported' if half == 'report' else 'Development'} half\n\n" + markdown(titles, lines)
