"""Numbers -> plots, as SVG that takes its colours from the page. matplotlib is at home here.

Every plot is drawn for a wide and for a narrow page, and the page's style shows one: scaled down, a wide one's text could not
be read. Colours are written as signs that the page's variables take the place of: one plot serves light, dark and paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# What the page calls its colours, and the signs that stand for them here.
INK, MUTED, GRID, ACCENT, TAG, MODEL, ALERT = _COLOURS = (
    *("#010203", "#010204", "#010205", "#010206", "#010207", "#010208", "#010209"),
)
_VARIABLES = dict(zip(_COLOURS, ("ink", "muted", "grid", "accent", "tag", "model", "alert"), strict=True))

_WIDE, _NARROW = 8.4, 3.5  # inches; the page shows 100 px to one, so that text of 9 pt is 12 px high
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "figure.facecolor": "none",
}
_OUTLIER = 6.0  # medians of a line's distance from the mean curve, beyond which it does not set the axis


@dataclass(frozen=True)
class Plot:
    """One figure, twice."""

    wide: str
    narrow: str


@dataclass(frozen=True)
class Mark:
    """A µm/px, or a scale, to be marked on the axis."""

    at: float
    kind: str  # "estimate", "tag", "model" or "tissue"


_MARKS = {"estimate": (ACCENT, "-", 2.0), "tag": (TAG, (0, (1, 1.6)), 2.0), "model": (MODEL, (0, (5, 2.5)), 1.6)}


def score_plot(
    at: Floats,
    score: Floats,
    lo: Floats,
    hi: Floats,
    *,
    places: Floats | None,
    votes: Floats,
    marks: Sequence[Mark],
    interval: tuple[float, float] | None,
    unit: str,
) -> Plot:
    """The score over scale (S,) with its band, a thin line for each of `places` (N, S), and the places' votes below."""

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3.2, 1), "hspace": 0.12})
        if places is not None and len(places):
            # Places differ in height by what they show; what they say of scale is each line's shape.
            level = places - places.mean(axis=1, keepdims=True) + score.mean()
            above.plot(at, level.T, color=MUTED, lw=0.5, alpha=0.45)
            reach = _OUTLIER * np.median(np.abs(level - score))
            bottom = min(lo.min(), score.min() - reach)
            top = max(hi.max(), score.max() + reach)
            above.set_ylim(max(level.min(), bottom), min(level.max(), top))
        above.fill_between(at, lo, hi, color=ACCENT, alpha=0.22, lw=0)
        above.plot(at, score, color=ACCENT, lw=2, marker="o", ms=3)
        above.set_ylabel("score")
        edges = _bins(float(at[0]), float(at[-1]), per_octave=8)
        below.hist(votes[np.isfinite(votes)], bins=edges.tolist(), color=MUTED, alpha=0.65, lw=0)
        below.set_ylabel("votes")
        below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
        below.set_xlabel(unit)
        for axes in (above, below):
            if interval is not None:
                axes.axvspan(*interval, color=ACCENT, alpha=0.10, lw=0)
            for mark in marks:
                colour, style, width = _MARKS[mark.kind]
                axes.axvline(mark.at, color=colour, ls=style, lw=width)
        seen = [float(at[0]), float(at[-1]), *(mark.at for mark in marks), *(interval or ())]
        _octaves(below, min(seen), max(seen))
        figure.align_ylabels()

    return _drawn(draw, "score", wide=(_WIDE, 4.3), narrow=(_NARROW, 3.8))


def nuclei_plot(diameters: Floats, *, usual: tuple[float, float]) -> Plot:
    """Each place's typical diameter in µm, their median, and where nuclei usually lie."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = np.linspace(-0.28, 0.28, 7)[np.arange(len(diameters)) * 3 % 7]  # apart, so that they do not hide each other
        axes.axvspan(*usual, color=MODEL, alpha=0.16, lw=0)
        axes.plot(diameters, rows, "o", color=MUTED, ms=4.5, alpha=0.6, mew=0)
        axes.axvline(float(np.median(diameters)), color=ACCENT, lw=2)
        axes.set(ylim=(-0.6, 0.6), yticks=[], xlabel="diameter of nuclei, µm")
        axes.spines["left"].set_visible(False)
        _octaves(axes, min(2.5, diameters.min()), max(25.0, diameters.max()), ticks=(1, 2, 3, 5, 7, 10, 15, 25, 50, 100))

    return _drawn(draw, "nuclei", wide=(_WIDE, 1.45), narrow=(_NARROW, 1.5))


def estimates_plot(mpps: Floats, *, median: float) -> Plot:
    """How many slides are best at which µm/px."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        low, high = float(mpps.min()), float(mpps.max())
        span = np.log2(high / low)
        axes.hist(
            mpps, bins=_bins(low, high, per_octave=24 if span < 1 else 12 if span < 3 else 8).tolist(), color=ACCENT, lw=0
        )
        axes.axvline(median, color=INK, lw=1.2, ls=(0, (5, 2.5)))
        axes.set(xlabel="best µm/px", ylabel="slides")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _octaves(axes, low / 2**0.25, high * 2**0.25)

    return _drawn(draw, "estimates", wide=(_WIDE, 2.6), narrow=(_NARROW, 2.6))


