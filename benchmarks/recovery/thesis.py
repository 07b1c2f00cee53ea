"""The synthetic experiment of Bagamaev 2022: 20 classes of coloured figures, networks of 5,192 parameters, planted scales.

Data and network follow the thesis (see docs/methods.md): white canvases of 10,000 px with 40,000 figures of one class, sides
of 35 to 44 px; training patches of floor(scale * 224) px resized to 224 px by Pillow's antialiased bicubic; convolution, ReLU,
BatchNorm; Keras's momentum, epsilon and initialisation; Adam, 875 steps of 32.

    python -m benchmarks.recovery.thesis data --cache DIR     # canvases -> patches for every scale, once
    python -m benchmarks.recovery.thesis train --cache DIR    # every network that is not there yet -> nets/
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import io
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import dask.array as da
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn

import wsiscale as ws
from benchmarks.recovery.cases import Case, Half, Oracle, Range, Setting, drawn, half_of, joined, over_ranges
from wsiscale.geometry import scale_grid
from wsiscale.types import ScaleResponse, ScaleStack

HERE = Path(__file__).parent
NETS = HERE / "nets"

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "purple": (128, 0, 128)}
FIGURES = ("rectangle", "ellipse", "cross", "triangle")
CLASSES = tuple((colour, figure) for colour in COLOURS for figure in FIGURES)  # class = 4 * colour + figure

CANVAS, DENSITY = 10_000, 40_000 / 10_000**2
TILE = 224
SCALES = (1.5, 2.0, 3.0, 5.0, 7.0)
TRAIN_CANVASES, PATCHES = 10, 20  # a class; patches of each canvas


@dataclass(frozen=True)
class Recipe:
    """One network: what it was trained at, on what, from which seed."""

    scale: float
    seed: int
    width: int = 4  # of the first convolutions: 4 is the thesis's light network, 8 the heavy one
    noise: int = 0  # standard deviation in grey levels

    @property
    def name(self) -> str:
        return f"{'light' if self.width == 4 else 'heavy'}-noise{self.noise}-scale{self.scale:g}-seed{self.seed}"


RECIPES = (
    *(Recipe(scale, seed) for seed in range(3) for scale in SCALES),
    *(Recipe(scale, 0, noise=noise) for noise in (50, 100) for scale in SCALES),
    *(Recipe(scale, 0, width=8) for scale in SCALES),
)


def canvas(label: int, *, seed: int, size: int = CANVAS, noise: int = 0) -> Image.Image:
    """A square of white with figures of class `label` (0..19), overlapping, and Gaussian noise on top if asked."""
    colour, figure = CLASSES[label]
    rng = np.random.default_rng([seed, label, noise])
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    count = round(size**2 * DENSITY)
    corners = rng.integers(0, size, (count, 2))
    sides = 40 + rng.integers(-5, 5, count)
    jitters = rng.integers(-20, 20, count)
    for (x, y), side, jitter in zip(corners.tolist(), sides.tolist(), jitters.tolist(), strict=True):
        fill = tuple(min(max(base + jitter, 0), 255) for base in COLOURS[colour])
        right, bottom = x + side, y + side
        if figure == "rectangle":
            draw.rectangle((x, y, right, bottom), fill)
        elif figure == "ellipse":
            draw.ellipse((x, y, right, bottom), fill)
        elif figure == "cross":
            draw.line((x, y, right, bottom), fill, 7)
            draw.line((x, bottom, right, y), fill, 7)
        else:
            draw.polygon(((x, bottom), (x + side // 2, y), (right, bottom)), fill)
    if noise:
        half = np.clip(rng.normal(128, noise, (size // 2, size // 2, 3)), 0, 255).astype(np.uint8)
        grain = np.asarray(Image.fromarray(half).resize((size, size)), np.int16) - 128
        image = Image.fromarray(np.clip(np.asarray(image, np.int16) + grain, 0, 255).astype(np.uint8))
    return image


def _jpeg(image: Image.Image) -> Image.Image:
    """What is left after saving as JPEG with Pillow's defaults, as the thesis did."""
    file = io.BytesIO()
    image.save(file, "JPEG")
    return Image.open(file).convert("RGB")


def _cut(seed: int, label: int, *, noise: int, scales: tuple[float, ...]) -> dict[float, NDArray[np.uint8]]:
    """Training patches of one canvas: scale -> (PATCHES, 224, 224, 3)."""
    drawn = _jpeg(canvas(label, seed=seed, noise=noise))
    rng = np.random.default_rng([seed, label, noise, 1])
    found = {}
    for scale in scales:
        side = math.floor(scale * TILE)
        corners = rng.integers(0, CANVAS - side, (PATCHES, 2)).tolist()
        tiles = [drawn.crop((x, y, x + side, y + side)).resize((TILE, TILE), Image.Resampling.BICUBIC) for x, y in corners]
        found[scale] = np.stack([np.asarray(tile) for tile in tiles])
    return found


