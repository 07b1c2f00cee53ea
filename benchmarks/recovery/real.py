"""Networks that nobody here trained, and the embedded one, on real tissue. Needs third-party images and weights (--data).

| family | network | slides | quality |
|---|---|---|---|
| nuclei32 | five folds of a 32 px classifier, "nucleus at the centre?", 0.25 µm/px | 14 MoNuSeg images | AUC over pixels |
| embedded | the U-Net that comes with the package, 0.5 µm/px, procedural tissue | the same | Dice over pixels |
| crc | nine tissue classes on DenseNet121, 0.5 µm/px | 4 mixed and 16 single-class ones of 32 patches | accuracy |

A MoNuSeg image is one slide of 1000 px at 0.25 µm/px; two of them, TCGA-HE-7128 and -7129, were scanned at about 0.5, which
their data sheet does not say. A single-class slide has two patches at 6 places each, a mixed one
eight. A patch is as small as one tile at the training scale: coarser tiles see it mirrored over and over (twice as wide at
1 µm/px, four times at 2), which keeps its texture and invents its layout; finer tiles are upsampled crops. So what is
measured there is how the network takes the size of texture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import rankdata
from torch import nn

from benchmarks.recovery.cases import Case, Half, MissingDataError, Oracle, Range, Setting, drawn, half_of, joined, over_ranges
from wsiscale.analyzer import respond
from wsiscale.geometry import View
from wsiscale.networks import Network, load_network
from wsiscale.places import default_places
from wsiscale.plugins import load_object
from wsiscale.readers.array import ArrayReader
from wsiscale.stacks import scale_stack
from wsiscale.types import ScaleResponse, ScaleStack
from wsiscale.views import read_view

ROOT = Path(__file__).parents[2]

VIEWS = ("rot90", "phase_scrambled", "pixel_shuffled")  # each costs as many forward passes again
PER_OCTAVE = 4
RESAMPLES = 200  # of an oracle's bootstrap

MONUSEG_MPP = 0.25
# The data sheet says 0.25 of all. The nuclei of these two are half as wide in pixels as those of the others.
MONUSEG_OTHER_MPP = {"TCGA-HE-7128-01Z-00-DX1": 0.5, "TCGA-HE-7129-01Z-00-DX1": 0.5}
MONUSEG = (
    "TCGA-18-5592-01Z-00-DX1",
    "TCGA-21-5784-01Z-00-DX1",
    "TCGA-49-4488-01Z-00-DX1",
    "TCGA-A7-A13E-01Z-00-DX1",
    "TCGA-AR-A1AS-01Z-00-DX1",
    "TCGA-AY-A8YK-01A-01-TS1",
    "TCGA-B0-5711-01Z-00-DX1",
    "TCGA-DK-A2I6-01A-01-TS1",
    "TCGA-E2-A14V-01Z-00-DX1",
    "TCGA-G9-6336-01Z-00-DX1",
    "TCGA-G9-6356-01Z-00-DX1",
    "TCGA-HE-7128-01Z-00-DX1",
    "TCGA-HE-7129-01Z-00-DX1",
    "TCGA-NH-A8F7-01A-01-TS1",
)

FOLDS = tuple(f"nuclei32-fold{fold}" for fold in range(1, 6))
# Best near 0.72 (0.18 µm/px): on the fine side of A's middle, 1.2, on the coarse side of B's, 0.59, and beyond native's end.
NUCLEI32_RANGES = (Range("A", 2**-1.5, 4), Range("B", 2**-2, 2**0.5), Range("native", 1, 16))
NUCLEI32_PIXELS = 100  # of each kind, nucleus and not, for the AUC

EMBEDDED = "embedded"
EMBEDDED_TILE = 128
# Trained at 2 (0.5 µm/px): on the fine side of A's middle, 2.8, on the coarse side of B's, 1.2.
EMBEDDED_RANGES = (Range("A", 1, 8), Range("B", 2**-1, 2**1.5))

CRC = "crc9"
CRC_MPP = 0.5
CRC_SIDE = 224  # px, of a patch and of a tile
CRC_CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")  # the network's first nine outputs
CRC_SHOWN = ("ADI", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")  # there is no patch of background
CRC_PAIRS = ("12", "34")  # of a class's 4 patches: one pair to develop on, one to report on
# One patch of each class, or one class's pair.
CRC_SLIDES = {pair: (*(f"mixed-{i}" for i in pair), *(f"only-{name}-{pair}" for name in CRC_SHOWN)) for pair in CRC_PAIRS}
CRC_PLACES = 6  # a patch
# Trained at 1 (0.5 µm/px): on the fine side of A's middle, 1.7, on the coarse side of B's, 0.77, and at native's end.
CRC_RANGES = (Range("A", 2**-0.5, 4), Range("B", 2**-1.25, 2**0.5), Range("native", 1, 4))
# All 121 BatchNorm inputs at 14 scales of 192 places in 4 views would be 15 GB; every eighth one and the stages are 0.6.
CRC_EVERY = 8

# --- nuclei32 ------------------------------------------------------------------------------------------------------------


def nuclei32(setting: Setting) -> Iterator[Case]:
    """Folds that were trained on other images of the same kind: 35 pairs of a fold and an image, three ranges each."""
    data = setting.needs_data()
    for slide in _some(MONUSEG, setting, 4):
        seen = [(network, half) for network in FOLDS if (half := half_of("nuclei32", network=network, slide=slide))]

        @lru_cache(maxsize=1)
        def looked_at(slide: str = slide) -> ScaleStack:
            image, _ = _monuseg(data, slide)
            return _computed(_stack(image, _inner_places(image, default_places(32), slide), NUCLEI32_RANGES, size=32))

        @lru_cache(maxsize=1)
        def labelled(slide: str = slide) -> tuple[ScaleStack, NDArray[np.bool_]]:
            image, mask = _monuseg(data, slide)
            pixels, nucleus = _labelled_pixels(mask, slide)
            return _computed(_stack(image, pixels, NUCLEI32_RANGES, size=32)), nucleus

        for network, half in _some(seen, setting, 1):
            key = f"nuclei32/{network}/{slide}"
            setting.log(key)
            asked = setting.cached_response(_with_views(key, VIEWS), lambda n=network: _ask(_fold(data, n), looked_at()))
            mpp = monuseg_mpp(slide)
            response = _tagged(asked, mpp)
            oracle = setting.cached_oracle(key, lambda n=network: _auc_oracle(_fold(data, n), *labelled(), seed=0))
            yield from over_ranges(
                _whole("nuclei32", network, slide, half, response, oracle, train_scale=0.25 / mpp), NUCLEI32_RANGES
            )


def _fold(data: Path, name: str) -> Network:
    weights = load_file(data / "weights" / "nuclei32_5folds.safetensors")
    fold = name[-1]
    module: nn.Module = load_object(f"{ROOT / 'tests' / 'nets.py'}:Nuclei32")(weights[f"mean.DB_train_w32_{fold}"])
    own = {key.removeprefix(f"fold{fold}."): value for key, value in weights.items() if key.startswith(f"fold{fold}.")}
    module.load_state_dict({**own, "mean": module.mean})
    return load_network(module.eval(), name=name, tile_size=32, channels="bgr", value_range=255, training_mpp=0.25)


def _labelled_pixels(
    mask: NDArray[np.bool_],
    slide: str,
    *,
    ranges: tuple[Range, ...] = NUCLEI32_RANGES,
    count: int = NUCLEI32_PIXELS,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Pixel centres (N, 2) whose coarsest tile of 32 px lies in the image, `count` on nuclei and beside, and which: (N,)."""
    rng = _rng("pixels", slide)
    margin = _margin(ranges, 32)
    inner = mask[margin:-margin, margin:-margin]
    found = []
    for kind in (True, False):
        y, x = np.nonzero(inner == kind)
        chosen = rng.choice(len(y), count, replace=False)
        found.append(np.stack([y[chosen], x[chosen]], axis=1) + margin + 0.5)
    return np.concatenate(found), np.repeat([True, False], count)


