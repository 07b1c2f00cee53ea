"""Slide x network x profile -> the slide's true µm/px: asks the network everywhere, and goes around what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import SlideError
from wsiscale.places import default_places, sample_places
from wsiscale.profile import MIN_OVERLAP, STEP, Profile, Registration, refusal, register
from wsiscale.stacks import scale_stack
from wsiscale.types import Calibration, Pyramid, Reader, ScaleResponse, ScaleStack, SlideSource, Tissue

if TYPE_CHECKING:
    from wsiscale.networks import Network

T = TypeVar("T")

# What a slide is asked: from level 0 on, whatever its tag says.
REGISTRATION_SHARE = 3 / 8  # of the places that a network of its tile size is asked about
REGISTRATION_COARSEST = 16.0  # level-0 px per px
LEAST_READABLE = 0.5  # of the places, on a damaged slide


def registered(
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
    claimed = slide.pyramid.mpp
    octaves = (MIN_OVERLAP - 1) * STEP
    if _coarsest(slide, network) < 2**octaves:
        return refusal("too_few_scales", f"the slide is too small; {octaves:g} octaves are needed", claimed=claimed), 0
    try:
        response = answers_over_scale(slide, network, tissue, seed=seed, progress=progress, **how)
    except SlideError as error:
        if error.code != "READ_FAILED":
            raise
        return refusal("too_few_places", f"the slide is damaged at most of them: {error}", claimed=claimed), 0
    found = register(profile, response, seed=seed)
    return replace(found, claimed=claimed), response.places * len(response.scales)


def answers_over_scale(
    slide: Reader,
    network: Network,
    tissue: Tissue,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None,
    layers: str | Sequence[str] = "stages",
    **how: Any,
) -> ScaleResponse:
    """What the network's layers answer to the slide from level 0 on, up to four octaves, `STEP` apart; without µm/px.

    Raises NoTissueError, and SlideError where most places are damaged. `how` goes to `respond`.
    """
    from wsiscale.analyzer import respond

    coarsest = _coarsest(slide, network)
    count = round(REGISTRATION_SHARE * default_places(network.tile_size))
    centers = sample_places(tissue, count, seed=seed, field=network.tile_size * coarsest)
    scales = np.exp2(STEP * np.arange(max(int(np.log2(coarsest) / STEP + 1e-6), 0) + 1))
    stacked = partial(scale_stack, slide, scales=scales, size=network.tile_size)

    def answered(centers: NDArray[np.float64]) -> ScaleResponse:
        return respond(network, stacked(centers), layers=layers, progress=progress, **how)

    response, _, _ = around_damage(answered, stacked, centers)
    return replace(response, slide_mpp=None)


def _coarsest(slide: Reader, network: Network) -> float:
    _, _, height, width = slide.pyramid.scanned
    return min(REGISTRATION_COARSEST, min(height, width) / network.tile_size)


def around_damage(
    work: Callable[[NDArray[np.float64]], T], stacked: Callable[[NDArray[np.float64]], ScaleStack], centers: NDArray[np.float64]
) -> tuple[T, NDArray[np.float64], tuple[str, ...]]:
    """`work` at the places that can be read, those places, and a note where they are not all.

    The tiles are looked through only once one of them has failed. Raises that SlideError where fewer than half are whole.
    """
    try:
        return work(centers), centers, ()
    except SlideError as error:
        if error.code != "READ_FAILED":
            raise
        stack = stacked(centers)
        whole = np.array([_is_readable(stack, place) for place in range(len(centers))])
        if whole.mean() < LEAST_READABLE:
            raise
    note = f"the slide is damaged at {(~whole).sum()} of {len(whole)} places, which are left out"
    return work(centers[whole]), centers[whole], (note,)


def _is_readable(stack: ScaleStack, place: int) -> bool:
    try:
        stack.images[place].compute(scheduler="synchronous")
    except SlideError:
        return False
    return True


def calibrated(slide: Reader, registration: Registration | None, *, trust_tag: bool) -> Reader:
    """The slide with the µm/px to go by: its tag's where that is trusted, else what its tissue says, if anything."""
    tag = slide.calibration
    if trust_tag and slide.pyramid.mpp is not None:
        return slide
    if registration is not None and registration.mpp is not None and registration.ci90 is not None:
        low, high = registration.ci90
        detail = f"{registration.mpp:.3g} µm/px ({low:.3g} to {high:.3g}) by the tissue, registered to the network's profile"
        found = replace(tag, mpp=registration.mpp, source="estimated", verdict="trusted", reasons=("registered",))
        return Recalibrated(slide, replace(found, detail=detail))
    if slide.pyramid.mpp is None:
        return slide
    distrusted = replace(tag, mpp=None, source="none", verdict="missing", detail="the tag is not to be trusted")
    return Recalibrated(slide, distrusted)


@dataclass(frozen=True)
class Recalibrated:
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
