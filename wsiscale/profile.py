"""A network's memory: how reference slides of known µm/px look to it over scale, and which µm/px suits it.

Two facts make it worth having. What a network wants belongs to the network: a label-free score pooled over slides is steadier
than any one slide's. And tissue looks different to a network at each scale, so that a slide's answers, laid along those of the
reference slides, tell the slide's true µm/px whatever its tag says. Pure numpy; docs/profiles.md has the measurements.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from wsiscale.card import packed, read_card, unpacked, update_card
from wsiscale.criteria import DEFAULT_CRITERION, Criterion, find_criterion, peak
from wsiscale.errors import ModelError, OptionError
from wsiscale.judging import identifies
from wsiscale.responses import merge_responses
from wsiscale.types import Abstention, ScaleEstimate, ScaleResponse

VERSION = 1
STEP = 0.25  # octaves between the bank's scales
SCORE_STEP = 0.125  # octaves between the pooled score's
SAME = 0.03  # octaves, 2 %: slides whose µm/px differ by less count as scanned at the same
DIMENSIONS = 16  # principal components that are kept of a network's channels; 12 and 32 register as well
CHANNELS = 512  # that the components are made of, at most: those that tell scales apart best
BANK_TILES = 192  # of all slides together; with the above a card stays below 500 kB

MIN_PLACES = 8
# Scales that a slide and the bank must share, 1.5 octaves; 2 octaves where the slide has them. Fewer fit somewhere by chance.
MIN_OVERLAP = 7
OVERLAP = 9
BEST_SLIDES = 3  # the reference slides that a slide's mean curve is held against, out of all: those that it fits best
NEIGHBOURS = 3
RESAMPLES = 200
SIGNIFICANCE = 0.01
# A slide is unlike the bank where it is this many standard deviations less like it than the bank's slides are like each other.
UNLIKE = 3.0
# It may be unlike in one of the two ways, a slide of one tissue by its mean curve, say; but not by more than this. Noise of
# tissue's colours has tiles here and there that look like tissue's, and a mean curve that is like nothing.
ABSURD = 5.0
# The deviation counts as no less than this (correlation; log distance): a slide may lie between the grid's scales, where the
# bank's slides perhaps do not, and the deviation of few slides is a guess.
LIKENESS_SPREAD = (0.05, 0.2)
# Tiles of tissue differ: a slide whose tiles differ by less than this share of the bank's variance is no mixture, and its mean
# curve not to be held against those of mixtures. Smooth noise is small round blobs, whose mean curve is much like that of
# nuclei, but it is alike everywhere: 1/24 to 1/12 of the embedded network's bank; the most uniform of 24 real images has 1/9.
MIXED = 1 / 10
# Two shifts are two answers when they are this far apart and the other one wins in this share of the resamples.
AMBIGUOUS_OCTAVES = 0.75
AMBIGUOUS_SHARE = 0.15
# Own curve and profile contradict each other beyond this many standard deviations; then the curve has another peak than
# the network's optimum (most often the fine end, where everything is smooth and sure), and has no say.
CONFLICT = 3.0
SCORED_SLIDES = 6  # that have to reach a scale for it to count in the pooled score, where that is not half of them
STANDS_OUT = 0.05  # p-value of the optimum against the ends of the range; slides are few, and a stricter test never passes
# A tag is called wrong where it is so many octaves beyond the 90 % interval of the registration: one slide in ten is beyond it.
TAG_MARGIN = 0.25
WIDEST_OCTAVES = 2.0  # an interval of the optimum that is wider tells a user nothing
_NORMAL_90 = 1.645  # standard deviations on either side that hold 90 % of a normal distribution
_SMALLEST = 1 / 16  # octaves: a standard deviation below this cannot be told from these grids


@dataclass(frozen=True)
class Profile:
    """What is remembered of a network: µm/px that suits it, and the curves of reference tiles over log2 µm/px."""

    optimum: float | None  # µm/px at which the pooled score is highest; None where it has no interior peak
    ci90: tuple[float, float] | None  # of `optimum`, by bootstrap over slides
    spread: float  # octaves, standard deviation of single slides' own peaks around the optimum
    criterion: str
    score_octaves: NDArray[np.float32]  # (V,) log2 µm/px
    score: NDArray[np.float32]  # (V,) pooled over the slides, each with an offset of its own

    layers: tuple[tuple[str, int], ...]  # name and number of channels; "features" is the head's pooled input
    channels: NDArray[np.int32]  # (K,) of the layers' channels laid end to end, those that are used
    center: NDArray[np.float32]  # (K,)
    basis: NDArray[np.float32]  # (K, P) centred channels -> components
    octaves: NDArray[np.float32]  # (U,) log2 µm/px, STEP apart
    tiles: NDArray[np.float32]  # (T, U, P) the bank's tile curves, NaN where the slide has no such scale
    tile_slide: NDArray[np.int32]  # (T,) index of the tile's slide
    means: NDArray[np.float32]  # (R, U, P) mean curve of each reference slide, over all of its places

    # Each reference slide registered to the others.
    errors: NDArray[np.float32]  # (2, R) octaves, by mean curves and tile by tile; NaN where it could not be
    likeness: NDArray[np.float32]  # (2, R) how well it fits where it fits best, in the units of `Registration.likeness`
    notes: tuple[str, ...] = ()
    # Whose it is, where that is known: another network's layers may have the same names, and borders of tiles count.
    network: str | None = None  # networks.network_digest
    tile_size: int | None = None  # px
    # Octaves by which other slides come out too coarse, where the reference slides are of another kind (procedural ones).
    offset: float = 0.0

    @property
    def slides(self) -> int:
        """R"""
        return len(self.means)

    def without(self, slide: int) -> Profile:
        """What the other slides say: for a slide that is one of them. The optimum and the scale of the curves stay."""
        bank = _bank_of(self).without(slide)
        return replace(
            self,
            tiles=bank.tiles,
            tile_slide=bank.tile_slide.astype(np.int32),
            means=bank.means,
            errors=np.delete(self.errors, slide, axis=1),
            likeness=np.delete(self.likeness, slide, axis=1),
        )


@dataclass(frozen=True)
class Registration:
    """A slide's level-0 µm/px as its tissue looks to the network, or a named reason why that cannot be said."""

    mpp: float | None
    ci90: tuple[float, float] | None
    claimed: float | None  # µm/px that the slide is tagged with
    refused: Abstention | None  # too_few_places, too_few_scales, flat, unlike_bank, boundary, ambiguous
    method: str  # "mean curves", or "tiles" where the slide's mix of tissue is not that of the bank's slides
    # Where it fits best: correlation with the best reference slides; log of the bank's own nearest distance over the slide's.
    likeness: tuple[float, float]
    tried: NDArray[np.float64]  # (D,) level-0 µm/px
    score: NDArray[np.float64]  # (D,) of `method`
    places: int

    @property
    def shift(self) -> float | None:
        """Octaves from the tag to the true µm/px; None without either."""
        return None if self.mpp is None or self.claimed is None else float(np.log2(self.mpp / self.claimed))


