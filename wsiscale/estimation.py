"""The scale at which a network works best on a slide: joins the stages, and knows when not to answer."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from wsiscale.criteria import (
    DEFAULT_CRITERION,
    Criterion,
    default_criterion,
    find_criterion,
    peak,
)
from wsiscale.criteria.mutual_information import dispersed, kept, of_pixels
from wsiscale.errors import ModelError, NoTissueError, OptionError, ScaleError, StoreError
from wsiscale.geometry import level_for, mpp_error, scale_grid
from wsiscale.places import default_places, sample_places
from wsiscale.profile import (
    MIN_OVERLAP,
    STEP,
    Profile,
    Registration,
    load_profile,
    profile_digest,
    profile_of,
    refusal,
    register,
    registration_of,
    registration_record,
    settle,
)
from wsiscale.responses import SavedResponse
from wsiscale.search import STRUCTURE_VIEW, Judged, Searched, adaptive, full_grid
from wsiscale.stacks import scale_stack
from wsiscale.tissue import TissueDetector, find_tissue
from wsiscale.training_tiles import referring
from wsiscale.types import (
    Abstention,
    Calibration,
    Pyramid,
    Reader,
    ScaleCurve,
    ScaleEstimate,
    ScaleResponse,
    ScaleStack,
    SlideSource,
    Tissue,
)

if TYPE_CHECKING:
    from wsiscale.networks import Network

MPP_RANGE = (0.125, 4.0)  # from finer than any scanner to the gland
SCALE_RANGE = (1.0, 16.0)  # where the slide's µm/px is unknown: four octaves from level 0
PER_OCTAVE = 8
PRECISION = 0.1  # octaves

# What a slide is asked to be registered to a profile: from level 0 on, whatever its tag says.
REGISTRATION_PLACES = 24
REGISTRATION_COARSEST = 16.0  # level-0 px per px
# A slide that does not look like the profile's slides, or cannot be compared with them, is none that the profile knows of.
UNKNOWN_TO_PROFILE = ("unlike_bank", "flat", "too_few_places", "too_few_scales")

# Fewer places than this make neither an interval nor a test.
MIN_PLACES = 8
# A curve is flat unless chance would give one as marked less than once in a hundred slides.
SIGNIFICANCE = 0.01
# Several criteria that have to agree hold each other in check, and are tested less hard.
JOINED_SIGNIFICANCE = 0.05
RESAMPLES = 400
# Noise moves a network's answers over scale by its contrast alone. What the arrangement of the pixels adds has to be at least
# this share of what is seen.
STRUCTURE_SHARE = 0.2
# Two peaks are two answers when they are this far apart and each wins in this share of the resamples.
BIMODAL_OCTAVES = 0.75
BIMODAL_SHARE = 0.15
# A classifier that is right keeps its answers when the scale changes a little; one that is lost answers by chance, and places
# then differ by that. Of right answers on the development half of the benchmark 0.88 to 1.00 of the places keep their class a
# quarter of an octave on, of wrong ones on slides of one class 0.67 to 0.77.
SETTLED = 0.8
# An interval wider than this tells a user nothing.
WIDEST_OCTAVES = 2.0
# That of joined criteria holds their disagreement too.
JOINED_WIDEST_OCTAVES = 3.0
# A range that begins here or finer has all that the slide has.
FINEST = 1.01
# Networks do work best an octave away from where they were trained; further, one of the two µm/px is wrong.
CONFLICT_OCTAVES = 1.5


def estimate(
    slide: Reader,
    network: Network | Any | None = None,
    *,
    mpp_range: tuple[float, float] | None = None,
    scale_range: tuple[float, float] | None = None,
    criterion: str | Criterion | Callable[[ScaleResponse], NDArray[np.float64]] | None = None,
    places: int | None = None,
    tile_size: int | None = None,
    max_upsample: float = 1.0,
    per_octave: int = PER_OCTAVE,
    precision: float | None = PRECISION,
    detector: TissueDetector | str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    profile: Profile | str | os.PathLike[str] | None = "auto",
    trust_tag: bool = True,
    keep: str | os.PathLike[str] | None = None,
    reuse: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ScaleEstimate:
    """The scale at which `network` works best on the tissue of `slide`, or a named abstention.

    `network` is a Network, an nn.Module, or anything `load_network` takes; None is the embedded one. Without a `criterion` it
    goes by the training tiles in the network's card where there are any, else by `criteria.DEFAULT_CRITERION`. The range is in
    µm/px (`mpp_range`) or relative to level 0 (`scale_range`); a slide without µm/px is worked in relative scale. The range is
    clipped to what the slide holds, which `notes` says.

    Without `places` it is `default_places` of the tile size, at most. The search is coarse to fine, and stops adding places
    once the 90 % interval is within `precision` octaves on either side of the answer; with None every one of `places` is
    looked at at every scale. `keep` writes what the network answered to a folder; `reuse` reads it back and asks the network
    nothing. With `overwrite` `keep` replaces an older one.

    `profile` is the network's memory of other slides (docs/profiles.md): a Profile, a card that holds one, None for none, or
    "auto", the one in the network's own card if it is of this network, tile size and criterion. The slide is registered to it,
    and the answer is its optimum and the slide's own curve, weighed; `registration`, `own_share` and `notes` tell. A slide
    that does not look like the profile's has its own curve alone. The tag is gone by where there is one, unless `trust_tag`
    is False; without one the µm/px is the registration's (`mpp_source` "estimated"). A `scale_range` asks without a profile.

    Raises MppError where the slide's µm/px is implausible and no `scale_range` is given, ModelError before any work where
    the network cannot take a tile, and StoreError (MISMATCH) where `reuse` is of another slide, network or options.
    """
    from wsiscale.networks import load_network, respond

    started = time.perf_counter()
    if precision is not None and not precision > 0:
        raise OptionError(f"a precision is in octaves, above 0, or None for every place at every scale; got {precision:g}")
    if keep is not None and reuse is not None:
        raise OptionError("what is reused is kept already; give either keep or reuse")
    if keep is not None:
        from wsiscale.store import check_destination

        check_destination(keep, overwrite=overwrite)
    loaded = load_network(network, tile_size=tile_size)
    rule = find_criterion(default_criterion(loaded.card) if criterion is None else criterion)
    size = loaded.tile_size
    places = default_places(size) if places is None else places
    check_range(mpp_range, scale_range, max_upsample=max_upsample)
    known, said = _profile_for(loaded, profile, rule, scale_range)
    saved = None
    if reuse is not None:
        from wsiscale.store import read_response

        saved = read_response(reuse)
    tissue = find_tissue(slide, detector)
    asked = 0
    registration = None
    if known is not None and tissue.mask.any():
        if saved is not None:
            registration = _kept_registration(saved, known)
            said += () if registration else ("the kept answers were not registered to this profile, which has no say",)
        else:
            registration, asked = _registered(
                slide, loaded, known, tissue, seed=seed, device=device, batch_size=batch_size, progress=progress
            )
    slide = _calibrated(slide, registration, trust_tag=trust_tag)
    lo, hi, notes = range_on(slide, mpp_range, scale_range, size=size, max_upsample=max_upsample)
    about: dict[str, Any] = {
        "slide": slide.source.name,
        "mpp_source": slide.calibration.source,
        "model": loaded.name,
        "notes": (*notes, *said, *([slide.calibration.detail] if slide.calibration.source == "estimated" else [])),
    }
    try:
        centers = sample_places(tissue, places, seed=seed, field=size * hi)
    except NoTissueError as error:
        nothing = _abstain(rule, slide.pyramid.mpp, Abstention("no_tissue", str(error)), seed=seed)
        return replace(nothing, seconds=time.perf_counter() - started, **about)
    scales = scale_grid(lo, hi, per_octave=per_octave)
    # Of a part of the scales too, all tiles come from the level that suits the finest of all.
    stacked = partial(
        scale_stack, slide, size=size, max_upsample=max_upsample, level=level_for(slide.pyramid, float(scales[0]))
    )

    def ask(some: NDArray[np.intp], columns: NDArray[np.intp], guarded: bool) -> ScaleResponse:
        nonlocal asked
        views = tuple(dict.fromkeys((*rule.views, STRUCTURE_VIEW))) if guarded else rule.views
        count, before = len(some) * len(columns) * (1 + len(views)), asked
        heard = None if progress is None else lambda done, _: progress(before + done, before + count)
        stack = stacked(centers[some], scales=scales[columns])
        answer = respond(loaded, stack, views=views, layers=rule.layers, device=device, batch_size=batch_size, progress=heard)
        asked += count
        return answer

    def judge(response: ScaleResponse, guard: ScaleResponse | None) -> Judged:
        return _judged(response, rule, guard=guard, seed=seed)

    made_of: dict[str, Any] = {}
    if keep is not None or reuse is not None:
        from wsiscale.networks import network_digest

        made_of = {
            "slide": fingerprint(slide, stacked(np.array([slide.pyramid.shape]) / 2, scales=scales[:1])),
            "network": {"name": loaded.name, "sha256": network_digest(loaded), "tile_size": size},
            "options": {
                "scales": scales.tolist(),
                "places": places,
                "seed": seed,
                "max_upsample": max_upsample,
                "layers": rule.layers,
                "views": list(rule.views),
                "criterion": rule.name,
                "precision": precision,
            },
        }
    if saved is not None and reuse is not None:
        saved = _checked_against(saved, made_of, centers, reuse)
        response = referring(replace(saved.response, slide_mpp=slide.pyramid.mpp), loaded.card)
        guard = None if saved.guard is None else referring(saved.guard, loaded.card)
        found = Searched(judge(response, guard).estimate, response, guard)
    else:
        # Where the criterion itself sees the shuffled tiles, it has them at every place and scale.
        guarded = STRUCTURE_VIEW not in rule.views
        if precision is None:
            found = full_grid(ask, judge, scales, places=len(centers), guarded=guarded)
        else:
            # A rule of its own, or a score that looks at neighbouring scales, means the grid that it was given to be even.
            refine = rule.pointwise and rule.decide is None
            found = adaptive(ask, judge, scales, places=len(centers), precision=precision, guarded=guarded, refine=refine)
    if keep is not None:
        from wsiscale.store import write_response

        if known is not None and registration is not None:
            made_of["registration"] = {"profile": profile_digest(known), **registration_record(registration)}
        write_response(keep, SavedResponse(found.response, centers, found.guard, made_of), overwrite=overwrite)
    result = replace(
        found.estimate,
        layers=tuple(found.response.layers),
        forwards=asked,
        seconds=time.perf_counter() - started,
        **about,
    )
    if result.scale is not None and result.scale < lo * 2 ** (0.5 / per_octave):
        finer = "" if max_upsample > 1 else "; finer than the slide is asked with --max-upsample"
        result = replace(result, notes=(*result.notes, f"the best is the finest there is, and finer may be better{finer}"))
    if known is not None and registration is not None:
        result = _settled(result, known, registration, lo, hi)
    return _checked_against_training(result, loaded.training_mpp)


def _profile_for(
    network: Network,
    profile: Profile | str | os.PathLike[str] | None,
    rule: Criterion,
    scale_range: tuple[float, float] | None,
) -> tuple[Profile | None, tuple[str, ...]]:
    """The profile to go by, if there is one that fits, and why one that there is does not.

    One that the user names has to fit. Raises ModelError where it is another network's.
    """
    from wsiscale.networks import network_digest

    automatic = isinstance(profile, str) and profile == "auto"
    if profile is None or (automatic and scale_range is not None):
        return None, ()
    if automatic:
        found = profile_of(network.card)
    else:
        found = profile if isinstance(profile, Profile) else load_profile(os.fspath(profile))
    if found is None:
        return None, ()
    if scale_range is not None:
        raise OptionError("a profile is in µm/px and the range is not; give the range in µm/px, or no profile")
    unfit = None
    if found.network is not None and found.network != network_digest(network):
        unfit = "it was made of other weights or another preparation of tiles"
    elif found.tile_size is not None and found.tile_size != network.tile_size:
        unfit = f"it was made of tiles of {found.tile_size} px, and these are of {network.tile_size}"
    if unfit is not None and not automatic:
        raise ModelError(f"the profile is not of {network.name}: {unfit}; make one with wsiscale profile")
    if automatic and unfit is None and found.criterion != rule.name:
        unfit = f"it was made with the criterion {found.criterion}"
    return (found, ()) if unfit is None else (None, (f"the network's profile has no say: {unfit}",))


def _registered(
    slide: Reader,
    network: Network,
    profile: Profile,
    tissue: Tissue,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None,
    **how: Any,
) -> tuple[Registration, int]:
    """The slide's µm/px against `profile`, and how many tiles that took. The tag is not looked at, but for the record."""
    from wsiscale.networks import respond

    claimed = slide.pyramid.mpp
    _, _, height, width = slide.pyramid.scanned
    coarsest = min(REGISTRATION_COARSEST, min(height, width) / network.tile_size)
    octaves = (MIN_OVERLAP - 1) * STEP
    if coarsest < 2**octaves:
        return refusal("too_few_scales", f"the slide is too small; {octaves:g} octaves are needed", claimed=claimed), 0
    centers = sample_places(tissue, REGISTRATION_PLACES, seed=seed, field=network.tile_size * coarsest)
    scales = np.exp2(STEP * np.arange(int(np.log2(coarsest) / STEP + 1e-6) + 1))
    stack = scale_stack(slide, centers, scales=scales, size=network.tile_size)
    response = respond(network, stack, layers="stages", progress=progress, **how)
    found = register(profile, replace(response, slide_mpp=None), seed=seed)
    return replace(found, claimed=claimed), len(centers) * len(scales)


