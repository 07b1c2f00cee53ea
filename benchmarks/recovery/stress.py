"""What happens to the answers when slides are worse than they should be.

The embedded network and one fold of nuclei32 of each half, on a few MoNuSeg images of it. Each image is changed in one way
and asked again over one range in level-0 px, which stays what it is where a copy has more or fewer pixels, as for a slide
without a tag. Places are the same spots of tissue throughout.

A change costs quality too. So regret is against the labels of the changed image, read as the network got it; the shift is
against the same criterion on the image as it was, after the factor where pixels were added or taken away.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.color import hed_from_rgb, rgb_from_hed

from benchmarks.recovery import real
from benchmarks.recovery.cases import Case, Half, Oracle, Range, Setting, drawn, half_of
from benchmarks.recovery.methods import ABSTAINS, Method, NotApplicableError, methods
from benchmarks.recovery.photos import as_far_as_it_goes, rescaled
from benchmarks.recovery.tables import markdown
from wsiscale.analyzer import respond
from wsiscale.criteria import CRITERIA, DEFAULT_CRITERION
from wsiscale.estimation import CONFLICT_OCTAVES
from wsiscale.geometry import View
from wsiscale.networks import Network, load_network
from wsiscale.responses import at_scales
from wsiscale.types import ScaleResponse

RgbImage = NDArray[np.uint8]  # (H, W, 3)
Kernel = Literal["area", "bilinear", "bicubic"]

SLIDES = 2  # of each half
PLACES = 24
MANY_PLACES = 64  # of the image as it is, for fewer of them
VIEWS = ("rot90", "phase_scrambled", "pixel_shuffled")
COLUMNS = ("consensus", "margin_over_null", "confidence", "nuclear_norm", "bagamaev2022", "penkin2022", "penkin2023")
# The best scale is at 2 for the embedded network and near 0.8 for nuclei32: off the middles, 2.8 and 1.4, and within the range
# for copies of x0.6 to x2 too.
RANGES = {real.EMBEDDED: (Range("stress", 2**-0.5, 2**3.5),), "nuclei32": (Range("stress", 2**-2, 2**3),)}


# --- the stressors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stressor:
    """A way in which a slide is worse than it should be."""

    name: str
    change: Callable[[RgbImage], RgbImage] = lambda image: image
    factor: float = 1.0  # px of the changed image per px of the image
    kernel: Kernel = "area"  # how its tiles are made; without anti-aliasing, all but the first


def stained(image: RgbImage, *, hematoxylin: float, eosin: float) -> RgbImage:
    """The image with so many times as much of either dye (colour deconvolution of Ruifrok & Johnston, 2001)."""
    # By scikit-image's matrices and not its rgb2hed, which cuts negative amounts off and so changes colours by itself.
    dyes = -np.log(np.maximum(image, 1) / 255) @ hed_from_rgb * np.array([hematoxylin, eosin, 1.0])
    return np.clip(np.rint(np.exp(-dyes @ rgb_from_hed) * 255), 0, 255).astype(np.uint8)


def jpeg(image: RgbImage, *, quality: int) -> RgbImage:
    """The image as JPEG gives it back."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    with Image.open(file) as back:
        return np.asarray(back.convert("RGB"))


def blurred(image: RgbImage, *, sigma: float) -> RgbImage:
    """Out of focus: a Gaussian of `sigma` px."""
    return gaussian_filter(image, (sigma, sigma, 0), mode="reflect")


UNSTRESSED = Stressor("none")
STRESSORS = (
    Stressor("stain: hematoxylin x1.3, eosin x0.7", partial(stained, hematoxylin=1.3, eosin=0.7)),
    Stressor("stain: hematoxylin x0.7, eosin x1.3", partial(stained, hematoxylin=0.7, eosin=1.3)),
    Stressor("JPEG, quality 60", partial(jpeg, quality=60)),
    Stressor("JPEG, quality 30", partial(jpeg, quality=30)),
    Stressor("tiles by bilinear sampling", kernel="bilinear"),
    Stressor("tiles by bicubic sampling", kernel="bicubic"),
    Stressor("blur, sigma 1 px", partial(blurred, sigma=1)),
    Stressor("blur, sigma 2 px", partial(blurred, sigma=2)),
    Stressor("empty magnification x2", partial(rescaled, factor=2.0), factor=2.0),
    Stressor("copy x0.6", partial(rescaled, factor=0.6), factor=0.6),
    Stressor("copy x1.5", partial(rescaled, factor=1.5), factor=1.5),
)
FEWER_PLACES = (1, 4, 16)
WRONG_TAGS = (0.4, 0.63, 1.6, 2.5)  # claimed over true µm/px