def refusal(reason: str, detail: str, **found: Any) -> Registration:
    """A registration that came to nothing, with what is known of it."""
    empty: dict[str, Any] = {"claimed": None, "method": "none", "likeness": (np.nan, np.nan), "places": 0}
    empty |= {"tried": np.empty(0), "score": np.empty(0)}
    return Registration(mpp=None, ci90=None, refused=Abstention(reason, detail), **(empty | found))


@dataclass(frozen=True)
class Settlement:
    """The scale to work at, from all that is known, and what it rests on."""

    scale: float | None  # level-0 px per px
    ci90: tuple[float, float] | None  # of `scale`
    slide_mpp: float | None  # µm/px of level 0 that was gone by: the tag's, or the registration's
    own_share: float  # 0..1, weight of the slide's own curve
    abstained: Abstention | None
    notes: tuple[str, ...] = ()

    @property
    def mpp(self) -> float | None:
        return None if self.scale is None or self.slide_mpp is None else self.scale * self.slide_mpp


def make_profile(
    responses: Sequence[ScaleResponse],
    *,
    criterion: str | Criterion | Callable[[ScaleResponse], NDArray[np.float64]] = DEFAULT_CRITERION,
    seed: int = 0,
) -> Profile:
    """The profile of the network that gave `responses`: one for each slide, unlabelled, whose µm/px is to be trusted.

    Two slides are needed; from five on the interval and the refusal mean something. Slides may differ in range and grid.
    Scales finer than level 0 count for the score and not for the bank, since interpolation would be recognised and not tissue.
    Raises OptionError where a slide has no µm/px, where the networks differ, or where too little is left.
    """
    rule = find_criterion(criterion)
    kept, notes = _usable(responses)
    layers = _layers_of(kept[0])
    curves = [_curves(response, layers) for response in kept]  # (N, S, K) each
    channels, center, basis = _components(curves)
    coarser = [_native(response) for response in kept]
    projected = [(c[:, ok][:, :, channels] - center) @ basis for c, ok in zip(curves, coarser, strict=True)]  # (N, S, P)
    at = [_log2_mpp(r)[ok] for r, ok in zip(kept, coarser, strict=True)]
    octaves = _common_grid(at, STEP)
    on_grid = [_interpolated(a, p, octaves) for a, p in zip(at, projected, strict=True)]  # (N, U, P)
    rng = np.random.default_rng(seed)
    share = max(BANK_TILES // len(kept), 1)
    chosen = [np.sort(rng.permutation(len(tiles))[:share]) for tiles in on_grid]
    bank = _Bank(
        octaves=octaves,
        tiles=_stored(np.concatenate([tiles[i] for tiles, i in zip(on_grid, chosen, strict=True)])),
        tile_slide=np.repeat(np.arange(len(kept), dtype=np.intp), [len(i) for i in chosen]),
        means=_stored(np.stack([tiles.mean(axis=0) for tiles in on_grid])),
    )
    errors, likeness = _leave_one_out(bank, at, projected)
    score_octaves, score, optimum, ci90, spread, said = _pooled_score(kept, rule, rng)
    if len(kept) < 5:
        said = (*said, f"made of {len(kept)} slides: its intervals and refusals are rough; five or more are better")
    return Profile(
        optimum=optimum,
        ci90=ci90,
        spread=spread,
        criterion=rule.name,
        score_octaves=score_octaves.astype(np.float32),
        score=score.astype(np.float32),
        layers=layers,
        channels=channels.astype(np.int32),
        center=center.astype(np.float32),
        basis=basis.astype(np.float32),
        octaves=octaves.astype(np.float32),
        tiles=bank.tiles,
        tile_slide=bank.tile_slide.astype(np.int32),
        means=bank.means,
        errors=errors.astype(np.float32),
        likeness=likeness.astype(np.float32),
        notes=(*notes, *said),
    )


def register(profile: Profile, response: ScaleResponse, *, seed: int = 0) -> Registration:
    """The level-0 µm/px at which `response` fits the profile's reference slides, or a refusal. Its own tag is not used.

    By mean curves where the slide as a whole is as like the reference slides as they are like each other, or tile by tile where
    its tiles are as like the bank's as those are like each other; where both hold, in the way in which the reference slides
    find each other better; where neither holds it is refused as "unlike_bank". The interval is
    the wider of a bootstrap over places and of what nine out of ten reference slides are off by, registered to the others.
    Raises OptionError where the response is another network's.
    """
    curves = _curves(response, profile.layers)[:, _native(response)]
    used = np.isfinite(curves).all(axis=(1, 2))
    projected = (curves[used][:, :, profile.channels].astype(np.float64) - profile.center) @ profile.basis.astype(np.float64)
    places = int(used.sum())
    found: dict[str, Any] = {"claimed": response.slide_mpp, "places": places}

    def no(reason: str, detail: str, **more: Any) -> Registration:
        return refusal(reason, detail, **(found | more))

    if places < MIN_PLACES:
        return no("too_few_places", f"{places} places with finite answers; a registration needs {MIN_PLACES}")
    at = np.log2(response.scales[_native(response)])
    relative = at[0] + STEP * np.arange(int((at[-1] - at[0]) / STEP + 1e-6) + 1)
    if len(relative) < MIN_OVERLAP:
        width = at[-1] - at[0]
        return no("too_few_scales", f"{width:.2g} octaves from level 0 on; {(MIN_OVERLAP - 1) * STEP:g} are needed")
    tiles = _interpolated(at, projected, relative)  # (N, L, P)
    rng = np.random.default_rng(seed)
    if _is_flat(tiles, rng):
        return no("flat", "the network's answers do not change over scale by more than chance between places would")
    bank = _bank_of(profile)
    shifts = _shifts(bank, len(relative))
    if not len(shifts):
        return no("too_few_scales", "the profile's range and the slide's share too few scales at any µm/px")
    origin = bank.octaves[0] - profile.offset - relative[0]
    tried = np.exp2(origin + shifts * STEP)  # level-0 µm/px
    by_mean = _mean_scores(bank, tiles.mean(axis=0)[None], shifts)[0]
    by_tile = _tile_scores(bank, tiles, shifts)  # (N, D)
    floor = _floors(bank, shifts, len(relative))
    nearest = floor - by_tile.mean(axis=0)
    likeness = (float(by_mean.max()), float(nearest.max()))
    found |= {"tried": tried, "likeness": likeness}
    fits = [row for row in (0, 1) if _is_like(likeness[row], profile.likeness[row], LIKENESS_SPREAD[row])]
    if 0 in fits and _between(tiles) < MIXED * np.median([_between(t) for t in bank.of_each_slide()]):
        fits.remove(0)
    if any(not _is_like(likeness[row], profile.likeness[row], LIKENESS_SPREAD[row], times=ABSURD) for row in (0, 1)):
        fits = []
    if not fits:
        detail = "neither the slide's mean curve nor its tiles look like those of any reference slide, at any scale"
        return no("unlike_bank", detail, score=by_mean, method="mean curves")
    draws = rng.integers(places, size=(RESAMPLES, places))
    row = min(fits, key=lambda row: usual_error(profile.errors[row], 0.5))
    if row == 0:
        method, score = "mean curves", by_mean
        resampled = _mean_scores(bank, tiles[draws].mean(axis=1), shifts)
    else:
        method, score = "tiles", nearest
        resampled = floor - by_tile[draws].mean(axis=1)
    found |= {"method": method, "score": score}
    best = _top(shifts, score)
    spread = np.array([_top(shifts, s) for s in resampled]) - best  # octaves
    away = np.abs(spread) > AMBIGUOUS_OCTAVES
    if away.mean() >= AMBIGUOUS_SHARE:
        other = float(np.median(spread[away]))
        mpp = np.exp2(origin + best)
        return no("ambiguous", f"{mpp:.3g} and {mpp * 2**other:.3g} µm/px at level 0 fit about as well")
    partial = (shifts < 0) | (shifts + len(relative) > len(bank.octaves))
    end = int(score.argmax())
    if end in (0, len(shifts) - 1) and len(shifts) > 1 and partial[end]:
        return no("boundary", "the slide fits best where it overlaps the profile's range least; the truth may lie beyond")
    usual = usual_error(profile.errors[row], 0.9)
    lo, hi = np.percentile(spread, [5, 95])
    lo, hi = min(lo, -usual, -STEP / 4), max(hi, usual, STEP / 4)
    level0 = origin + best
    return Registration(
        mpp=float(np.exp2(level0)),
        ci90=(float(np.exp2(level0 + lo)), float(np.exp2(level0 + hi))),
        refused=None,
        **found,
    )


def settle(
    profile: Profile, registration: Registration, own: ScaleEstimate | None = None, *, trust_tag: bool = True
) -> Settlement:
    """The scale to work at on a slide: the profile's optimum, at the slide's µm/px, refined by the slide's own estimate.

    The µm/px is the tag's where there is one and it is trusted, else the registration's. Both sides are weighed by the inverse
    of their variance in octaves: the profile's is that of its optimum and of the registration; the own estimate's is that of
    its interval plus the square of `profile.spread`, by which single slides' peaks miss the optimum. An own estimate further
    from the profile than `CONFLICT` joint standard deviations has no say, an abstaining one neither.
    """
    notes: list[str] = []
    level0, level0_sd = registration.mpp, 0.0 if registration.ci90 is None else deviation(registration.ci90)
    if trust_tag and registration.claimed is not None:
        if registration.mpp is not None and registration.ci90 is not None:
            low, high = registration.ci90
            if beyond(registration.claimed, registration.ci90) > TAG_MARGIN:
                found = f"{registration.mpp:.3g} ({low:.3g} to {high:.3g})"
                notes.append(f"the tag says {registration.claimed:.4g} µm/px, the tissue {found}")
        level0, level0_sd = registration.claimed, 0.0
    if level0 is None and registration.refused is not None:
        notes.append(f"the slide could not be registered: {registration.refused.detail}")
    ours = None
    if own is not None and own.scale is not None and own.ci90 is not None:
        ours = (float(np.log2(own.scale)), float(np.hypot(deviation(own.ci90), profile.spread)))
    theirs = None
    if level0 is not None and profile.optimum is not None and profile.ci90 is not None:
        theirs = (float(np.log2(profile.optimum / level0)), float(np.hypot(deviation(profile.ci90), level0_sd)))
    if ours is not None and theirs is not None and abs(ours[0] - theirs[0]) > CONFLICT * np.hypot(ours[1], theirs[1]):
        notes.append(
            f"the slide's own curve peaks {ours[0] - theirs[0]:+.1f} octaves from the network's optimum, and was left out"
        )
        ours = None
    if ours is None and theirs is None:
        why = Abstention("nothing_known", "no own optimum, and no profile's optimum at a known µm/px")
        return Settlement(None, None, level0, 0.0, why, tuple(notes))
    weights = [0.0 if side is None else side[1] ** -2 for side in (ours, theirs)]
    total = sum(weights)
    middle = sum(w * side[0] for w, side in zip(weights, (ours, theirs), strict=True) if side is not None) / total
    half = _NORMAL_90 * total**-0.5
    if theirs is None:
        notes.append("rests on the slide's own curve alone")
    return Settlement(
        scale=float(np.exp2(middle)),
        ci90=(float(np.exp2(middle - half)), float(np.exp2(middle + half))),
        slide_mpp=level0,
        own_share=weights[0] / total,
        abstained=None,
        notes=tuple(notes),
    )


def beyond(mpp: float, ci90: tuple[float, float]) -> float:
    """Octaves that `mpp` lies outside of an interval, 0 inside."""
    return max(0.0, float(np.log2(ci90[0] / mpp)), float(np.log2(mpp / ci90[1])))


def deviation(ci90: tuple[float, float]) -> float:
    """The standard deviation in octaves that a 90 % interval stands for."""
    return max(float(np.log2(ci90[1] / ci90[0])) / (2 * _NORMAL_90), _SMALLEST)


def interval(mpp: float, sd: float) -> tuple[float, float]:
    """The 90 % interval around `mpp` that a standard deviation in octaves stands for."""
    return (mpp * 2 ** (-_NORMAL_90 * sd), mpp * 2 ** (_NORMAL_90 * sd))


# --- in the card --------------------------------------------------------------------------------------------------------

_HALF = ("octaves", "tiles", "means")
_ARRAYS = (*_HALF, "score_octaves", "score", "errors", "likeness", "center", "basis", "channels", "tile_slide")


def to_record(profile: Profile) -> dict[str, Any]:
    """The profile as JSON: numbers in the open where people read them, the curves in half precision as npz in base64."""
    arrays = {name: getattr(profile, name) for name in _ARRAYS}
    arrays |= {name: arrays[name].astype(np.float16) for name in _HALF}
    return {
        "version": VERSION,
        "optimum": profile.optimum,
        "ci90": None if profile.ci90 is None else list(profile.ci90),
        "spread": profile.spread,
        "criterion": profile.criterion,
        "slides": profile.slides,
        "network": profile.network,
        "tile_size": profile.tile_size,
        "offset": profile.offset,
        "layers": [list(layer) for layer in profile.layers],
        "notes": list(profile.notes),
        "arrays": packed(arrays),
    }


def from_record(record: Mapping[str, Any]) -> Profile:
    """What `to_record` wrote. Raises ModelError where it is damaged or of a newer version. Runs no code from it."""
    if record.get("version") != VERSION:
        raise ModelError(f"the profile is of version {record.get('version')!r}, this wsiscale reads {VERSION}; make it again")
    try:
        arrays = unpacked(record["arrays"], _ARRAYS)
        ci90 = record["ci90"]
        profile = Profile(
            optimum=record["optimum"],
            ci90=None if ci90 is None else (float(ci90[0]), float(ci90[1])),
            spread=float(record["spread"]),
            criterion=str(record["criterion"]),
            layers=tuple((str(name), int(count)) for name, count in record["layers"]),
            notes=tuple(record["notes"]),
            network=None if record.get("network") is None else str(record["network"]),
            tile_size=None if record.get("tile_size") is None else int(record["tile_size"]),
            offset=float(record.get("offset", 0.0)),
            **(arrays | {name: arrays[name].astype(np.float32) for name in _HALF}),
        )
    except (LookupError, ValueError, TypeError) as error:
        raise ModelError(f"the profile is damaged ({type(error).__name__}: {error}); make it again") from error
    steps, components = len(profile.octaves), profile.basis.shape[-1]
    fits = (
        profile.basis.shape == (len(profile.channels), components)
        and profile.tiles.shape == (len(profile.tile_slide), steps, components)
        and profile.means.shape == (profile.slides, steps, components)
    )
    if not fits:
        raise ModelError("the profile is damaged: its arrays do not fit each other; make it again")
    return profile


def profile_of(card: Mapping[str, Any]) -> Profile | None:
    """The profile in a model card's fields (`Network.card`), if it has one."""
    record = card.get("profile")
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise ModelError("the card's profile is not an object; make it again")
    return from_record(record)


def load_profile(card: str | Path) -> Profile:
    """The profile in a card's file. Raises ModelError where there is none."""
    found = profile_of(read_card(card))
    if found is None:
        raise ModelError(f"{card} holds no profile; make one with wsiscale profile SLIDES... -o {card}")
    return found


def save_profile(profile: Profile, card: str | Path, *, fields: Mapping[str, Any] | None = None) -> None:
    """Puts the profile into a card's file, in place of one that is there; the card's other fields stay, or become `fields`."""
    update_card(card, {"profile": to_record(profile)}, fields=fields)


def profile_digest(profile: Profile) -> str:
    """By which a profile is known again, before and after it was in a card."""
    digest = hashlib.sha256(repr((profile.optimum, profile.network, profile.tile_size, profile.offset)).encode())
    for name in _ARRAYS:
        digest.update(np.ascontiguousarray(getattr(profile, name)).tobytes())
    return digest.hexdigest()


def registration_record(registration: Registration) -> dict[str, Any]:
    """A registration as plain JSON: what an estimate says of it."""
    return {
        "mpp": registration.mpp,
        "ci90": None if registration.ci90 is None else list(registration.ci90),
        "claimed": registration.claimed,
        "refused": None if registration.refused is None else dict(vars(registration.refused)),
        "method": registration.method,
        "likeness": [float(f"{v:.4g}") if np.isfinite(v) else None for v in registration.likeness],
        "places": registration.places,
    }


def registration_of(record: Mapping[str, Any]) -> Registration:
    """What `registration_record` wrote, without its curve over shifts."""
    return Registration(
        mpp=record["mpp"],
        ci90=None if record["ci90"] is None else (record["ci90"][0], record["ci90"][1]),
        claimed=record["claimed"],
        refused=None if record["refused"] is None else Abstention(**record["refused"]),
        method=record["method"],
        likeness=(_number(record["likeness"][0]), _number(record["likeness"][1])),
        tried=np.empty(0),
        score=np.empty(0),
        places=record["places"],
    )


def _number(value: float | None) -> float:
    return np.nan if value is None else value


# --- from responses to curves ---------------------------------------------------------------------------------------------


def _usable(responses: Sequence[ScaleResponse]) -> tuple[list[ScaleResponse], tuple[str, ...]]:
    """Those with enough finite places and scales, and what was left out."""
    kept, notes = [], []
    for i, response in enumerate(responses):
        if response.slide_mpp is None:
            raise OptionError(f"slide {i + 1} of {len(responses)} has no µm/px; a profile is made of slides that have")
        if (lacking := lacks(response)) is not None:
            notes.append(f"slide {i + 1} of {len(responses)} was left out: {lacking}")
            continue
        finite = _finite(response)
        kept.append(response if finite.all() else response.take(np.flatnonzero(finite)))
    if len(kept) < 2:
        said = f" ({'; '.join(notes)})" if notes else ""
        raise OptionError(f"a profile needs two slides or more, and there are {len(kept)} to make it of{said}")
    return kept, tuple(notes)


def lacks(response: ScaleResponse) -> str | None:
    """What a slide with µm/px lacks to be a reference slide; None where it will do."""
    native = response.scales[_native(response)]
    octaves = float(np.log2(native[-1] / native[0])) if len(native) else 0.0
    if octaves <= (MIN_OVERLAP - 1) * STEP - 1e-6:
        return f"{octaves:.2g} octaves from level 0 on; {(MIN_OVERLAP - 1) * STEP:g} are needed"
    if (places := int(_finite(response).sum())) < MIN_PLACES:
        return f"{places} finite places; {MIN_PLACES} are needed"
    return None


def _finite(response: ScaleResponse) -> NDArray[np.bool_]:
    """(N,) places whose answers are all finite."""
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(_curves(response, _layers_of(response))).all(axis=(1, 2)))
    return finite