def _kept_registration(saved: SavedResponse, profile: Profile) -> Registration | None:
    """The registration that was kept with the answers, if it was to this profile."""
    record = saved.about.get("registration")
    return registration_of(record) if record is not None and record["profile"] == profile_digest(profile) else None


def _calibrated(slide: Reader, registration: Registration | None, *, trust_tag: bool) -> Reader:
    """The slide with the µm/px to go by: its tag's where that is trusted, else what its tissue says, if anything."""
    tag = slide.calibration
    if trust_tag and slide.pyramid.mpp is not None:
        return slide
    if registration is not None and registration.mpp is not None and registration.ci90 is not None:
        low, high = registration.ci90
        detail = f"{registration.mpp:.3g} µm/px ({low:.3g} to {high:.3g}) by the tissue, registered to the network's profile"
        found = replace(tag, mpp=registration.mpp, source="estimated", verdict="trusted", reasons=("registered",))
        return _Recalibrated(slide, replace(found, detail=detail))
    if slide.pyramid.mpp is None:
        return slide
    distrusted = replace(tag, mpp=None, source="none", verdict="missing", detail="the tag is not to be trusted")
    return _Recalibrated(slide, distrusted)


@dataclass(frozen=True)
class _Recalibrated:
    """A slide with another calibration than its file's."""

    slide: Reader
    calibration: Calibration

    @property
    def pyramid(self) -> Pyramid:
        return replace(self.slide.pyramid, mpp=self.calibration.mpp)

    @property
    def source(self) -> SlideSource:
        return self.slide.source

    def read(self, *, level: int, y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
        return self.slide.read(level=level, y=y, x=x, height=height, width=width)

    def close(self) -> None:
        self.slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def _settled(own: ScaleEstimate, profile: Profile, registration: Registration, lo: float, hi: float) -> ScaleEstimate:
    """The slide's own estimate and the profile's, weighed; within the range of scales, `lo` to `hi`, that was asked for."""
    own = replace(own, registration=registration)
    refused = registration.refused
    if refused is not None and refused.reason in UNKNOWN_TO_PROFILE:
        return replace(own, notes=(*own.notes, f"the network's profile has no say ({refused.reason}): {refused.detail}"))
    # What the estimate goes by is settled already: the tag where it is trusted, else the registration.
    by_tag = own.mpp_source in ("metadata", "override")
    answer = settle(profile, registration, own, trust_tag=by_tag)
    notes = (*own.notes, *answer.notes)
    if answer.scale is None or answer.ci90 is None:
        return replace(own, notes=notes)
    if own.abstained is not None:
        notes = (*notes, f"the slide's own curve has no answer ({own.abstained.reason}); this one is the profile's")
    settled = replace(own, scale=answer.scale, ci90=answer.ci90, abstained=None, own_share=answer.own_share, notes=notes)
    if lo <= answer.scale <= hi:
        return settled
    end, name = (lo, "finer") if answer.scale < lo else (hi, "coarser")
    beyond = f"{_named(answer.scale, own.slide_mpp)} by its profile, {name} than the range, which ends at"
    # Where the slide has no finer, its finest is the best there is.
    if answer.ci90[0] <= end <= answer.ci90[1] or (end == lo and lo <= FINEST):
        note = f"the network works best at {beyond} {_named(end, own.slide_mpp)}: this is that end"
        return replace(settled, scale=end, ci90=(min(answer.ci90[0], end), max(answer.ci90[1], end)), notes=(*notes, note))
    why = Abstention("boundary_optimum", f"the network works best at {beyond} {_named(end, own.slide_mpp)}")
    return replace(own, scale=None, ci90=None, abstained=why, notes=(*own.notes, *answer.notes), own_share=answer.own_share)


def fingerprint(slide: Reader, stack: ScaleStack) -> dict[str, Any]:
    """What a slide is known by again: its file, and the pixels of `stack`, which have to do for a slide in memory."""
    source = slide.source
    known = {name: getattr(source, name) for name in ("name", "size", "mtime_ns", "reader")}
    pixels: NDArray[np.uint8] = stack.images.compute(scheduler="synchronous")
    return {**known, "shape": list(slide.pyramid.shape), "pixels": hashlib.sha256(pixels.tobytes()).hexdigest()}


def _checked_against(
    saved: SavedResponse, wanted: dict[str, Any], centers: NDArray[np.float64], path: str | os.PathLike[str]
) -> SavedResponse:
    """`saved`, if asking again would have given it. Raises StoreError naming all that differs.

    The full grid serves every criterion that needs no more than was watched, and every precision.
    """
    wanted = {part: dict(values) for part, values in wanted.items()}
    options, kept = wanted["options"], saved.about.get("options", {})
    if kept.get("precision", 0) is None:
        loose = ["criterion", "precision"]
        loose += ["layers"] if options["layers"] == "none" or kept.get("layers") == "auto" else []
        loose += ["views"] if set(options["views"]) <= set(kept.get("views", ())) else []
        for name in loose:
            options[name] = kept.get(name)
    differs = [
        f"{part} {name} ({_short(theirs)}, asked for {_short(ours)})"
        for part, values in wanted.items()
        for name, ours in values.items()
        if (theirs := saved.about.get(part, {}).get(name)) != ours
    ]
    if not differs and not np.array_equal(saved.centers, centers):
        differs = ["the places, and so the tissue"]
    if differs:
        raise StoreError(
            f"{os.fspath(path)} holds other answers than were asked for: {'; '.join(differs)}; ask without --reuse",
            code="MISMATCH",
        )
    return saved


def _short(value: object) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} from {value[0]:.4g} to {value[-1]:.4g}"
    return f"{value:.12}" if isinstance(value, str) else str(value)


