"""Where a network keeps scale: how well each layer, pooled, tells the µm/px of a tile.

Tiles of slides whose µm/px is known are read again at known factors, and from every layer's channels, averaged over the tile,
log2 µm/px is regressed. The method is Graziani et al.'s ("On the Scale Invariance in State of the Art CNNs Trained on
ImageNet", MAKE 3(2), 2021, section 3; regression concept vectors), and so is what follows from it: cut the network where it
knows scale best. `as_published` is theirs: ordinary least squares, to the ratio and not its logarithm, tiles split at random.
Ours is a ridge to log2 µm/px, whole slides held out; the penalty is chosen within the slides to learn from.

R2 = 1 - RSS / TSS of what was held out. Ours counts, slide by slide, squares around the slide's own mean, so that to know the
slide is worth nothing. Pure numpy but for `probe_slides`, which asks the network; docs/probe.md has the measurements.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from wsiscale.card import packed, read_card, unpacked, update_card
from wsiscale.errors import ModelError, MppError, NoTissueError, OptionError, ScaleError, SlideError
from wsiscale.geometry import level_for
from wsiscale.profile import interval
from wsiscale.ridge import PENALTIES, fit_ridges
from wsiscale.types import Reader, ScaleResponse

if TYPE_CHECKING:
    from wsiscale.networks import Network

VERSION = 1
OCTAVES, FACTORS = 3.0, 12
PLACES = 16
FOLDS = 5
LEAST_PLACES = 3
RESAMPLES = 1000
HELD_OUT, REPEATS = 0.3, 10  # of the tiles, and how often drawn, as published

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """What the layers of a network answer to tiles of one slide at known µm/px."""

    slide: str
    log2_mpp: Floats  # (S,)
    layers: Mapping[str, NDArray[np.float32]]  # (N, S, K) averaged over each tile, in forward order

    @property
    def targets(self) -> Floats:
        """(N * S,) log2 µm/px of each tile."""
        return np.tile(self.log2_mpp, len(next(iter(self.layers.values()))))


@dataclass(frozen=True)
class Layer:
    """How well one layer tells scale, and the controls beside it."""

    name: str
    depth: float  # 0 the first layer, 1 the last
    channels: int
    r2: float
    lo: float  # 90 % interval: over slides, drawn with replacement; as published over random splits
    hi: float
    random: float | None  # R2 of the same architecture with random weights
    shuffled: float  # R2 for targets shuffled within each slide
    usual: float  # R2 as it usually is, around the mean of all that was held out: to know the slide is worth something
    error: float  # octaves, mean absolute


@dataclass(frozen=True)
class Comparison:
    """Octaves by which the cut network and the whole one miss the µm/px of held-out slides' tiles, mean absolute."""

    cut: float
    whole: float
    gain: float  # whole less cut
    lo: float  # 90 % interval of the gain, slides drawn with replacement
    hi: float


@dataclass(frozen=True)
class Probe:
    """Scale in the layers of a network."""

    model: str
    layers: tuple[Layer, ...]  # in forward order
    prune_at: str  # the earliest layer that is as good as the best, within one standard error of the difference
    cut: Comparison | None  # the layer chosen without the slides that it is tested on; None as published
    slides: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]  # name, and why
    tiles: int
    mpp_range: tuple[float, float]
    published: bool
    seed: int

    @property
    def peak(self) -> Layer:
        return max(self.layers, key=lambda layer: layer.r2)

    def layer(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)

    def sentence(self) -> str:
        """For people."""
        best, pruned = self.peak, self.layer(self.prune_at)
        how = "as published" if self.published else "slides held out"
        lines = [
            f"{self.model}: scale is best told at {best.name}, R2 {best.r2:.2f} ({best.lo:.2f} to {best.hi:.2f}; {how}), "
            f"depth {best.depth:.0%} of {len(self.layers)} layers",
            f"  cut at {pruned.name}: R2 {pruned.r2:.2f}, {pruned.channels} channels, depth {pruned.depth:.0%}",
            f"  controls there: targets shuffled {pruned.shuffled:.2f}"
            + ("" if pruned.random is None else f", weights random {pruned.random:.2f}"),
        ]
        if self.cut is not None:
            lines.append(
                f"  held-out slides are missed by {self.cut.cut:.3f} octave cut and {self.cut.whole:.3f} whole; "
                f"the gain is {self.cut.gain:.3f} ({self.cut.lo:.3f} to {self.cut.hi:.3f})"
            )
        return "\n".join(lines)

    def as_record(self) -> dict[str, Any]:
        """What `probe --json` prints."""
        return {
            "model": self.model,
            "method": "published" if self.published else "ridge",
            "peak": self.peak.name,
            "prune_at": self.prune_at,
            "cut": None if self.cut is None else dict(vars(self.cut)),
            "slides": list(self.slides),
            "left_out": [{"slide": name, "reason": why} for name, why in self.left_out],
            "tiles": self.tiles,
            "mpp_range": list(self.mpp_range),
            "seed": self.seed,
            "layers": [dict(vars(layer)) for layer in self.layers],
        }