def sampled(image: RgbImage, view: View, *, kernel: Kernel) -> RgbImage:
    """The view by interpolation between the nearest pixels, however coarse: aliased, as careless resizing is."""
    box = (view.x, view.y, view.x + view.width * view.scale, view.y + view.height * view.scale)
    how = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[kernel]
    size = (view.width, view.height)
    return np.asarray(Image.fromarray(image).transform(size, Image.Transform.EXTENT, box, resample=how))


# --- measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stressed:
    """What one criterion answers on one slide under one stressor."""

    network: str
    slide: str
    stressor: str
    criterion: str
    scale: float | None  # by its own rule, level-0 px per px of the changed image
    shift: float | None  # octaves from the answer to the image as it was, after the factor
    regret: float | None  # against the changed image's own labels
    abstained: bool  # whether `estimate` would say nothing
    estimate_regret: float | None  # of what it would say


@dataclass(frozen=True)
class _Subject:
    """A network on an image: what it answers and how good it is there, under any stressor."""

    family: str  # "embedded" or "nuclei32"
    network: str
    slide: str
    half: Half
    training_mpp: float
    ask: Callable[[Stressor, int], ScaleResponse]  # number of places
    label: Callable[[Stressor], Oracle]


def section(setting: Setting, halves: Sequence[Half]) -> str:
    """The report's tables, in markdown, with what they mean."""
    found, end = as_far_as_it_goes(stressed(setting, halves))
    parts = [_MEANING + end]
    for family in dict.fromkeys(_family(s.network) for s in found):
        group = [s for s in found if _family(s.network) == family]
        slides = len({s.slide for s in group})
        parts += [f"\n### {family}, {slides} slide{'s' if slides > 1 else ''}\n", stress_table(group)]
    return "\n".join(parts)


_MEANING = """One network on a few slides, changed in one way at a time. A cell: mean shift of the criterion's own answer in
|octaves| against the unchanged image, after the factor where a copy has other pixels; mean regret against the labels of the
changed image; share of slides without an estimate. A shift of nothing at all is no merit in itself: the middle of the range
has it in every row but the copies'. Tiles by sampling are not anti-aliased. Empty magnification is an image with twice as many
pixels and nothing more in them. A wrong tag moves a range that is given in µm/px; what is left of it is asked, and an estimate
that cannot be reconciled with the network's training µm/px is none. Without a tag the range is the whole one. With fewer than
8 places there is no estimate; the rule answers.
"""


def stressed(setting: Setting, halves: Sequence[Half]) -> Iterator[Stressed]:
    """Every criterion of the tables under every stressor."""
    chosen = [name for name in dict.fromkeys((DEFAULT_CRITERION, *COLUMNS)) if name in CRITERIA]
    every = methods({name: CRITERIA[name] for name in chosen})
    rows = {name: (every[name], every[name + ABSTAINS]) for name in chosen}
    rows["range centre (log)"] = (every["range centre (log)"],) * 2
    for subject in _subjects(setting, halves):
        setting.log(f"stress/{subject.network}/{subject.slide}")
        whole, oracle = subject.ask(UNSTRESSED, MANY_PLACES), subject.label(UNSTRESSED)
        plain = whole.take(np.arange(PLACES))
        before: dict[str, float | None] = {}
        for name, (rule, estimate) in rows.items():
            try:
                first = _told(subject, UNSTRESSED, name, rule, estimate, [plain], oracle, before=None)
            except NotApplicableError:
                continue
            before[name] = first.scale
            yield first

        def judged(
            stressor: Stressor,
            parts: list[ScaleResponse],
            labels: Oracle,
            claimed: float | None = None,
            subject: _Subject = subject,
            before: dict[str, float | None] = before,
        ) -> Iterator[Stressed]:
            for name in before:
                yield _told(subject, stressor, name, *rows[name], parts, labels, before=before[name], claimed=claimed)

        for stressor in real._some(STRESSORS, setting, 3):
            yield from judged(stressor, [subject.ask(stressor, PLACES)], subject.label(stressor))
        for count in FEWER_PLACES:
            # Disjoint sets of places, so that a lucky draw does not decide.
            draws = [whole.take(np.arange(start, start + count)) for start in range(0, min(4 * count, MANY_PLACES), count)]
            yield from judged(Stressor(f"{count} place{'s' if count > 1 else ''}"), draws, oracle)
        yield from judged(Stressor(f"{MANY_PLACES} places"), [whole], oracle)
        true = real.monuseg_mpp(subject.slide)
        for wrong in WRONG_TAGS:
            scales = plain.scales
            # The range was meant in µm/px; that of the slide is believed to be `wrong` times what it is.
            index = np.flatnonzero((scales >= scales[0] / wrong * 0.999) & (scales <= scales[-1] / wrong * 1.001))
            left = real._tagged(at_scales(plain, index), wrong * true)
            yield from judged(Stressor(f"tag x{wrong:g}"), [left], oracle, claimed=wrong * true)
        yield from judged(Stressor("no tag"), [real._tagged(plain, None)], oracle)


