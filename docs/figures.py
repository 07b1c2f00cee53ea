"""Draws docs/figures/estimate.png, the README's figure: `python docs/figures.py`."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import wsiscale as ws

HERE = Path(__file__).parent
SLIDE = HERE.parent / "sample_slides" / "tissue_mpp0.25.svs"
SIZE = 160  # px of a tile


def main() -> None:
    with ws.open_slide(SLIDE) as slide:
        found = ws.estimate(slide, mpp_range=(0.25, 4.0), seed=0)
        assert found.mpp is not None
        assert found.ci90 is not None
        assert found.curve is not None
        assert found.slide_mpp is not None
        shown = found.mpp * np.array([0.5, 1 / np.sqrt(2), 1, 2, 4])
        shown = np.maximum(shown, found.slide_mpp)
        places = ws.sample_places(ws.find_tissue(slide), 12, seed=3, field=SIZE * shown[-1] / found.slide_mpp)
        tiles = ws.scale_stack(slide, places[4:5], mpps=shown, size=SIZE).images.compute()[0]

    figure = plt.figure(figsize=(9, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, len(shown), height_ratios=(1.25, 1))
    axes = figure.add_subplot(grid[0, :])
    mpp = found.curve.scales * found.slide_mpp
    axes.fill_between(mpp, found.curve.lo, found.curve.hi, alpha=0.25, lw=0, label="90 % over places")
    axes.plot(mpp, found.curve.score, lw=2, label="mean confidence of the network")
    axes.axvspan(*(bound * found.slide_mpp for bound in found.ci90), color="tab:red", alpha=0.2, lw=0)
    axes.axvline(found.mpp, color="tab:red", label=f"estimate: {found.mpp:.2f} µm/px")
    axes.axvline(found.slide_mpp, color="0.5", ls=":", label=f"slide's level 0: {found.slide_mpp:g} µm/px")
    axes.set_xscale("log", base=2)
    ticks = [0.25, 0.5, 1, 2, 4]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel="µm/px", ylabel="score", xlim=(mpp[0] * 0.97, mpp[-1]))
    axes.legend(frameon=False, fontsize=9)
    for column, (tile, at) in enumerate(zip(tiles, shown, strict=True)):
        axes = figure.add_subplot(grid[1, column])
        axes.imshow(tile)
        chosen = np.isclose(at, found.mpp)
        axes.set_title(f"{at:.2f} µm/px", color="tab:red" if chosen else "black", fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.plot([8, 8 + 20 / at], [SIZE - 10] * 2, color="black", lw=3, solid_capstyle="butt")  # 20 µm
        for spine in axes.spines.values():
            spine.set(edgecolor="tab:red" if chosen else "none", linewidth=3)
    figure.savefig(HERE / "figures" / "estimate.png", dpi=110)


if __name__ == "__main__":
    main()
