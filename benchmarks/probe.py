"""Where ImageNet's networks keep scale, on real tissue; and whether cutting them there helps. Writes docs/probe.md.

    python -m benchmarks.probe --data DIR [--cache DIR] [--networks densenet121,vgg16] [--out docs]

17 images of known µm/px from four sources, each one slide, held out whole. Needs third-party images and weights. Answers are
cached one network and slide at a time: from nothing it takes half an hour on one core, from the cache half of that.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import tifffile
from numpy.typing import NDArray
from torch import nn

import wsiscale as ws
from benchmarks.recovery.photos import imagenet_network
from benchmarks.recovery.real import MONUSEG, MONUSEG_OTHER_MPP, _monuseg, _rgb, monuseg_mpp
from wsiscale.figures import passing_by_chance, passing_channels, probe_figure, response_to_image
from wsiscale.networks import Network
from wsiscale.nuclear_area import cohen_kappa, magnification_kappa, mean_nuclear_area
from wsiscale.probe import Layer, Probe, folds, probe_answers
from wsiscale.ridge import fit_ridges

ROOT = Path(__file__).parents[1]
TILE = 96  # px: eight times as coarse, and a little more, still lies within 1000 px
PLACES = 12
NETWORKS = ("densenet121", "vgg16")
MAGNIFICATIONS = (5, 8, 10, 15, 20, 30, 40)


def slides(data: Path) -> Iterator[ws.Reader]:
    """Real tissue of known µm/px, one at a time."""
    for name in ("CMU-1-Small-Region.svs", "OS-1-detail.ome.tif"):
        with ws.open_slide(data / "slides" / name) as slide:
            yield slide
    yield ws.ArrayReader(tifffile.imread(data / "patches/instanseg_he/HE_example.tif"), mpp=0.5001, name="instanseg")
    for name in MONUSEG:
        yield ws.ArrayReader(_rgb(data / "patches/monuseg/images" / f"{name}.png"), mpp=monuseg_mpp(name), name=name)


def network(name: str, data: Path) -> Network:
    """The trunk, up to what its classifier would get, its layers by torchvision's names."""
    trunk = imagenet_network(name, data / "weights", tile_size=TILE)
    parts = OrderedDict(features=trunk.module)
    if name == "densenet121":  # torchvision has its last ReLU outside of the trunk
        parts["relu"] = nn.ReLU()
    return replace(trunk, module=nn.Sequential(parts).eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    data = os.environ.get("WSISCALE_DATA")
    parser.add_argument("--data", type=Path, required=data is None, default=None if data is None else Path(data))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "wsiscale" / "probe")
    parser.add_argument("--places", type=int, default=PLACES)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    parts = []
    for name in options.networks.split(","):
        began, told = time.perf_counter(), partial(print, name, file=sys.stderr)
        asked = network(name, options.data)
        probe, answers = ws.probe_slides(slides(options.data), asked, places=options.places, keep=options.cache, told=told)
        published = probe_answers(answers, model=name, as_published=True)
        figure = options.out / "figures" / f"probe_{name}.png"
        figure.parent.mkdir(parents=True, exist_ok=True)
        probe_figure(probe).savefig(figure, dpi=110)
        print(probe.sentence())
        parts.append(section(name, probe, published))
        parts.append(areas_section(asked, probe, options.data, options.places))
        parts.append(channels_section(asked, options.data))
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    page = options.out / "probe.md"
    before = page.read_text(encoding="utf-8").partition(MARK)[0] if page.exists() else ""
    page.write_text(before + MARK + "\n\n" + "\n".join(parts), encoding="utf-8")


MARK = "<!-- measured: written by python -m benchmarks.probe; do not edit below -->"


def section(name: str, probe: Probe, published: Probe) -> str:
    """R2 of the layers that matter, beside the controls; and cut against whole."""
    called = {
        probe.layers[0].name: "first",
        probe.prune_at: "cut here",
        probe.peak.name: "peak",
        published.peak.name: "peak as published",
        probe.layers[-1].name: "last",
    }
    if probe.prune_at == probe.peak.name:
        called[probe.peak.name] = "peak, cut here"
    rows = [row(called[layer.name], layer, published.layer(layer.name)) for layer in probe.layers if layer.name in called]
    random = max(probe.layers, key=lambda layer: -np.inf if layer.random is None else layer.random)
    shuffled = max(layer.shuffled for layer in probe.layers)
    negative = sum(layer.r2 < 0 for layer in published.layers)
    assert probe.cut is not None
    assert random.random is not None
    cut = probe.cut
    lines = [
        f"### {name}",
        f"![R2 of scale against depth](figures/probe_{name}.png)",
        f"{len(probe.slides)} slides, {probe.tiles} tiles of {TILE} px at {probe.mpp_range[0]:.2f} to {probe.mpp_range[1]:.2f} "
        f"µm/px; {len(probe.layers)} layers.",
        "| | layer | depth | channels | R2 (90 %) | usual R2 | random weights | shuffled | error, octaves | as published |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n" + "\n".join(rows),
        f"Of all layers, random weights reach {random.random:.2f} at most (depth {random.depth:.0%}; as trained "
        f"{random.r2:.2f} there), shuffled targets {shuffled:.2f}. As published {negative} of {len(published.layers)} layers "
        f"are below 0, and shuffled targets reach {max(layer.shuffled for layer in published.layers):.2f} at most.",
        f"**Cut against whole**, the layer chosen each time without the slides it is tested on: held-out tiles are missed by "
        f"{cut.cut:.3f} octave cut, {cut.whole:.3f} whole; the gain is {cut.gain:.3f} ({cut.lo:.3f} to {cut.hi:.3f}).",
    ]
    return "\n\n".join(lines) + "\n"