def probe_slides(
    slides: Iterable[str | os.PathLike[str] | Reader],
    network: Network | Any | None = None,
    *,
    known_mpp: float | None = None,
    as_published: bool = False,
    octaves: float = OCTAVES,
    factors: int = FACTORS,
    places: int = PLACES,
    tile_size: int | None = None,
    layers: str | Sequence[str] = "every",
    control: bool = True,
    reader: str = "auto",
    device: str = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    keep: str | os.PathLike[str] | None = None,
    told: Callable[[str, str | None], None] | None = None,
) -> tuple[Probe, list[Answers]]:
    """Where `network` keeps scale, by slides whose µm/px is right or is `known_mpp`; and the answers that tell it.

    Each slide's tiles are read at `factors` scales over `octaves` from level 0 on. Slides that cannot be used are left out by
    name, and `told` hears of each. Without `control` no random weights are asked. With `keep`, a folder, answers are written
    there and read again. Raises OptionError for fewer than three slides.
    """
    from wsiscale.cutting import randomised
    from wsiscale.networks import load_network
    from wsiscale.readers import open_slide

    loaded = load_network(network, tile_size=tile_size)
    networks = [loaded, randomised(loaded, seed=seed)] if control else [loaded]
    found: list[list[Answers]] = [[] for _ in networks]
    left_out: list[tuple[str, str]] = []
    for number, slide in enumerate(slides):
        is_file = isinstance(slide, (str, os.PathLike))
        name = Path(slide).name if isinstance(slide, (str, os.PathLike)) else slide.source.name
        why: str | None = None
        try:
            opened = open_slide(slide, mpp=known_mpp, reader=reader) if isinstance(slide, (str, os.PathLike)) else slide
            try:
                told_by = [
                    ask_layers(
                        opened,
                        each,
                        mpp=known_mpp,
                        octaves=octaves,
                        factors=factors,
                        places=places,
                        layers=layers,
                        device=device,
                        batch_size=batch_size,
                        seed=seed + number,
                        keep=keep,
                    )
                    for each in networks
                ]
            finally:
                if is_file:  # what the caller opened the caller closes
                    opened.close()
            for into, answers in zip(found, told_by, strict=True):
                into.append(answers)
        except (SlideError, MppError, NoTissueError, ScaleError) as error:
            why = str(error)
            left_out.append((name, why))
        if told is not None:
            told(name, why)
    probe = probe_answers(
        found[0],
        found[1] if control else None,
        model=loaded.name,
        as_published=as_published,
        seed=seed,
        left_out=left_out,
    )
    return probe, found[0]


