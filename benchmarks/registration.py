"""How well a slide's true µm/px is found by registering it to other slides: ways to do it, on real tissue, slide left out.

    python benchmarks/registration.py [DATA] [--cache FOLDER] [--bundled develop|report|all]

With --bundled the embedded network's own profile, made of procedural slides, is tried instead, on real images and copies of
them with other pixels, and on noise; by halves of the split that methods are developed on and reported on.

DATA ($WSISCALE_DATA) holds slides/, patches/ and weights/. Each slide is registered to a profile of the others, over a window
of its scales that is drawn at random: all images start at level 0, and without that the ends of the ranges would give the
answer away. Copies made 1.5 times coarser ask the same with another pixel size. Takes some minutes; docs/profiles.md quotes it.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment

import wsiscale as ws
from wsiscale import profile as p
from wsiscale.testing.procedural import random_stain, slide_image
from wsiscale.types import LayerMoments, Reader, ScaleResponse

NAMES = Path(__file__).parents[1] / "tests" / "nets.py"
NETWORKS = {"embedded, 64 px tiles": (None, 64, 9.6), "nuclei32": (f"{NAMES}:nuclei32", 32, 8.0)}
PLACES = 24
# MoNuSeg calls all of its images 40x. Nuclei in these two are 11 and 13 px wide and over 1,000 to the image, in the others 18
# to 34 px and 220 to 430; there is 2 to 9 times as much power in the finest details: they are 20x.
TWENTY = ("TCGA-HE-7128", "TCGA-HE-7129")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, default=os.environ.get("WSISCALE_DATA"))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--bundled", choices=("develop", "report", "all"))
    options = parser.parse_args()
    if options.data is None:
        sys.exit("say where the real data is, or set WSISCALE_DATA")
    os.environ["WSISCALE_DATA"] = str(options.data)
    if options.bundled:
        bundled(options.data, ("develop", "report") if options.bundled == "all" else (options.bundled,))
        return
    for name, (spec, size, coarsest) in NETWORKS.items():
        responses = cached(options.cache, f"{size}.pickle", options.data, spec, size, coarsest)
        report(name, responses)


def bundled(data: Path, halves: tuple[str, ...]) -> None:
    """The embedded network's profile on real tissue, by half, and on noise."""
    network = ws.load_network()
    made = p.profile_of(network.card)
    assert made is not None
    split = json.loads((Path(__file__).parent / "recovery" / "split.json").read_text())["families"]["embedded"]["slides"]
    for half in halves:
        found = []
        for name, image, mpp in real_images(data):
            # Those that are not of the split were looked at while the profile was made.
            belongs = next((h for h, names in split.items() if any(n.startswith(name) for n in names)), "develop")
            for factor in (1.0, 1.5, 1 / 0.6) if half == belongs else ():
                size = (round(image.width / factor), round(image.height / factor))
                smaller = image if factor == 1 else image.resize(size, Image.Resampling.BOX)
                truth = mpp * image.width / smaller.width
                answer = p.register(made, looked_at(np.asarray(smaller), network))
                off = np.nan if answer.mpp is None else float(np.log2(answer.mpp / truth))
                held = answer.ci90 is not None and answer.ci90[0] <= truth <= answer.ci90[1]
                found.append((off, held))
                said = answer.refused.reason if answer.refused else f"{off:+.2f} octaves, {answer.method}"
                print(f"  {name} at {truth:.3f} µm/px: {said}", flush=True)
        off, held = np.array([f[0] for f in found]), np.array([f[1] for f in found])
        known = np.isfinite(off)
        row(f"{half}: {len(off)} images and copies", off[known])
        print(f"  bias {off[known].mean():+.2f}; intervals cover {held[known].mean():.0%}; refused {np.sum(~known)}")
    registered = [kind for kind, pixels in noises() if p.register(made, looked_at(pixels, network)).refused is None]
    print(f"noise that was registered: {len(registered)} of {len(list(noises()))} ({', '.join(registered) or 'none'})")


def looked_at(pixels: NDArray[np.uint8], network: ws.Network) -> ScaleResponse:
    height, width = pixels.shape[:2]
    top = int(4 * np.log2(min(16, 0.8 * min(height, width) / network.tile_size)))
    scales = np.exp2(np.arange(top + 1) / 4)
    half = network.tile_size * scales[-1] / 2
    centers = np.random.default_rng(0).uniform(half, (height - half, width - half), size=(PLACES, 2))
    stack = ws.scale_stack(ws.ArrayReader(pixels), centers, scales=scales, size=network.tile_size)
    return ws.respond(network, stack, layers="stages", device="cpu")


def real_images(data: Path) -> Iterator[tuple[str, Image.Image, float]]:
    for path in sorted((data / "patches" / "monuseg" / "images").glob("*.png")):
        yield path.stem[:12], Image.open(path).convert("RGB"), 0.5 if path.stem[:12] in TWENTY else 0.25
    for name, reader in (("CMU-1-Small-Region.svs", "auto"), ("OS-1-detail.ome.tif", "tiffslide")):
        with ws.open_slide(data / "slides" / name, reader=reader) as slide:
            height, width = slide.pyramid.shape
            yield name, Image.fromarray(slide.read(level=0, y=0, x=0, height=height, width=width)), slide.pyramid.mpp or np.nan


