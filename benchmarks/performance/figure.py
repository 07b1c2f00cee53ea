"""docs/figures/performance.png: what a tile, a place and a slide cost, and how cost grows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

OURS, LIMIT, OTHERS = "#1b6ca8", "#3a3a3a", "#b9bfc6"


def draw(path: Path, bars: Mapping[str, Mapping[str, float]], growth: Mapping[str, Mapping[int, float]]) -> None:
    """`bars`: title with its unit -> way -> cost; `growth`: what grows -> how much -> cost of one thing."""
    figure, axes = plt.subplots(1, len(bars) + 1, figsize=(4.6 * (len(bars) + 1), 3.4), layout="constrained")
    for axis, (title, ways) in zip(axes, bars.items(), strict=False):
        _bars(axis, title, ways)
    axis = axes[-1]
    for what, costs in growth.items():
        first = next(iter(costs.values()))
        axis.plot(list(costs), np.array(list(costs.values())) / first, marker="o", ms=3.5, lw=1.3, label=what)
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, None)
    axis.axhline(1, color=OTHERS, lw=0.8, zorder=0)
    axis.set_title("Cost of one, by how many there are", fontsize=10, loc="left")
    axis.set_xlabel("how many (slide: megapixels)", fontsize=9)
    axis.set_ylabel("over the first's", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Axes, title: str, ways: Mapping[str, float]) -> None:
    ways = dict(sorted(ways.items(), key=lambda item: -item[1]))
    colours = [OURS if name.startswith("wsiscale") else LIMIT if "limit" in name else OTHERS for name in ways]
    drawn = axis.barh(range(len(ways)), list(ways.values()), color=colours, height=0.7)
    axis.bar_label(drawn, fmt="%.3g", fontsize=8, padding=2)
    axis.set_yticks(range(len(ways)), [name.replace(", ", ",\n", 1) for name in ways], fontsize=8)
    axis.set_xlim(0, 1.18 * max(ways.values()))
    axis.set_title(title, fontsize=10, loc="left")
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
