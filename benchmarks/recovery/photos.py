"""ImageNet networks: on photographs, where the size of the object is the answer, and on tissue, where there is none.

| what | network | slides | quality |
|---|---|---|---|
| family photos | SqueezeNet 1.1, 1000 classes | 5 photographs of scikit-image | probability of the object's classes |
| stability | SqueezeNet, trunks of VGG16 and DenseNet121 | MoNuSeg images | none: does the answer hold still? |
| | the trunks | the photographs | none: does it hold still, and does the object fill the tile? |

ImageNet's objects fill the picture, so that an object is taken to be at its training scale where its longer side is as wide
as the tile. A tile is centred on the object, give or take an eighth of its side; beyond its edges a photograph is mirrored.

A feature extractor on tissue has no best scale. What can be asked of an estimate is that it says so, or that it is a property
of slide and network: two disjoint halves of the places agree, and a copy of the slide rescaled by x0.6 or x1.5 moves it by
that factor. Constants pass the first and fail the second, for the range stays what it is in level-0 px.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from benchmarks.recovery import real
from benchmarks.recovery.cases import Case, Half, MissingDataError, Oracle, Range, Setting, drawn, half_of, over_ranges
from benchmarks.recovery.methods import ABSTAINS, Method, NotApplicableError, log_centre, methods
from benchmarks.recovery.tables import markdown
from wsiscale.analyzer import respond
from wsiscale.networks import Network, import_torchvision, load_network
from wsiscale.types import ScaleResponse


@dataclass(frozen=True)
class Photo:
    """An object whose class ImageNet has, and where it is."""

    file: str  # in the scikit-image wheel
    centre: tuple[float, float]  # (y, x) px, of the object's box
    side: float  # px, the longer one of the box
    classes: tuple[int, ...]  # of ImageNet's 1000, all that are right


# All of the wheel's photographs of an object that has a class, but for a clock that is blurred beyond telling. Boxes were drawn
# by hand before any network saw the pictures.
PHOTOS = {
    "cameraman": Photo("camera.png", (324, 333), 376, (732, 759, 872)),  # Polaroid and reflex camera, tripod
    "cat": Photo("chelsea.png", (150, 210), 350, (281, 282, 285)),  # tabby, tiger cat, Egyptian cat
    "coffee": Photo("coffee.png", (200, 275), 400, (504, 967, 968)),  # mug, espresso, cup
    "motorcycle": Photo("motorcycle_left.png", (265, 390), 588, (665, 670)),  # moped, motor scooter
    "rocket": Photo("rocket.jpg", (265, 322), 280, (657, 744)),  # missile, projectile
}

SQUEEZENET = "squeezenet1_1"
NETWORKS = (SQUEEZENET, "densenet121", "vgg16")
TILE = 224  # px, on photographs
PLACES = 16
# Objects fill the tile at 1.25 to 2.6: below A's middle, 3.4, and above B's, 1.
RANGES = (Range("A", 1, 2**3.5), Range("B", 2**-1.5, 2**1.5))

STABILITY_TILE = 128  # px, on tissue: VGG16 costs a quarter of what it does at 224
STABILITY_PLACES = 16  # two halves of 8, the least that an estimate takes
STABILITY_SLIDES = 2  # of each half
STABILITY_RANGE = Range("stability", 1, 8)
FACTORS = (1.0, 0.6, 1.5)  # level-0 px of a copy per px of the slide
GUARD = ("pixel_shuffled",)  # the one view that estimates of a feature extractor look at


# --- photos --------------------------------------------------------------------------------------------------------------


def photos(setting: Setting) -> Iterator[Case]:
    """SqueezeNet on each photograph, two ranges."""
    weights = _weights(setting)

    @lru_cache(maxsize=1)
    def network() -> Network:
        return imagenet_network(SQUEEZENET, weights, tile_size=TILE)

    for name, photo in real._some(list(PHOTOS.items()), setting, 2):
        half = half_of("photos", network=SQUEEZENET, slide=name)
        assert half is not None

        def ask(name: str = name, photo: Photo = photo) -> ScaleResponse:
            stack = real._stack(_photograph(photo), _around(photo, name), RANGES, size=TILE)
            return respond(network(), stack, views=real.VIEWS, layers="auto", device="cpu")

        key = f"photos/{SQUEEZENET}/{name}"
        setting.log(key)
        response = setting.cached_response(real._with_views(key, real.VIEWS), ask)
        oracle = setting.cached_oracle(key, lambda r=response, p=photo: _probability_oracle(r, p.classes))
        train_scale = photo.side / TILE
        whole = real._whole("photos", SQUEEZENET, name, half, response, oracle, train_scale=train_scale)
        # One object each: with what else there is to tell it from, no answer is clear.
        yield from over_ranges(replace(whole, tags=frozenset({"single-class"})), RANGES)


def imagenet_network(name: str, weights: Path, *, tile_size: int) -> Network:
    """SqueezeNet with its classes, the trunks of VGG16 and DenseNet121 as extractors of features."""
    build = getattr(import_torchvision().models, {SQUEEZENET: "squeezenet1_1"}.get(name, name))
    module: nn.Module = build(weights=None)
    if name == SQUEEZENET:
        # Caffe's: BGR, 0..255.
        module.load_state_dict(_state(weights / "squeezenet1_1_imagenet.safetensors"))
        return load_network(
            module.eval(), name=name, tile_size=tile_size, channels="bgr", value_range=255, mean=(104, 117, 123)
        )
    trunk = module.features
    assert isinstance(trunk, nn.Module)
    if name == "vgg16":
        trunk.load_state_dict(_without_prefix(_state(weights / "vgg16_imagenet_features_bgr.safetensors")))
        prepared = {"channels": "bgr", "value_range": 255, "mean": (103.939, 116.779, 123.68)}
    else:
        trunk.load_state_dict(_without_prefix(_state(weights / "densenet121_imagenet_features.safetensors")))
        for layer in trunk.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = 1.001e-5  # Keras's, where the weights are from
        prepared = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return load_network(trunk.eval(), name=name, tile_size=tile_size, output="features", **prepared)


def _state(file: Path) -> dict[str, object]:
    return {name: value.float() if value.is_floating_point() else value for name, value in load_file(file).items()}


def _without_prefix(state: dict[str, object]) -> dict[str, object]:
    return {name.removeprefix("features."): value for name, value in state.items()}


def _weights(setting: Setting) -> Path:
    """The folder of weights. Raises MissingDataError."""
    folder = setting.needs_data() / "weights"
    wanted = ("squeezenet1_1_imagenet", "vgg16_imagenet_features_bgr", "densenet121_imagenet_features")
    if missing := [name for name in wanted if not (folder / f"{name}.safetensors").exists()]:
        raise MissingDataError(f"its weights {', '.join(missing)} are not in {folder.name}")
    return folder


def _photograph(photo: Photo) -> NDArray[np.uint8]:
    return real._rgb(Path(skimage.data.__file__).parent / photo.file)


def _around(photo: Photo, name: str) -> NDArray[np.float64]:
    """(PLACES, 2) around the object's centre, up to an eighth of its side away."""
    off = real._rng("photos", name).uniform(-photo.side / 8, photo.side / 8, (PLACES, 2))
    return np.asarray(photo.centre) + off


