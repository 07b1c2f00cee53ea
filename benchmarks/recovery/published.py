"""The thesis's own experiment, tables 2 to 5: pyramids of 95 scales, 0.5 to 9.9, of its figures, and what ours say of the same.

Test images of 5,000 px, five a class; a pyramid's tile of 224 px at scale s is cut from the image that is resized to
floor(5000 / s) px, made even, by Pillow's antialiased bicubic; its centre is uniform in 1109..3890. Pillow resizes the box
that the tile shows, which gives the same pixels. The thesis tried one true scale, 5, which is next to the middle of its
range; here the same is done for the networks that were trained at others.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.recovery.cases import Half, MissingDataError, Setting, half_of, joined
from benchmarks.recovery.tables import markdown
from benchmarks.recovery.thesis import CLASSES, FAMILY, TILE, Recipe, canvas, load, trained
from wsiscale.analyzer import respond
from wsiscale.criteria import CRITERIA, bagamaev2022_grid, bagamaev2022_with_labels, peak
from wsiscale.networks import Network, load_network
from wsiscale.training_tiles import Reference, calibrate, from_record, to_record
from wsiscale.types import ScaleResponse

IMAGES, SIDE, FIRST_SEED = 5, 5000, 7_000  # a class
PYRAMIDS = {5.0: 50}  # a class; of the scales that the thesis did not try fewer do
FEWER = 5
VIEWS = ("phase_scrambled",)

# Tables 2 to 4: sum of squared errors, classes within 0.5, and within 1; rows are shares of channels, columns sigmas.
SIGMAS = tuple(range(7, 16))
THESIS: dict[int, tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]] = {
    40: (
        (15.570, 12.810, 11.055, 10.068, 10.933, 10.823, 12.368, 12.553, 13.840),
        (10, 8, 10, 11, 8, 9, 8, 10, 9),
        (14, 15, 15, 15, 15, 14, 13, 14, 14),
    ),
    50: (
        (12.565, 10.675, 11.415, 11.998, 12.230, 11.883, 11.860, 14.948, 15.610),
        (9, 10, 10, 8, 7, 7, 7, 7, 8),
        (15, 16, 16, 16, 16, 15, 14, 13, 14),
    ),
    60: (
        (11.108, 10.065, 9.445, 12.850, 10.433, 9.480, 10.325, 11.190, 12.153),
        (10, 9, 7, 7, 7, 5, 7, 6, 8),
        (16, 15, 16, 14, 17, 18, 17, 15, 16),
    ),
}


def section(setting: Setting, halves: Sequence[Half]) -> str:
    """The report's tables, in markdown."""
    mine = sorted((r for r in trained() if _mine(r, halves)), key=lambda recipe: -PYRAMIDS.get(recipe.scale, 0))
    found = [_asked(setting, recipe) for recipe in mine]
    if not found:
        raise MissingDataError("no network of these halves was trained")
    return "\n".join([_MEANING, answers_table(found), _TUNED, tuned_table(found)])


_MEANING = """Per class the median over its pyramids, or the peak of the curve of all of them: sum of squared errors over the 20
classes, how many are within 0.5 and within 1 of the true scale (strictly), mean |log2| error. *All classes*: one answer of all
pyramids together, counted 20 times. `reference` has seen 240 training patches. The thesis's own network, by its Table 5, has
10.675, 10, 16 and 0.175 at scale 5; answering 5.2, the middle of the range, whatever one sees, has 0.8, 20, 20 and 0.057.

"""

_TUNED = """
The thesis chose sigma (grid steps) and the share of channels on its test: its tables 2 to 4. Sum of squared errors, classes
within 0.5, within 1, here and (thesis), at true scale 5:

"""


def _mine(recipe: Recipe, halves: Sequence[Half]) -> bool:
    """The first network of each scale without noise; what half it is in does not matter where both are shown."""
    if recipe.noise or recipe.width != 4 or recipe.seed:
        return False
    return any(half_of(FAMILY, network=recipe.name, slide=f"mixed-{i}") in halves for i in range(2)) or recipe.scale == 5


@dataclass(frozen=True)
class Asked:
    """What one network answered to all pyramids, in order of class."""

    recipe: Recipe
    response: ScaleResponse
    pyramids: int  # a class

    def of_class(self, label: int) -> ScaleResponse:
        return self.response.take(np.arange(label * self.pyramids, (label + 1) * self.pyramids))


def _asked(setting: Setting, recipe: Recipe) -> Asked:
    count = PYRAMIDS.get(recipe.scale, FEWER)

    fed = load_network(load(recipe), name=recipe.name, tile_size=TILE, value_range=255)
    folder = f"published/{recipe.name}-{count}"
    parts = [
        setting.cached_response(f"{folder}/class-{label:02d}", partial(_of_class, fed, label, count, setting))
        for label in range(len(CLASSES))
    ]
    response = joined(parts)
    return Asked(recipe, replace(response, reference=_reference(setting, recipe)), count)