def _auc_oracle(network: Network, stack: ScaleStack, nucleus: NDArray[np.bool_], *, seed: int) -> Oracle:
    return _auc_of(respond(network, stack, layers="none", device="cpu"), nucleus, seed=seed)


def _auc_of(response: ScaleResponse, nucleus: NDArray[np.bool_], *, seed: int) -> Oracle:
    """The AUC of "nucleus at the tile's centre" at each scale, over labelled pixels, one a place."""
    assert response.outputs is not None
    shown = response.outputs.probabilities[..., 1].astype(np.float64)  # (N, S)

    def auc(pixels: NDArray[np.intp]) -> NDArray[np.float64]:
        return _auc(shown[pixels], nucleus[pixels])

    return _bootstrapped(response.scales, len(nucleus), auc, measure="AUC", seed=seed)


def _auc(shown: NDArray[np.float64], nucleus: NDArray[np.bool_]) -> NDArray[np.float64]:
    """How often a nucleus is shown more than what is none, equals counting half: (N, S), (N,) -> (S,)."""
    positive, negative = nucleus.sum(), (~nucleus).sum()
    ranks = rankdata(shown, axis=0)[nucleus].sum(axis=0)
    area: NDArray[np.float64] = (ranks - positive * (positive + 1) / 2) / (positive * negative)
    return area