def _probability_oracle(response: ScaleResponse, classes: tuple[int, ...]) -> Oracle:
    """The probability of the object's classes, mean over places; the bootstrap draws places."""
    assert response.outputs is not None
    right = response.outputs.probabilities[..., list(classes)].sum(axis=2).astype(np.float64)  # (N, S)
    return real._bootstrapped(
        response.scales, len(right), lambda drawn: right[drawn].mean(axis=0), measure="probability", seed=0
    )


# --- stability -----------------------------------------------------------------------------------------------------------


Row = TypeVar("Row")


@dataclass(frozen=True)
class Steadiness:
    """How far answers to what ought to be one question are apart: one network, one slide, one criterion."""

    network: str
    ground: str  # "tissue" or "photos"
    slide: str
    criterion: str
    # |octaves| between two disjoint halves of the places, and between the slide and its rescaled copies after the factor:
    # by the criterion's own rule, which always answers, and as `estimate` would, None where one of the two abstains.
    halves: float | None
    halves_estimated: float | None
    rescaled: tuple[float | None, ...]
    rescaled_estimated: tuple[float | None, ...]
    off: float | None  # octaves from where the object fills the tile, by the rule; None on tissue


def section(setting: Setting, halves: Sequence[Half]) -> str:
    """The report's table, in markdown, with what it means."""
    found, end = as_far_as_it_goes(steadiness(setting, halves))
    return f"{_MEANING}{end}\n{stability_table(found)}"