def ask_layers(
    slide: Reader,
    network: Network,
    *,
    mpp: float | None = None,
    octaves: float = OCTAVES,
    factors: int = FACTORS,
    places: int = PLACES,
    layers: str | Sequence[str] = "every",
    device: str = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    keep: str | os.PathLike[str] | None = None,
) -> Answers:
    """What the layers answer to one slide, read at `factors` scales over `octaves`, from `keep` where it is there.

    The finest scale is a seeded part of a step coarser than level 0: else a tile that no kernel has been over would be known by
    its sharpness, and slides of one scanner would share a grid. Each scale has places of its own, all whole within the slide.
    Raises MppError, NoTissueError, SlideError, ScaleError where the slide is too small for the coarsest tile.
    """
    from wsiscale.analyzer import respond
    from wsiscale.networks import network_digest
    from wsiscale.places import sample_places
    from wsiscale.stacks import scale_stack
    from wsiscale.tissue import find_tissue

    level0 = slide.pyramid.mpp if mpp is None else mpp
    if level0 is None:
        raise MppError(f"no µm/px to trust: {slide.calibration.detail or 'the slide does not say it'}")
    if factors < 3 or not octaves > 0:
        raise OptionError(f"{factors} factors over {octaves:g} octaves; at least 3 over more than 0 are needed")
    rng = np.random.default_rng(seed)
    step = min(octaves / (factors - 1), OCTAVES / (FACTORS - 1))
    scales = np.exp2(rng.uniform(step / 4, step) + np.linspace(0, octaves, factors))
    field = network.tile_size * float(scales[-1])
    shorter = min(slide.pyramid.scanned[2:])
    if field > shorter:
        raise ScaleError(
            f"a tile of {network.tile_size} px at {scales[-1]:.1f} level-0 px per px is {field:.0f} px wide, and the slide "
            f"{shorter}; give a smaller --tile-size or fewer --octaves",
            code="TOO_SMALL",
        )
    tissue = find_tissue(slide)
    centers = [
        sample_places(tissue, places, seed=seed + 1000 * number, field=network.tile_size * float(scale))
        for number, scale in enumerate(scales)
    ]
    centers = [some[: min(map(len, centers))] for some in centers]
    about = {
        "slide": [slide.source.name, slide.source.size, slide.source.mtime_ns],
        "network": [network_digest(network), network.tile_size],
        "scales": scales.tolist(),
        "centers": [some.tolist() for some in centers],
        "layers": layers if isinstance(layers, str) else list(layers),
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    kept = None if keep is None else Path(keep, f"{slide.source.name}-{key}.npz")
    at = np.log2(scales * level0)
    if kept is not None and kept.exists():
        with np.load(kept, allow_pickle=False) as file:
            return Answers(slide.source.name, at, {name: file[name] for name in file["names"].tolist()})
    level = level_for(slide.pyramid, float(scales[0]))
    tiles = [
        scale_stack(slide, some, scales=[scale], size=network.tile_size, level=level).images.compute(scheduler="synchronous")[
            :, 0
        ]
        for some, scale in zip(centers, scales, strict=True)
    ]  # (N, H, W, 3) each
    response = respond(network, tiles, scales=scales, layers=layers, device=device, batch_size=batch_size)
    answers = Answers(slide.source.name, at, {name: moments.mean for name, moments in response.layers.items()})
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f"{kept.stem}.{os.getpid()}.partial.npz")
        np.savez(partial, names=np.array(list(answers.layers)), allow_pickle=False, **answers.layers)
        partial.replace(kept)
    return answers


def probe_answers(
    answers: Sequence[Answers],
    control: Sequence[Answers] | None = None,
    *,
    model: str = "network",
    as_published: bool = False,
    seed: int = 0,
    left_out: Sequence[tuple[str, str]] = (),
) -> Probe:
    """The probe from what a network's layers answer to slides, one each, and what they answer with random weights."""
    if len(answers) < 3:
        said = "; ".join(f"{name}: {why}" for name, why in left_out)
        raise OptionError(
            f"{len(answers)} slides to probe with ({said or 'no other'}); at least three are needed, more are better"
        )
    names = list(answers[0].layers)
    if any(list(each.layers) != names for each in [*answers, *(control or ())]):
        raise OptionError("the answers are of different layers, so that they are not one network's")
    look = _published if as_published else _held_out
    rows = [look(answers, name, seed=seed) for name in names]
    random = None if control is None else [look(control, name, seed=seed) for name in names]
    last = max(len(names) - 1, 1)
    layers = tuple(
        Layer(
            name=name,
            depth=i / last,
            channels=answers[0].layers[name].shape[2],
            r2=row.r2,
            lo=row.interval(seed)[0],
            hi=row.interval(seed)[1],
            random=None if random is None else random[i].r2,
            shuffled=row.shuffled,
            usual=row.usual,
            error=row.error,
        )
        for i, (name, row) in enumerate(zip(names, rows, strict=True))
    )
    spans = np.concatenate([each.log2_mpp for each in answers])
    return Probe(
        model=model,
        layers=layers,
        prune_at=names[max(range(len(rows)), key=lambda i: rows[i].r2) if as_published else _earliest(rows, seed)],
        cut=None if as_published else _compared(rows, seed),
        slides=tuple(each.slide for each in answers),
        left_out=tuple(left_out),
        tiles=sum(len(each.targets) for each in answers),
        mpp_range=(float(2 ** spans.min()), float(2 ** spans.max())),
        published=as_published,
        seed=seed,
    )