# --- embedded ------------------------------------------------------------------------------------------------------------


def embedded(setting: Setting) -> Iterator[Case]:
    """The embedded U-Net, which has seen no real tissue, against the nuclei that people outlined."""
    data = setting.needs_data()
    network = load_network(None, tile_size=EMBEDDED_TILE)
    for slide in _some(MONUSEG, setting, 4):
        half = half_of("embedded", network=EMBEDDED, slide=slide)
        assert half is not None

        def ask(slide: str = slide) -> ScaleResponse:
            image, _ = _monuseg(data, slide)
            return _ask(
                network,
                _stack(image, _inner_places(image, default_places(EMBEDDED_TILE), slide), EMBEDDED_RANGES, size=EMBEDDED_TILE),
            )

        key = f"embedded/{EMBEDDED}/{slide}"
        setting.log(key)
        mpp = monuseg_mpp(slide)
        response = _tagged(setting.cached_response(_with_views(key, VIEWS), ask), mpp)
        oracle = setting.cached_oracle(key, lambda s=slide: _dice_oracle(network, *_monuseg(data, s)))
        yield from over_ranges(
            _whole("embedded", EMBEDDED, slide, half, response, oracle, train_scale=0.5 / mpp), EMBEDDED_RANGES
        )


Look = Callable[[NDArray[np.uint8], View], NDArray[np.uint8]]  # the view, of an image
_BLOCK = 125  # level-0 px, what the Dice's bootstrap draws: a few nuclei


def _dice_oracle(
    network: Network,
    image: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    *,
    ranges: tuple[Range, ...] = EMBEDDED_RANGES,
    look: Look | None = None,
) -> Oracle:
    """Dice of the whole image segmented at each scale, at level-0 pixels; the bootstrap draws blocks of 125 px.

    `look` reads the image in another way than wsiscale does.
    """
    scales = _grid(ranges)
    counts = np.stack([_overlap(_segmented(network, image, scale, look or _look), mask) for scale in scales])  # (S, 3, blocks)

    def dice(drawn: NDArray[np.intp]) -> NDArray[np.float64]:
        both, found, there = counts[:, :, drawn].sum(axis=2).T
        score: NDArray[np.float64] = 2 * both / np.maximum(found + there, 1)
        return score

    return _bootstrapped(scales, counts.shape[2], dice, measure="Dice", seed=0)