def as_far_as_it_goes(rows: Iterator[Row]) -> tuple[list[Row], str]:
    """All rows, and a line that says where data or the cache ended. Raises MissingDataError where that is before the first."""
    found: list[Row] = []
    try:
        for row in rows:
            found.append(row)
    except MissingDataError as error:
        if not found:
            raise
        return found, f"\n**Not to its end**: {error}\n"
    return found, ""


_MEANING = """Networks of ImageNet as feature extractors. On tissue nobody can say which scale is right, so that nothing is said
of regret: an estimate has to hold still, or there has to be none. *rule*: the criterion's own answer, which it always gives;
*estimate*: as `wsiscale estimate` answers, with the share of pairs in which it did twice. *halves*: |octaves| between two
disjoint halves of the places, median and worst. *rescaled*: |octaves| between the slide and copies of it at x0.6 and x1.5,
after the factor, in a range that stays the same in level-0 px. The middle of the range, which knows nothing, holds perfectly
still for the first and not for the second. *to the object*: octaves from where the photographed object fills the tile.
"""


def steadiness(setting: Setting, halves: Sequence[Half]) -> Iterator[Steadiness]:
    """Networks on their grounds, the slides of these halves; each criterion that the network can be asked for."""
    rows = methods()
    for network, ground, slide, off_from, responses in _asked(setting, halves):
        whole, *copies = responses
        parts = [_part(whole, start) for start in (0, 1)]
        yield _steady(network, ground, slide, "range centre (log)", log_centre, log_centre, whole, parts, copies, off_from)
        for name in [row for row in rows if row + ABSTAINS in rows]:
            try:
                yield _steady(network, ground, slide, name, rows[name], rows[name + ABSTAINS], whole, parts, copies, off_from)
            except NotApplicableError:
                continue


def _steady(
    network: str,
    ground: str,
    slide: str,
    criterion: str,
    rule: Method,
    estimate: Method,
    whole: ScaleResponse,
    parts: Sequence[ScaleResponse],
    copies: Sequence[ScaleResponse],
    off_from: float | None,
) -> Steadiness:
    def apart(method: Method) -> tuple[float | None, tuple[float | None, ...], float | None]:
        first, second, scale, *scaled = [method(_unlabelled(r)).scale for r in (*parts, whole, *copies)]
        factors = FACTORS[1 : 1 + len(copies)]
        moved = tuple(_octaves(s, None if scale is None else scale * f) for s, f in zip(scaled, factors, strict=True))
        return _octaves(first, second), moved, scale

    by_rule, moved, scale = apart(rule)
    estimated, moved_estimated, _ = apart(estimate)
    off = None if off_from is None or scale is None else float(np.log2(scale / off_from))
    return Steadiness(network, ground, slide, criterion, by_rule, estimated, moved, moved_estimated, off)


def _asked(setting: Setting, halves: Sequence[Half]) -> Iterator[tuple[str, str, str, float | None, tuple[ScaleResponse, ...]]]:
    """Network, ground, slide, the scale at which its object fills the tile, and responses to the slide and its copies."""
    weights = _weights(setting)
    for name in real._some(NETWORKS, setting, 1):

        @lru_cache(maxsize=2)
        def network(size: int, name: str = name) -> Network:
            return imagenet_network(name, weights, tile_size=size)

        def asked(
            key: str, load: Callable[[], tuple[NDArray[np.uint8], NDArray[np.float64]]], factor: float, size: int,
            name: str = name, network: Callable[[int], Network] = network,
        ) -> ScaleResponse:  # fmt: skip
            def ask() -> ScaleResponse:
                image, places = load()
                image, places = rescaled(image, factor), places * factor
                stack = real._stack(image, places, (STABILITY_RANGE,), size=size)
                return respond(network(size), stack, views=_views(name), layers=_layers(network(size)), device="cpu")

            setting.log(f"{key} x{factor:g}")
            return setting.cached_response(real._with_views(f"{key}-x{factor:g}", _views(name)), ask)

        for slide in real._some(_stability_slides(halves), setting, 1):
            key = f"stability/{name}/{slide}"
            responses = tuple(asked(key, lambda s=slide: _tissue(setting, s), factor, STABILITY_TILE) for factor in FACTORS)
            yield name, "tissue", slide, None, responses
        if name == SQUEEZENET:
            continue  # which has the family photos
        for slide, photo in PHOTOS.items():
            if half_of("stability", network=name, slide=slide) in halves and not setting.quick:
                key = f"stability/{name}/{slide}"
                response = asked(key, lambda p=photo, s=slide: (_photograph(p), _around(p, s)), 1.0, TILE)
                yield name, "photos", slide, photo.side / TILE, (response,)