# --- one layer --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Told:
    """What one layer tells of tiles that were held out, by slide (R,) or, as published, by random split."""

    rss: Floats  # (R,)
    tss: Floats  # (R,)
    absolute: Floats  # (R,) octaves, mean absolute error
    shuffled: float
    usual: float
    inner: Floats  # (F,) for each fold, mean square error on slides left out of those to learn from
    fold: NDArray[np.intp]  # (R,)
    published: bool

    @property
    def r2(self) -> float:
        # As published, the mean over repetitions.
        return float(np.mean(1 - self.rss / self.tss)) if self.published else float(1 - self.rss.sum() / self.tss.sum())

    @property
    def error(self) -> float:
        return float(self.absolute.mean())

    def interval(self, seed: int) -> tuple[float, float]:
        if self.published:
            lo, hi = np.percentile(1 - self.rss / self.tss, [5, 95])
        else:
            drawn = _draws(len(self.rss), seed)
            lo, hi = np.percentile(1 - self.rss[drawn].sum(axis=1) / self.tss[drawn].sum(axis=1), [5, 95])
        return float(lo), float(hi)


def _held_out(answers: Sequence[Answers], name: str, *, seed: int) -> _Told:
    values, target, slide = _rows(answers, name)
    fold = folds(len(answers), seed)
    rng = np.random.default_rng([seed, 1])
    shuffled = target.copy()
    for rows in _by_slide(slide):
        shuffled[rows] = rng.permutation(target[rows])
    targets = np.stack([target, shuffled], axis=1)
    predicted = np.empty_like(targets)
    inner = np.empty(int(fold.max()) + 1)
    for each in range(len(inner)):
        test = fold[slide] == each
        ridges = fit_ridges(values[~test], targets[~test], slide[~test])
        predicted[test] = np.stack([ridge.predict(values[test]) for ridge in ridges], axis=1)
        inner[each] = ridges[0].left_out
    missed = predicted - targets
    rss = np.array([np.square(missed[rows]).sum(axis=0) for rows in _by_slide(slide)])  # (R, 2)
    tss = np.array([np.square(target[rows] - target[rows].mean()).sum() for rows in _by_slide(slide)])
    return _Told(
        rss=rss[:, 0],
        tss=tss,
        absolute=np.array([np.abs(missed[rows, 0]).mean() for rows in _by_slide(slide)]),
        shuffled=float(1 - rss[:, 1].sum() / tss.sum()),
        usual=float(1 - rss[:, 0].sum() / np.square(target - target.mean()).sum()),
        inner=inner,
        fold=fold,
        published=False,
    )


def _published(answers: Sequence[Answers], name: str, *, seed: int) -> _Told:
    """Least squares with an intercept, to µm/px itself, a random 30 % of the tiles held out, ten times."""
    values, target, _ = _rows(answers, name)
    mpp = np.exp2(target)
    design = np.concatenate([np.ones((len(values), 1)), values.astype(np.float64)], axis=1)
    rng = np.random.default_rng([seed, 2])
    found = []
    for _ in range(REPEATS):
        order = rng.permutation(len(mpp))
        test, rest = np.split(order, [round(HELD_OUT * len(mpp))])
        mixed = rng.permutation(mpp)
        both = np.stack([mpp, mixed], axis=1)
        # By QR, a tenth of the time of singular values.
        slopes = linalg.lstsq(design[rest], both[rest], lapack_driver="gelsy", check_finite=False)[0]
        predicted = design[test] @ slopes
        rss = np.square(predicted - both[test]).sum(axis=0)
        tss = np.square(both[test] - both[test].mean(axis=0)).sum(axis=0)
        # A prediction below zero has no logarithm; the finest tile is the nearest that there is.
        off = np.log2(np.maximum(predicted[:, 0], mpp.min())) - target[test]
        found.append((rss[0], tss[0], 1 - rss[1] / tss[1], np.abs(off).mean()))
    rss, tss, shuffled, absolute = np.array(found).T
    return _Told(
        rss=rss,
        tss=tss,
        absolute=absolute,
        shuffled=float(shuffled.mean()),
        usual=float(np.mean(1 - rss / tss)),
        inner=np.empty(0),
        fold=np.empty(0, np.intp),
        published=True,
    )