def check_range(mpp_range: tuple[float, float] | None, scale_range: tuple[float, float] | None, *, max_upsample: float) -> None:
    if mpp_range is not None and scale_range is not None:
        raise OptionError("give either a range in µm/px or one in relative scale, not both")
    if max_upsample < 1:
        raise OptionError(f"max_upsample is 1 (no upsampling) or more, not {max_upsample:g}")
    asked = scale_range or mpp_range
    if asked is not None and not 0 < asked[0] < asked[1]:
        raise OptionError(f"a range runs from low to high, above 0; got {asked[0]:g}:{asked[1]:g}")


def range_on(
    slide: Reader,
    mpp_range: tuple[float, float] | None,
    scale_range: tuple[float, float] | None,
    *,
    size: int,
    max_upsample: float,
) -> tuple[float, float, tuple[str, ...]]:
    """(lo, hi) in level-0 px per px, clipped to what the slide holds, and what was clipped."""
    mpp = slide.pyramid.mpp
    if scale_range is None and mpp is None and (mpp_range is not None or slide.calibration.verdict == "refused"):
        raise mpp_error("an estimate in µm/px was asked for", slide.calibration)
    if scale_range is not None:
        lo, hi = scale_range
    elif mpp is not None:
        lo, hi = ((m / mpp) for m in (mpp_range or MPP_RANGE))
    else:
        lo, hi = SCALE_RANGE[0] / max_upsample, SCALE_RANGE[1]
    notes = [slide.calibration.detail] if slide.calibration.verdict == "suspicious" else []
    finest = 1 / max_upsample
    if lo < finest:
        notes.append(f"the range starts at {_named(finest, mpp)}, the slide's finest within max_upsample {max_upsample:g}")
        lo = finest
    _, _, height, width = slide.pyramid.scanned
    coarsest = min(height, width) / size
    if hi > coarsest:
        notes.append(f"the range ends at {_named(coarsest, mpp)}, where a tile of {size} px is as wide as the slide")
        hi = coarsest
    if hi < lo * 2**0.5:
        raise ScaleError(
            f"the slide, {height} x {width} px, and the range leave less than half an octave for tiles of {size} px "
            f"({_named(lo, mpp)} to {_named(hi, mpp)}); use a wider range, a smaller --tile-size, or --max-upsample"
        )
    return lo, hi, tuple(notes)