def row(called: str, layer: Layer, published: Layer) -> str:
    random = "" if layer.random is None else f"{layer.random:.2f}"
    cells = [
        called,
        f"`{layer.name}`",
        f"{layer.depth:.0%}",
        str(layer.channels),
        f"{layer.r2:.2f} ({layer.lo:.2f} to {layer.hi:.2f})",
        f"{layer.usual:.2f}",
        random,
        f"{layer.shuffled:.2f}",
        f"{layer.error:.2f}",
        f"{published.r2:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


# --- mean nuclear area, the published task ------------------------------------------------------------------------------------


def areas_section(asked: Network, probe: Probe, data: Path, places: int) -> str:
    """Kappa over seven magnifications, cut and whole: by mean nuclear area, as published, and by log2 µm/px."""
    layers = [probe.prune_at, probe.layers[-1].name]
    names = [name for name in MONUSEG if name not in MONUSEG_OTHER_MPP]
    values: dict[str, list[NDArray[np.float32]]] = {layer: [] for layer in layers}
    areas, power, slide = [], [], []
    for number, name in enumerate(names):
        image, mask = _monuseg(data, name)
        tiles, masks = _at_magnifications(image, mask, places, seed=number)
        response = ws.respond(asked, tiles, scales=np.arange(1.0, 1.0 + len(tiles)), layers=layers)
        for layer in layers:
            values[layer].append(response.layers[layer].mean.reshape(-1, response.layers[layer].mean.shape[2]))
        areas += [[mean_nuclear_area(masks[s][n]) for s in range(len(masks))] for n in range(places)]
        power += [list(MAGNIFICATIONS[::-1])] * places
        slide += [[number] * len(MAGNIFICATIONS)] * places
    area, magnification, which = np.ravel(areas), np.ravel(power).astype(float), np.ravel(slide).astype(np.intp)
    known = np.isfinite(area)
    area, magnification, which = area[known], magnification[known], which[known]
    target = np.stack([area, np.log2(magnification)], axis=1)
    fold = folds(len(names), 0)[which]
    lines = [
        f"Published task, {known.sum()} tiles with nuclei of {len(names)} MoNuSeg images, images held out: mean nuclear area "
        "in px² from the layer, and the nearest of seven magnifications' mean areas; beside it log2 of the magnification, the "
        "nearest in octaves.",
        "| | layer | area: MAE, px² | kappa by area | kappa by log2 µm/px |\n|---|---|---|---|---|",
    ]
    classes = np.log2(np.array(MAGNIFICATIONS, float))
    for called, layer in zip(("cut", "whole"), layers, strict=True):
        channels = np.concatenate(values[layer])[known]
        predicted = np.empty_like(target)
        for each in np.unique(fold):
            test = fold == each
            ridges = fit_ridges(channels[~test], target[~test], which[~test])
            predicted[test] = np.stack([ridge.predict(channels[test]) for ridge in ridges], axis=1)
        by_area = magnification_kappa(predicted[:, 0], magnification, area)
        nearest = classes[np.abs(predicted[:, 1, None] - classes).argmin(axis=1)]
        by_scale = cohen_kappa(target[:, 1], nearest)
        missed = np.abs(predicted[:, 0] - area).mean()
        lines[-1] += f"\n| {called} | `{layer}` | {missed:.1f} | {by_area:.2f} | {by_scale:.2f} |"
    return "\n\n".join(lines) + "\n"


def _at_magnifications(
    image: NDArray[np.uint8], mask: NDArray[np.bool_], places: int, *, seed: int
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Tiles and masks of one image scanned at 40x, at each magnification from fine to coarse: (N, TILE, TILE, 3) each."""
    rng = np.random.default_rng(seed)
    grey = np.repeat((mask * np.uint8(255))[..., None], 3, axis=2)
    pictures, masks = [], []
    for power in MAGNIFICATIONS[::-1]:
        scale = 40 / power
        reach = TILE * scale / 2
        centers = np.stack([rng.uniform(reach, side - reach, places) for side in image.shape[:2]], axis=1).round()
        for source, into in ((image, pictures), (grey, masks)):
            stack = ws.scale_stack(ws.ArrayReader(source), centers, scales=[scale], size=TILE)
            into.append(np.asarray(stack.images[:, 0].compute(scheduler="synchronous")))
    return pictures, [tiles[..., 0] for tiles in masks]


# --- channels ---------------------------------------------------------------------------------------------------------------


def channels_section(asked: Network, data: Path) -> str:
    """The share of channels that pass the filter of Penkin et al., on tissue and on noise."""
    image, _ = _monuseg(data, MONUSEG[0])
    noise = np.random.default_rng(0).integers(0, 256, image.shape, np.uint8)
    scales = np.exp2(np.arange(0, 3.01, 0.25))
    shares = [
        _thirds(list(passing_channels(response_to_image(asked, each, scales=scales, layers="every")).values()))
        for each in (image, noise)
    ]
    told = "; ".join(
        f"{name} {', '.join(f'{share:.0%}' for share in found)}"
        for name, found in zip(("tissue", "noise"), shares, strict=True)
    )
    return (
        f"Channels that pass Penkin et al.'s filter, in the first, middle and last third of the layers: {told}. Random numbers "
        f"instead of answers: {passing_by_chance(len(scales)):.0%}.\n"
    )


def _thirds(shares: Sequence[float]) -> list[float]:
    return [float(np.mean(part)) for part in np.array_split(shares, 3)]


if __name__ == "__main__":
    main()