def _rows(answers: Sequence[Answers], name: str) -> tuple[NDArray[np.float32], Floats, NDArray[np.intp]]:
    """All tiles: channels (n, K), log2 µm/px (n,) and slide (n,); what is not finite left out."""
    values = np.concatenate([each.layers[name].reshape(-1, each.layers[name].shape[2]) for each in answers])
    target = np.concatenate([each.targets for each in answers])
    slide = np.repeat(np.arange(len(answers)), [len(each.targets) for each in answers])
    finite = np.isfinite(values).all(axis=1)
    if not all(finite[slide == number].any() for number in range(len(answers))):
        raise OptionError(f"layer {name!r} gives no finite answer to a whole slide; leave the layer out with layers=")
    return values[finite], target[finite], slide[finite]


def _by_slide(slide: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    return [np.flatnonzero(slide == number) for number in range(int(slide.max()) + 1)]


def folds(slides: int, seed: int) -> NDArray[np.intp]:
    """(R,) the fold that each slide is held out in."""
    return np.asarray(np.random.default_rng([seed, 0]).permutation(slides) % min(FOLDS, slides), np.intp)


def _draws(slides: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 3]).integers(slides, size=(RESAMPLES, slides))


def _earliest(rows: Sequence[_Told], seed: int) -> int:
    """The first layer whose R2 is within one standard error of the best one's, by the same draws of slides for both."""
    best = max(range(len(rows)), key=lambda i: rows[i].r2)
    drawn = _draws(len(rows[best].rss), seed)
    total = rows[best].tss[drawn].sum(axis=1)
    for i, row in enumerate(rows):
        lost = (row.rss - rows[best].rss)[drawn].sum(axis=1) / total
        if rows[best].r2 - row.r2 <= lost.std():
            return i
    return best


def _compared(rows: Sequence[_Told], seed: int) -> Comparison:
    """The layer that is best within the slides to learn from, against the last layer, on the slides held out."""
    chosen = np.argmin([row.inner for row in rows], axis=0)  # (F,)
    cut = np.array([rows[chosen[f]].absolute[r] for r, f in enumerate(rows[0].fold)])  # (R,)
    whole = rows[-1].absolute
    lo, hi = np.percentile((whole - cut)[_draws(len(cut), seed)].mean(axis=1), [5, 95])
    return Comparison(float(cut.mean()), float(whole.mean()), float((whole - cut).mean()), float(lo), float(hi))


# --- µm/px from a layer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScaleRegressor:
    """log2 µm/px of a tile from one layer's channels: intercept + ((x - mean) / std) @ weights."""

    layer: str
    mean: NDArray[np.float32]  # (K,)
    std: NDArray[np.float32]  # (K,)
    weights: NDArray[np.float32]  # (K,)
    intercept: float
    # What tiles of held-out slides are said to be at each µm/px. A ridge draws to the middle of its range, and at the range's
    # ends, where tissue looks alike, its answer turns round: a slide is told by its whole curve, laid along this one.
    octaves: NDArray[np.float32]  # (U,) log2 µm/px, EXPECTED_STEP apart
    expected: NDArray[np.float32]  # (U,) log2 µm/px
    slide_sd: float  # octaves, by which held-out slides are off, each told by all of its tiles
    mpp_range: tuple[float, float]  # µm/px that it was fitted to
    slides: int
    tile_size: int
    network: str | None = None  # networks.network_digest


@dataclass(frozen=True)
class RegressedMpp:
    """A slide's level-0 µm/px by a regressor, from its tiles at all scales."""

    mpp: float
    ci90: tuple[float, float]
    places: int


