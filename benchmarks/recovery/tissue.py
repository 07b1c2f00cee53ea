"""Networks trained for this at known µm/px, on tissue: the scale is planted, the slides are not.

| networks | asked | trained at, µm/px | slides, µm/px | quality |
|---|---|---|---|---|
| nuclei-bn, nuclei-plain | "nucleus at the centre?", tiles of 32 px | 0.25, 0.5 | 12 MoNuSeg images, 0.25 | AUC |
| unet | which pixels are nucleus | 0.25, 0.5 | the same | Dice |
| regions-bn, regions-plain | how epithelium lies in stroma, tiles of 96 px | 2, 4 | procedural, 1 | accuracy |

The first and the last kind have a twin without BatchNorm (plain). A half has two slides of all four kinds of region and one
of each alone.

Each is trained twice: a network whose name ends in the one half of the split has seen images and seeds of the other half
alone, and is judged on slides of its own. What was trained on MoNuSeg, whose licence is non-commercial, stays in the cache
and is trained where it is missing; the networks of regions are in nets/.

The nuclei of TCGA-HE-7128 and -7129 are half as wide as the others': their data sheet's 0.25 µm/px is wrong. They are left
out, of training too.

    python -m benchmarks.recovery.tissue train --cache DIR [--data DIR]     # every network that is not there yet
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor, nn

from benchmarks.recovery.cases import Case, Half, MissingDataError, Oracle, Range, Setting, drawn, half_of, joined, over_ranges
from benchmarks.recovery.real import (
    MONUSEG,
    MONUSEG_MPP,
    MONUSEG_OTHER_MPP,
    _auc_oracle,
    _bootstrapped,
    _computed,
    _dice_oracle,
    _grid,
    _inner_places,
    _labelled_pixels,
    _monuseg,
    _rng,
    _some,
    _stack,
    _tagged,
    _with_views,
)
from wsiscale.analyzer import respond
from wsiscale.geometry import View
from wsiscale.networks import Network, load_network
from wsiscale.places import default_places
from wsiscale.readers.array import ArrayReader
from wsiscale.stacks import scale_stack
from wsiscale.testing.procedural import Pigments, colour, random_stain
from wsiscale.types import ScaleResponse, ScaleStack
from wsiscale.views import read_view

FAMILY = "tissue"
NETS = Path(__file__).parent / "nets"

Kind = Literal["nuclei-bn", "nuclei-plain", "unet", "regions-bn", "regions-plain"]

MEAN, STD = (0.70, 0.50, 0.68), (0.20, 0.20, 0.20)  # of RGB / 255, roughly that of H&E
TILE: dict[Kind, int] = {"nuclei-bn": 32, "nuclei-plain": 32, "unet": 96, "regions-bn": 96, "regions-plain": 96}
BATCH: dict[Kind, int] = {"nuclei-bn": 64, "nuclei-plain": 64, "unet": 16, "regions-bn": 24, "regions-plain": 24}
STEPS: dict[Kind, int] = {"nuclei-bn": 1200, "nuclei-plain": 2000, "unet": 900, "regions-bn": 800, "regions-plain": 900}


# A network of regions whose loss ends no lower has learned hardly anything (four classes by chance: 1.39), and is trained again
# from other numbers. One in eight was.
LEARNED, MOST_TRIES = 1.0, 4


@dataclass(frozen=True)
class Recipe:
    """One network: its kind, the scale that it is trained at, and the half that it is judged on."""

    kind: Kind
    scale: float  # level-0 px per px
    half: Half

    @property
    def name(self) -> str:
        return f"{self.kind}-scale{self.scale:g}-{self.half}"

    @property
    def other(self) -> Half:
        """The half that it is trained on."""
        return "report" if self.half == "develop" else "develop"

    @property
    def of_regions(self) -> bool:
        return self.kind.startswith("regions")


HALVES: tuple[Half, ...] = ("develop", "report")
RECIPES = tuple(
    Recipe(kind, scale, half)
    for kind in get_args(Kind)
    for scale in ((2.0, 4.0) if kind.startswith("regions") else (1.0, 2.0))
    for half in HALVES
)


# --- regions: procedural tissue that only its arrangement tells apart ------------------------------------------------------

REGION_MPP = 1.0  # of level 0
# Epithelium and stroma, half of the area each, look the same in every region; how wide one of them is (µm) and how it lies
# tells the regions apart. What is 50 µm wide sees an edge at most.
WIDTHS = {"nests": 150.0, "cribriform": 150.0, "thin-cords": 100.0, "thick-cords": 200.0}
REGIONS = tuple(WIDTHS)


def region(kind: str, *, side: int, seed: int) -> NDArray[np.uint8]:
    """Tissue of one kind of region at 1 µm/px, in some laboratory's colours: (side, side, 3)."""
    stain = random_stain(seed * 10 + REGIONS.index(kind))
    return colour(pigments(kind, side=side, seed=seed), stain, mpp=REGION_MPP, seed=seed)


