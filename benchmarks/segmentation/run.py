"""Segmentation against scale: `python -m benchmarks.segmentation [--data DIR] [--parts curves,cohort,landing]`.

Quality of nuclei masks against µm/px for two networks, what each way of choosing the scale loses, and what users get on a
cohort of mixed scales whose tags are right, missing or wrong. Ends with docs/segmentation.md; what was measured is kept in
--cache, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from benchmarks.recovery.cases import MissingDataError, Setting
from benchmarks.recovery.methods import NotApplicableError, methods
from benchmarks.recovery.real import MONUSEG, _monuseg, _rng, embedded, monuseg_mpp, nuclei32
from benchmarks.recovery.tables import markdown
from benchmarks.segmentation import cohort, landing, segmenters
from benchmarks.segmentation.cohort import Masks
from benchmarks.segmentation.quality import Quality, quality
from benchmarks.segmentation.segmenters import Segmenter

ROOT = Path(__file__).parents[2]
FOLD = "nuclei32-fold1"
MPPS = {
    "bundled": tuple(0.125 * 2 ** (step / 4) for step in range(17)),  # to 2 µm/px
    "nuclei32": tuple(0.0884 * 2 ** (step / 2) for step in range(8)),  # to 1 µm/px; a window costs 32 x 32 px
}
ROWS = ("penkin2022", "penkin2023", "bagamaev2022", "confidence", "consensus")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parsed(argv)
    data = arguments.data
    if not (data / "patches" / "monuseg").is_dir():
        print(f"there is no patches/monuseg in {data}; name the folder of third-party images with --data", file=sys.stderr)
        return 1
    parts = arguments.parts.split(",")
    text = [_HEAD]
    if "curves" in parts:
        text += [_curves(data, arguments.cache, arguments.docs, arguments.recovery)]
    if "cohort" in parts:
        text += [_cohort(data, arguments.cache, arguments.docs)]
    if "landing" in parts:
        text += [_landing(data, arguments.cache)]
    (arguments.docs / "segmentation.md").write_text("\n".join(text))
    print(f"written: {arguments.docs / 'segmentation.md'}", file=sys.stderr)
    return 0


# --- quality against µm/px -----------------------------------------------------------------------------------------------


def _curves(data: Path, cache: Path, docs: Path, recovery: Path) -> str:
    found: dict[str, dict[str, dict[float, Quality]]] = {}
    for segmenter in (segmenters.bundled(), segmenters.nuclei32(data, FOLD)):
        found[segmenter.name] = {slide: curve(segmenter, data, cache, slide) for slide in MONUSEG}
    curve_figure(docs / "figures" / "segmentation_curves.png", found)
    setting = Setting(cache=recovery, data=data)
    lines = ["## Quality against µm/px\n", "![Dice against µm/px](figures/segmentation_curves.png)\n"]
    for name, curves in found.items():
        lines += [f"### {name}\n", curve_table(curves), ""]
    lines += ["## What each way of choosing the scale loses\n", _CHOOSING, regret_table(found, setting)]
    return "\n".join(lines) + "\n"


def curve(segmenter: Segmenter, data: Path, cache: Path, slide: str) -> dict[float, Quality]:
    """Quality at each of MPPS, kept in the cache."""

    def measured() -> dict[str, dict[str, float]]:
        image, truth = _monuseg(data, slide)
        mpp = monuseg_mpp(slide)
        print(f"{segmenter.name}/{slide}", file=sys.stderr, flush=True)
        judged = {}
        for at in MPPS[segmenter.name]:
            nucleus = segmenter.probability(image, at / mpp)
            judged[f"{at:.6g}"] = asdict(quality(nucleus, truth, threshold=segmenter.threshold, mpp=mpp))
        return judged

    kept = _kept(cache / "curves" / segmenter.name / f"{slide}.json", measured)
    return {float(at): Quality(**values) for at, values in kept.items()}


def curve_table(curves: dict[str, dict[float, Quality]]) -> str:
    """Means over images, a row a µm/px."""
    mpps = sorted(next(iter(curves.values())))
    rows = []
    for mpp in mpps:
        at = [of_slide[mpp] for of_slide in curves.values()]
        rows.append([f"{mpp:.3g}", *(f"{np.mean([getattr(q, name) for q in at]):.3f}" for name in ("auc", "dice", "f1", "pq"))])
    peaks = [np.log2(max(of_slide, key=lambda m, c=of_slide: c[m].dice) / 0.5) for of_slide in curves.values()]
    said = f"\nBest Dice of single images: median {0.5 * 2 ** np.median(peaks):.3g} µm/px."
    return markdown(["µm/px", "AUC", "Dice", "object F1", "PQ"], rows) + "\n" + said


def regret_table(found: dict[str, dict[str, dict[float, Quality]]], setting: Setting) -> str:
    """Mean Dice lost against the best measured µm/px, a row a way of choosing."""
    lost: dict[str, dict[str, list[float]]] = {}

    def note(way: str, name: str, curves: dict[float, Quality], mpp: float) -> None:
        mpps = np.array(sorted(curves))
        values = np.array([curves[m].dice for m in mpps])
        lost.setdefault(way, {}).setdefault(name, []).append(
            float(values.max() - np.interp(np.log2(mpp), np.log2(mpps), values))
        )

    for name, family, training in (("bundled", embedded, 0.5), ("nuclei32", nuclei32, 0.25)):
        for slide, curves in found[name].items():
            native = monuseg_mpp(slide)
            wrong = cohort.LARGEST ** _rng("wrong tag", slide).uniform(-1, 1)
            note("as it is", name, curves, native)
            note("nominal 20x (0.5 µm/px)", name, curves, 0.5)
            note("training µm/px, right tag", name, curves, training)
            note("training µm/px, wrong tag", name, curves, training * wrong)
        rows = {way: method for way, method in methods().items() if way in ROWS or way == "consensus + abstains"}
        try:
            for case in family(setting):
                # Whichever half: nothing is developed here. The range from level 0 on, as `estimate` has it.
                fold = case.network in ("embedded", FOLD)
                if not fold or case.upsampled or case.slide not in found[name]:
                    continue
                for way, method in rows.items():
                    try:
                        answer = method(case)
                    except NotApplicableError:
                        continue
                    mpp = monuseg_mpp(case.slide)
                    scale = answer.scale if answer.scale is not None else 1.0
                    note(way, name, found[name][case.slide], scale * mpp)
        except MissingDataError as error:
            print(f"{name}: {error}", file=sys.stderr)
    names = list(found)

    def cell(of: list[float] | None) -> str:
        return "-" if of is None else f"{np.mean(of):.3f} ({len(of)})"

    cells = [[way, *(cell(of.get(name)) for name in names)] for way, of in lost.items()]
    return markdown(["", *names], cells)


def curve_figure(path: Path, found: dict[str, dict[str, dict[float, Quality]]]) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(found), figsize=(8, 3.2), layout="constrained", sharey=True)
    for axis, (name, curves) in zip(axes, found.items(), strict=True):
        mpps = np.array(sorted(next(iter(curves.values()))))
        values = np.array([[of_slide[m].dice for m in mpps] for of_slide in curves.values()])
        axis.plot(mpps, values.T, color="0.8", linewidth=0.8)
        axis.plot(mpps, values.mean(axis=0), color="black", linewidth=2)
        axis.set_xscale("log", base=2)
        ticks = [m for m in (0.125, 0.25, 0.5, 1, 2) if mpps[0] * 0.99 <= m <= mpps[-1] * 1.01]
        axis.set_xticks(ticks, [f"{m:g}" for m in ticks])
        axis.set_title(name)
        axis.set_xlabel("µm/px that it is shown")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("Dice, 14 images and their mean")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- a cohort of mixed scales --------------------------------------------------------------------------------------------


def _cohort(data: Path, cache: Path, docs: Path) -> str:
    found = _masks(data, cache)
    cohort_figure(docs / "figures" / "segmentation_cohort.png", found)
    ways = list(dict.fromkeys(m.way for m in found))
    rows = [[way, *(f"{cohort.mean_dice(found, way, tags):.3f}" for tags in cohort.TAGS)] for way in ways]
    one, one_dice = _one_for_all(data, cache)
    rows.append([f"oracle, {one:.3g} µm/px for all", *[f"{one_dice:.3f}"] * len(cohort.TAGS)])
    silent = [m.abstained is not None for m in found if m.way == "wsiscale" and m.tags == "missing"]
    gained = []
    for tags in cohort.TAGS:
        tag, ours, best = (cohort.mean_dice(found, way, tags) for way in ("trust the tag", "wsiscale", "oracle"))
        gained.append(f"{tags}: {ours - tag:+.3f} of {best - tag:+.3f} and {one_dice - tag:+.3f}")
    lines = [
        "## A cohort of mixed scales\n",
        _COHORT,
        "![Dice by how good the tags are](figures/segmentation_cohort.png)\n",
        markdown(["mean Dice, tags", *cohort.TAGS], rows),
        f"\nAgainst trusting the tag wsiscale gains, of what the two oracles do: {'; '.join(gained)}. "
        f"It has no estimate for {np.mean(silent):.0%} of the {len(silent)} copies, which are then read by their tag.",
    ]
    return "\n".join(lines) + "\n"


def _one_for_all(data: Path, cache: Path) -> tuple[float, float]:
    """The µm/px at which the mean Dice of all copies is highest, and that Dice."""
    segmenter = segmenters.bundled()
    of_copies = []
    for copy in cohort.copies(data):

        def measured(copy: cohort.Copy = copy) -> dict[str, float]:
            print(f"oracle/{copy.name}", file=sys.stderr, flush=True)
            return {f"{mpp:.6g}": value for mpp, value in cohort.by_truth(segmenter, copy).items()}

        of_copies.append(_kept(cache / "oracle" / f"{copy.name}.json", measured))
    means = {mpp: float(np.mean([of[mpp] for of in of_copies])) for mpp in of_copies[0]}
    best = max(means, key=lambda mpp: means[mpp])
    return float(best), means[best]


def _masks(data: Path, cache: Path) -> list[Masks]:
    segmenter = segmenters.bundled()
    found: list[Masks] = []
    for copy in cohort.copies(data):

        def measured(copy: cohort.Copy = copy) -> list[dict[str, Any]]:
            print(f"cohort/{copy.name}", file=sys.stderr, flush=True)
            return [asdict(m) for m in cohort.masks(segmenter, copy)]

        found += [Masks(**values) for values in _kept(cache / "cohort" / f"{copy.name}.json", measured)]
    return found


def cohort_figure(path: Path, found: list[Masks]) -> None:
    plt = _pyplot()
    ways = {"trust the tag": "0.75", "wsiscale": "#3b6ea5", "oracle": "0.25"}
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    for number, (way, colour) in enumerate(ways.items()):
        values = [cohort.mean_dice(found, way, tags) for tags in cohort.TAGS]
        bars = axis.bar(np.arange(3) + (number - 1) * 0.27, values, 0.25, color=colour, label=way)
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set_xticks(range(3), [f"tags {tags}" for tags in cohort.TAGS])
    axis.set_ylabel("mean Dice of nuclei")
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, ncols=3, loc="upper center")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- where the default lands ---------------------------------------------------------------------------------------------


def _landing(data: Path, cache: Path) -> str:
    curves = {slide: curve(segmenters.bundled(), data, cache, slide) for slide in MONUSEG}
    mpps = next(iter(curves.values()))
    peak = landing.peak({mpp: float(np.mean([of[mpp].dice for of in curves.values()])) for mpp in mpps})
    own = {slide: landing.peak({mpp: q.dice for mpp, q in of.items()}) for slide, of in curves.items()}

    def measured() -> dict[str, float | None]:
        return dict(landing.estimates(data))

    slides: dict[str, float | None] = _kept(cache / "landing.json", measured)
    copies = [m for m in _masks(data, cache) if m.way == "wsiscale, tags trusted" and m.tags == "right"]
    groups = {
        "the 14 images": [slides[slide] for slide in MONUSEG],
        f"{len(copies)} rescaled copies": [None if m.abstained else m.mpp for m in copies],
        **{name: [found] for name, found in slides.items() if name not in MONUSEG},
    }
    rows = [landing.row(name, found, peak) for name, found in groups.items()]
    apart = np.array([abs(np.log2(found / own[slide])) for slide in MONUSEG if (found := slides[slide]) is not None])
    lines = [
        "## Where `wsiscale estimate` lands\n",
        f"With no options, tags as the files have them. The mean Dice of the 14 images is highest at {peak:.3g} µm/px "
        f"({np.log2(peak / 0.5):+.2f} octaves from the 0.5 it was trained at).\n",
        markdown(["", "without an estimate", "estimates, µm/px (median, range)", "within 0.3 octaves of the peak"], rows),
        f"\nOf their own image's peak, which labels of one image do not fix as well, {np.mean(apart <= 0.3):.0%} of the "
        f"estimates are within 0.3 octaves (median {np.median(apart):.2f}).",
    ]
    return "\n".join(lines) + "\n"


# --- small things --------------------------------------------------------------------------------------------------------

_HEAD = """# Segmentation is better at the right scale