def fit_regressor(
    answers: Sequence[Answers],
    layer: str,
    *,
    tile_size: int,
    network: str | None = None,
    penalty: float | None = None,
    seed: int = 0,
) -> ScaleRegressor:
    """The regressor of `layer` from all slides, its errors from slides held out. Raises OptionError for fewer than three.

    Without a `penalty` it is the best for slides left out. Slides to come that are of another kind want a stronger one.
    """
    if len(answers) < 3:
        raise OptionError(f"{len(answers)} slides; a regressor needs three or more, each held out in turn")
    if layer not in answers[0].layers:
        raise OptionError(f"layer {layer!r} was not watched; there are {', '.join(answers[0].layers)}")
    values, target, slide = _rows(answers, layer)
    penalties = PENALTIES if penalty is None else np.array([penalty])
    fold = folds(len(answers), seed)
    said = np.empty_like(target)
    for each in range(int(fold.max()) + 1):
        test = fold[slide] == each
        (ridge,) = fit_ridges(values[~test], target[~test, None], slide[~test], penalties=penalties)
        said[test] = ridge.predict(values[test])
    (ridge,) = fit_ridges(values, target[:, None], slide, penalties=penalties)
    octaves, expected = _expected(target, said, slide)
    off = []
    for rows in _by_slide(slide):
        at = np.unique(target[rows])
        curve = np.array([np.median(said[rows][target[rows] == one]) for one in at])
        # As a slide of unknown µm/px would be: its finest scale is 0.
        shift = _shift(curve, at - at[0], octaves, expected)
        off.append(np.nan if shift is None else shift - at[0])
    if not np.isfinite(off).any():
        raise OptionError(f"layer {layer!r} tells no slide's µm/px from those of the others; give another, or more slides")
    # The card has no infinity; a channel that is constant has no weight.
    told = np.isfinite(ridge.unit)
    return ScaleRegressor(
        layer=layer,
        mean=ridge.center.astype(np.float32),
        std=np.where(told, ridge.unit, 1).astype(np.float32),
        weights=np.where(told, ridge.weights, 0).astype(np.float32),
        intercept=ridge.intercept,
        octaves=octaves.astype(np.float32),
        expected=expected.astype(np.float32),
        slide_sd=float(np.sqrt(np.nanmean(np.square(off)))),
        mpp_range=(float(2 ** target.min()), float(2 ** target.max())),
        slides=len(answers),
        tile_size=tile_size,
        network=network,
    )


EXPECTED_STEP = 0.25  # octaves
LEAST_SCALES = 4  # that a slide has within the regressor's range, where it is laid
_FINE = 0.02  # octaves between the shifts that are tried