def _native(response: ScaleResponse) -> NDArray[np.bool_]:
    """(S,) not finer than level 0."""
    native: NDArray[np.bool_] = response.scales >= 0.99
    return native


def _log2_mpp(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) of a slide that has µm/px."""
    assert response.slide_mpp is not None
    octaves: NDArray[np.float64] = np.log2(response.scales * response.slide_mpp)
    return octaves


def _layers_of(response: ScaleResponse) -> tuple[tuple[str, int], ...]:
    """The stages where they are known, else all layers, and the pooled input of the head."""
    names = response.stages or tuple(response.layers)
    found = [(name, response.layers[name].mean.shape[2]) for name in names]
    if response.features is not None:
        found.append(("features", response.features.shape[2]))
    if not found:
        raise OptionError("the response holds neither layers nor features; watch the network's stages (layers='stages')")
    return tuple(found)


def _curves(response: ScaleResponse, layers: tuple[tuple[str, int], ...]) -> NDArray[np.float32]:
    """(N, S, K) the layers' pooled channels, end to end."""
    parts = []
    for name, count in layers:
        part = response.features if name == "features" else getattr(response.layers.get(name), "mean", None)
        if part is None or part.shape[2] != count:
            raise OptionError(f"the profile is of another network: this one has no {name!r} of {count} channels")
        parts.append(part)
    return np.concatenate(parts, axis=2)


