"""A cohort as its own reference: the profile of a network that brings none, made of slides whose µm/px is to be believed.

Some of the cohort's slides are asked at every place and scale, on workers, and what the network answered is kept in
OUT/profile/answers; the profile made of it is OUT/profile.json. Every slide of the cohort is then registered to it while it is
estimated, a reference slide to the profile of the others, and slides that come later need no new profile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiscale.cohort.one_slide import RunOptions, loaded_network, opened_slide, plain_arguments
from wsiscale.cohort.plan import SlideSpec
from wsiscale.criteria import default_criterion, find_criterion
from wsiscale.errors import ModelError, MppError, NoTissueError, ScaleError, SlideError
from wsiscale.profile import Profile

if TYPE_CHECKING:
    from wsiscale.networks import Network

REFERENCES = 24  # slides; more do not register others any better
FEWEST = 5  # of fewer no interval means anything
ANSWERS = Path("profile", "answers")  # below OUT


def profile_path(out: Path) -> Path:
    return out / "profile.json"


def candidates(specs: Sequence[SlideSpec]) -> list[SlideSpec]:
    """The slides in the order in which they are asked to be references: by chance, and the same each time."""
    return sorted(specs, key=lambda spec: hashlib.sha256(spec.id.encode()).hexdigest())


def profile_to_use(options: dict[str, Any], out: str) -> str | None:
    """For a worker: "auto" where the network's card has a profile that fits, the cohort's own where there is one, else None."""
    from wsiscale.networks import network_digest
    from wsiscale.profile import load_profile, profile_of

    asked, network = RunOptions.of(options), loaded_network(RunOptions.of(options))
    criterion = find_criterion(_criterion(asked, network)).name

    def fits(profile: Profile | None) -> bool:
        whose = None if profile is None else (profile.network, profile.tile_size, profile.criterion)
        return whose == (network_digest(network), network.tile_size, criterion)

    if asked.profile == "auto" and fits(profile_of(network.card)):
        return "auto"
    path = profile_path(Path(out))
    try:
        return str(path) if fits(load_profile(path)) else None
    except ModelError:  # none, or a damaged one
        return None


def ask_reference(spec: dict[str, Any], options: dict[str, Any], out: str) -> dict[str, Any]:
    """For a worker: asks the network about a slide everywhere and keeps the answers. Says where, or why it is no reference."""
    from wsiscale.profile import lacks
    from wsiscale.reference_slides import ask_slide, kept_answers

    slide_spec, asked, folder = plain_arguments(spec, options, out)
    network = loaded_network(asked)
    try:
        with opened_slide(slide_spec, asked) as slide:
            if slide.calibration.verdict != "trusted":
                return {"id": slide_spec.id, "why": f"its µm/px is {slide.calibration.verdict}"}
            saved = ask_slide(
                slide,
                network,
                criterion=_criterion(asked, network),
                mpp_range=asked.mpp_range,
                places=asked.places,
                max_upsample=asked.max_upsample,
                detector=asked.detector,
                device=asked.device,
                batch_size=asked.batch_size,
                seed=asked.seed,
                keep=folder / ANSWERS,
            )
    except (SlideError, MppError, NoTissueError, ScaleError) as error:
        return {"id": slide_spec.id, "why": " ".join(str(error).split())}
    return {"id": slide_spec.id, "why": lacks(saved.response), "kept": kept_answers(folder / ANSWERS, saved.about).name}


def make_cohort_profile(references: Sequence[dict[str, Any]], options: dict[str, Any], out: str) -> str:
    """For a worker: the profile of what `ask_reference` kept, into OUT/profile.json. Returns what to say of it.

    Slides that, registered to the others, come out at another µm/px than their own are no references.
    """
    from wsiscale.profile import save_profile
    from wsiscale.reference_slides import join_references
    from wsiscale.store import read_response

    asked, folder = RunOptions.of(options), Path(out)
    network = loaded_network(asked)
    ids = [reference["id"] for reference in references]
    responses = [read_response(folder / ANSWERS / reference["kept"]).response for reference in references]
    how: dict[str, Any] = {"criterion": _criterion(asked, network), "seed": asked.seed}
    made = join_references(responses, ids, network, **how)
    sound = [number for number, name in enumerate(ids) if name not in made.doubtful]
    if FEWEST <= len(sound) < len(ids):  # a wrong tag would be every other slide's yardstick
        ids = [ids[number] for number in sound]
        made = join_references([responses[number] for number in sound], ids, network, **how)
    save_profile(made.profile, profile_path(folder), fields={"name": network.name, "references": ids})
    return made.sentence()


def _criterion(options: RunOptions, network: Network) -> str:
    return default_criterion(network.card) if options.criterion is None else options.criterion
