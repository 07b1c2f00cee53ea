"""The scale at which a network works best on a slide: joins the stages, and knows when not to answer."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria import (
    Criterion,
    default_criterion,
    find_criterion,
)
from wsiscale.errors import ModelError, NoTissueError, OptionError, ScaleError, StoreError
from wsiscale.geometry import level_for, mpp_error, scale_grid
from wsiscale.judging import FINEST, abstain, judged, named
from wsiscale.places import default_places, sample_places
from wsiscale.profile import (
    Profile,
    Registration,
    load_profile,
    profile_digest,
    profile_of,
    registration_of,
    registration_record,
    settle,
)
from wsiscale.registration import around_damage, calibrated, registered
from wsiscale.responses import SavedResponse
from wsiscale.search import STRUCTURE_VIEW, Judged, Searched, adaptive, full_grid
from wsiscale.stacks import scale_stack
from wsiscale.tissue import TissueDetector, find_tissue
from wsiscale.training_tiles import referring
from wsiscale.types import (
    Abstention,
    Reader,
    ScaleEstimate,
    ScaleResponse,
    ScaleStack,
)
from wsiscale.versions import versions

if TYPE_CHECKING:
    from wsiscale.networks import Network

T = TypeVar("T")

MPP_RANGE = (0.125, 4.0)  # from finer than any scanner to the gland
SCALE_RANGE = (1.0, 16.0)  # where the slide's µm/px is unknown: four octaves from level 0
PER_OCTAVE = 8
PRECISION = 0.1  # octaves

# A slide that does not look like the profile's slides, or cannot be compared with them, is none that the profile knows of.
UNKNOWN_TO_PROFILE = ("unlike_bank", "flat", "too_few_places", "too_few_scales")

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
    answered: Callable[[SavedResponse], None] | None = None,
) -> ScaleEstimate:
    """The scale at which `network` works best on the tissue of `slide`, or a named abstention.

    `network` is a Network, an nn.Module, or anything `load_network` takes; None is the embedded one. Without a `criterion` it
    goes by the training tiles in the network's card where there are any, else by `criteria.DEFAULT_CRITERION`. The range is in
    µm/px (`mpp_range`) or relative to level 0 (`scale_range`); a slide without µm/px is worked in relative scale. The range is
    clipped to what the slide holds, which `notes` says.

    Without `places` it is `default_places` of the tile size, at most. The search is coarse to fine, and stops adding places
    once the 90 % interval is within `precision` octaves on either side of the answer; with None every one of `places` is
    looked at at every scale. `keep` writes what the network answered to a folder; `reuse` reads it back and asks the network
    nothing. With `overwrite` `keep` replaces an older one. `answered` hears what the network answered, and where, before it is
    let go; not where there is no tissue to ask about.

    `profile` is the network's memory of other slides (docs/profiles.md): a Profile, a card that holds one, None for none, or
    "auto", the one in the network's own card if it is of this network, tile size and criterion. The slide is registered to it,
    and the answer is its optimum and the slide's own curve, weighed; `registration`, `own_share` and `notes` tell. A slide
    that does not look like the profile's has its own curve alone. The tag is gone by where there is one, unless `trust_tag`
    is False; without one the µm/px is the registration's (`mpp_source` "estimated"). A `scale_range` asks without a profile.

    Raises MppError where the slide's µm/px is implausible and no `scale_range` is given, ModelError before any work where
    the network cannot take a tile, and StoreError (MISMATCH) where `reuse` is of another slide, network or options.
    """
    from wsiscale.analyzer import respond
    from wsiscale.networks import load_network

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
            registration, asked = registered(
                slide, loaded, known, tissue, seed=seed, device=device, batch_size=batch_size, progress=progress
            )
    slide = calibrated(slide, registration, trust_tag=trust_tag)
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
        nothing = abstain(rule, slide.pyramid.mpp, Abstention("no_tissue", str(error)), seed=seed)
        return replace(nothing, seconds=time.perf_counter() - started, **about)
    scales = scale_grid(lo, hi, per_octave=per_octave)
    # Of a part of the scales too, all tiles come from the level that suits the finest of all.
    stacked = partial(
        scale_stack, slide, size=size, max_upsample=max_upsample, level=level_for(slide.pyramid, float(scales[0]))
    )

    def ask(centers: NDArray[np.float64], some: NDArray[np.intp], columns: NDArray[np.intp], guarded: bool) -> ScaleResponse:
        nonlocal asked
        views = tuple(dict.fromkeys((*rule.views, STRUCTURE_VIEW))) if guarded else rule.views
        count, before = len(some) * len(columns) * (1 + len(views)), asked
        heard = None if progress is None else lambda done, _: progress(before + done, before + count)
        stack = stacked(centers[some], scales=scales[columns])
        answer = respond(loaded, stack, views=views, layers=rule.layers, device=device, batch_size=batch_size, progress=heard)
        asked += count
        return answer

    def judge(response: ScaleResponse, guard: ScaleResponse | None) -> Judged:
        return judged(response, rule, guard=guard, seed=seed)

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

        def searched(centers: NDArray[np.float64]) -> Searched:
            # Where the criterion itself sees the shuffled tiles, it has them at every place and scale.
            how: dict[str, Any] = {"places": len(centers), "guarded": STRUCTURE_VIEW not in rule.views}
            if precision is None:
                return full_grid(partial(ask, centers), judge, scales, **how)
            # A rule of its own, or a score that looks at neighbouring scales, means the grid that it was given to be even.
            refine = rule.pointwise and rule.decide is None
            return adaptive(partial(ask, centers), judge, scales, precision=precision, refine=refine, **how)

        found, centers, damage = around_damage(searched, partial(stacked, scales=scales), centers)
        about["notes"] += damage
    if keep is not None:
        from wsiscale.store import write_response

        if known is not None and registration is not None:
            made_of["registration"] = {"profile": profile_digest(known), **registration_record(registration)}
        write_response(keep, SavedResponse(found.response, centers, found.guard, made_of), overwrite=overwrite)
    if answered is not None:
        answered(SavedResponse(found.response, centers, found.guard, made_of))
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


def _kept_registration(saved: SavedResponse, profile: Profile) -> Registration | None:
    """The registration that was kept with the answers, if it was to this profile."""
    record = saved.about.get("registration")
    return registration_of(record) if record is not None and record["profile"] == profile_digest(profile) else None


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
    beyond = f"{named(answer.scale, own.slide_mpp)} by its profile, {name} than the range, which ends at"
    # Where the slide has no finer, its finest is the best there is.
    if answer.ci90[0] <= end <= answer.ci90[1] or (end == lo and lo <= FINEST):
        note = f"the network works best at {beyond} {named(end, own.slide_mpp)}: this is that end"
        return replace(settled, scale=end, ci90=(min(answer.ci90[0], end), max(answer.ci90[1], end)), notes=(*notes, note))
    why = Abstention("boundary_optimum", f"the network works best at {beyond} {named(end, own.slide_mpp)}")
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
        notes.append(f"the range starts at {named(finest, mpp)}, the slide's finest within max_upsample {max_upsample:g}")
        lo = finest
    _, _, height, width = slide.pyramid.scanned
    coarsest = min(height, width) / size
    if hi > coarsest:
        notes.append(f"the range ends at {named(coarsest, mpp)}, where a tile of {size} px is as wide as the slide")
        hi = coarsest
    if hi < lo * 2**0.5:
        raise ScaleError(
            f"the slide, {height} x {width} px, and the range leave less than half an octave for tiles of {size} px "
            f"({named(lo, mpp)} to {named(hi, mpp)}); use a wider range, a smaller --tile-size, or --max-upsample"
        )
    return lo, hi, tuple(notes)


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
        "versions": versions("torch", "numpy", "openslide-bin", "tiffslide"),
        "seed": result.seed,
    }


def _plain(values: NDArray[np.float64]) -> list[float | None]:
    """JSON knows no NaN."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values]