def make_data(cache: Path, *, noise: int, scales: tuple[float, ...] = SCALES, workers: int = 2) -> None:
    """Patches (4000, 224, 224, 3) and labels of every scale, once, into `cache`."""
    missing = tuple(scale for scale in scales if not _patches(cache, noise, scale).exists())
    if not missing:
        return
    cache.mkdir(parents=True, exist_ok=True)
    jobs = [(1000 + i, label) for label in range(len(CLASSES)) for i in range(TRAIN_CANVASES)]
    shape = (len(jobs) * PATCHES, TILE, TILE, 3)
    partial_files = {scale: _patches(cache, noise, scale).with_suffix(".partial") for scale in missing}
    arrays = {scale: np.lib.format.open_memmap(file, "w+", np.uint8, shape) for scale, file in partial_files.items()}
    started = time.perf_counter()
    with ProcessPoolExecutor(workers) as pool:
        cut = pool.map(partial(_cut, noise=noise, scales=missing), *zip(*jobs, strict=True))
        for i, patches in enumerate(cut):
            for scale, tiles in patches.items():
                arrays[scale][i * PATCHES : (i + 1) * PATCHES] = tiles
            if i % 20 == 19:
                print(f"noise {noise}: {i + 1} of {len(jobs)} canvases, {time.perf_counter() - started:.0f} s", flush=True)
    for scale, file in partial_files.items():
        arrays[scale].flush()
        file.rename(_patches(cache, noise, scale))


def _patches(cache: Path, noise: int, scale: float) -> Path:
    return cache / f"patches-noise{noise}-scale{scale:g}.npy"


def labels() -> NDArray[np.int64]:
    """The class of each training patch: (4000,)."""
    return np.repeat(np.arange(len(CLASSES)), TRAIN_CANVASES * PATCHES)