def _expected(target: Floats, said: Floats, slide: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """What held-out slides are said to be, by µm/px: the mean over the slides that are there, each as much as another."""
    octaves = np.arange(target.min(), target.max() + 1e-6, EXPECTED_STEP)
    nearest = np.abs(target[:, None] - octaves).argmin(axis=1)
    means = np.array(
        [
            [
                said[(slide == one) & (nearest == bin_)].mean() if ((slide == one) & (nearest == bin_)).any() else np.nan
                for bin_ in range(len(octaves))
            ]
            for one in range(int(slide.max()) + 1)
        ]
    )  # (R, U)
    there = np.isfinite(means).any(axis=0)
    expected = np.nanmean(means[:, there], axis=0)
    return octaves[there], expected


def _shift(curve: Floats, at: Floats, octaves: NDArray[np.floating], expected: NDArray[np.floating]) -> float | None:
    """log2 µm/px of level 0 at which a slide's curve (S,) over log2 scale (S,) is most like the expected; None at an end."""
    low, high = float(octaves[0]), float(octaves[-1])
    tried = np.arange(low - at[-1], high + _FINE, _FINE)
    there = (at + tried[:, None] >= low - 1e-6) & (at + tried[:, None] <= high + 1e-6)  # (D, S)
    squares = np.square(curve - np.interp(at + tried[:, None], octaves, expected))
    count = there.sum(axis=1)
    enough = count >= LEAST_SCALES
    if not enough.any():
        return None
    misfit = np.where(enough, (squares * there).sum(axis=1) / np.maximum(count, 1), np.inf)
    best = int(misfit.argmin())
    possible = np.flatnonzero(enough)
    return None if best in (possible[0], possible[-1]) else float(tried[best])


def predict_log2_mpp(response: ScaleResponse | NDArray[np.floating], regressor: ScaleRegressor) -> Floats:
    """log2 of the µm/px that each tile looks like: (N, S) of a response that watched the layer, (...,) of channels (..., K).

    Raises OptionError where the layer was not watched or has other channels.
    """
    if isinstance(response, ScaleResponse):
        if regressor.layer not in response.layers:
            raise OptionError(f"layer {regressor.layer!r} was not watched; respond with layers=[{regressor.layer!r}]")
        channels = response.layers[regressor.layer].mean
    else:
        channels = np.asarray(response)
    if channels.shape[-1] != len(regressor.weights):
        raise OptionError(
            f"{channels.shape[-1]} channels, and the regressor was fitted to the {len(regressor.weights)} of layer "
            f"{regressor.layer!r}; ask the network that it was made with"
        )
    standard = (channels.astype(np.float64) - regressor.mean) / regressor.std
    octaves: Floats = standard @ regressor.weights.astype(np.float64) + regressor.intercept
    return octaves


def regressed_mpp(response: ScaleResponse, regressor: ScaleRegressor) -> RegressedMpp | None:
    """The slide's level-0 µm/px, whatever its tag says; None where it cannot be told from the regressor's range alone.

    What its tiles are said to be at each scale, median over places, is laid along what slides of known µm/px were said to be;
    where it fits best is the slide's µm/px. Scales finer than level 0 do not count.
    """
    seen = predict_log2_mpp(response, regressor)  # (N, S)
    native = response.scales >= 1 - 1e-6
    seen = seen[np.isfinite(seen).all(axis=1)][:, native]
    if len(seen) < LEAST_PLACES or seen.shape[1] < LEAST_SCALES:
        return None
    best = _shift(np.median(seen, axis=0), np.log2(response.scales[native]), regressor.octaves, regressor.expected)
    return None if best is None else RegressedMpp(2**best, interval(2**best, regressor.slide_sd), len(seen))


_ARRAYS = ("mean", "std", "weights", "octaves", "expected")


def save_regressor(regressor: ScaleRegressor, card: str | Path, *, fields: Mapping[str, Any] | None = None) -> None:
    """Puts the regressor into a card's file as `scale_regressor`; the card's other fields stay, or become `fields`."""
    record: dict[str, Any] = {"version": VERSION} | vars(regressor)
    record["mpp_range"] = list(regressor.mpp_range)
    record["arrays"] = packed({name: record.pop(name) for name in _ARRAYS})
    update_card(card, {"scale_regressor": record}, fields=fields)


def load_regressor(card: str | Path) -> ScaleRegressor:
    """The regressor in a card's file. Raises ModelError where there is none."""
    found = regressor_of(read_card(card))
    if found is None:
        raise ModelError(f"the card {card} has no scale_regressor; make one with wsiscale probe SLIDES --fit {card}")
    return found


def regressor_of(card: Mapping[str, object]) -> ScaleRegressor | None:
    """The regressor in a card's fields (`network.card`), None where it has none. Raises ModelError for a damaged one."""
    record = card.get("scale_regressor")
    if record is None:
        return None
    try:
        if not isinstance(record, Mapping) or record["version"] != VERSION:
            raise ValueError("it is of another version of wsiscale")
        arrays = unpacked(record["arrays"], _ARRAYS)
        per_channel = {arrays[name].shape for name in ("mean", "std", "weights")}
        if len(per_channel) != 1 or arrays["mean"].ndim != 1 or arrays["octaves"].shape != arrays["expected"].shape:
            raise ValueError("its arrays are of different lengths")
        lo, hi = record["mpp_range"]
        return ScaleRegressor(
            layer=str(record["layer"]),
            mean=arrays["mean"].astype(np.float32),
            std=arrays["std"].astype(np.float32),
            weights=arrays["weights"].astype(np.float32),
            octaves=arrays["octaves"].astype(np.float32),
            expected=arrays["expected"].astype(np.float32),
            intercept=float(record["intercept"]),
            slide_sd=float(record["slide_sd"]),
            mpp_range=(float(lo), float(hi)),
            slides=int(record["slides"]),
            tile_size=int(record["tile_size"]),
            network=record["network"],
        )
    except (LookupError, TypeError, ValueError) as error:
        raise ModelError(f"the card's scale_regressor is damaged: {error}; make it anew with wsiscale probe --fit") from error