def _reference(setting: Setting, recipe: Recipe) -> Reference:
    """Of 240 training patches, cut as the network's own were, from images of its own."""
    file = setting.cache / "published" / f"{recipe.name}-reference.json"
    if not file.exists():
        if setting.cached:
            raise MissingDataError(f"there is no {file.name} in this cache")
        rng = np.random.default_rng(0)
        side = math.floor(recipe.scale * TILE)
        patches = []
        for label in range(len(CLASSES)):
            image = canvas(label, seed=FIRST_SEED + IMAGES, size=SIDE)
            for x, y in rng.integers(0, SIDE - side, (12, 2)).tolist():
                patches.append(np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))))
        fed = load_network(load(recipe), name=recipe.name, tile_size=TILE, value_range=255)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(to_record(calibrate(fed, patches, device="cpu"))))
    return from_record(json.loads(file.read_text()))


def _of_class(fed: Network, label: int, count: int, setting: Setting) -> ScaleResponse:
    setting.log(f"published/{fed.name}: class {label}")
    scales = bagamaev2022_grid()
    found = []
    for i in range(IMAGES):
        image = canvas(label, seed=FIRST_SEED + i, size=SIDE)
        rng = np.random.default_rng([zlib.crc32(b"published"), label, i])
        centers = rng.uniform(1109, 3890, (math.ceil(count / IMAGES), 2))
        shown = [np.stack([tile(image, y, x, float(s)) for y, x in centers]) for s in scales]
        found.append(respond(fed, shown, scales=scales, views=VIEWS, layers="auto", device="cpu"))
    return joined(found)


def tile(image: Image.Image, y: float, x: float, scale: float) -> NDArray[np.uint8]:
    """What the image, resized whole to an even floor(side / scale), shows around (y, x) of it: (224, 224, 3)."""
    side = int(image.width / scale) // 2 * 2
    step = image.width / side
    top, left = (round(c / step) - TILE // 2 for c in (y, x))
    box = (left * step, top * step, (left + TILE) * step, (top + TILE) * step)
    return np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC, box=box))


# --- answers -------------------------------------------------------------------------------------------------------------

Answer = Callable[[ScaleResponse, int], float | None]


def _published(response: ScaleResponse, label: int, **how: float) -> float | None:
    return bagamaev2022_with_labels(response, np.full(response.places, label), **how)


def _peak_of(name: str, response: ScaleResponse, _: int) -> float | None:
    rule = CRITERIA[name]
    found = rule.decide(response) if rule.decide is not None else peak(response.scales, rule.score(response))
    return None if found is None or not np.isfinite(found) else found


ROWS: dict[str, Answer] = {
    "bagamaev2022, the true class given, as published": _published,
    **{name: partial(_peak_of, name) for name in ("bagamaev2022", "confidence", "batchnorm_tangent", "consensus", "reference")},
}
TOGETHER = ("bagamaev2022", "confidence", "batchnorm_tangent", "consensus", "reference")


def answers_table(found: Sequence[Asked]) -> str:
    lines = []
    for asked in found:
        true = asked.recipe.scale
        middle = float(np.median(asked.response.scales))
        each: dict[str, list[float | None]] = {"the middle of the range": [middle] * len(CLASSES)}
        for name, answer in ROWS.items():
            each[name] = [answer(asked.of_class(label), label) for label in range(len(CLASSES))]
        for name in TOGETHER:
            each[f"{name}, all classes"] = [_peak_of(name, asked.response, 0)] * len(CLASSES)
        lines += [[f"{true:g}", name, *judged(answers, true)] for name, answers in each.items()]
    return markdown(["true scale", "method", "answers", "SSE", "within 0.5", "within 1", "mean \\|log2\\|"], lines)


def judged(answers: Sequence[float | None], true: float) -> list[str]:
    """How many answers, SSE, within 0.5, within 1, mean |log2| error; of a method with gaps no sum."""
    given = np.array([a for a in answers if a is not None])
    if len(given) == 0:
        return ["0", "-", "-", "-", "-"]
    off = np.abs(given - true)
    sse = f"{np.square(off).sum():.3f}" if len(given) == len(answers) else "-"
    return [str(len(given)), sse, str((off < 0.5).sum()), str((off < 1).sum()), f"{np.abs(np.log2(given / true)).mean():.3f}"]


def tuned_table(found: Sequence[Asked]) -> str:
    """The thesis's tables 2 to 4, ours (theirs)."""
    lines = []
    for asked in (a for a in found if a.recipe.scale == 5):
        for percent, theirs in THESIS.items():
            cells = []
            for sigma, *numbers in zip(SIGMAS, *theirs, strict=True):
                ours = judged(
                    [_published(asked.of_class(c), c, sigma=sigma, percent=percent) for c in range(len(CLASSES))], 5.0
                )
                cells.append(f"{ours[1]}, {ours[2]}, {ours[3]} ({', '.join(map(str, numbers))})")
            lines.append([f"{percent} %", *cells])
    return markdown(["channels", *(f"sigma {sigma}" for sigma in SIGMAS)], lines)