def _named(scale: float, mpp: float | None) -> str:
    return f"{scale * mpp:.3g} µm/px" if mpp is not None else f"scale {scale:.3g}"


def _checked_against_training(result: ScaleEstimate, training_mpp: float | None) -> ScaleEstimate:
    """An abstention where the slide's tag and the network's stated training µm/px cannot both be right."""
    if training_mpp is None or result.mpp is None or result.slide_mpp is None:
        return result
    octaves = float(np.log2(result.mpp / training_mpp))
    if abs(octaves) <= CONFLICT_OCTAVES:
        return result
    detail = (
        f"the network works best at {result.mpp:.3g} µm/px by the slide's tag, {abs(octaves):.1f} octaves from the "
        f"{training_mpp:g} µm/px it was trained at; the slide's {result.slide_mpp:.4g} µm/px ({result.mpp_source}) or the "
        "network's is wrong"
    )
    return replace(result, scale=None, ci90=None, abstained=Abstention("metadata_conflict", detail))


def estimate_response(
    response: ScaleResponse,
    criterion: str | Criterion | Callable[[ScaleResponse], NDArray[np.float64]] = DEFAULT_CRITERION,
    *,
    guard: ScaleResponse | None = None,
    seed: int = 0,
) -> ScaleEstimate:
    """The scale that `criterion` finds best in `response`, with a 90 % bootstrap interval over places, or an abstention.

    Pure numpy. Places with non-finite answers are left out, and counted: above a tenth of them there is no estimate. `guard`
    is a response with the view "pixel_shuffled", at some of the places and scales; without one, `response` is where it has it.
    """
    return _judged(response, find_criterion(criterion), guard=guard, seed=seed).estimate