def _told(
    subject: _Subject,
    stressor: Stressor,
    criterion: str,
    rule: Method,
    estimate: Method,
    parts: Sequence[ScaleResponse],
    oracle: Oracle,
    *,
    before: float | None,
    claimed: float | None = None,
) -> Stressed:
    """Means over `parts`, each a response to the changed image. A `claimed` µm/px is checked against the training's."""
    cases = [_case(subject, part, oracle) for part in parts]
    scales = [scale for case in cases if (scale := rule(case).scale) is not None]
    said = [estimate(case).scale for case in cases]
    if claimed is not None:
        said = [None if s is None or _conflicts(s * claimed, subject.training_mpp) else s for s in said]
    answers = [s for s in said if s is not None]
    shifts = [] if before is None else [abs(np.log2(scale / (before * stressor.factor))) for scale in scales]
    return Stressed(
        network=subject.network,
        slide=subject.slide,
        stressor=stressor.name,
        criterion=criterion,
        scale=_mean([np.log2(scale) for scale in scales], np.exp2),
        shift=_mean(shifts),
        regret=_mean([oracle.regret(scale) for scale in scales]),
        abstained=2 * len(answers) < len(said),
        estimate_regret=_mean([oracle.regret(scale) for scale in answers]),
    )


def _conflicts(mpp: float, training_mpp: float) -> bool:
    """What `estimate` does not believe: a tag and an answer that put the network's best µm/px far from its training's."""
    return bool(abs(np.log2(mpp / training_mpp)) > CONFLICT_OCTAVES)


def _case(subject: _Subject, response: ScaleResponse, oracle: Oracle) -> Case:
    return real._whole("stress", subject.network, subject.slide, subject.half, response, oracle, train_scale=1.0)


def _mean(values: Sequence[float], back: Callable[[float], float] = float) -> float | None:
    return float(back(float(np.mean(values)))) if len(values) else None


# --- networks and slides -------------------------------------------------------------------------------------------------


def _subjects(setting: Setting, halves: Sequence[Half]) -> Iterator[_Subject]:
    listed = split()["stress"]
    for half in halves:
        for name in listed["networks"][half]:
            for slide in real._some(listed["slides"][half], setting, 1):
                # Of a fold and a slide of two halves nothing is asked; the embedded network is in both.
                if half_of("stress", network=name, slide=slide) == half:
                    yield _subject(setting, name, slide, half)