def _components(
    curves: list[NDArray[np.float32]],
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """Which channels (K,), their centre (K,), and the basis (K, P) that takes centred channels to components.

    Channels are put in units of the difference between tiles at the same scale. Kept are those whose mean curves change most
    over scale in that unit: their Fisher information on log2 scale, up to a constant.
    """
    within = np.mean([c.var(axis=0, dtype=np.float64).mean(axis=0) for c in curves], axis=0)  # (K,)
    between = np.mean([c.mean(axis=0, dtype=np.float64).var(axis=0) for c in curves], axis=0)
    alive = within > 1e-12 * max(float(within.max()), 1e-30)
    information = np.where(alive, between / np.where(alive, within, 1), -1)
    order = np.argsort(-information, kind="stable")[:CHANNELS]
    channels = np.sort(order[information[order] >= 0])
    if not len(channels):
        raise OptionError("the network answers the same for every tile; there is nothing to make a profile of")
    flat = np.concatenate([c[:, :, channels].reshape(-1, len(channels)) for c in curves]).astype(np.float64)
    center = flat.mean(axis=0)
    unit = np.sqrt(within[channels])
    flat = (flat - center) / unit
    variances, vectors = np.linalg.eigh(flat.T @ flat / len(flat))
    # The first component has a variance of 1, so that half precision holds them all.
    return channels, center, vectors[:, ::-1][:, :DIMENSIONS] / (unit[:, None] * np.sqrt(variances[-1]))


def _common_grid(at: list[NDArray[np.float64]], step: float) -> NDArray[np.float64]:
    """(U,) multiples of `step` in log2 µm/px, as far as two slides and a quarter of all reach."""
    lo = min(int(np.ceil(a[0] / step - 0.15)) for a in at)
    hi = max(int(np.floor(a[-1] / step + 0.15)) for a in at)
    every = step * np.arange(lo, hi + 1, dtype=np.float64)
    there = np.sum([(every >= a[0] - 0.15 * step) & (every <= a[-1] + 0.15 * step) for a in at], axis=0)
    grid: NDArray[np.float64] = every[there >= max(2, len(at) / 4)]
    if len(grid) < MIN_OVERLAP:
        raise OptionError("the slides' ranges in µm/px hardly overlap; a profile needs 1.5 octaves that two slides share")
    # A gap between two groups of slides would leave the grid uneven.
    if not np.allclose(np.diff(grid), step):
        raise OptionError("the slides fall into groups whose ranges in µm/px do not overlap; give slides in between")
    return grid


def _interpolated(at: NDArray[np.float64], values: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """`values` (N, S, P) at log2 positions `at` (S,) taken to `grid` (U,): (N, U, P), NaN beyond the ends."""
    outside = (grid < at[0] - 0.15 * STEP) | (grid > at[-1] + 0.15 * STEP)
    right = np.clip(np.searchsorted(at, grid), 1, len(at) - 1)
    part = np.clip((grid - at[right - 1]) / (at[right] - at[right - 1]), 0, 1)[:, None]
    result: NDArray[np.float64] = values[:, right - 1] * (1 - part) + values[:, right] * part
    result[:, outside] = np.nan
    return result


def _stored(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """As it will come back from the card, so that a profile answers the same before and after."""
    return values.astype(np.float16).astype(np.float32)


# --- the score of the network -----------------------------------------------------------------------------------------------


def _pooled_score(
    responses: list[ScaleResponse], rule: Criterion, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64], float | None, tuple[float, float] | None, float, tuple[str, ...]]:
    """log2 µm/px (V,), pooled score (V,), its peak in µm/px with a 90 % interval, the slides' spread, and notes."""
    at = [_log2_mpp(r) for r in responses]
    grid = _common_grid(at, SCORE_STEP)
    scores = _scores_of(responses, rule)
    table = np.stack([_interpolated(a, s[None, :, None], grid)[0, :, 0] for a, s in zip(at, scores, strict=True)])  # (R, V)
    table = table[np.isfinite(table).any(axis=1)]
    there = np.isfinite(table).sum(axis=0) >= min(max(2, len(table) / 2), SCORED_SLIDES)
    grid, table = grid[there], table[:, there]
    nothing = (grid, np.zeros(len(grid)), None, None, STEP)
    if len(grid) < 3:
        return (*nothing, ("no pooled optimum: the slides' scores share too few scales",))
    pooled = _additive(table)
    best = float(np.log2(peak(np.exp2(grid), pooled)))
    if not np.isfinite(best):
        return (*nothing, ("no pooled optimum: the score is the same at all scales",))
    # Where the slides have no finer, and were not blown up, their finest may be the optimum.
    ends = {"coarsest": -1}
    if grid[0] < min(np.log2(r.slide_mpp or np.nan) for r in responses) - SCORE_STEP:
        ends["finest"] = 0
    for reached, end in ends.items():
        if abs(best - grid[end]) < SCORE_STEP / 2:
            return (grid, pooled, None, None, STEP, (f"no pooled optimum: the score is highest at the {reached} end",))
        if not _stands_out(grid, table, best, end):
            said = f"no pooled optimum: the {reached} end is about as good as any scale"
            return (grid, pooled, None, None, STEP, (said,))
    draws = [_additive(table[rng.integers(len(table), size=len(table))]) for _ in range(RESAMPLES)]
    tops = np.log2([peak(np.exp2(grid), d) for d in draws])
    lo, hi = np.percentile(tops[np.isfinite(tops)], [5, 95])
    lo, hi = min(lo, best - SCORE_STEP / 2), max(hi, best + SCORE_STEP / 2)
    if hi - lo > WIDEST_OCTAVES:
        return (grid, pooled, None, None, STEP, (f"no pooled optimum: the slides disagree by {hi - lo:.1f} octaves",))
    own = np.log2([peak(np.exp2(a), s) for a, s in zip(at, scores, strict=True)])
    own = own[np.isfinite(own)]
    spread = 1.4826 * float(np.median(np.abs(own - best))) if len(own) else STEP
    finer = ("the optimum is the finest that the slides have; finer may be better",) if best < grid[0] + SCORE_STEP / 2 else ()
    return grid, pooled, float(2**best), (float(2**lo), float(2**hi)), max(spread, _SMALLEST), finer


def _scores_of(responses: list[ScaleResponse], rule: Criterion) -> list[NDArray[np.float64]]:
    """(S,) for each slide: its own, or where slides are of one tissue each as one of all that were asked at the same µm/px.

    Whether answers differ, and how far a network's BatchNorm is from its memory, a slide of one tissue does not tell. Slides of
    several tissues do, and joined what one slide differs from the next by would count as well, at any scale.
    """
    if rule.rows is None and rule.shares is None:
        return [rule.score(response) for response in responses]
    found: dict[int, NDArray[np.float64]] = {}
    for alike in _same_scales(responses):
        own = [rule.score(responses[i]) for i in alike]
        told = [identifies(responses[i], peak(responses[i].scales, score)) for i, score in zip(alike, own, strict=True)]
        joint = own if all(told) else _as_one([responses[i] for i in alike], rule)
        found |= {i: alone if ok else shared for i, ok, alone, shared in zip(alike, told, own, joint, strict=True)}
    return [found[i] for i in range(len(responses))]


def _as_one(responses: list[ScaleResponse], rule: Criterion) -> list[NDArray[np.float64]]:
    """(S,) for each slide: what its places are worth among those of all."""
    places = _stacked(responses, responses[0].scales)
    if rule.rows is not None:
        rows = rule.rows(places).sum(axis=0)
    else:
        assert rule.shares is not None
        rows = rule.shares(places)
    ends = np.cumsum([response.places for response in responses])
    return [part.mean(axis=0) for part in np.split(rows, ends[:-1])]


def _same_scales(responses: Sequence[ScaleResponse]) -> list[list[int]]:
    """The slides in groups that were asked at the same µm/px, to within `SAME` octaves."""
    groups: list[list[int]] = []
    for i, response in enumerate(responses):
        mine = _log2_mpp(response)
        for group in groups:
            theirs = _log2_mpp(responses[group[0]])
            if len(theirs) == len(mine) and np.abs(theirs - mine).max() < SAME:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _stacked(responses: Sequence[ScaleResponse], scales: NDArray[np.float64]) -> ScaleResponse:
    """All their places as one slide's, at `scales`."""

    def at(response: ScaleResponse) -> ScaleResponse:
        views = {name: at(view) for name, view in response.views.items()}
        return replace(response, scales=scales, slide_mpp=None, views=views)

    return reduce(partial(merge_responses, along="places"), map(at, responses))


def _stands_out(grid: NDArray[np.float64], table: NDArray[np.float64], best: float, end: int) -> bool:
    """Whether the optimum stands out from that end of the range: a one-sided paired t test over slides.

    Of two slides nothing can be tested.
    """
    top = int(np.abs(grid - best).argmin())
    gain = table[:, top] - table[:, end]
    gain = gain[np.isfinite(gain)]
    if len(gain) <= 2 or np.ptp(gain) == 0:
        return True
    return bool(stats.ttest_1samp(gain, 0, alternative="greater").pvalue < STANDS_OUT)


def _additive(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """The curve (V,) of a table (R, V) with gaps, each row with an offset of its own: least squares, by turns.

    A plain mean would step where a slide begins or ends.
    """
    seen = np.isfinite(table)
    offset = np.zeros(len(table))
    curve = np.zeros(table.shape[1])
    for _ in range(30):
        rest = np.where(seen, table - offset[:, None], 0)
        curve = rest.sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
        rest = np.where(seen, table - curve, 0)
        offset = rest.sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
    curve[~seen.any(axis=0)] = np.nan
    if np.isnan(curve).any():  # a resample may miss a scale
        known = np.flatnonzero(np.isfinite(curve))
        curve = np.interp(np.arange(len(curve)), known, curve[known])
    return curve


# --- registration -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bank:
    octaves: NDArray[np.float64]  # (U,)
    tiles: NDArray[np.float32]  # (T, U, P)
    tile_slide: NDArray[np.intp]  # (T,)
    means: NDArray[np.float32]  # (R, U, P)

    def without(self, slide: int) -> _Bank:
        rest = self.tile_slide != slide
        names = self.tile_slide[rest]
        return _Bank(self.octaves, self.tiles[rest], names - (names > slide), np.delete(self.means, slide, axis=0))

    def of_each_slide(self) -> list[NDArray[np.float32]]:
        """Tiles (T, U, P) of each reference slide."""
        return [self.tiles[self.tile_slide == r] for r in range(len(self.means))]

    def alike(self) -> list[list[int]]:
        """The slides in groups that have the same scales."""
        groups: dict[bytes, list[int]] = {}
        for r, mean in enumerate(self.means):
            groups.setdefault(np.isfinite(mean[:, 0]).tobytes(), []).append(r)
        return list(groups.values())

    def there(self, slide: int, scales: NDArray[np.intp]) -> NDArray[np.intp]:
        """Those of `scales` that the slide has."""
        there: NDArray[np.intp] = scales[np.isfinite(self.means[slide, scales, 0])]
        return there


def _bank_of(profile: Profile) -> _Bank:
    octaves = np.round(profile.octaves.astype(np.float64) / STEP) * STEP
    return _Bank(octaves, profile.tiles, profile.tile_slide.astype(np.intp), profile.means)


def _shifts(bank: _Bank, length: int) -> NDArray[np.intp]:
    """(D,) grid positions at which a slide's first scale may lie: enough of it overlaps the bank, and one of its slides."""
    enough = _enough(length)
    every = np.arange(enough - length, len(bank.octaves) - enough + 1)

    def holds(shift: int) -> bool:
        _, scales = _overlap(int(shift), length, len(bank.octaves))
        return any(len(bank.there(r, scales)) >= enough for r in range(len(bank.means)))

    return np.array([shift for shift in every if holds(int(shift))], np.intp)


def _enough(length: int) -> int:
    """How many of a slide's `length` scales have to overlap; one may always stick out, so that a peak has two sides."""
    return max(MIN_OVERLAP, min(OVERLAP, length - 1))


def _overlap(shift: int, length: int, steps: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices into the slide's scales and into the bank's."""
    mine = np.arange(max(0, -shift), min(length, steps - shift))
    return mine, mine + shift


def _mean_scores(bank: _Bank, means: NDArray[np.float64], shifts: NDArray[np.intp]) -> NDArray[np.float64]:
    """(B, D) for mean curves (B, L, P): correlation with the mean curves of the reference slides that fit best.

    Over all components and shared scales, each centred over scale: a slide's own level (stain, scanner) drops out.
    """
    result = np.empty((len(means), len(shifts)))
    for column, shift in enumerate(shifts):
        mine, scales = _overlap(int(shift), means.shape[1], len(bank.octaves))
        found = []
        for r, reference in enumerate(bank.means):
            there = bank.there(r, scales)
            if len(there) >= _enough(means.shape[1]):
                found.append(_correlation(means[:, there - scales[0] + mine[0]], reference[there]))
        result[:, column] = np.sort(found, axis=0)[-BEST_SLIDES:].mean(axis=0)
    return result


def _correlation(curves: NDArray[np.float64], reference: NDArray[np.float32]) -> NDArray[np.float64]:
    """(B,) of curves (B, L, P) with one (L, P)."""
    a = (curves - curves.mean(axis=1, keepdims=True)).reshape(len(curves), -1)
    b = (reference - reference.mean(axis=0)).ravel().astype(np.float64)
    length = np.linalg.norm(a, axis=1) * np.linalg.norm(b)
    correlation: NDArray[np.float64] = a @ b / np.where(length > 0, length, 1)
    return correlation


def _tile_scores(bank: _Bank, tiles: NDArray[np.float64], shifts: NDArray[np.intp]) -> NDArray[np.float64]:
    """(N, D) for tile curves (N, L, P): log of the mean squared distance to the nearest of the bank's tile curves.

    The logarithm keeps a few tiles of a tissue that the bank has not from deciding.
    """
    result = np.empty((len(tiles), len(shifts)))
    for column, shift in enumerate(shifts):
        mine, scales = _overlap(int(shift), tiles.shape[1], len(bank.octaves))
        found = []
        for r in range(len(bank.means)):
            there = bank.there(r, scales)
            if len(there) >= _enough(tiles.shape[1]):
                found.append(_distances(tiles[:, there - scales[0] + mine[0]], bank.tiles[bank.tile_slide == r][:, there]))
        result[:, column] = np.log(_nearest(np.concatenate(found, axis=1)))
    return result


def _floors(bank: _Bank, shifts: NDArray[np.intp], length: int) -> NDArray[np.float64]:
    """(D,) what `_tile_scores` is on average for the bank's own tiles, each among the other slides' tiles.

    Without it the shifts win at which all tissue looks alike (the coarse end) or few scales have to fit.
    """
    result = np.empty(len(shifts))
    groups = bank.alike()
    for column, shift in enumerate(shifts):
        _, scales = _overlap(int(shift), length, len(bank.octaves))
        found: list[np.floating] = []
        for mine in groups:
            own = np.isin(bank.tile_slide, mine)
            others = []
            for theirs in groups:
                there = bank.there(theirs[0], bank.there(mine[0], scales))
                if len(there) >= _enough(length):
                    rest = np.isin(bank.tile_slide, theirs)
                    distances = _distances(bank.tiles[own][:, there], bank.tiles[rest][:, there])
                    distances[bank.tile_slide[own][:, None] == bank.tile_slide[rest]] = np.inf
                    others.append(distances)
            if others:
                nearest = np.log(_nearest(np.concatenate(others, axis=1)))  # (T of mine,), inf without another slide
                means = [nearest[bank.tile_slide[own] == r].mean() for r in mine]
                found += [mean for mean in means if np.isfinite(mean)]
        # Where only one slide reaches there is nothing to compare with; then no shift is favoured.
        result[column] = np.mean(found) if found else np.nan
    usual = np.nanmean(result) if np.isfinite(result).any() else 0.0
    return np.where(np.isfinite(result), result, usual)


def _between(tiles: NDArray[np.float64] | NDArray[np.float32]) -> float:
    """The variance between tiles (N, L, P) at one scale, mean over the scales that there are and over components."""
    there = np.isfinite(tiles[0, :, 0])
    return float(tiles[:, there].var(axis=0, dtype=np.float64).mean())


def _distances(
    a: NDArray[np.float64] | NDArray[np.float32], b: NDArray[np.float64] | NDArray[np.float32]
) -> NDArray[np.float64]:
    """(A, B) mean over scales of the squared distance between curves (A, L, P) and (B, L, P), each centred over scale."""
    scales = a.shape[1]
    a = (a - a.mean(axis=1, keepdims=True)).reshape(len(a), -1).astype(np.float64)
    b = (b - b.mean(axis=1, keepdims=True)).reshape(len(b), -1).astype(np.float64)
    square = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T
    distances: NDArray[np.float64] = np.maximum(square, 0) / scales
    return distances


def _nearest(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """(A,) mean of the smallest few of (A, B); infinity is no distance, unless there is no other."""
    few = min(NEIGHBOURS, distances.shape[1])
    nearest = np.partition(distances, few - 1, axis=1)[:, :few]
    counted = np.isfinite(nearest)
    total = np.where(counted, nearest, 0).sum(axis=1)
    mean: NDArray[np.float64] = np.where(counted.any(axis=1), total / np.maximum(counted.sum(axis=1), 1), np.inf)
    return np.maximum(mean, 1e-12)


def _top(shifts: NDArray[np.intp], score: NDArray[np.float64]) -> float:
    """The shift in octaves of the highest score, by a parabola through it and its neighbours."""
    i = int(score.argmax())
    offset = 0.0
    if 0 < i < len(score) - 1 and shifts[i + 1] - shifts[i - 1] == 2:
        before, at, after = score[i - 1 : i + 2]
        bend = before - 2 * at + after
        if bend < 0:
            offset = 0.5 * (before - after) / bend
    return float((shifts[i] + offset) * STEP)


def _is_flat(tiles: NDArray[np.float64], rng: np.random.Generator) -> bool:
    """Whether the mean curve (of N, L, P) is no more marked than tiles with nothing in common would give: a sign-flip test."""
    centred = (tiles - tiles.mean(axis=1, keepdims=True)).reshape(len(tiles), -1)
    seen = np.square(centred.mean(axis=0)).sum()
    signs = rng.choice([-1.0, 1.0], size=(999, len(tiles)))
    chance = np.square(signs @ centred / len(tiles)).sum(axis=1)
    return bool((1 + (chance >= seen * (1 - 1e-12)).sum()) / 1000 > SIGNIFICANCE)


def usual_error(errors: NDArray[np.float32], share: float) -> float:
    """Octaves that this share of slides like the reference slides are off by at most.

    The quantile is raised by (n + 1) / n for being taken of the same few slides (conformal prediction).
    """
    known = np.abs(errors[np.isfinite(errors)])
    return float(np.quantile(known, min(1, share * (1 + 1 / len(known))))) if len(known) else STEP


def _is_like(value: float, usual: NDArray[np.float32], smallest: float, *, times: float = UNLIKE) -> bool:
    """Whether the likeness is what the reference slides have among each other, or better."""
    known = usual[np.isfinite(usual)].astype(np.float64)
    if not len(known):
        return True
    spread = max(float(known.std(ddof=1)) if len(known) > 1 else 0.0, smallest)
    return value >= float(known.mean()) - times * spread


def _leave_one_out(
    bank: _Bank, at: list[NDArray[np.float64]], projected: list[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Errors (2, R) in octaves and likenesses (2, R) of each reference slide registered to the others, both ways."""
    errors = np.full((2, len(at)), np.nan)
    likeness = np.full((2, len(at)), np.nan)
    for r, (octaves, curves) in enumerate(zip(at, projected, strict=True)):
        rest = bank.without(r)
        grid = octaves[0] + STEP * np.arange(int((octaves[-1] - octaves[0]) / STEP + 1e-6) + 1)
        shifts = _shifts(rest, len(grid))
        if not len(shifts):
            continue
        tiles = _interpolated(octaves, curves, grid)
        by_mean = _mean_scores(rest, tiles.mean(axis=0)[None], shifts)[0]
        by_tile = _floors(rest, shifts, len(grid)) - _tile_scores(rest, tiles, shifts).mean(axis=0)
        for row, score in enumerate((by_mean, by_tile)):
            errors[row, r] = bank.octaves[0] + _top(shifts, score) - grid[0]
            likeness[row, r] = score.max()
    return errors, likeness