def pigments(kind: str, *, side: int, seed: int) -> Pigments:
    """The stains in one kind of region, at 1 µm/px: (side, side) each."""
    rng = np.random.default_rng([seed, REGIONS.index(kind)])
    epithelium = arrangement(kind, side=side, seed=seed)
    inside = ndimage.gaussian_filter(epithelium.astype(np.float32), 1.5)  # (H, W) 0 stroma .. 1 epithelium
    grain = ndimage.gaussian_filter(rng.standard_normal((side, side), np.float32), 1.2) * 4  # unit variance, roughly
    # Nuclei: one per 100 µm² of epithelium, one per 600 µm² of stroma.
    there = rng.random((side, side), np.float32) < np.where(epithelium, 1 / 100, 1 / 600)
    blobs = ndimage.gaussian_filter(there.astype(np.float32), 2.3) * (2 * np.pi * 2.3**2)
    nuclei = np.clip(2.2 * blobs - 0.7, 0, 1) * (0.75 + 0.1 * grain)
    eosin = 0.36 - 0.08 * inside + 0.05 * grain + 0.04 * smooth(rng, side, 40.0)
    haematoxylin = nuclei + 0.08 * inside
    return Pigments(
        np.maximum(haematoxylin, 0).astype(np.float32),
        np.maximum(eosin * (1 - 0.5 * nuclei), 0).astype(np.float32),
        np.zeros((side, side), np.float32),
        np.zeros((side, side), np.int32),
    )


def arrangement(kind: str, *, side: int, seed: int) -> NDArray[np.bool_]:
    """Where epithelium is in such a region, at 1 µm/px: half of it, (side, side)."""
    rng = np.random.default_rng([seed, REGIONS.index(kind), 1])
    width = WIDTHS[kind]
    y, x = np.mgrid[:side, :side].astype(np.float32) - side / 2
    turn = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    ragged = 3 * smooth(rng, side, 12.0)
    if kind.endswith("cords"):
        # Bends over a millimetre, and swells and narrows a little.
        bent = across + 50 * smooth(rng, side, 800.0) + 0.05 * width * smooth(rng, side, 150.0) + ragged
        return np.asarray(np.sin(np.pi * bent / width + rng.uniform(0, 2 * np.pi)) > 0)
    # Discs of that width on a warped hexagonal lattice, of which they fill half.
    along = along + 25 * smooth(rng, side, 200.0) + ragged
    across = across + 25 * smooth(rng, side, 200.0)
    spacing = width / 2 * np.sqrt(2 * np.pi / (np.sqrt(3) / 2))
    nearest = np.full(y.shape, np.inf, np.float32)
    for shift in (0.0, 0.5):  # two rectangular lattices make a hexagonal one
        dx = along / spacing + shift
        dy = across / (spacing * np.sqrt(3)) + shift
        nearest = np.minimum(nearest, np.hypot(dx - np.rint(dx), (dy - np.rint(dy)) * np.sqrt(3)))
    discs = nearest * spacing < width / 2
    return np.asarray(discs if kind == "nests" else ~discs)