def _judged(response: ScaleResponse, rule: Criterion, *, guard: ScaleResponse | None, seed: int) -> Judged:
    rows = rule.rows(response) if rule.rows is not None else _score_places(response, rule)[None]  # (K, N, S)
    finite = np.asarray(np.isfinite(rows).all(axis=(0, 2)))
    if response.outputs is not None:  # which not every part of a sum looks at
        finite &= np.isfinite(response.outputs.confidence).all(axis=1)
    used = np.flatnonzero(finite)
    scores, flat = rows[0], True

    def no(reason: str, detail: str, **found: Any) -> Judged:
        why = Abstention(reason, detail)
        return Judged(_abstain(rule, response.slide_mpp, why, seed=seed, places=len(used), **found), scores, flat)

    if len(finite) and (~finite).sum() > 0.1 * len(finite):
        if (rule.shares is not None or rule.rows is not None) and not finite.any():
            return no("non_finite", f"{rule.name} says nothing of these answers: NaN or infinity, or not to be trusted")
        return no("non_finite", f"the network answered NaN or infinity at {(~finite).sum()} of {len(finite)} places")
    if len(used) < MIN_PLACES:
        return no("too_few_places", f"{len(used)} places on tissue; an estimate needs {MIN_PLACES}")
    guard = response if guard is None else guard
    response, rows = response.take(used), rows[:, used]
    scales = response.scales
    rng = np.random.default_rng(seed)
    joined = rule.rows is not None
    if not joined:
        scores = rows[0]
        pooled = rule.score(response)
        votes = _votes(response, rule, scores)
        draws, curves = _bootstrap(response, rule, scores, votes, pooled, rng)  # (B,) scales, (B, S)
        of_places = draws
    else:
        scores = rows.sum(axis=0)
        pooled = scores.mean(axis=0)
        votes = np.array([peak(scales, row) for row in scores])
        draws, curves = _bootstrap_joined(rows, scales, rng)
        of_places, _ = _bootstrap_joined(scores[None], scales, rng)
    band = np.percentile(curves, [5, 95], axis=0)
    found: dict[str, Any] = {"curve": ScaleCurve(scales=scales, score=pooled, lo=band[0], hi=band[1]), "votes": votes}
    best = _decide(response, rule, pooled)

    significance = JOINED_SIGNIFICANCE if joined else SIGNIFICANCE
    flat = _flip_test(_centred(scales, scores), rng) > significance
    if flat:
        if (split := _modes(np.log2(votes[np.isfinite(votes)]))) is not None:
            return no("bimodal", _two(split, response.slide_mpp), **found)
        return no("flat_curve", "the score does not change over scale by more than chance between places would", **found)
    if best is None or not np.isfinite(best):
        return no("no_optimum", f"the rule of {rule.name} finds no optimum in this range", **found)
    if joined and not _identifies(response, best):
        detail = (
            "the network answers nearly the same everywhere on this slide, of which it can be as sure at a wrong scale; "
            "give a profile or training tiles, or name a criterion"
        )
        return no("one_tissue", detail, **found)
    if _lacks_structure(guard, rule, rng):
        detail = "the network answers the slide's colours alone, not their arrangement: shuffled pixels give the same curve"
        return no("no_structure", detail, **found)
    octaves = np.log2(draws[np.isfinite(draws)])
    if not joined:
        end = _end_reached(scales, scores, best, own_rule=rule.decide is not None)
    else:
        end = _joined_end_reached(scales, best)
    if end is not None:
        detail = f"the {end} end of the range is about as good as anything in it; the optimum may lie beyond"
        return no("boundary_optimum", detail, **found)
    if (split := _modes(octaves)) is not None:
        return no("bimodal", _two(split, response.slide_mpp), **found)
    if joined and (share := _settled_share(response, best)) < SETTLED:
        detail = (
            f"{1 - share:.0%} of the places change their class within a quarter of an octave of the best scale: the network "
            "answers by chance there more than by tissue; give a profile or training tiles, or name a criterion"
        )
        return no("unsettled", detail, **found)
    finest, coarsest = _indistinct(scales, pooled, best, own_rule=rule.decide is not None)
    answer = float(np.log2(best))

    def reach(drawn: NDArray[np.float64]) -> tuple[float, float]:
        """The octaves down and up from the answer that hold 90 % of what was drawn, and all that is as good."""
        low, high = np.percentile(np.log2(drawn[np.isfinite(drawn)]), [5, 95])
        return float(min(low, finest)) - answer, float(max(high, coarsest)) - answer

    lo, hi = reach(draws)
    lo, hi = -np.hypot(lo, rule.usual_error), np.hypot(hi, rule.usual_error)
    # Nothing was asked beyond the ends.
    lo, hi = max(lo, np.log2(scales[0]) - answer), min(hi, np.log2(scales[-1]) - answer)
    if hi - lo > (JOINED_WIDEST_OCTAVES if joined else WIDEST_OCTAVES):
        return no("wide_interval", f"the places disagree: the interval is {hi - lo:.1f} octaves wide", **found)
    result = ScaleEstimate(
        scale=float(best),
        ci90=(float(best * 2**lo), float(best * 2**hi)),
        slide_mpp=response.slide_mpp,
        abstained=None,
        criterion=rule.name,
        places=len(used),
        seed=seed,
        curve=found["curve"],
        votes=votes,
    )
    # More places can narrow what they differ by, not what the criteria do.
    return Judged(result, scores, flat, reach(of_places))