def _segmented(network: Network, image: NDArray[np.uint8], scale: float, look: Look) -> NDArray[np.bool_]:
    """Where the network sees a nucleus, asked at `scale`, at level-0 pixels: (H, W)."""
    height, width = image.shape[:2]
    # The U-Net halves three times; what it needs beyond the image it sees mirrored.
    rows, columns = (8 * int(np.ceil(side / scale / 8)) for side in (height, width))
    pad = 128
    canvas = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
    pixels = look(canvas, View(y=pad, x=pad, height=rows, width=columns, scale=scale))
    normalised = (pixels / np.float32(255) - np.float32(network.mean)) / np.float32(network.std)
    with torch.inference_mode():
        logits = network.module(torch.from_numpy(normalised).permute(2, 0, 1)[None])
        covered = (round(rows * scale), round(columns * scale))
        fine = nn.functional.interpolate(logits, size=covered, mode="bilinear", align_corners=False)
    nucleus: NDArray[np.bool_] = (fine[0, 1] > fine[0, 0]).numpy()[:height, :width]
    return nucleus


def _look(canvas: NDArray[np.uint8], view: View) -> NDArray[np.uint8]:
    return read_view(ArrayReader(canvas), view)


def _overlap(found: NDArray[np.bool_], there: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pixels in both, found, and there, of each block: (3, blocks)."""
    rows, columns = (side // _BLOCK for side in there.shape)

    def summed(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        blocks = mask[: rows * _BLOCK, : columns * _BLOCK].reshape(rows, _BLOCK, columns, _BLOCK)
        return blocks.sum(axis=(1, 3)).ravel()

    return np.stack([summed(found & there), summed(found), summed(there)])


# --- crc -----------------------------------------------------------------------------------------------------------------


def crc(setting: Setting) -> Iterator[Case]:
    """Slides put together from patches: one patch of each of 8 classes, or the 4 patches of one class."""
    data = setting.needs_data()
    patches = {name: sorted((data / "patches" / "crc_val_he_7k").glob(f"{name}-*.png")) for name in CRC_SHOWN}
    if any(len(found) != len("".join(CRC_PAIRS)) for found in patches.values()):
        raise MissingDataError(f"its four patches of each of {', '.join(CRC_SHOWN)} are not all in {data.name}")

    @lru_cache(maxsize=1)
    def network() -> Network:
        os.environ["WSISCALE_DATA"] = str(data)  # where tests/nets.py looks for weights
        return load_network(f"{ROOT / 'tests' / 'nets.py'}:crc9")

    def response_of(patch: Path) -> ScaleResponse:
        key = f"crc/{CRC}/patches/{patch.stem}"
        setting.log(key)
        return setting.cached_response(_with_views(key, VIEWS), lambda: _ask_patch(network(), patch))

    for slide in _some([slide for slides in zip(*CRC_SLIDES.values(), strict=True) for slide in slides], setting, 6):
        half = half_of("crc", network=CRC, slide=slide)
        assert half is not None
        kind, which = slide.split("-")[0], slide.rpartition("-")[2]
        shown = CRC_SHOWN if kind == "mixed" else (slide.split("-")[1],)
        chosen = [patches[name][int(number) - 1] for name in shown for number in which]
        responses = [response_of(patch) for patch in chosen]
        labels = np.array([CRC_CLASSES.index(patch.name.partition("-")[0]) for patch in chosen])
        oracle = setting.cached_oracle(f"crc/{CRC}/{slide}", lambda r=responses, c=labels: _accuracy_oracle(r, c))
        whole = _whole("crc", CRC, slide, half, joined(responses), oracle, train_scale=1.0)
        tag = "mixed" if kind == "mixed" else "single-class"
        yield from over_ranges(replace(whole, tags=frozenset({tag})), CRC_RANGES)


def _ask_patch(network: Network, patch: Path) -> ScaleResponse:
    """A patch, mirrored over and over beyond its edges, at places around its middle."""
    slide, pad = _mirrored(_rgb(patch), CRC_SIDE * 2, mpp=CRC_MPP)
    # Spread, and a little moved: an upsampled tile (half as wide at 0.25 µm/px) sees a part of its own.
    spread = np.array([(y, x) for y in (0.35, 0.65) for x in (0.3, 0.5, 0.7)]) * CRC_SIDE
    places = pad + spread + _rng("crc", patch.stem).uniform(-8, 8, (CRC_PLACES, 2))
    scales = _grid(CRC_RANGES)
    stack = scale_stack(slide, places, scales=scales, size=CRC_SIDE, max_upsample=1 / scales[0])
    norms = [name for name, layer in network.module.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    stages = _stages(network)
    return respond(network, stack, views=VIEWS, layers=[*norms[::CRC_EVERY], *stages], device="cpu")


def _stages(network: Network) -> tuple[str, ...]:
    blank = [np.zeros((1, network.tile_size, network.tile_size, 3), np.uint8)]
    return respond(network, blank, scales=[1.0], layers="stages", device="cpu").stages


def _accuracy_oracle(responses: list[ScaleResponse], labels: NDArray[np.intp]) -> Oracle:
    """The share of tiles told right, among nine classes; the bootstrap draws patches, whose tiles belong together."""

    def right(response: ScaleResponse, label: int) -> NDArray[np.float64]:
        assert response.outputs is not None
        shown = response.outputs.logits[..., : len(CRC_CLASSES)].argmax(axis=2)  # (N, S)
        share: NDArray[np.float64] = (shown == label).mean(axis=0)
        return share

    shares = np.stack([right(r, label) for r, label in zip(responses, labels, strict=True)])  # (patches, S)
    return _bootstrapped(responses[0].scales, len(shares), lambda drawn: shares[drawn].mean(axis=0), measure="accuracy", seed=0)


# --- the split of these families: by network and slide, shared slides on the same side everywhere --------------------------


def split() -> dict[str, dict[str, dict[Half, list[str]]]]:
    """What `write_split` was given before anything was measured."""
    monuseg = drawn("monuseg slides", MONUSEG)
    pairs = drawn("crc slides", CRC_PAIRS)
    halves: tuple[Half, ...] = ("develop", "report")
    return {
        "nuclei32": {"networks": drawn("nuclei32 networks", FOLDS), "slides": monuseg},
        "embedded": {"networks": drawn("embedded networks", [EMBEDDED]), "slides": monuseg},
        "crc": {
            "networks": drawn("crc networks", [CRC]),
            "slides": {half: [slide for pair in pairs[half] for slide in CRC_SLIDES[pair]] for half in halves},
        },
    }


# --- what they share -----------------------------------------------------------------------------------------------------


def _whole(
    family: str,
    network: str,
    slide: str,
    half: Half,
    response: ScaleResponse,
    oracle: Oracle,
    *,
    train_scale: float,
) -> Case:
    """Before its ranges are cut out of it."""
    return Case(
        name=f"{family}/{network}/{slide}",
        family=family,
        network=network,
        slide=slide,
        half=half,
        response=response,
        oracle=oracle,
        train_scale=train_scale,
        range="whole",
        upsampled=True,
    )


def _ask(network: Network, stack: ScaleStack) -> ScaleResponse:
    return respond(network, stack, views=VIEWS, layers="auto", device="cpu")


def _stack(image: NDArray[np.uint8], places: NDArray[np.float64], ranges: tuple[Range, ...], *, size: int) -> ScaleStack:
    """Tiles at places (N, 2) of the image, which is mirrored beyond its edges and has no tag: `_tagged` sees to that."""
    scales = _grid(ranges)
    slide, pad = _mirrored(image, int(np.ceil(size * scales[-1] / 2)))
    return scale_stack(slide, places + pad, scales=scales, size=size, max_upsample=1 / scales[0])


def first_of(slides: Sequence[str], count: int) -> list[str]:
    """The first few MoNuSeg images that were scanned at 0.25 µm/px, for what is too dear for all."""
    return [slide for slide in slides if slide not in MONUSEG_OTHER_MPP][:count]


def monuseg_mpp(slide: str) -> float:
    """µm/px at which the image was scanned."""
    return MONUSEG_OTHER_MPP.get(slide, MONUSEG_MPP)


def _tagged(response: ScaleResponse, mpp: float | None) -> ScaleResponse:
    """The same answers, of a slide whose level 0 has `mpp` µm/px. What is cached does not depend on it."""
    return replace(response, slide_mpp=mpp, views={name: _tagged(view, mpp) for name, view in response.views.items()})


def _computed(stack: ScaleStack) -> ScaleStack:
    """The same stack read once, for several networks."""
    images = stack.images.compute(scheduler="synchronous")
    return replace(stack, images=da.from_array(images, chunks=(1, *images.shape[1:])))


def _grid(ranges: tuple[Range, ...]) -> NDArray[np.float64]:
    """Every 1/4 octave from the finest to the coarsest of the ranges, whose ends it meets: (S,)."""
    first, last = min(r.lo for r in ranges), max(r.hi for r in ranges)
    steps = round(np.log2(last / first) * PER_OCTAVE)
    return np.asarray(first * np.exp2(np.arange(steps + 1) / PER_OCTAVE), np.float64)


def _inner_places(image: NDArray[np.uint8], count: int, slide: str) -> NDArray[np.float64]:
    """(count, 2) anywhere in the middle half of the image: a MoNuSeg image is tissue from edge to edge."""
    side = np.array(image.shape[:2])
    return _rng("places", slide).uniform(side / 4, side * 3 / 4, (count, 2))


def _margin(ranges: tuple[Range, ...], size: int) -> int:
    return int(np.ceil(size * max(r.hi for r in ranges) / 2))


def _mirrored(image: NDArray[np.uint8], pad: int, *, mpp: float | None = None) -> tuple[ArrayReader, int]:
    """The image on a canvas that it fills beyond its edges, mirrored as often as it takes, and where it begins there."""
    return ArrayReader(np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric"), mpp=mpp), pad


def _bootstrapped(
    scales: NDArray[np.float64],
    units: int,
    quality: Callable[[NDArray[np.intp]], NDArray[np.float64]],
    *,
    measure: str,
    seed: int,
) -> Oracle:
    """`quality` of all units, and its 90 % band over units drawn with replacement."""
    rng = np.random.default_rng(seed)
    drawn = np.stack([quality(rng.integers(units, size=units)) for _ in range(RESAMPLES)])
    lo, hi = np.percentile(drawn, [5, 95], axis=0)
    return Oracle(scales=scales, quality=quality(np.arange(units)), lo=lo, hi=hi, measure=measure)


def _monuseg(data: Path, slide: str) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The image (H, W, 3) and where its nuclei are (H, W)."""
    folder = data / "patches" / "monuseg"
    with Image.open(folder / "masks" / f"{slide}.png") as mask:
        return _rgb(folder / "images" / f"{slide}.png"), np.asarray(mask) > 0


def _rgb(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _rng(*names: str) -> np.random.Generator:
    """The same numbers for the same names, whatever else runs."""
    return np.random.default_rng([int.from_bytes(name.encode()) % 2**63 for name in names])


def _with_views(key: str, views: tuple[str, ...]) -> str:
    """Where a response with these views is kept."""
    return f"{key}.{'+'.join(views)}"


def _some(names: Any, setting: Setting, count: int) -> Any:
    return names[:count] if setting.quick else names