def smooth(rng: np.random.Generator, side: int, spacing: float) -> NDArray[np.float32]:
    """Noise of about unit variance with features of about `spacing` px: (side, side)."""
    count = int(np.ceil(side / spacing)) + 4
    lattice = rng.standard_normal((count, count), np.float32)
    at = np.arange(side, dtype=np.float32) / spacing + 1
    rows = ndimage.map_coordinates(lattice, np.meshgrid(at, np.arange(count), indexing="ij"), order=1)  # (side, count)
    return np.asarray(ndimage.map_coordinates(rows, np.meshgrid(np.arange(side), at, indexing="ij"), order=1) * 1.5)


# --- networks ------------------------------------------------------------------------------------------------------------


def network(kind: Kind) -> nn.Module:
    """Untrained; takes normalised RGB (B, 3, TILE, TILE)."""
    if kind == "unet":
        return UNet()
    if kind.startswith("regions"):
        return regions_classifier(batchnorm=kind.endswith("bn"))
    return nucleus_classifier(batchnorm=kind.endswith("bn"))


def nucleus_classifier(*, batchnorm: bool) -> nn.Sequential:
    """Logits (B, 2) of a 32 px tile: none, a nucleus at the centre."""
    widths = (3, 16, 32, 48)
    trunk = [layer for a, b in pairwise(widths) for layer in (*_block(a, b, batchnorm), nn.MaxPool2d(2))]
    return nn.Sequential(*trunk, nn.Flatten(), nn.Linear(48 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 2))


def regions_classifier(*, batchnorm: bool) -> nn.Sequential:
    """Logits (B, 4) of REGIONS; one position of its last maps sees 78 px."""
    widths = (3, 8, 16, 24, 32, 32)
    trunk = [layer for a, b in pairwise(widths) for layer in (nn.MaxPool2d(2), *_block(a, b, batchnorm))]
    return nn.Sequential(*trunk[1:], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, len(REGIONS)))