def _abstain(
    rule: Criterion,
    slide_mpp: float | None,
    why: Abstention,
    *,
    seed: int,
    places: int = 0,
    curve: ScaleCurve | None = None,
    votes: NDArray[np.float64] | None = None,
) -> ScaleEstimate:
    return ScaleEstimate(
        scale=None,
        ci90=None,
        slide_mpp=slide_mpp,
        abstained=why,
        criterion=rule.name,
        curve=curve,
        votes=np.empty(0) if votes is None else votes,
        places=places,
        seed=seed,
    )


def _score_places(response: ScaleResponse, rule: Criterion) -> NDArray[np.float64]:
    """(N, S): the criterion on each place alone, or what the place adds to it."""
    if response.places == 0:
        return np.empty((0, len(response.scales)))
    if rule.rows is not None:
        total: NDArray[np.float64] = rule.rows(response).sum(axis=0)
        return total
    if rule.shares is not None:
        return rule.shares(response)
    return np.stack([rule.score(response.take(np.array([i]))) for i in range(response.places)])


def _decide(response: ScaleResponse, rule: Criterion, score: NDArray[np.float64]) -> float | None:
    return rule.decide(response) if rule.decide is not None else peak(response.scales, score)


def _votes(response: ScaleResponse, rule: Criterion, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) the scale that each place alone would choose; NaN where it would choose none."""
    if rule.decide is None:
        return np.array([peak(response.scales, row) for row in scores])
    one = [_decide(response.take(np.array([i])), rule, scores[i]) for i in range(len(scores))]
    return np.array([np.nan if scale is None else scale for scale in one])


def _bootstrap(
    response: ScaleResponse,
    rule: Criterion,
    scores: NDArray[np.float64],
    votes: NDArray[np.float64],
    pooled: NDArray[np.float64],
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Decisions (B,) and score curves (B, S) on places drawn with replacement."""
    draws = rng.integers(len(scores), size=(RESAMPLES, len(scores)))
    mean_of_places = rule.shares is not None or np.allclose(pooled, scores.mean(axis=0), rtol=1e-5, atol=1e-8)
    if mean_of_places and (rule.decide is None or rule.combine is not None):
        # Most criteria are means over places; their resamples are means of rows, and need no second look at the response.
        curves = scores[draws].mean(axis=1)
        if rule.combine is None:
            return np.array([peak(response.scales, c) for c in curves]), curves
        combined = [rule.combine(v) for v in votes[draws]]
        return np.array([np.nan if d is None else d for d in combined]), curves
    resampled = [response.take(places) for places in draws]
    curves = np.stack([rule.score(r) for r in resampled])
    decided = [_decide(r, rule, c) for r, c in zip(resampled, curves, strict=True)]
    return np.array([np.nan if d is None else d for d in decided]), curves


