"""The true µm/px of a slide from its pixels: three opinions side by side, and what they make of the file's own word.

*registration*  the network's answers over scale, laid along its profile of slides of known µm/px (`profile.register`)
*regression*    µm/px read off a middle layer of the network (`regressor.regressed_mpp`; Graziani et al., MAKE 3(2), 2021)
*nuclei*        the size of the haematoxylin's blobs, without any network (`nuclei.nucleus_px`)

They are joined in octaves, each by the inverse of its variance. Where they differ by more than their intervals allow, the joint
interval is widened by as much (Birge, Phys. Rev. 40, 1932). docs/slide-mpp.md has the measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wsiscale.errors import MppError, NoTissueError, OptionError, SlideError
from wsiscale.nuclei import NUCLEUS_SD, NUCLEUS_UM, nucleus_px
from wsiscale.profile import TAG_MARGIN, Profile, beyond, deviation, interval, profile_of, register
from wsiscale.registration import Recalibrated, answers_over_scale
from wsiscale.regressor import ScaleRegressor, regressed_mpp, regressor_of
from wsiscale.tissue import TissueDetector, find_tissue
from wsiscale.types import Abstention, Reader, ScaleResponse, Tissue
from wsiscale.upsampling import Upsampling, find_upsampling
from wsiscale.versions import versions

if TYPE_CHECKING:
    from wsiscale.networks import Network

# Octaves, standard deviation: what the opinions have in common, since all three go by the nuclei of this one tissue. So large
# that the interval is as wide as the largest error of the nine images that methods may be developed on, which is what
# conformal prediction asks for of so few (docs/slide-mpp.md).
SHARED_SD = 0.25
# Of what the network has never seen the other opinions are not to be asked either: they would call noise tissue.
UNKNOWN = ("unlike_bank", "flat", "too_few_places")
WIDEST_OCTAVES = 2.5  # a joint interval that is wider tells a user nothing


@dataclass(frozen=True)
class Opinion:
    """One way of telling the slide's level-0 µm/px."""

    name: str  # registration, regression, nuclei
    mpp: float | None
    ci90: tuple[float, float] | None
    refused: Abstention | None = None


@dataclass(frozen=True)
class SlideMpp:
    """The level-0 µm/px that a slide's pixels speak for, beside what its file says."""

    slide: str
    mpp: float | None
    ci90: tuple[float, float] | None
    verdict: Literal["agrees", "conflicts", "fills in", "abstained"]
    claimed: float | None  # µm/px that the file or the user says, believed or not
    tag: str | None  # where the file says so
    detail: str  # the verdict in a sentence
    abstained: Abstention | None
    opinions: tuple[Opinion, ...]
    upsampling: Upsampling | None  # None without tissue
    model: str
    seconds: float
    seed: int

    @property
    def magnification(self) -> float | None:
        return None if self.mpp is None else 10 / self.mpp


