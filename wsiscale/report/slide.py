"""The page of one slide: the answer in words, the curve, the fields that a pathologist judges, and where it all comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria import find_criterion
from wsiscale.estimation import as_record
from wsiscale.judging import named, place_scores
from wsiscale.profile import TAG_MARGIN, Registration, beyond
from wsiscale.report.figures import Mark, Plot, nuclei_plot, score_plot
from wsiscale.report.looking import (
    USUAL_NUCLEI,
    Column,
    Nuclei,
    Overview,
    Row,
    class_colour,
    columns_for,
    nuclei_at,
    overview,
    rows_for,
)
from wsiscale.report.pages import number, percent, write_page
from wsiscale.responses import SavedResponse
from wsiscale.tissue import TissueDetector, find_tissue
from wsiscale.types import Reader, ScaleEstimate

if TYPE_CHECKING:
    from wsiscale.networks import Network

# Why there is no estimate, and what helps: docs/methods.md, "When there is no estimate", in words for this page.
REASONS = {
    "no_tissue": ("nothing on the slide looks like tissue", "Give a detector of your own with --tissue file.py:name."),
    "too_few_places": (
        "there is too little tissue to look at",
        "Give a tissue detector with --tissue, or a smaller --tile-size.",
    ),
    "non_finite": (
        "the network, or the criterion, gives no usable numbers here",
        "Try another --criterion, and check how the network's tiles are prepared (mean, std, value_range in its card).",
    ),
    "flat_curve": ("the score hardly changes with magnification", "Ask at more --places, or give the network a profile."),
    "bimodal": ("two magnifications are about as good", "Give a narrower --mpp-range, or the network a profile."),
    "boundary_optimum": (
        "the best lies at an end of the range that was looked at",
        "Give a wider --mpp-range; finer than the scan takes --max-upsample.",
    ),
    "no_structure": ("the network sees colours alone, not their arrangement", "Use another network."),
    "one_tissue": (
        "the network answers nearly the same everywhere, which it can do at a wrong magnification too",
        "Give the network a profile or training tiles, or name a --criterion.",
    ),
    "unsettled": (
        "the network's classes change by chance",
        "Give the network a profile or training tiles, or name a --criterion.",
    ),
    "wide_interval": ("the places disagree", "Ask at more --places, or give the network a profile."),
    "no_optimum": ("the criterion's own rule finds no best magnification", "Try another --criterion."),
    "metadata_conflict": (
        "the slide's µm/px and the network's cannot both be right",
        "See wsiscale info; give the right µm/px with --slide-mpp, or mend the network's card.",
    ),
}

_NARROW, _WIDE = 0.3, 1.0  # octaves of an interval
_BARS = tuple(float(f"{digit}e{power}") for power in range(-1, 5) for digit in (1, 2, 5))
_FRACTIONS = {0.25: "¼", 0.5: "½"}
_CLASSES = 3  # bars a field
_ELSEWHERE = 0.5  # octaves between the answer and the curve's own peak that are worth a word
_TOLD = 0.25  # octaves around the answer in which a place's vote counts as for it


def write_slide_page(
    path: Path,
    slide: Reader,
    network: Network,
    estimate: ScaleEstimate,
    answers: SavedResponse | None,
    *,
    detector: TissueDetector | str | None = None,
    device: str = "auto",
) -> None:
    """What was found on `slide`, as `path`: one HTML file that needs nothing else.

    `answers` is what `estimate(answered=)` heard, None where there was nothing to ask about. Of the slide the page has the
    file's name, its pixels and numbers; neither folder, label nor free text. Raises SlideError where the slide cannot be
    read and StoreError where the page cannot be written.
    """
    tissue = find_tissue(slide, detector)
    columns = columns_for(estimate, slide.pyramid, size=network.tile_size)
    rows: tuple[Row, ...] = ()
    centers = np.empty((0, 2))
    if answers is not None:
        centers = answers.centers[: answers.response.places]
        finest = float(answers.response.scales[0])
        rows = rows_for(slide, network, columns, centers, finest=finest, device=device)
    nuclei = nuclei_at(slide, np.empty((0, 2)) if answers is None else answers.centers, mpp=estimate.slide_mpp, device=device)
    write_page(
        path,
        "slide.html",
        title=estimate.slide or slide.source.name,
        record=as_record(estimate),
        estimate=estimate,
        unit="µm/px" if estimate.slide_mpp is not None else "level-0 px per px",
        factor=estimate.slide_mpp or 1.0,
        reason=REASONS.get(estimate.abstained.reason, ("there is no estimate", "")) if estimate.abstained else None,
        sureness=list(_sureness(estimate)),
        warnings=list(_warnings(estimate)),
        marks=_legend(slide, network, estimate),
        curve=_curve(slide, network, estimate, answers),
        columns=[_heading(column, estimate, network.tile_size) for column in columns],
        rows=[_row(row, columns, network, estimate) for row in rows],
        classes=_classes(network),
        network=network,
        overview=_overview(overview(slide, tissue), centers, rows, estimate),
        tissue=tissue,
        nuclei=nuclei if isinstance(nuclei, Nuclei) else None,
        no_nuclei=nuclei if isinstance(nuclei, str) else None,
        nuclei_plot=nuclei_plot(nuclei.diameters, usual=USUAL_NUCLEI) if isinstance(nuclei, Nuclei) else None,
        usual_nuclei=USUAL_NUCLEI,
        facts=list(_facts(slide, estimate)),
    )


# --- words --------------------------------------------------------------------------------------------------------------


def _sureness(estimate: ScaleEstimate) -> Iterator[str]:
    """How far the answer is to be believed, in sentences."""
    if estimate.scale is None or estimate.ci90 is None:
        return
    octaves = math.log2(estimate.ci90[1] / estimate.ci90[0])
    name = "narrow" if octaves <= _NARROW else "wide" if octaves > _WIDE else "moderate"
    yield f"The interval is {name}: {octaves:.2f} octaves, about {percent(2 ** (octaves / 2) - 1)} either way."
    votes = estimate.votes[np.isfinite(estimate.votes)]
    near = np.abs(np.log2(votes / estimate.scale)) <= _TOLD + 1e-9
    if len(votes):
        yield f"Of {len(votes)} places, {int(near.sum())} by themselves vote within a quarter of an octave of it."
    if estimate.own_share < 1:
        yield (
            f"{percent(1 - estimate.own_share)} of the answer's weight is the network's profile, its memory of reference "
            f"slides; {percent(estimate.own_share)} is this slide's own curve."
        )


def _warnings(estimate: ScaleEstimate) -> Iterator[str]:
    """What a reader must not miss."""
    found = estimate.registration
    if found is not None and _contradicts(found):
        tag = f"{number(found.claimed)} µm/px by the tag"
        yield f"The tissue contradicts the metadata: {tag}, {_by_tissue(found)} by the tissue. One of them is wrong."
    if estimate.scale is not None and estimate.curve is not None:
        own = float(estimate.curve.scales[np.nanargmax(estimate.curve.score)])
        if abs(math.log2(own / estimate.scale)) > _ELSEWHERE:
            apart = f"{abs(math.log2(own / estimate.scale)):.1f} octaves from the answer, which goes by the network's profile"
            yield f"The slide's own curve is best at {named(own, estimate.slide_mpp)}, {apart}."
    if estimate.mpp_source == "estimated":
        yield "The slide's µm/px is estimated from its tissue; every µm on this page rests on that."
    for note in estimate.notes:
        if note.startswith("the slide is damaged"):
            yield note[0].upper() + note[1:] + "."


def _facts(slide: Reader, estimate: ScaleEstimate) -> Iterator[tuple[str, str]]:
    """What the page rests on: (name, value)."""
    calibration, source = slide.calibration, slide.source
    height, width = slide.pyramid.shape
    mpp = estimate.slide_mpp
    size = f"{width} × {height} px"
    yield "Size", size if mpp is None else f"{size}, {width * mpp / 1000:.3g} × {height * mpp / 1000:.3g} mm"
    used = "unknown" if mpp is None else f"{number(mpp, 4)} µm/px"
    origin = {
        "metadata": "from the file's metadata",
        "override": "given by the user",
        "estimated": "estimated from the tissue",
        "none": "the file does not say, or is not believed",
    }
    yield "Level 0", f"{used}, {origin[estimate.mpp_source]}"
    yield "Metadata", f"{calibration.verdict}: {calibration.detail}"
    found = estimate.registration
    if found is not None:
        if found.mpp is None:
            why = "" if found.refused is None else f" ({found.refused.reason}: {found.refused.detail})"
            yield "By the tissue", f"no answer{why}"
        else:
            tag = "" if found.claimed is None else f", {'contradicts' if _contradicts(found) else 'agrees with'} the tag"
            yield "By the tissue", f"{_by_tissue(found)}{tag}"
    yield "Levels", f"{len(slide.pyramid.shapes)}: " + ", ".join(f"1/{d:g}" for d in slide.pyramid.downsamples)
    yield "Reader", f"{source.reader} ({source.vendor})"


def _contradicts(found: Registration) -> bool:
    return found.ci90 is not None and found.claimed is not None and beyond(found.claimed, found.ci90) > TAG_MARGIN


def _by_tissue(found: Registration) -> str:
    low, high = found.ci90 or (None, None)
    return f"{number(found.mpp)} µm/px ({number(low)} to {number(high)})"


def _classes(network: Network) -> list[dict[str, Any]]:
    """Names and colours of what is outlined, of a segmenter of several classes."""
    names = _class_names(network)
    if network.output != "segmentation" or len(names) < 3:
        return []
    return [{"name": name, "colour": "rgb({}, {}, {})".format(*class_colour(n))} for n, name in enumerate(names) if n]


def _class_names(network: Network) -> Sequence[str]:
    names = network.card.get("classes")
    return [str(name) for name in names] if isinstance(names, list | tuple) else []


# --- figures ------------------------------------------------------------------------------------------------------------


def _marks(slide: Reader, network: Network, estimate: ScaleEstimate) -> Iterator[tuple[Mark, str]]:
    """What is marked on the axis, and its name."""
    factor = estimate.slide_mpp
    if estimate.scale is not None:
        yield Mark(estimate.scale * (factor or 1.0), "estimate"), "estimate"
    claimed = slide.calibration.claimed
    if factor is None:
        yield Mark(1.0, "tag"), "level 0 of the slide"
    elif claimed is not None:
        yield Mark(claimed, "tag"), "level 0 by the slide's metadata"
    if factor is not None and network.training_mpp is not None:
        yield Mark(network.training_mpp, "model"), "what the network was trained at"


def _legend(slide: Reader, network: Network, estimate: ScaleEstimate) -> list[dict[str, Any]]:
    return [{"kind": mark.kind, "at": mark.at, "name": name} for mark, name in _marks(slide, network, estimate)]


def _curve(slide: Reader, network: Network, estimate: ScaleEstimate, answers: SavedResponse | None) -> Plot | None:
    curve = estimate.curve
    if curve is None:
        return None
    factor = estimate.slide_mpp or 1.0
    places: NDArray[np.float64] | None = None
    if answers is not None and np.array_equal(answers.response.scales, curve.scales):
        alone = place_scores(answers.response, find_criterion(estimate.criterion))
        places = alone[np.isfinite(alone).all(axis=1)]
    return score_plot(
        curve.scales * factor,
        curve.score,
        curve.lo,
        curve.hi,
        places=places,
        votes=estimate.votes * factor,
        marks=[mark for mark, _ in _marks(slide, network, estimate)],
        interval=None if estimate.ci90 is None else (estimate.ci90[0] * factor, estimate.ci90[1] * factor),
        unit="µm/px (coarser to the right)" if estimate.slide_mpp is not None else "level-0 px per px (coarser to the right)",
    )


def _overview(seen: Overview, centers: NDArray[np.float64], rows: Sequence[Row], estimate: ScaleEstimate) -> dict[str, Any]:
    height, width = seen.pixels.shape[:2]
    shown = {row.center for row in rows}
    mpp = estimate.slide_mpp
    return {
        "pixels": seen.pixels,
        "height": height,
        "width": width,
        "outline": " ".join("M" + " L".join(f"{x:.1f} {y:.1f}" for y, x in line.tolist()) + " Z" for line in seen.outlines),
        "places": [(y / seen.step, x / seen.step) for y, x in centers.tolist() if (y, x) not in shown],
        "shown": [(row.center[0] / seen.step, row.center[1] / seen.step) for row in rows],
        "bar": None if mpp is None else _bar(width * seen.step * mpp, "µm"),
    }


def _heading(column: Column, estimate: ScaleEstimate, size: int) -> dict[str, Any]:
    mpp = None if estimate.slide_mpp is None else column.scale * estimate.slide_mpp
    return {
        "column": column,
        "mpp": mpp,
        "magnification": None if mpp is None else 10 / mpp,
        "times": _times(column, estimate),
        "bar": _bar(size * column.scale if mpp is None else size * mpp, "level-0 px" if mpp is None else "µm"),
        "name": f"{number(column.scale)} level-0 px per px" if mpp is None else f"{number(mpp)} µm/px",
    }


def _times(column: Column, estimate: ScaleEstimate) -> str | None:
    """A scale beside the estimate, in words."""
    if estimate.scale is None:
        return None
    if abs(column.scale - 1) < 1e-6:
        return "the scan's finest"
    times = round(column.scale / estimate.scale, 3)
    return f"{_FRACTIONS.get(times, number(times, 2))} × the estimate"


def _row(row: Row, columns: Sequence[Column], network: Network, estimate: ScaleEstimate) -> list[dict[str, Any] | None]:
    names = _class_names(network)
    cells: list[dict[str, Any] | None] = []
    for index, column in enumerate(columns):
        field = row.fields.get(index)
        if field is None:
            cells.append(None)
            continue
        likeliest: list[dict[str, Any]] = []
        if field.probabilities is not None and field.marked is None:
            for number_ in np.argsort(field.probabilities)[::-1][:_CLASSES].tolist():
                name = names[number_] if number_ < len(names) else f"class {number_}"
                likeliest.append({"name": name, "share": float(field.probabilities[number_])})
        diameter = None if field.object_px is None else field.object_px * column.scale * (estimate.slide_mpp or 1.0)
        cells.append({"field": field, "likeliest": likeliest, "diameter": diameter})
    return cells


def _bar(width: float, unit: str) -> dict[str, Any]:
    """A scale bar of a round length for a picture that is `width` wide: length, in words, and its share in percent."""
    length = max((bar for bar in _BARS if bar <= 0.4 * width), default=_BARS[0])
    name = f"{length / 1000:g} mm" if unit == "µm" and length >= 1000 else f"{length:g} {unit}"
    return {"name": name, "percent": 100 * length / width}