def _bootstrap_joined(
    rows: NDArray[np.float64], scales: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same of several criteria (K, N, S), drawn as well: which of them weighs how much is as uncertain as which place.

    Weights of criteria are those of the Bayesian bootstrap (Rubin, Annals of Statistics 9, 1981).
    """
    draws = rng.integers(rows.shape[1], size=(RESAMPLES, rows.shape[1]))
    weights = rng.exponential(size=(len(rows), RESAMPLES)) if len(rows) > 1 else np.ones((1, RESAMPLES))
    curves = sum(w[:, None] * part[draws].mean(axis=1) for w, part in zip(weights, rows, strict=True))
    curves = np.asarray(curves / weights.sum(axis=0)[:, None] * len(rows))
    return np.array([peak(scales, c) for c in curves]), curves


def _centred(scales: NDArray[np.float64], curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Curves (N, S) without their means, each scale weighing as much as the octaves it stands for.

    So a search that looked closer at some scales tests the same curve as an even grid does.
    """
    weight = _weight(scales)
    centred: NDArray[np.float64] = (curves - (curves * weight).mean(axis=1, keepdims=True)) * np.sqrt(weight)
    return centred


def _weight(scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """(S,) the octaves that each scale stands for, 1 on average."""
    share = np.gradient(np.log2(scales))
    weight: NDArray[np.float64] = share / share.mean()
    return weight


def _flip_test(curves: NDArray[np.float64], rng: np.random.Generator, resamples: int = 999) -> float:
    """The p-value of (N, S) curves' mean being no more marked than places with nothing in common would give.

    A sign-flip test: each place's centred curve is as likely as its mirror image if the places share no trend. It keeps
    each curve's smoothness over scale, which shuffling the scales would destroy.
    """
    seen = np.square(curves.mean(axis=0)).sum()
    if seen == 0:
        return 1.0
    signs = rng.choice([-1.0, 1.0], size=(resamples, len(curves)))
    chance = np.square(signs @ curves / len(curves)).sum(axis=1)
    return float((1 + (chance >= seen * (1 - 1e-12)).sum()) / (1 + resamples))


def _identifies(response: ScaleResponse, best: float) -> bool:
    """Whether there is more to go by than how sure a classifier is: at `best`, where it is surest, it tells places apart.

    A segmenter always does, what it looks for from what is beside that.
    """
    return response.outputs is None or of_pixels(response) or dispersed(response, best)


def _settled_share(response: ScaleResponse, best: float) -> float:
    """Share of the places whose class a small change of scale does not change; 1 where places have no class."""
    return 1.0 if response.outputs is None or of_pixels(response) else kept(response, best)


def _lacks_structure(guard: ScaleResponse, rule: Criterion, rng: np.random.Generator) -> bool:
    """Whether tiles with their pixels shuffled - the same colours, no structure - would have given the same curve."""
    scrambled = guard.views.get(STRUCTURE_VIEW)
    if scrambled is None:
        return False
    # What a criterion with views of its own would say of a view is not known, and a sum of criteria has other units there; the
    # network's confidence has to do, and only for whether there is structure at all.
    own = rule.rows is None and not set(rule.views) - {STRUCTURE_VIEW}
    if not own and guard.outputs is None:
        return False
    judge = rule if own else find_criterion("confidence")
    seen = _score_places(guard, judge)
    null = _score_places(replace(scrambled, views={STRUCTURE_VIEW: scrambled}), judge)
    finite = np.isfinite(seen).all(axis=1) & np.isfinite(null).all(axis=1)
    if not finite.any():
        return False  # of shuffled tiles the criterion has nothing to say: what it says comes from their arrangement
    added = (seen - null)[finite]  # (N, S)
    # Signed ranks, as Wilcoxon's: a few places where much is added tell less than many where a little is.
    signed = np.sign(added) * stats.rankdata(np.abs(added), axis=1)
    significance = SIGNIFICANCE if rule.rows is None else JOINED_SIGNIFICANCE
    if _flip_test(signed * np.sqrt(_weight(guard.scales)), rng) > significance:
        return True
    return own and bool(np.ptp(added.mean(axis=0)) < STRUCTURE_SHARE * np.ptp(seen[finite].mean(axis=0)))


def _end_reached(scales: NDArray[np.float64], scores: NDArray[np.float64], best: float, *, own_rule: bool) -> str | None:
    """The end of the range, "finest" or "coarsest", at which `best` lies or from which its score does not stand out.

    A paired t test over places, one-sided, at `SIGNIFICANCE` shared among the scales that the best was chosen from. Methods
    with a rule of their own do not go by the height of the score, and are only held to not choosing an end.
    """
    octaves = np.log2(scales)
    steps = np.diff(octaves)
    # A search that looked closer at some scales has chosen them: it might have looked that close anywhere.
    candidates = round(float((octaves[-1] - octaves[0]) / steps.min())) + 1
    for end, step, name in ((0, steps[0], "finest"), (-1, steps[-1], "coarsest")):
        if abs(np.log2(best / scales[end])) < step / 2:
            return name
        top = int(np.abs(np.log2(scales / best)).argmin())
        gain = scores[:, top] - scores[:, end]
        if not own_rule and not stats.ttest_1samp(gain, 0, alternative="greater").pvalue < SIGNIFICANCE / candidates:
            return name
    return None


def _joined_end_reached(scales: NDArray[np.float64], best: float) -> str | None:
    """The same of several criteria joined: whether `best` is that end. An interval may well end there.

    The finest end, smooth and surely classified by colour, is where single scores peak without a cause. Joined ones hold a null
    against it, and where the range begins at level 0 or finer it is an answer: that is all there is of the slide.
    """
    octaves = np.log2(scales)
    if np.log2(best) > octaves[-1] - (octaves[-1] - octaves[-2]) / 2:
        return "coarsest"
    if scales[0] > FINEST and np.log2(best) < octaves[0] + (octaves[1] - octaves[0]) / 2:
        return "finest"
    return None


def _indistinct(
    scales: NDArray[np.float64], pooled: NDArray[np.float64], best: float, *, own_rule: bool
) -> tuple[float, float]:
    """The octaves around `best` that the criterion cannot tell from it, however alike the places are.

    A parabola through the scales of the grid is good to about a quarter of a step. A rule of its own votes for scales of the
    grid, and so is good to half a step. Scales that tie at the top are all as good as their middle.
    """
    octaves, answer = np.log2(scales), float(np.log2(best))
    nearest = int(np.abs(octaves - answer).argmin())
    step = float(np.diff(octaves[max(nearest - 1, 0) : nearest + 2]).max())
    lo, hi = answer - step / 4, answer + step / 4
    if own_rule:
        return answer - step / 2, answer + step / 2
    tied = octaves[pooled == pooled.max()]
    return (min(lo, float(tied[0])), max(hi, float(tied[-1]))) if len(tied) > 1 else (lo, hi)


def _two(split: tuple[float, float], slide_mpp: float | None) -> str:
    low, high = (_named(2**octave, slide_mpp) for octave in split)
    return f"two scales are about as good: {low} and {high}"


def _modes(octaves: NDArray[np.float64]) -> tuple[float, float] | None:
    """The two medians, if the resampled answers (B,) fall into two groups far apart."""
    ordered = np.sort(octaves)
    gaps = np.diff(ordered)
    if len(gaps) == 0 or gaps.max() < BIMODAL_OCTAVES:
        return None
    cut = int(gaps.argmax()) + 1
    if min(cut, len(ordered) - cut) < BIMODAL_SHARE * len(ordered):
        return None
    return float(np.median(ordered[:cut])), float(np.median(ordered[cut:]))


def as_record(result: ScaleEstimate) -> dict[str, Any]:
    """What `estimate --json` prints and a store keeps: plain, in µm/px where the slide's is known, else in relative scale."""
    unit = "scale" if result.slide_mpp is None else "mpp"
    factor = 1.0 if result.slide_mpp is None else result.slide_mpp
    curve = None
    if result.curve is not None:
        curve = {unit: _plain(result.curve.scales * factor)}
        curve |= {name: _plain(getattr(result.curve, name)) for name in ("score", "lo", "hi")}
    return {
        "slide": result.slide,
        "mpp": result.mpp,
        "ci90": None if result.ci90 is None else [bound * factor for bound in result.ci90],
        "magnification": result.magnification,
        "scale": result.scale,
        "abstained": None if result.abstained is None else vars(result.abstained),
        "criterion": result.criterion,
        "model": result.model,
        "layers": list(result.layers),
        "places": result.places,
        "forwards": result.forwards,
        "seconds": round(result.seconds, 3),
        "slide_mpp": result.slide_mpp,
        "mpp_source": result.mpp_source,
        "curve": curve,
        "votes": _plain(result.votes * factor),
        "notes": list(result.notes),
        "own_share": result.own_share,
        "registration": None if result.registration is None else registration_record(result.registration),
        "versions": versions(),
        "seed": result.seed,
    }


def _plain(values: NDArray[np.float64]) -> list[float | None]:
    """JSON knows no NaN."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values]


def versions() -> dict[str, str]:
    """Of what the answer depends on."""
    names = ("wsiscale", "torch", "numpy", "openslide-bin", "tiffslide")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
