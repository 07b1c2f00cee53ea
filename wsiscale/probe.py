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

from wsiscale.errors import MppError, NoTissueError, OptionError, ScaleError, SlideError
from wsiscale.geometry import level_for
from wsiscale.ridge import fit_ridges
from wsiscale.types import Reader

if TYPE_CHECKING:
    from wsiscale.networks import Network

OCTAVES, FACTORS = 3.0, 12
PLACES = 16
FOLDS = 5
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
    values, target, slide = rows_of(answers, name)
    fold = folds(len(answers), seed)
    rng = np.random.default_rng([seed, 1])
    shuffled = target.copy()
    for rows in by_slide(slide):
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
    rss = np.array([np.square(missed[rows]).sum(axis=0) for rows in by_slide(slide)])  # (R, 2)
    tss = np.array([np.square(target[rows] - target[rows].mean()).sum() for rows in by_slide(slide)])
    return _Told(
        rss=rss[:, 0],
        tss=tss,
        absolute=np.array([np.abs(missed[rows, 0]).mean() for rows in by_slide(slide)]),
        shuffled=float(1 - rss[:, 1].sum() / tss.sum()),
        usual=float(1 - rss[:, 0].sum() / np.square(target - target.mean()).sum()),
        inner=inner,
        fold=fold,
        published=False,
    )


def _published(answers: Sequence[Answers], name: str, *, seed: int) -> _Told:
    """Least squares with an intercept, to µm/px itself, a random 30 % of the tiles held out, ten times."""
    values, target, _ = rows_of(answers, name)
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


def rows_of(answers: Sequence[Answers], name: str) -> tuple[NDArray[np.float32], Floats, NDArray[np.intp]]:
    """All tiles: channels (n, K), log2 µm/px (n,) and slide (n,); what is not finite left out."""
    values = np.concatenate([each.layers[name].reshape(-1, each.layers[name].shape[2]) for each in answers])
    target = np.concatenate([each.targets for each in answers])
    slide = np.repeat(np.arange(len(answers)), [len(each.targets) for each in answers])
    finite = np.isfinite(values).all(axis=1)
    if not all(finite[slide == number].any() for number in range(len(answers))):
        raise OptionError(f"layer {name!r} gives no finite answer to a whole slide; leave the layer out with layers=")
    return values[finite], target[finite], slide[finite]


def by_slide(slide: NDArray[np.intp]) -> list[NDArray[np.intp]]:
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