class UNet(nn.Module):
    """(B, 3, H, W) -> logits (B, 2, H, W): none, nucleus. H and W are multiples of 8. Ronneberger et al. 2015, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [
                nn.Sequential(*_block(3, 8, True)),
                nn.Sequential(*_block(8, 16, True), *_block(16, 16, True)),
                nn.Sequential(*_block(16, 32, True), *_block(32, 32, True)),
                nn.Sequential(*_block(32, 48, True), *_block(48, 48, True)),
            ]
        )
        self.up = nn.ModuleList(
            [
                nn.Sequential(*_block(48 + 32, 32, True)),
                nn.Sequential(*_block(32 + 16, 16, True)),
                nn.Sequential(*_block(16 + 8, 8, True)),
            ]
        )
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, tiles: Tensor) -> Tensor:
        maps = [self.down[0](tiles)]
        for stage in self.down[1:]:
            maps.append(stage(F.max_pool2d(maps[-1], 2)))
        found = maps.pop()
        for stage in self.up:
            found = stage(torch.cat([F.interpolate(found, scale_factor=2), maps.pop()], 1))
        logits: Tensor = self.head(found)
        return logits


def _block(channels: int, out: int, batchnorm: bool) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out, 3, padding=1, bias=not batchnorm)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return [convolution, *([nn.BatchNorm2d(out)] if batchnorm else []), nn.ReLU()]


# --- training ------------------------------------------------------------------------------------------------------------

Example = tuple[NDArray[np.uint8], NDArray[np.int64]]  # tiles (B, H, W, 3); classes (B,) or (B, H, W)


def train(
    recipe: Recipe, draw: Callable[[np.random.Generator], Example], *, steps: int, again: int = 0
) -> tuple[nn.Module, list[float]]:
    """The trained network, in eval mode, and its loss at each step. `draw` gives a batch; `again` is how often it was tried."""
    torch.manual_seed(RECIPES.index(recipe) + 1000 * again)
    module = network(recipe.kind).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(module.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.2)
    rng = np.random.default_rng(RECIPES.index(recipe))
    # A piece of procedural tissue is of one stain, which would tell its class as well as its structure does.
    spread = (0.4, 0.25) if recipe.of_regions else (0.15, 0.08)
    losses = []
    for _ in range(steps):
        tiles, classes = draw(rng)
        loss = F.cross_entropy(module(normalised(stained(tiles, rng, spread=spread))), torch.from_numpy(classes))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return module.eval(), losses


def normalised(tiles: Tensor) -> Tensor:
    """(B, 3, H, W) of 0..1 as the networks take them."""
    centred = (tiles - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return centred.contiguous(memory_format=torch.channels_last)


def stained(tiles: NDArray[np.uint8], rng: np.random.Generator, *, spread: tuple[float, float]) -> Tensor:
    """The tiles in other laboratories' colours and focus, 0..1: (B, 3, H, W).

    `spread`: standard deviations of the logarithm of optical density, of all channels alike and of each by itself.
    """
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    count = len(tiles)
    densities = np.exp(rng.normal(0, spread[0], (count, 1, 1, 1)) + rng.normal(0, spread[1], (count, 3, 1, 1)))
    images = images.clamp(1 / 255, 1) ** torch.from_numpy(densities).float()
    blur = rng.uniform(0, 0.7, (count, 1, 1, 1)) * (rng.random((count, 1, 1, 1)) < 0.4)
    softer = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return images + torch.from_numpy(blur).float() * (softer - images)


def turned(images: NDArray[np.uint8], maps: NDArray[np.int64], rng: np.random.Generator) -> Example:
    """A batch turned and mirrored, all of it alike: batches differ."""
    turns, mirror = int(rng.integers(4)), int(rng.choice([-1, 1]))
    images = np.rot90(images, turns, (1, 2))[:, :, ::mirror]
    if maps.ndim > 1:
        maps = np.rot90(maps, turns, (1, 2))[:, :, ::mirror]
    return np.ascontiguousarray(images), np.ascontiguousarray(maps)


def examples(recipe: Recipe, data: Path | None) -> Callable[[np.random.Generator], Example]:
    """Batches of what the network is to learn, from the half that it is not judged on."""
    if recipe.of_regions:
        return _regions_examples(recipe)
    assert data is not None
    fields = [_at_scale(*_monuseg(data, slide), recipe.scale) for slide in monuseg_slides(recipe.other)]
    return _segments(fields, recipe) if recipe.kind == "unet" else _centres(fields, recipe)


Field = tuple[NDArray[np.uint8], NDArray[np.bool_]]  # an image (H, W, 3) at the training scale, and its nuclei (H, W)


def _centres(fields: Sequence[Field], recipe: Recipe) -> Callable[[np.random.Generator], Example]:
    """Tiles as often around a nucleus's pixel as around another one."""
    half, count = TILE[recipe.kind] // 2, BATCH[recipe.kind]
    inner = [mask[half:-half, half:-half] for _, mask in fields]
    found = [[np.argwhere(mask == kind) for kind in (False, True)] for mask in inner]

    def draw(rng: np.random.Generator) -> Example:
        classes = rng.integers(2, size=count)
        tiles = np.empty((count, 2 * half, 2 * half, 3), np.uint8)
        for i, (number, kind) in enumerate(zip(rng.integers(len(fields), size=count), classes, strict=True)):
            pixels = found[number][kind]
            y, x = pixels[rng.integers(len(pixels))]
            tiles[i] = fields[number][0][y : y + 2 * half, x : x + 2 * half]
        return turned(tiles, classes, rng)

    return draw


def _segments(fields: Sequence[Field], recipe: Recipe) -> Callable[[np.random.Generator], Example]:
    side, count = TILE[recipe.kind], BATCH[recipe.kind]

    def draw(rng: np.random.Generator) -> Example:
        tiles, masks = [], []
        for number in rng.integers(len(fields), size=count):
            image, mask = fields[number]
            y, x = (rng.integers(n - side + 1) for n in mask.shape)
            tiles.append(image[y : y + side, x : x + side])
            masks.append(mask[y : y + side, x : x + side])
        return turned(np.stack(tiles), np.stack(masks).astype(np.int64), rng)

    return draw


PIECES, PIECE = 20, 1024  # of each region, to train on, in as many stains; px on a side