def tags_plot(tags: Floats, tissue: Floats, conflicts: NDArray[np.bool_]) -> Plot:
    """The µm/px of each slide's tag against what its tissue says."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        both = np.concatenate([tags, tissue])
        low, high = float(both.min()) / 2**0.3, float(both.max()) * 2**0.3
        line = np.array([low, high])
        axes.fill_between(line, line / 2**0.25, line * 2**0.25, color=MODEL, alpha=0.14, lw=0)
        axes.plot(line, line, color=MUTED, lw=1)
        for which, colour, shape, size in ((~conflicts, MUTED, "o", 4.0), (conflicts, ALERT, "D", 5.5)):
            axes.plot(tags[which], tissue[which], shape, color=colour, ms=size, alpha=0.75, mew=0)
        axes.set(xlabel="µm/px by the tag", ylabel="µm/px by the tissue")
        _octaves(axes, low, high)
        _octaves(axes, low, high, vertical=True)

    return _drawn(draw, "tags", wide=(4.6, 3.6), narrow=(_NARROW, 3.2))


def _bins(low: float, high: float, *, per_octave: int) -> Floats:
    """Edges whose bins have their middles on `low` times whole steps, and hold `high`."""
    steps = int(np.ceil(np.log2(high / low) * per_octave - 1e-6)) + 1
    return low * np.exp2((np.arange(steps + 1) - 0.5) / per_octave)


_TICKS = (
    tuple(2.0**octave for octave in range(-5, 12)),  # 0.25, 0.5, 1: how the field counts
    tuple(float(f"{digit}e{power}") for power in range(-3, 5) for digit in (1, 1.5, 2, 3, 4, 5, 6, 8)),
    *(tuple(float(f"{d}e{power}") for power in range(-3, 5) for d in np.arange(1, 10, step)) for step in (0.5, 0.25, 0.1)),
)
_FEWEST_TICKS = 3


def _octaves(axes: Axes, low: float, high: float, *, ticks: Sequence[float] | None = None, vertical: bool = False) -> None:
    """A logarithmic axis from `low` to `high` with round numbers on it."""
    axis = axes.yaxis if vertical else axes.xaxis
    (axes.set_yscale if vertical else axes.set_xscale)("log", base=2)
    room = (high / low) ** 0.02
    (axes.set_ylim if vertical else axes.set_xlim)(low / room, high * room)
    for some in (ticks,) if ticks is not None else _TICKS:
        shown = [tick for tick in some if low / room <= tick <= high * room]
        if len(shown) >= _FEWEST_TICKS:
            break
    most = 8 if axes.figure.get_figure(root=True).get_figwidth() > 4 else 5
    shown = shown[:: max(1, -(-len(shown) // most))]
    axis.set_major_locator(FixedLocator(shown))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y" if vertical else "x", lw=0.6)
    axes.set_axisbelow(True)


def _drawn(draw: Callable[[Figure], None], name: str, *, wide: tuple[float, float], narrow: tuple[float, float]) -> Plot:
    svg = {}
    for form, size in (("wide", wide), ("narrow", narrow)):
        style: Any = {**_STYLE, "svg.hashsalt": f"{name}-{form}"}
        with mpl.rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        svg[form] = _inlined(file.getvalue(), f"{name}-{form}")
    return Plot(**svg)


def _inlined(svg: str, name: str) -> str:
    """The drawing without what only a file needs, its ids its own, its colours the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for sign, variable in _VARIABLES.items():
        svg = svg.replace(sign, f"var(--{variable})")
    return svg.strip()
