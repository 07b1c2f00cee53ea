"""Reference slides -> a network's profile: asks the network about each of them, and joins the rest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsiscale.card import DEFAULT_CARD, read_card, shipped_card
from wsiscale.criteria import Criterion, default_criterion, find_criterion
from wsiscale.errors import MppError, NoTissueError, OptionError, ScaleError, SlideError
from wsiscale.estimation import PER_OCTAVE, check_range, fingerprint, range_on
from wsiscale.geometry import level_for, scale_grid
from wsiscale.places import default_places, sample_places
from wsiscale.profile import Profile, lacks, make_profile, usual_error
from wsiscale.readers import open_slide
from wsiscale.responses import SavedResponse
from wsiscale.stacks import scale_stack
from wsiscale.store import read_response, write_response
from wsiscale.tissue import TissueDetector, find_tissue
from wsiscale.types import Reader, ScaleResponse

if TYPE_CHECKING:
    from wsiscale.networks import Network

# A slide further than this beyond what nine out of ten reference slides are off by may have a wrong tag.
DOUBTFUL = 0.25  # octaves


@dataclass(frozen=True)
class References:
    """A profile, and which slides it is made of."""

    profile: Profile
    slides: tuple[str, ...]  # (R,) in the order of the profile's own
    left_out: tuple[tuple[str, str], ...]  # name, and why
    doubtful: tuple[str, ...]  # of `slides`: registered to the others they come out elsewhere; their tags may be wrong

    def sentence(self) -> str:
        """For people."""
        best = self.profile.optimum
        if best is None or self.profile.ci90 is None:
            lines = [f"profile of {len(self.slides)} slides, without an optimum"]
        else:
            lo, hi = self.profile.ci90
            lines = [
                f"profile of {len(self.slides)} slides; the network works best at {best:.3g} µm/px (90 % within {lo:.3g} to "
                f"{hi:.3g}; single slides {self.profile.spread:.2f} octaves from it)"
            ]
        lines += [f"  note: {note}" for note in self.profile.notes]
        lines += [
            f"  note: {name} looks like another µm/px than its own among the others; its tag may be wrong"
            for name in self.doubtful
        ]
        return "\n".join(lines)

    def as_record(self) -> dict[str, Any]:
        """What `profile --json` prints."""
        profile = self.profile
        return {
            "slides": list(self.slides),
            "left_out": [{"slide": name, "reason": why} for name, why in self.left_out],
            "optimum": profile.optimum,
            "ci90": None if profile.ci90 is None else list(profile.ci90),
            "spread": profile.spread,
            "criterion": profile.criterion,
            "tile_size": profile.tile_size,
            "errors": {
                way: {name: _plain(off) for name, off in zip(self.slides, row, strict=True)}
                for way, row in zip(("mean curves", "tiles"), profile.errors, strict=True)
            },
            "doubtful": list(self.doubtful),
            "notes": list(profile.notes),
        }


def profile_slides(
    slides: Iterable[str | os.PathLike[str] | Reader],
    network: Network | Any | None = None,
    *,
    criterion: str | Criterion | Callable[[ScaleResponse], NDArray[np.float64]] | None = None,
    mpp_range: tuple[float, float] | None = None,
    places: int | None = None,
    tile_size: int | None = None,
    max_upsample: float = 1.0,
    detector: TissueDetector | str | None = None,
    reader: str = "auto",
    device: str = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    keep: str | os.PathLike[str] | None = None,
    told: Callable[[str, str | None], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> References:
    """A profile of `network` from unlabelled slides whose µm/px is to be trusted. Slides are files, or open Readers.

    Every slide is asked at every place and scale. One that cannot be read, has no µm/px, no tissue or too few scales is left
    out by name. With `keep`, a folder, each slide's answers are written there, and a later run with the same slide, network
    and options reads them. `told` hears of each slide's name and why it was left out, None where it was not.

    Raises OptionError where fewer than two slides are left, ModelError where the network cannot take a tile.
    """
    from wsiscale.networks import load_network

    loaded = load_network(network, tile_size=tile_size)
    rule = find_criterion(default_criterion(loaded.card) if criterion is None else criterion)
    check_range(mpp_range, None, max_upsample=max_upsample)
    responses: list[ScaleResponse] = []
    names: list[str] = []
    left_out: list[tuple[str, str]] = []
    for slide in slides:
        name = Path(slide).name if isinstance(slide, (str, os.PathLike)) else slide.source.name
        why: str | None
        try:
            with _opened(slide, reader) as opened:
                response = ask_slide(
                    opened,
                    loaded,
                    criterion=rule,
                    mpp_range=mpp_range,
                    places=places,
                    max_upsample=max_upsample,
                    detector=detector,
                    device=device,
                    batch_size=batch_size,
                    seed=seed,
                    keep=keep,
                    progress=progress,
                ).response
            why = lacks(response)
        except (SlideError, MppError, NoTissueError, ScaleError) as error:
            why = str(error)
        if why is None:
            responses.append(response)
            names.append(name)
        else:
            left_out.append((name, why))
        if told is not None:
            told(name, why)
    return join_references(responses, names, loaded, criterion=rule, seed=seed, left_out=left_out)


def join_references(
    responses: Sequence[ScaleResponse],
    names: Sequence[str],
    network: Network,
    *,
    criterion: str | Criterion | Callable[[ScaleResponse], NDArray[np.float64]],
    seed: int = 0,
    left_out: Sequence[tuple[str, str]] = (),
) -> References:
    """The profile of what `network` answered to slides, as `ask_slide` gives it. Raises OptionError for fewer than two."""
    from wsiscale.networks import network_digest

    if len(responses) < 2:
        said = "; ".join(f"{name}: {why}" for name, why in left_out)
        raise OptionError(
            f"a profile needs two slides or more, and there are {len(responses)} to make it of ({said or 'none'})"
        )
    made = make_profile(responses, criterion=criterion, seed=seed)
    profile = replace(made, network=network_digest(network), tile_size=network.tile_size)
    return References(profile, tuple(names), tuple(left_out), _doubtful(profile, names))


def _opened(slide: str | os.PathLike[str] | Reader, reader: str) -> AbstractContextManager[Reader]:
    """What the caller opened the caller closes."""
    return open_slide(slide, reader=reader) if isinstance(slide, (str, os.PathLike)) else nullcontext(slide)


def ask_slide(
    slide: Reader,
    network: Network,
    *,
    criterion: str | Criterion | Callable[[ScaleResponse], NDArray[np.float64]],
    mpp_range: tuple[float, float] | None = None,
    places: int | None = None,
    max_upsample: float = 1.0,
    detector: TissueDetector | str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    keep: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SavedResponse:
    """What the network answers to a reference slide at every place and scale, from `keep` where it is there.

    Raises MppError for a slide without a µm/px, NoTissueError, ScaleError, SlideError.
    """
    from wsiscale.analyzer import respond
    from wsiscale.networks import network_digest

    if slide.pyramid.mpp is None:
        raise MppError(f"no µm/px to trust: {slide.calibration.detail or 'the slide does not say it'}")
    rule, size = find_criterion(criterion), network.tile_size
    lo, hi, _ = range_on(slide, mpp_range, None, size=size, max_upsample=max_upsample)
    count = default_places(size) if places is None else places
    centers = sample_places(find_tissue(slide, detector), count, seed=seed, field=size * hi)
    scales = scale_grid(lo, hi, per_octave=PER_OCTAVE)
    # Stages are what slides are registered by; some criteria look at BatchNorm's inputs too.
    layers = "stages" if rule.layers in ("none", "stages") else "auto"
    level = level_for(slide.pyramid, float(scales[0]))
    stack = scale_stack(slide, centers, scales=scales, size=size, max_upsample=max_upsample, level=level)
    about: dict[str, Any] = {
        "slide": fingerprint(slide, scale_stack(slide, centers[:1], scales=scales[:1], size=size, max_upsample=max_upsample)),
        "network": {"name": network.name, "sha256": network_digest(network), "tile_size": size},
        "options": {"scales": scales.tolist(), "centers": centers.tolist(), "layers": layers, "views": list(rule.views)},
    }
    kept = None if keep is None else kept_answers(keep, about)
    if kept is not None and kept.exists():
        saved = read_response(kept)
        return replace(saved, response=replace(saved.response, slide_mpp=slide.pyramid.mpp))
    response = respond(
        network, stack, views=rule.views, layers=layers, device=device, batch_size=batch_size, seed=seed, progress=progress
    )
    saved = SavedResponse(response, centers, None, about)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_response(kept, saved)
    return saved


def kept_answers(keep: str | os.PathLike[str], about: Mapping[str, Any]) -> Path:
    """Where `ask_slide` keeps the answers that it says this of."""
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    return Path(keep, f"{about['slide']['name']}-{key}.zarr")


def _doubtful(profile: Profile, names: Sequence[str]) -> tuple[str, ...]:
    """Slides that come out elsewhere when registered to the others, whichever way is the better one for this network."""
    row = min((0, 1), key=lambda row: usual_error(profile.errors[row], 0.5))
    off = np.abs(profile.errors[row])
    usual = [usual_error(np.delete(profile.errors[row], r), 0.9) for r in range(len(off))]
    return tuple(name for name, o, u in zip(names, off, usual, strict=True) if np.isfinite(o) and o > u + DOUBTFUL)


def _plain(octaves: float) -> float | None:
    return round(float(octaves), 3) if np.isfinite(octaves) else None


# --- the card ---------------------------------------------------------------------------------------------------------------


def card_fields(network: Network, model: str | None, weights: str | os.PathLike[str] | None, card: Path) -> dict[str, Any]:
    """What a card at `card` has to hold for `--model card` to be the network that `model` and `weights` gave.

    Another card's fields are kept, its paths rewritten for the new place.
    """
    here = card.absolute().parent

    def from_here(path: Path) -> str:
        return os.path.relpath(path.absolute(), here)

    fields: dict[str, Any] = {}
    beside = Path.cwd()  # what relative paths in `fields` start from
    if model is None or model.startswith("card:") or model.endswith(".json"):
        own = DEFAULT_CARD if model is None else shipped_card(model[5:]) if model.startswith("card:") else Path(model)
        fields = {name: value for name, value in read_card(own).items() if name != "profile"}
        beside = own.absolute().parent
        if model is None:
            del fields["weights"]  # the embedded network brings its own, wherever it is installed
    else:
        fields["factory"] = model
    factory = str(fields["factory"])
    if ".py:" in factory or ":" not in factory:
        file, colon, name = factory.rpartition(":") if ":" in factory else (factory, "", "")
        fields["factory"] = from_here(beside / file) + colon + name
    if weights is not None:
        fields["weights"] = from_here(Path(weights))
    elif "weights" in fields:
        fields["weights"] = from_here(beside / fields["weights"])
    return {"name": network.name, **fields, "tile_size": network.tile_size}