def _regions_examples(recipe: Recipe) -> Callable[[np.random.Generator], Example]:
    seeds = training_seeds(recipe.other)
    pieces = [[_piece(kind, seed, recipe.scale) for seed in seeds] for kind in REGIONS]
    side, count = TILE[recipe.kind], BATCH[recipe.kind]

    def draw(rng: np.random.Generator) -> Example:
        classes = rng.integers(len(REGIONS), size=count)
        tiles = []
        for kind in classes:
            piece = pieces[kind][rng.integers(len(seeds))]
            y, x = rng.integers(len(piece) - side + 1, size=2)
            tiles.append(piece[y : y + side, x : x + side])
        return turned(np.stack(tiles), classes, rng)

    return draw


def training_seeds(half: Half) -> range:
    """Of the regions of a half that networks are trained on."""
    first = 1000 + 100 * HALVES.index(half)
    return range(first, first + PIECES)


@lru_cache(maxsize=4 * len(REGIONS) * PIECES)  # for two scales and two halves
def _piece(kind: str, seed: int, scale: float) -> NDArray[np.uint8]:
    """A piece to train on, at the training scale."""
    return _view(_native_piece(kind, seed), scale)


@lru_cache(maxsize=2 * len(REGIONS) * PIECES)  # 250 MB a half
def _native_piece(kind: str, seed: int) -> NDArray[np.uint8]:
    return region(kind, side=PIECE, seed=seed)


def _at_scale(image: NDArray[np.uint8], mask: NDArray[np.bool_], scale: float) -> Field:
    """Both at the training scale, through wsiscale's own kernel; a pixel is nucleus where most of it is."""
    there = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    return _view(image, scale), _view(there, scale)[..., 0] > 127