def network(width: int = 4) -> nn.Sequential:
    """The thesis's network for raw 0..255 RGB, logits of 20 classes; `width` 4 has its 5,192 numbers."""

    def block(channels: int, out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, out, 3, padding=1)
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(convolution.bias)
        # Keras's momentum 0.99 is torch's 0.01.
        return [convolution, nn.ReLU(), nn.BatchNorm2d(out, eps=1e-3, momentum=0.01)]

    head = nn.Linear(4 * width, len(CLASSES))
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(
        *block(3, width),
        *block(width, width),
        nn.MaxPool2d(2),
        *block(width, 2 * width),
        *block(2 * width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width),
        *block(4 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        head,
    )


def train(recipe: Recipe, cache: Path, *, epochs: int = 7, batch: int = 32) -> nn.Sequential:
    """The trained network, in eval mode."""
    torch.manual_seed(recipe.seed)
    module = network(recipe.width).to(memory_format=torch.channels_last)
    patches = np.load(_patches(cache, recipe.noise, recipe.scale), mmap_mode="r")
    classes = labels()
    optimiser = torch.optim.Adam(module.parameters(), 1e-3, eps=1e-7)  # Keras's epsilon
    rng = np.random.default_rng(recipe.seed)
    for epoch in range(epochs):
        started, right = time.perf_counter(), 0
        for rows in np.split(rng.permutation(len(patches)), len(patches) // batch):
            rows.sort()
            tiles = torch.from_numpy(patches[rows]).permute(0, 3, 1, 2).float()
            wanted = torch.from_numpy(classes[rows])
            logits = module(tiles)
            loss = nn.functional.cross_entropy(logits, wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            right += int((logits.argmax(1) == wanted).sum())
        share, seconds = right / len(patches), time.perf_counter() - started
        print(f"{recipe.name}: epoch {epoch + 1}, accuracy {share:.3f}, {seconds:.0f} s", flush=True)
    return module.eval()


def load(recipe: Recipe) -> nn.Sequential:
    """A trained network from nets/, in eval mode."""
    module = network(recipe.width)
    module.load_state_dict(load_file(NETS / f"{recipe.name}.safetensors"))
    return module.eval()


def trained() -> Iterator[Recipe]:
    """The recipes whose networks are in nets/."""
    return (recipe for recipe in RECIPES if (NETS / f"{recipe.name}.safetensors").exists())


# --- cases ---------------------------------------------------------------------------------------------------------------

FAMILY = "thesis"
RANGES = (Range("A", 0.5, 8.0), Range("B", 1.0, 16.0))  # off-centre to either side for most of the planted scales
TEST_SIZE = 5_000  # px: holds the widest field, 16 * 224
TEST_SEED = 9_000  # canvases that no network was trained on
SINGLE_PLACES, MIXED_PLACES = 12, 3  # a class
VIEWS = ("rot90", "phase_scrambled", "pixel_shuffled")


def slides() -> list[str]:
    """Two slides of all 20 classes, and 20 of one class."""
    return ["mixed-0", "mixed-1", *(f"class-{label:02d}" for label in range(len(CLASSES)))]


def split() -> dict[str, dict[str, dict[Half, list[str]]]]:
    """What `write_split` was given before anything was measured: all networks, trained or not; a mixed slide in each half."""
    classes = drawn("thesis slides", [slide for slide in slides() if slide.startswith("class")])
    halves: dict[Half, list[str]] = {
        "develop": ["mixed-0", *classes["develop"]],
        "report": ["mixed-1", *classes["report"]],
    }
    return {FAMILY: {"networks": drawn("thesis networks", [recipe.name for recipe in RECIPES]), "slides": halves}}


def cases(setting: Setting) -> Iterator[Case]:
    """Each trained network on the mixed slide and the single-class slides of its half."""
    for recipe in sorted(trained(), key=lambda recipe: recipe.noise):  # networks of one noise look at the same tiles
        if setting.quick and recipe.seed > 0:
            continue
        found: dict[str, ScaleResponse] = {}
        halves: dict[str, Half] = {}
        for slide in slides():
            if (half := half_of(FAMILY, network=recipe.name, slide=slide)) is not None:
                found[slide], halves[slide] = _asked(setting, recipe, slide), half
        right = {slide: _right(response, slide) for slide, response in found.items()}
        for slide, response in found.items():
            mixed = slide.startswith("mixed")
            # The quality on a mixed slide from every tile that the network was asked about, places being few.
            seen = np.concatenate(list(right.values())) if mixed else right[slide]
            case = Case(
                name=f"{FAMILY}/{recipe.name}/{slide}",
                family=FAMILY,
                network=recipe.name,
                slide=slide,
                half=halves[slide],
                response=response,
                oracle=_oracle(response.scales, seen),
                train_scale=recipe.scale,
                range="whole",
                upsampled=True,
                tags=frozenset({"mixed" if mixed else "single-class"}),
            )
            yield from over_ranges(case, RANGES)


def _asked(setting: Setting, recipe: Recipe, slide: str) -> ScaleResponse:
    """The network's answers on a slide, over all ranges."""

    def ask() -> ScaleResponse:
        fed = ws.load_network(load(recipe), name=recipe.name, tile_size=TILE, value_range=255)
        return joined([ws.respond(fed, _looked_at(recipe.noise, slide, label), views=VIEWS) for label in _classes(slide)])

    key = f"{FAMILY}/{recipe.name}/{slide}"
    setting.log(key)
    return setting.cached_response(key, ask)


def _classes(slide: str) -> Sequence[int]:
    return range(len(CLASSES)) if slide.startswith("mixed") else [int(slide[-2:])]


@lru_cache(maxsize=64)  # 11 MB for a mixed slide's class, 44 for a slide of one class
def _looked_at(noise: int, slide: str, label: int) -> ScaleStack:
    """The part of a slide that is of one class, read once for all networks."""
    mixed = slide.startswith("mixed")
    seed = TEST_SEED + (1 + int(slide[-1]) if mixed else 0)
    reader = ws.ArrayReader(np.asarray(canvas(label, seed=seed, size=TEST_SIZE, noise=noise)))
    reach = (TEST_SIZE - RANGES[-1].hi * TILE) / 2
    count = MIXED_PLACES if mixed else SINGLE_PLACES
    centers = TEST_SIZE / 2 + np.random.default_rng([seed, label]).uniform(-reach, reach, (count, 2))
    scales = scale_grid(RANGES[0].lo, RANGES[-1].hi, per_octave=4)
    stack = ws.scale_stack(reader, centers, scales=scales, size=TILE, max_upsample=1 / RANGES[0].lo)
    images = stack.images.compute(scheduler="synchronous")
    return replace(stack, images=da.from_array(images, chunks=(1, *images.shape[1:])))


def _right(response: ScaleResponse, slide: str) -> NDArray[np.bool_]:
    """(N, S) whether the network tells the class at each place."""
    assert response.outputs is not None
    classes = np.repeat(_classes(slide), MIXED_PLACES if slide.startswith("mixed") else SINGLE_PLACES)
    right: NDArray[np.bool_] = response.outputs.logits.argmax(axis=2) == classes[:, None]
    return right


def _oracle(scales: NDArray[np.float64], right: NDArray[np.bool_]) -> Oracle:
    draws = np.random.default_rng(0).integers(len(right), size=(500, len(right)))
    lo, hi = np.percentile(right[draws].mean(axis=1), [5, 95], axis=0)
    return Oracle(scales=scales, quality=right.mean(axis=0), lo=lo, hi=hi, measure="accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "train"))
    parser.add_argument("--cache", type=Path, required=True, help="folder for the patches, 600 MB a scale")
    parser.add_argument("--noise", type=int, nargs="*", default=[0, 50, 100])
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    for noise in arguments.noise:
        make_data(arguments.cache, noise=noise, workers=arguments.workers)
        if arguments.what == "data":
            continue
        missing = [r for r in RECIPES if r.noise == noise and not (NETS / f"{r.name}.safetensors").exists()]
        # Convolutions of four channels gain little from a second thread.
        with ProcessPoolExecutor(arguments.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(partial(_train_and_save, cache=arguments.cache), missing))


def _train_and_save(recipe: Recipe, cache: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in train(recipe, cache).state_dict().items()}
    file = NETS / f"{recipe.name}.safetensors"
    save_file(state, file.with_suffix(".partial"))
    file.with_suffix(".partial").rename(file)


if __name__ == "__main__":
    main()