def find_mpp(
    slide: Reader,
    network: Network | Any | None = None,
    *,
    profile: Profile | None = None,
    detector: TissueDetector | str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SlideMpp:
    """The slide's level-0 µm/px from its pixels, compared with its tag, or a named abstention. The tag has no say in it.

    `network` is what `estimate` takes; None is the embedded one. Its card, or `profile`, has to know slides of known µm/px:
    a profile (`wsiscale profile`) or a regressor (`wsiscale probe --fit`). Abstains on slides without tissue, and on those that
    look like nothing the profile knows of. Raises OptionError where the card has neither.
    """
    from wsiscale.networks import load_network

    started = time.perf_counter()
    loaded = load_network(network)
    known, regressor = _known_of(loaded) if profile is None else (profile, None)
    if known is None and regressor is None:
        raise OptionError(
            f"{loaded.name} has neither a profile nor a regressor of its own to tell µm/px by; make one with wsiscale profile "
            "or wsiscale probe --fit from slides of known µm/px, or leave --model out"
        )
    calibration = slide.calibration
    claimed = calibration.claimed if calibration.mpp is None else calibration.mpp
    about: dict[str, Any] = {"slide": slide.source.name, "claimed": claimed, "tag": calibration.tag, "model": loaded.name}
    opinions: tuple[Opinion, ...] = ()
    upsampling = None
    try:
        tissue = find_tissue(slide, detector)
        asked = answers_over_scale(
            slide,
            loaded,
            tissue,
            layers=_watched(known, regressor),
            seed=seed,
            progress=progress,
            device=device,
            batch_size=batch_size,
        )
        upsampling = find_upsampling(slide, tissue, seed=seed)
        opinions = (_registration(known, asked, seed), *_regression(regressor, asked), _nuclei(slide, tissue, seed))
        joint, why = _joined(opinions)
    except NoTissueError as error:
        joint, why = None, Abstention("no_tissue", str(error))
    except SlideError as error:
        if error.code != "READ_FAILED":
            raise
        joint, why = None, Abstention("damaged", str(error))
    mpp, ci90 = (None, None) if joint is None else joint
    verdict, detail = _compared(mpp, ci90, claimed, why)
    return SlideMpp(
        mpp=mpp,
        ci90=ci90,
        verdict=verdict,
        detail=detail,
        abstained=why,
        opinions=opinions,
        upsampling=upsampling,
        seconds=time.perf_counter() - started,
        seed=seed,
        **about,
    )


def with_mpp_from_pixels(slide: Reader, found: SlideMpp) -> Reader:
    """The slide with the µm/px of its pixels, unless its tag agrees with them. Raises MppError where there is none."""
    if found.verdict == "agrees":
        return slide
    if found.mpp is None or found.ci90 is None:
        raise MppError(f"no µm/px from the pixels of {found.slide}: {found.detail}; give --slide-mpp, or ask in relative scale")
    low, high = found.ci90
    detail = f"{found.mpp:.3g} µm/px ({low:.3g} to {high:.3g}) by the pixels; {found.detail}"
    given = replace(slide.calibration, mpp=found.mpp, source="estimated", verdict="trusted", reasons=("pixels",))
    return Recalibrated(slide, replace(given, detail=detail))


def _registration(profile: Profile | None, asked: ScaleResponse, seed: int) -> Opinion:
    if profile is None:
        return Opinion("registration", None, None, Abstention("no_profile", "the network's card has no profile"))
    found = register(profile, asked, seed=seed)
    return Opinion("registration", found.mpp, found.ci90, found.refused)


def _known_of(network: Network) -> tuple[Profile | None, ScaleRegressor | None]:
    """What the network's card knows of µm/px, where that was made of these weights and this size of tiles."""
    from wsiscale.networks import network_digest

    def own(made: Profile | ScaleRegressor | None) -> bool:
        return made is not None and made.network in (None, digest) and made.tile_size in (None, network.tile_size)

    digest = network_digest(network)
    profile, regressor = profile_of(network.card), regressor_of(network.card)
    return profile if own(profile) else None, regressor if own(regressor) else None


def _watched(profile: Profile | None, regressor: ScaleRegressor | None) -> Sequence[str]:
    """The layers that both go by; the head's input is always there."""
    names = [] if profile is None else [name for name, _ in profile.layers if name != "features"]
    return list(dict.fromkeys([*names, *([] if regressor is None else [regressor.layer])]))


def _regression(regressor: ScaleRegressor | None, asked: ScaleResponse) -> tuple[Opinion, ...]:
    if regressor is None:
        return ()
    found = regressed_mpp(asked, regressor)
    if found is None:
        low, high = regressor.mpp_range
        detail = f"no scale of the slide looks to be within {low:.3g} to {high:.3g} µm/px, which the regressor knows"
        return (Opinion("regression", None, None, Abstention("out_of_range", detail)),)
    return (Opinion("regression", found.mpp, found.ci90),)


def _nuclei(slide: Reader, tissue: Tissue, seed: int) -> Opinion:
    diameter = nucleus_px(slide, tissue, seed=seed)
    if diameter is None:
        return Opinion("nuclei", None, None, Abstention("too_few_blobs", "there are too few blobs of haematoxylin"))
    mpp = NUCLEUS_UM / diameter
    return Opinion("nuclei", mpp, interval(mpp, NUCLEUS_SD))


def _joined(opinions: Sequence[Opinion]) -> tuple[tuple[float, tuple[float, float]] | None, Abstention | None]:
    """(µm/px, 90 % interval) of those that answer, or why there is none."""
    for opinion in opinions:
        if opinion.refused is not None and opinion.refused.reason in UNKNOWN:
            return None, opinion.refused
    answers = [o for o in opinions if o.mpp is not None]
    if all(o.name == "nuclei" for o in answers):  # size alone does not know tissue from anything else
        first = next((o.refused for o in opinions if o.refused is not None), None)
        return None, first or Abstention("nothing_known", "no opinion that knows tissue")
    at = np.array([np.log2(o.mpp) for o in answers if o.mpp is not None])
    sd = np.array([deviation(o.ci90) for o in answers if o.ci90 is not None])
    weight = sd**-2.0
    middle = float(np.average(at, weights=weight))
    birge = max(1.0, float(np.sum(weight * (at - middle) ** 2)) / max(len(at) - 1, 1)) ** 0.5
    joint = interval(2**middle, float(np.hypot(birge * weight.sum() ** -0.5, SHARED_SD)))
    if np.log2(joint[1] / joint[0]) > WIDEST_OCTAVES:
        said = ", ".join(f"{o.name} {o.mpp:.3g}" for o in answers)
        return None, Abstention("opinions_disagree", f"the ways to tell contradict each other: {said} µm/px")
    return (2**middle, joint), None


def _compared(
    mpp: float | None, ci90: tuple[float, float] | None, claimed: float | None, why: Abstention | None
) -> tuple[Literal["agrees", "conflicts", "fills in", "abstained"], str]:
    if mpp is None or ci90 is None:
        return "abstained", "" if why is None else f"{why.reason}, {why.detail}"
    if claimed is None:
        return "fills in", "nothing else is known of the slide's µm/px"
    if claimed > 0 and beyond(claimed, ci90) <= TAG_MARGIN:
        return "agrees", f"with the {claimed:.4g} µm/px that is said"
    octaves = f", {np.log2(mpp / claimed):+.1f} octaves away" if claimed > 0 else ""
    return "conflicts", f"with the {claimed:.4g} µm/px that is said{octaves}"


def as_record(found: SlideMpp) -> dict[str, Any]:
    """What `mpp --json` prints: plain, in µm/px."""
    return {
        "slide": found.slide,
        "mpp": found.mpp,
        "ci90": None if found.ci90 is None else list(found.ci90),
        "magnification": found.magnification,
        "verdict": found.verdict,
        "detail": found.detail,
        "claimed": found.claimed,
        "tag": found.tag,
        "abstained": None if found.abstained is None else vars(found.abstained),
        "opinions": [
            {
                "name": o.name,
                "mpp": o.mpp,
                "ci90": None if o.ci90 is None else list(o.ci90),
                "refused": None if o.refused is None else vars(o.refused),
            }
            for o in found.opinions
        ],
        "upsampling": None if found.upsampling is None else vars(found.upsampling),
        "model": found.model,
        "seconds": round(found.seconds, 3),
        "versions": versions("torch", "numpy", "openslide-bin", "tiffslide"),
        "seed": found.seed,
    }