def noises(side: int = 1200, each: int = 8) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """White, smooth, pink and hardly any noise around a colour, and tissue whose pixels are shuffled."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = np.inf
    for seed in range(each):
        rng = np.random.default_rng([seed, 17])
        shape = (side, side, 3)
        smooth = float(2 ** rng.uniform(0, 3))
        spectrum = np.fft.fft2(rng.standard_normal(shape), axes=(0, 1)) / frequency[..., None]
        made = {
            "white": rng.standard_normal(shape),
            "smooth": gaussian_filter(rng.standard_normal(shape), (smooth, smooth, 0)),
            "pink": np.fft.ifft2(spectrum, axes=(0, 1)).real @ rng.normal(size=(3, 3)),
        }
        color = rng.uniform(120, 230, 3)
        for kind, noise in made.items():
            yield f"{kind} {seed}", np.clip(color + rng.uniform(10, 50) * noise / noise.std(), 0, 255).astype(np.uint8)
        yield f"faint {seed}", np.clip(color + rng.normal(0, 1.5, shape), 0, 255).astype(np.uint8)
        tissue = slide_image(side, side, 0.25, 81_000 + seed, stain=random_stain(seed)).reshape(-1, 3)
        yield f"shuffled {seed}", tissue[rng.permutation(len(tissue))].reshape(shape)


def report(name: str, responses: dict[str, ScaleResponse]) -> None:
    errors: dict[str, list[float]] = {}
    settled: dict[str, list[float]] = {}
    covered, refused = [], []
    rng = np.random.default_rng(0)
    for slide, response in responses.items():
        image = slide.removesuffix(" x1.5")
        made = p.make_profile([r for s, r in responses.items() if s != image and not s.endswith("x1.5")])
        seen = window(response, rng)
        truth = float(response.slide_mpp or np.nan)
        for way, mpp in ways(made, seen).items():
            errors.setdefault(way, []).append(float(np.log2(mpp / truth)))
        found = p.register(made, seen)
        if found.mpp is None or found.ci90 is None:
            refused.append(found.refused.reason if found.refused else "")
        else:
            errors.setdefault("register(), refusals left out", []).append(float(np.log2(found.mpp / truth)))
            covered.append(found.ci90[0] <= truth <= found.ci90[1])
        own = ws.estimate_response(response)
        tag = float(2 ** rng.uniform(-1.32, 1.32))  # 1/2.5 to 2.5
        wrong = replace(found, claimed=truth * tag)
        for how, answer in (
            ("own curve alone", own.scale),
            ("profile, right tag", p.settle(made, found, own).scale),
            ("profile, wrong tag", p.settle(made, wrong, own, trust_tag=False).scale),
            ("profile, no tag", p.settle(made, replace(found, claimed=None), own).scale),
            ("wrong tag believed", p.settle(made, wrong, own).scale),
        ):
            settled.setdefault(how, []).append(np.nan if answer is None else float(np.log2(answer * truth)))
    print(f"\n{name}: {len(responses)} slides and copies")
    print(f"{'true µm/px of level 0, octaves':<36}{'median':>8}{'90 %':>8}{'within 1/4':>12}{'n':>5}")
    for way, off in errors.items():
        row(way, np.array(off))
    print(f"intervals cover {np.mean(covered):.0%}; refused {len(refused)}: {', '.join(sorted(refused)) or 'none'}")
    whole = p.make_profile([r for s, r in responses.items() if not s.endswith("x1.5")])
    if whole.optimum is None or whole.ci90 is None:
        print("; ".join(whole.notes))
    else:
        print(f"profile's optimum {whole.optimum:.3g} µm/px, 90 % {whole.ci90[0]:.3g} to {whole.ci90[1]:.3g}")
        print(f"{'settled scale against 0.5 µm/px':<36}{'median':>8}{'90 %':>8}{'within 1/4':>12}{'n':>5}")
        for how, octaves in settled.items():
            off = np.array(octaves) + 1
            row(how, off[np.isfinite(off)])


def row(name: str, off: NDArray[np.float64]) -> None:
    size = np.abs(off)
    print(f"{name:<36}{np.median(size):>8.2f}{np.quantile(size, 0.9):>8.2f}{np.mean(size <= 0.25):>12.0%}{len(size):>5}")


def ways(made: p.Profile, response: ScaleResponse) -> dict[str, float]:
    """Level-0 µm/px by each way, none refused."""
    bank = p._bank_of(made)
    curves = p._curves(response, made.layers)[:, :, made.channels] - made.center
    at = np.log2(response.scales)
    relative = at[0] + p.STEP * np.arange(int((at[-1] - at[0]) / p.STEP + 1e-6) + 1)
    tiles = p._interpolated(at, curves.astype(np.float64) @ made.basis, relative)
    shifts = p._shifts(bank, len(relative))
    mean = tiles.mean(axis=0)[None]
    nearest = p._tile_scores(bank, tiles, shifts).mean(axis=0)
    level = p._floors(bank, shifts, len(relative)) - nearest
    whole = p._mean_scores(bank, mean, shifts)[0]
    together = sum((score - score.max()) / (score.std() or 1) for score in (whole, level))
    scores = {
        "mean curves, the 3 best slides": whole,
        "mean curves, all slides": all_slides(bank, mean, shifts),
        "nearest tiles, plain": -nearest,
        "nearest tiles, over the bank's own": level,
        "transport between tiles": transport(bank, tiles, shifts),
        "mean curves + nearest tiles": np.asarray(together),
        "range's middle": -np.abs(shifts - shifts.mean()),
    }
    return {way: float(2 ** (bank.octaves[0] + p._top(shifts, score) - relative[0])) for way, score in scores.items()}


def all_slides(bank: p._Bank, mean: NDArray[np.float64], shifts: NDArray[np.intp]) -> NDArray[np.float64]:
    best = p.BEST_SLIDES
    try:
        p.BEST_SLIDES = len(bank.means)
        return p._mean_scores(bank, mean, shifts)[0]
    finally:
        p.BEST_SLIDES = best


def transport(bank: p._Bank, tiles: NDArray[np.float64], shifts: NDArray[np.intp]) -> NDArray[np.float64]:
    """(D,) tiles matched one to one with each reference slide's, over what the bank's slides cost each other there."""
    result = np.full(len(shifts), np.nan)
    for column, shift in enumerate(shifts):
        mine, scales = p._overlap(int(shift), tiles.shape[1], len(bank.octaves))
        costs, usual = [], []
        for r in range(len(bank.means)):
            there = bank.there(r, scales)
            if len(there) < p._enough(tiles.shape[1]):
                continue
            reference = bank.tiles[bank.tile_slide == r]
            costs.append(matched(tiles[:, there - scales[0] + mine[0]], reference[:, there]))
            for q in range(max(r - 3, 0), r):  # some pairs are enough for a level
                both = bank.there(q, there)
                if len(both) >= p._enough(tiles.shape[1]):
                    usual.append(matched(reference[:, both], bank.tiles[bank.tile_slide == q][:, both]))
        if costs and usual:
            result[column] = np.mean(usual) - np.mean(np.sort(costs)[:3])
    return np.where(np.isfinite(result), result, np.nanmin(result))


def matched(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    distances = p._distances(a.astype(np.float64), b.astype(np.float64))
    return float(np.log(distances[linear_sum_assignment(distances)].mean()))


def window(response: ScaleResponse, rng: np.random.Generator) -> ScaleResponse:
    """Two octaves or more of the scales from level 0 on."""
    native = np.flatnonzero(response.scales > 0.99)
    width = int(rng.integers(min(9, len(native)), len(native) + 1))
    first = int(rng.integers(len(native) - width + 1))
    kept = native[first : first + width]
    layers = {n: LayerMoments(m.mean[:, kept], m.square[:, kept]) for n, m in response.layers.items()}
    features = None if response.features is None else response.features[:, kept]
    return replace(response, scales=response.scales[kept], layers=layers, features=features, outputs=None)


def cached(
    folder: Path | None, name: str, data: Path, spec: str | None, size: int, coarsest: float
) -> dict[str, ScaleResponse]:
    path = None if folder is None else folder / name
    if path is not None and path.exists():
        return pickle.loads(path.read_bytes())
    network = ws.load_network(spec, tile_size=size if spec is None else None)
    responses = {}
    for slide_name, slide in slides(data):
        with slide:
            height, width = slide.pyramid.shape
            top = int(4 * np.log2(min(coarsest, 0.75 * min(height, width) / size)))
            scales = 2.0 ** (np.arange(-4, top + 1) / 4)
            half = size * scales[-1] / 2
            centers = np.random.default_rng(0).uniform(half, (height - half, width - half), size=(PLACES, 2))
            stack = ws.scale_stack(slide, centers, scales=scales, size=size, max_upsample=2)
            responses[slide_name] = ws.respond(network, stack, layers="stages", device="cpu")
    if path is not None:
        path.write_bytes(pickle.dumps(responses))
    return responses


def slides(data: Path) -> Iterator[tuple[str, Reader]]:
    for path in sorted((data / "patches" / "monuseg" / "images").glob("*.png")):
        image = Image.open(path).convert("RGB")
        name = path.stem[:12]
        mpp = 0.5 if name in TWENTY else 0.25
        yield name, ws.ArrayReader(np.asarray(image), mpp=mpp)
        small = image.resize((round(image.width / 1.5), round(image.height / 1.5)), Image.Resampling.BOX)
        yield f"{name} x1.5", ws.ArrayReader(np.asarray(small), mpp=mpp * image.width / small.width)
    yield "CMU-1", ws.open_slide(data / "slides" / "CMU-1-Small-Region.svs")
    yield "OS-1", ws.open_slide(data / "slides" / "OS-1-detail.ome.tif", reader="tiffslide")


if __name__ == "__main__":
    main()