def _subject(setting: Setting, name: str, slide: str, half: Half) -> _Subject:
    data = setting.needs_data()
    family = _family(name)
    ranges, size = RANGES[family], real.EMBEDDED_TILE if family == real.EMBEDDED else 32
    key = f"stress/{name}/{slide}"

    @lru_cache(maxsize=1)
    def network() -> Network:
        return load_network(None, tile_size=size) if family == real.EMBEDDED else real._fold(data, name)

    @lru_cache(maxsize=1)
    def changed(stressor: Stressor) -> RgbImage:
        return stressor.change(real._monuseg(data, slide)[0])

    def ask(stressor: Stressor, count: int) -> ScaleResponse:
        def make() -> ScaleResponse:
            places = real._inner_places(real._monuseg(data, slide)[0], MANY_PLACES, slide)[:count]
            return asked(stressor, places, VIEWS)

        asked_before = setting.cached_response(real._with_views(f"{key}/{_file(stressor)}-{count}", VIEWS), make)
        return real._tagged(asked_before, real.monuseg_mpp(slide) / stressor.factor)

    def asked(stressor: Stressor, places: NDArray[np.float64], views: tuple[str, ...]) -> ScaleResponse:
        layers = "auto" if views else "none"
        places = places * stressor.factor
        if stressor.kernel == "area":
            stack = real._stack(changed(stressor), places, ranges, size=size)
            return respond(network(), stack, views=views, layers=layers, device="cpu")
        scales = real._grid(ranges)
        tiles = sampled_tiles(changed(stressor), places, scales, size=size, kernel=stressor.kernel)
        return respond(network(), tiles, scales=scales, views=views, layers=layers, device="cpu")

    def label(stressor: Stressor) -> Oracle:
        def make() -> Oracle:
            _, mask = real._monuseg(data, slide)
            if family == real.EMBEDDED:
                look = None if stressor.kernel == "area" else partial(sampled, kernel=stressor.kernel)
                image = changed(stressor)
                return real._dice_oracle(network(), image, resized_mask(mask, image.shape[:2]), ranges=ranges, look=look)
            pixels, nucleus = real._labelled_pixels(mask, slide)
            return real._auc_of(asked(stressor, pixels, ()), nucleus, seed=0)

        return setting.cached_oracle(f"{key}/{_file(stressor)}", make)

    training_mpp = 0.5 if family == real.EMBEDDED else 0.25
    return _Subject(family, name, slide, half, training_mpp, ask, label)


def sampled_tiles(
    image: RgbImage, places: NDArray[np.float64], scales: NDArray[np.float64], *, size: int, kernel: Kernel
) -> list[NDArray[np.uint8]]:
    """Tiles around places (N, 2) of the image, mirrored beyond its edges: one (N, size, size, 3) a scale."""
    pad = int(np.ceil(size * scales[-1] / 2)) + 2
    canvas = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")

    def tile(y: float, x: float, scale: float) -> RgbImage:
        half = size * scale / 2
        view = View(y=y + pad - half, x=x + pad - half, height=size, width=size, scale=scale)
        return sampled(canvas, view, kernel=kernel)

    return [np.stack([tile(y, x, scale) for y, x in places]) for scale in scales.tolist()]


def resized_mask(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask on an image of another size: nearest pixels."""
    return np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))


def _family(network: str) -> str:
    return network.partition("-")[0]


def _file(stressor: Stressor) -> str:
    """Its name, fit for a file."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in stressor.name).split())


# --- the table -----------------------------------------------------------------------------------------------------------


def stress_table(found: Sequence[Stressed]) -> str:
    """Markdown, a row a stressor, a column a criterion: mean |shift|, mean regret, share of slides without an estimate."""
    criteria = list(dict.fromkeys(s.criterion for s in found))

    def cell(stressor: str, criterion: str) -> str:
        group = [s for s in found if (s.stressor, s.criterion) == (stressor, criterion)]
        shift, regret = ([v for s in group if (v := getattr(s, name)) is not None] for name in ("shift", "regret"))
        shown = [f"{np.mean(shift):.2f}" if shift else "-", f"{np.mean(regret):.3f}" if regret else "-"]
        return ", ".join([*shown, f"{np.mean([s.abstained for s in group]):.0%}"]) if group else "-"

    names = dict.fromkeys(s.stressor for s in found)
    return markdown(["stressor", *criteria], [[name, *[cell(name, c) for c in criteria]] for name in names])


# --- the split -----------------------------------------------------------------------------------------------------------


def split() -> dict[str, dict[str, dict[Half, list[str]]]]:
    """What `write_split` was given before anything was measured: the first fold and the first images of each half."""
    folds, slides = drawn("nuclei32 networks", real.FOLDS), drawn("monuseg slides", real.MONUSEG)
    halves: tuple[Half, ...] = ("develop", "report")
    return {
        "stress": {
            "networks": {half: [real.EMBEDDED, folds[half][0]] for half in halves},
            "slides": {half: real.first_of(slides[half], SLIDES) for half in halves},
        }
    }
