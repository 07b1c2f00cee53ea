"""What else was tried for the default: ways from curves to a scale, essentially different, on the half to develop on.

Each takes the criteria that `consensus` is made of, its way; `wsiscale.criteria` has what is left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal, stats

from benchmarks.recovery.tables import Record, markdown
from wsiscale.criteria import CRITERIA, Criterion, combined, peak
from wsiscale.errors import OptionError
from wsiscale.types import ScaleResponse

SURE = ("confidence", "hyperplane")  # of each place: both fall for the fine end
PARTS = ("margin_over_null", "hyperplane", "mutual_information")
VIEWS = ("phase_scrambled",)

Curve = NDArray[np.float64]


def _curves(response: ScaleResponse, names: Sequence[str]) -> list[Curve]:
    """Those that the network can give."""
    found = []
    for name in names:
        try:
            curve = CRITERIA[name].score(response)
        except OptionError:
            continue
        if np.isfinite(curve).all():
            found.append(curve)
    return found


def _sum_of(change: Callable[[Curve, Curve], Curve], names: Sequence[str], response: ScaleResponse) -> Curve:
    """The sum of curves in units of their mean and deviation over scale, each changed first, given (curve, octaves)."""
    octaves = np.log2(response.scales)
    curves = [change(curve, octaves) for curve in _curves(response, names)]
    return np.sum([stats.zscore(c) for c in curves if np.ptp(c) > 0], axis=0) if curves else np.full(len(octaves), np.nan)


def _smooth(curve: Curve, octaves: Curve, width: float) -> Curve:
    """Over `width` octaves, a standard deviation."""
    smooth: Curve = ndimage.gaussian_filter1d(curve, width / float(np.diff(octaves).mean()), mode="nearest")
    return smooth


def _interior_peak(response: ScaleResponse) -> float | None:
    """The most prominent peak between the ends of the sum; the end with the higher score where there is none."""
    score = _sum_of(lambda curve, octaves: _smooth(curve, octaves, 1 / 4), SURE, response)
    if not np.isfinite(score).all():
        return None
    peaks, about = signal.find_peaks(score, prominence=0)
    if len(peaks) == 0:
        return peak(response.scales, score)
    return float(response.scales[peaks[int(about["prominences"].argmax())]])


def _bump(curve: Curve, octaves: Curve) -> Curve:
    """How far a curve is above its own surroundings, an octave wide."""
    return _smooth(curve, octaves, 1 / 4) - _smooth(curve, octaves, 1)


def _fall(curve: Curve, _: Curve) -> Curve:
    """How far a curve falls from here on towards coarser scales."""
    return curve - np.minimum.accumulate(curve[::-1])[::-1]


def _votes(response: ScaleResponse) -> float | None:
    """The median of the parts' own peaks."""
    found = [np.log2(peak(response.scales, curve)) for curve in _curves(response, PARTS)]
    return float(np.exp2(np.nanmedian(found))) if np.isfinite(found).any() else None


def _any(response: ScaleResponse) -> Curve:
    return np.zeros(len(response.scales))


def _plain(curve: Curve, _: Curve) -> Curve:
    return curve


APPROACHES: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("sure: its peak", partial(_sum_of, _plain, SURE)),
        Criterion("sure: the most prominent interior peak", _any, _interior_peak),
        Criterion("sure: height above an octave's surroundings", partial(_sum_of, _bump, SURE)),
        Criterion("sure: fall towards the coarse side", partial(_sum_of, _fall, SURE)),
        Criterion("minus a null without structure", CRITERIA["margin_over_null"].score, views=VIEWS),
        Criterion("the same under rotation", CRITERIA["agreement"].score, views=CRITERIA["agreement"].views),
        Criterion("sure and minus a null", partial(_sum_of, _plain, (*SURE, "margin_over_null")), views=VIEWS),
        Criterion("sum with dispersity", partial(_sum_of, _plain, PARTS), views=VIEWS),
        Criterion("median of peaks with dispersity", _any, _votes, views=VIEWS),
        combined(optional=PARTS, name="ranks with dispersity"),
        CRITERIA["consensus"],
    )
}


def table(records: Sequence[Record]) -> str:
    """Mean regret of each approach on each kind of case, in markdown."""
    kinds = list(dict.fromkeys((r.family, r.tags) for r in records))
    lines = []
    for name in APPROACHES:
        mine = [r for r in records if r.method == name and r.regret is not None]
        cells = [[r.regret for r in mine if (r.family, r.tags) == kind and r.regret is not None] for kind in kinds]
        lines.append([name, *[f"{np.mean(cell):.3f}" if cell else "-" for cell in cells]])
    return markdown(["approach", *[" ".join(part for part in kind if part) for kind in kinds]], lines)