def _view(image: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    height, width = (int(side / scale) for side in image.shape[:2])
    return read_view(ArrayReader(image), View(y=0, x=0, height=height, width=width, scale=scale))


def steps(recipe: Recipe) -> int:
    """Of its training."""
    # Without BatchNorm, and where a tile shows a quarter of the area, the loss does not fall before 600 steps.
    return STEPS[recipe.kind] * (2 if recipe.kind == "regions-plain" and recipe.scale == 2 else 1)


def weights_file(recipe: Recipe, setting: Setting) -> Path:
    folder = NETS if recipe.of_regions else setting.cache / FAMILY / "nets"
    return folder / f"{recipe.name}.safetensors"


def trained(recipe: Recipe, setting: Setting) -> nn.Module:
    """The network, in eval mode; trained now where it never was. Raises MissingDataError without the images for it."""
    file = weights_file(recipe, setting)
    if not file.exists():
        if setting.cached:
            raise MissingDataError(f"{recipe.name} was never trained into this cache")
        data = None if recipe.of_regions else setting.needs_data()
        started = time.process_time()
        draw = examples(recipe, data)
        for again in range(MOST_TRIES):
            module, losses = train(recipe, draw, steps=steps(recipe), again=again)
            if np.mean(losses[-50:]) < LEARNED:
                break
        setting.log(
            f"{recipe.name}: loss {np.mean(losses[:20]):.3f} -> {np.mean(losses[-50:]):.3f},"
            f" {time.process_time() - started:.0f} CPU seconds"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file({name: value.contiguous() for name, value in module.state_dict().items()}, unfinished)
        unfinished.replace(file)
    module = network(recipe.kind)
    module.load_state_dict(load_file(file))
    return module.eval()


# --- cases ---------------------------------------------------------------------------------------------------------------

VIEWS = ("rot90", "phase_scrambled", "pixel_shuffled")
PIXELS = 200  # of each kind, nucleus and not, for the AUC
CROP = 625  # px, the middle of an image, where the Dice is measured: a U-Net at 1/4 of level 0 sees 16 times as many
SLIDE = 3072  # px, a slide of regions: holds tiles at the coarsest scale, 1536, with their centres in its middle half


def ranges(train_scale: float) -> tuple[Range, ...]:
    """The training scale lies 3/4 octave on the fine side of A's middle, as much on the coarse side of B's.

    At level 0 it is the end of a range that is not upsampled, which is one more.
    """
    found = (Range("A", train_scale * 2**-0.5, train_scale * 4), Range("B", train_scale / 4, train_scale * 2**0.5))
    return (*found, Range("native", 1.0, 4.0)) if train_scale == 1 else found


def cases(setting: Setting) -> Iterator[Case]:
    """Each network on the slides of its half: first regions, which need no data of others; last U-Nets, which take longest."""

    def order(recipe: Recipe) -> tuple[bool, bool, int, float]:  # a network and its twin look at the same tiles
        return not recipe.of_regions, recipe.kind == "unet", HALVES.index(recipe.half), recipe.scale

    for recipe in sorted(RECIPES, key=order):
        yield from (_of_regions if recipe.of_regions else _of_nuclei)(recipe, setting)


def _of_regions(recipe: Recipe, setting: Setting) -> Iterator[Case]:
    fed = lru_cache(maxsize=1)(lambda: _fed(recipe, setting))
    responses: dict[str, ScaleResponse] = {}
    for slide in _some(region_slides(recipe.half), setting, 3):

        def ask(slide: str = slide) -> ScaleResponse:
            return joined([_ask(fed(), _region_stack(slide, kind, recipe.scale)) for kind in _kinds(slide)])

        key = f"{FAMILY}/{recipe.name}/{slide}"
        setting.log(key)
        responses[slide] = setting.cached_response(_with_views(key, VIEWS), ask)
    right = {slide: _right(response, slide) for slide, response in responses.items()}
    for slide, response in responses.items():
        mixed = len(_kinds(slide)) > 1
        # The quality on a mixed slide from every tile that the network was asked about, places being few.
        oracle = _accuracy(response.scales, np.concatenate(list(right.values())) if mixed else right[slide])
        yield from _cut(recipe, slide, response, oracle, tags={"regions", "mixed" if mixed else "single-class"})


def _kinds(slide: str) -> tuple[str, ...]:
    kind = slide.removeprefix("regions-").rpartition("-")[0]
    return (kind,) if kind in REGIONS else REGIONS


def _region_places(slide: str) -> int:
    """Of each kind of region."""
    return default_places(TILE["regions-bn"]) // len(_kinds(slide))


@lru_cache(maxsize=12)  # a slide of one kind is 40 MB
def _region_stack(slide: str, kind: str, train_scale: float) -> ScaleStack:
    """The part of a slide that is of one kind of region, read once for both networks."""
    image = _region_part(slide, kind)
    count = _region_places(slide)
    places = _rng(slide, kind).uniform(SLIDE / 4, SLIDE * 3 / 4, (count, 2))
    scales = _grid(ranges(train_scale))
    size = TILE["regions-bn"]
    stack = scale_stack(
        ArrayReader(image, mpp=REGION_MPP), places, scales=scales, size=size, max_upsample=max(1, 1 / scales[0])
    )
    return _computed(stack)


@lru_cache(maxsize=12)  # those of one half, 28 MB each
def _region_part(slide: str, kind: str) -> NDArray[np.uint8]:
    return region(kind, side=SLIDE, seed=seed_of(slide))


def seed_of(slide: str) -> int:
    """Of a slide of regions; no network was trained on it."""
    return 9000 + [name for half in HALVES for name in region_slides(half)].index(slide)


def _right(response: ScaleResponse, slide: str) -> NDArray[np.bool_]:
    """(N, S) whether the network tells the kind of region at each place."""
    assert response.outputs is not None
    kinds = _kinds(slide)
    truth = np.repeat([REGIONS.index(kind) for kind in kinds], _region_places(slide))
    right: NDArray[np.bool_] = response.outputs.logits.argmax(axis=2) == truth[:, None]
    return right


def _accuracy(scales: NDArray[np.float64], right: NDArray[np.bool_]) -> Oracle:
    return _bootstrapped(scales, len(right), lambda tiles: right[tiles].mean(axis=0), measure="accuracy", seed=0)


def _of_nuclei(recipe: Recipe, setting: Setting) -> Iterator[Case]:
    data = setting.needs_data()
    fed = lru_cache(maxsize=1)(lambda: _fed(recipe, setting))
    for slide in _some(monuseg_slides(recipe.half), setting, 2):

        def ask(slide: str = slide) -> ScaleResponse:
            return _ask(fed(), _nuclei_stack(data, slide, recipe.scale, TILE[recipe.kind]))

        def judge(slide: str = slide) -> Oracle:
            if recipe.kind != "unet":
                return _auc_oracle(fed(), *_labelled(data, slide, recipe.scale), seed=0)
            image, mask = _monuseg(data, slide)
            top = (len(mask) - CROP) // 2
            inner = np.s_[top : top + CROP, top : top + CROP]
            return _dice_oracle(fed(), image[inner], mask[inner], ranges=ranges(recipe.scale))

        key = f"{FAMILY}/{recipe.name}/{slide}"
        setting.log(key)
        response = _tagged(setting.cached_response(_with_views(key, VIEWS), ask), MONUSEG_MPP)
        oracle = setting.cached_oracle(key, judge)
        yield from _cut(recipe, slide, response, oracle, tags={"nuclei"})


@lru_cache(maxsize=8)  # the slides of one half, for a network and its twin; 16 MB each, for a U-Net 40
def _nuclei_stack(data: Path, slide: str, train_scale: float, size: int) -> ScaleStack:
    image, _ = _monuseg(data, slide)
    return _computed(_stack(image, _inner_places(image, default_places(size), slide), ranges(train_scale), size=size))


@lru_cache(maxsize=8)  # 21 MB each
def _labelled(data: Path, slide: str, train_scale: float) -> tuple[ScaleStack, NDArray[np.bool_]]:
    """Tiles around labelled pixels, and which of them are nuclei."""
    image, mask = _monuseg(data, slide)
    pixels, nucleus = _labelled_pixels(mask, slide, ranges=ranges(train_scale), count=PIXELS)
    return _computed(_stack(image, pixels, ranges(train_scale), size=TILE["nuclei-bn"])), nucleus


def _fed(recipe: Recipe, setting: Setting) -> Network:
    return load_network(trained(recipe, setting), name=recipe.name, tile_size=TILE[recipe.kind], mean=MEAN, std=STD)


def _ask(fed: Network, stack: ScaleStack) -> ScaleResponse:
    return respond(fed, stack, views=VIEWS, layers="auto", device="cpu")


def _cut(recipe: Recipe, slide: str, response: ScaleResponse, oracle: Oracle, *, tags: set[str]) -> Iterator[Case]:
    half = half_of(FAMILY, network=recipe.name, slide=slide)
    assert half == recipe.half
    whole = Case(
        name=f"{FAMILY}/{recipe.name}/{slide}",
        family=FAMILY,
        network=recipe.name,
        slide=slide,
        half=half,
        response=response,
        oracle=oracle,
        train_scale=recipe.scale,
        range="whole",
        upsampled=True,
        tags=frozenset(tags),
    )
    yield from over_ranges(whole, ranges(recipe.scale))


# --- slides and their halves ---------------------------------------------------------------------------------------------


def monuseg_slides(half: Half) -> list[str]:
    """The images of a half, as all families share them, less the two whose µm/px is not what their data sheet says."""
    return [slide for slide in drawn("monuseg slides", MONUSEG)[half] if slide not in MONUSEG_OTHER_MPP]


def region_slides(half: Half) -> list[str]:
    """Two slides of all kinds of region, and one of each alone."""
    return [*(f"regions-mixed-{i}-{half}" for i in range(2)), *(f"regions-{kind}-{half}" for kind in REGIONS)]


def split() -> dict[str, dict[str, dict[Half, list[str]]]]:
    """What `write_split` was given before anything was measured. A network's name says on which half it is judged."""
    return {
        FAMILY: {
            "networks": {half: sorted(recipe.name for recipe in RECIPES if recipe.half == half) for half in HALVES},
            "slides": {half: [*monuseg_slides(half), *region_slides(half)] for half in HALVES},
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train",))
    parser.add_argument("--cache", type=Path, required=True, help="folder for what was trained on MoNuSeg")
    parser.add_argument("--data", type=Path, default=os.environ.get("WSISCALE_DATA"), help="third-party images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # convolutions of so few channels gain little from a second thread
    setting = Setting(cache=arguments.cache, data=arguments.data)
    for recipe in RECIPES:
        trained(recipe, setting)


if __name__ == "__main__":
    main()