def rescaled(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """A copy of the slide with `factor` times as many pixels a side: area means down, bicubic up."""
    if factor == 1:
        return image
    height, width = (round(side * factor) for side in image.shape[:2])
    kernel = Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize((width, height), kernel))


def _tissue(setting: Setting, slide: str) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    image, _ = real._monuseg(setting.needs_data(), slide)
    return image, real._inner_places(image, STABILITY_PLACES, slide)


def _stability_slides(halves: Sequence[Half]) -> list[str]:
    listed = split()["stability"]["slides"]
    return [slide for half in halves for slide in listed[half] if slide not in PHOTOS]


def _views(network: str) -> tuple[str, ...]:
    return real.VIEWS if network == SQUEEZENET else GUARD


def _layers(network: Network) -> list[str]:
    """Stages, and of DenseNet121's 121 BatchNorm inputs every eighth one, as in family crc."""
    norms = [name for name, layer in network.module.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    return list(dict.fromkeys([*norms[:: real.CRC_EVERY], *real._stages(network)]))


def _part(response: ScaleResponse, start: int) -> ScaleResponse:
    """Every second place: one of two disjoint halves."""
    return response.take(np.arange(start, response.places, 2))


def _unlabelled(response: ScaleResponse) -> Case:
    """For methods, which look at the response alone."""
    nothing = np.zeros(len(response.scales))
    oracle = Oracle(scales=response.scales, quality=nothing, lo=nothing, hi=nothing, measure="none")
    case = real._whole("stability", "any", "any", "develop", response, oracle, train_scale=1.0)
    return replace(case, train_scale=None)


def _octaves(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else abs(float(np.log2(one / other)))


def stability_table(found: Sequence[Steadiness]) -> str:
    """Markdown, a row a network, ground and criterion."""
    titles = (
        "network", "on", "criterion", "slides", "halves: rule", "halves: estimate", "estimated",
        "rescaled: rule", "rescaled: estimate", "estimated", "to the object",
    )  # fmt: skip
    rows = []
    for key in dict.fromkeys((f.network, f.ground, f.criterion) for f in found):
        group = [f for f in found if (f.network, f.ground, f.criterion) == key]
        halves = [f.halves_estimated for f in group]
        moved = [m for f in group for m in f.rescaled_estimated]
        offs = [f.off for f in group if f.off is not None]
        rows.append(
            (
                *key,
                str(len(group)),
                _median_and_worst([f.halves for f in group]),
                _median_and_worst(halves),
                _share(halves),
                _median_and_worst([m for f in group for m in f.rescaled]),
                _median_and_worst(moved),
                _share(moved),
                "-" if not offs else ", ".join(f"{off:+.2f}" for off in offs),
            )
        )
    return markdown(titles, rows)


def _median_and_worst(apart: Sequence[float | None]) -> str:
    known = [a for a in apart if a is not None]
    return "-" if not known else f"{np.median(known):.2f}, {max(known):.2f}"


def _share(apart: Sequence[float | None]) -> str:
    return "-" if not apart else f"{np.mean([a is not None for a in apart]):.0%}"


# --- the split -----------------------------------------------------------------------------------------------------------


def split() -> dict[str, dict[str, dict[Half, list[str]]]]:
    """What `write_split` was given before anything was measured. There is one network of each kind: slides decide."""
    photographs = drawn("photos slides", PHOTOS)
    monuseg = drawn("monuseg slides", real.MONUSEG)
    every = sorted(NETWORKS)
    halves: tuple[Half, ...] = ("develop", "report")
    return {
        "photos": {"networks": drawn("photos networks", [SQUEEZENET]), "slides": photographs},
        "stability": {
            "networks": dict.fromkeys(halves, every),
            "slides": {half: [*real.first_of(monuseg[half], STABILITY_SLIDES), *photographs[half]] for half in halves},
        },
    }