Written by `python -m benchmarks.segmentation`; do not edit. Nuclei on the 14 MoNuSeg images (1000 x 1000 px; research use, not
shipped, none of them trained on): the bundled U-Net, and nuclei32, a published classifier of 32 px windows, fold 1. One fixed
threshold each, 0.5 and 0.2 (the better one on the development half). Objects are connected pieces of 4 µm² or more, also in the
truth, which does not tell nuclei that touch; they are found where they overlap by more than half. Two images were scanned at
0.5 µm/px and not at 0.25 as their data sheet says.
"""

_CHOOSING = """Mean Dice lost against the best measured µm/px of each image; in brackets how many images. The seed methods,
`confidence` and ours (`consensus`, without a profile) choose from the slide's own pixels, from level 0 on; ours with abstention
reads the slide as it is where it abstains.
"""

_COHORT = f"""Each image in {cohort.COPIES} copies with 1/{cohort.LARGEST} to {cohort.LARGEST} times as many pixels a side,
segmented by the bundled network (0.5 µm/px). Tags are right, missing, or wrong by a random factor of up to {cohort.LARGEST}
either way. *Trust the tag* reads at 0.5 µm/px by the tag, and takes a slide without one for {cohort.GUESS} µm/px; *wsiscale* is
`estimate --no-trust-tag`, which sees the pixels alone; *tags trusted* is its default; the *oracle* picks the best of
{len(cohort.ORACLE)} scales for each copy by that copy's own labels, or the best one for all of them by all labels.
"""


def _kept(path: Path, measure: Callable[[], Any]) -> Any:
    if not path.exists():
        made = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(made))
        partial.replace(path)
    return json.loads(path.read_text())


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.segmentation", description=(__doc__ or "").split("\n\n")[0])
    known = os.environ.get("WSISCALE_DATA", ROOT.parent / "shared" / "data")
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wsiscale-benchmark" / "segmentation"
    parser.add_argument("--data", type=Path, default=Path(known), help="folder of third-party images and weights")
    parser.add_argument("--cache", type=Path, default=kept, help=f"folder for what was measured (default {kept})")
    asked = kept.parent
    parser.add_argument("--recovery", type=Path, default=asked, help=f"the cache of benchmarks.recovery (default {asked})")
    parser.add_argument("--parts", default="curves,cohort,landing", help="which of curves, cohort, landing")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder for segmentation.md and its figures")
    return parser.parse_args(argv)
