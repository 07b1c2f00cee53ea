"""The adaptive search answers as the full grid does, at a part of its cost, and abstains where that abstains."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

import wsiscale as ws
from wsiscale.criteria import Criterion, find_criterion
from wsiscale.errors import OptionError
from wsiscale.geometry import scale_grid
from wsiscale.judging import _weight, estimate_response, judged
from wsiscale.responses import at_scales, merge_responses, without_view
from wsiscale.search import STRUCTURE_VIEW, Searched, adaptive
from wsiscale.testing import planted_network, planted_slide
from wsiscale.testing.responses import noise_response, planted_response
from wsiscale.types import ScaleResponse

SCALES = scale_grid(0.5, 16)
PLACES = 64


def asked_of(response: ScaleResponse, seed: int = 0) -> ScaleResponse:
    """Answers as a network would give them: of one kind of layer less, and with shuffled tiles that say nothing."""
    shuffled = noise_response(seed=1000 + seed, scales=SCALES, places=response.places)
    bare = {"layers": {}, "stages": (), "batchnorm": {}}
    views = {name: replace(view, **bare) for name, view in {**response.views, STRUCTURE_VIEW: shuffled}.items()}
    return replace(response, views=views, **bare)


def searched(
    response: ScaleResponse, *, criterion: str = "confidence", precision: float = 0.1, refine: bool = True, seed: int = 0
) -> tuple[Searched, float]:
    """What the search finds in a response that is all there already, and the share of it that it asked for."""
    asked = 0

    def ask(places: Any, scales: Any, guarded: bool) -> ScaleResponse:
        nonlocal asked
        asked += len(places) * len(scales) * (2 if guarded else 1)
        part = at_scales(response.take(places), scales)
        return part if guarded else without_view(part, STRUCTURE_VIEW)

    judge = partial(judged, rule=find_criterion(criterion), seed=seed)
    found = adaptive(
        ask,
        lambda part, guard: judge(part, guard=guard),
        response.scales,
        places=response.places,
        precision=precision,
        guarded=True,
        refine=refine,
    )
    return found, asked / (response.places * len(response.scales) * 2)


def octaves(a: float | None, b: float | None) -> float:
    assert a is not None
    assert b is not None
    return abs(float(np.log2(a / b)))


def two_kinds(share: float, seed: int) -> ScaleResponse:
    """A slide of which a share of the places is best at 1.4, the rest at 6."""
    fine = planted_response(1.4, seed=seed, scales=SCALES, places=round(PLACES * share))
    coarse = planted_response(6.0, seed=seed + 1, scales=SCALES, places=PLACES - fine.places)
    bare = [replace(part, features=None, head_weight=None, head_bias=None) for part in (fine, coarse)]
    return merge_responses(bare[0], bare[1], along="places").take(np.random.default_rng(seed).permutation(PLACES))


@pytest.mark.parametrize("criterion", ["confidence", "consensus"])
def test_the_answer_is_that_of_the_full_grid_at_less_than_a_quarter_of_its_forward_passes(criterion: str) -> None:
    away, cost = [], []
    for seed, (scale, spread) in enumerate([(0.9, 0.1), (1.4, 0.3), (2.1, 0.1), (3.3, 0.2), (5.2, 0.4), (8.0, 0.1)]):
        planted = planted_response(scale, seed=seed, scales=SCALES, places=PLACES, spread=spread, everything=True)
        response = asked_of(planted, seed)
        full = estimate_response(response, criterion, seed=seed)
        found, share = searched(response, criterion=criterion, seed=seed)
        away.append(octaves(found.estimate.scale, full.scale))
        cost.append(share)

    assert max(away) <= 0.1, np.round(away, 3)
    assert np.mean(cost) <= 0.15, np.round(cost, 3)
    assert max(cost) <= 0.35, np.round(cost, 3)


def test_places_that_differ_more_get_more_of_them_until_the_interval_is_as_narrow_as_asked() -> None:
    alike, mixed = (
        asked_of(planted_response(2.0, seed=3, scales=SCALES, places=PLACES, spread=spread)) for spread in (0.05, 0.35)
    )

    (quick, _), (long, _), (rough, _) = searched(alike), searched(mixed), searched(mixed, precision=0.4)

    assert quick.response.places < long.response.places
    assert rough.response.places < long.response.places
    assert long.estimate.ci90 is not None
    assert long.response.places == PLACES or octaves(*long.estimate.ci90) <= 0.2


@pytest.mark.parametrize("kind", ["white", "walk"])
def test_noise_abstains_and_is_not_looked_at_any_closer(kind: Any) -> None:
    reasons = []
    for seed in range(6):
        found, share = searched(asked_of(noise_response(seed=seed, scales=SCALES, places=PLACES, kind=kind), seed), seed=seed)
        reasons.append(found.estimate.abstained and found.estimate.abstained.reason)
        assert share <= (0.2 if kind == "white" else 0.55)

    assert None not in reasons, Counter(reasons)


@pytest.mark.parametrize("share", [0.5, 0.6])
def test_two_kinds_of_tissue_are_not_taken_for_one_because_few_places_were(share: float) -> None:
    for seed in range(4):
        response = asked_of(two_kinds(share, seed), seed)
        full, (found, _) = estimate_response(response, "confidence", seed=seed), searched(response, seed=seed)

        assert (found.estimate.abstained is None) == (full.abstained is None), (seed, full.abstained, found.estimate.scale)


def test_places_of_the_other_kind_keep_the_search_from_ending_early_though_they_were_few_at_first() -> None:
    response = two_kinds(0.6, 0)
    fine = np.flatnonzero(estimate_response(response, "confidence").votes < 3)
    coarse = np.setdiff1d(np.arange(PLACES), fine)
    unlucky = response.take(np.concatenate([fine[:13], coarse[:3], coarse[3:], fine[13:]]))

    found, _ = searched(asked_of(unlucky))

    assert found.response.places == PLACES


@pytest.mark.parametrize("scale", [0.5, 16.0])
def test_an_optimum_at_the_end_of_the_range_is_told_early(scale: float) -> None:
    found, share = searched(asked_of(planted_response(scale, seed=2, scales=SCALES, places=PLACES)))

    assert found.estimate.abstained is not None
    assert found.estimate.abstained.reason == "boundary_optimum"
    assert share < 0.15


def test_a_curve_of_colours_alone_is_refused_though_the_guard_is_small() -> None:
    response = planted_response(2.0, seed=5, scales=SCALES, places=PLACES)
    again = response.take(np.random.default_rng(0).permutation(PLACES))

    found, _ = searched(replace(response, views={STRUCTURE_VIEW: again}))

    assert found.estimate.abstained is not None
    assert found.estimate.abstained.reason == "no_structure"


def test_a_rule_that_needs_an_even_grid_gets_one() -> None:
    response = asked_of(planted_response(3.0, seed=7, scales=SCALES, places=PLACES, spread=0.02))

    found, share = searched(response, criterion="penkin2023", refine=False)

    assert np.array_equal(found.response.scales, SCALES)
    assert octaves(found.estimate.scale, estimate_response(response, "penkin2023").scale) <= 0.1
    assert share < 0.6


def test_an_interval_is_no_narrower_than_the_criterion_can_tell() -> None:
    response = planted_response(3.0, seed=7, scales=SCALES, places=PLACES, spread=0.0, noise=0.0)
    step = octaves(SCALES[1], SCALES[0])
    assert response.outputs is not None
    flat_top = np.minimum(response.outputs.confidence, response.outputs.confidence[:, 18:23].min())
    saturated = replace(response, outputs=replace(response.outputs, confidence=flat_top))

    peaked, voted, plateau = (
        estimate_response(r, c) for r, c in ((response, "confidence"), (response, "penkin2023"), (saturated, "confidence"))
    )

    for found, width in ((peaked, step / 2), (voted, step), (plateau, 4 * step)):
        assert found.ci90 is not None
        assert octaves(*found.ci90) >= width - 1e-9


def test_an_uneven_grid_is_judged_as_the_even_one_that_it_is_a_part_of() -> None:
    # Noise looked at closely in one place only must not weigh more there.
    uneven = np.union1d(np.arange(0, len(SCALES), 4), np.arange(10, 20))
    flat = [estimate_response(at_scales(noise_response(seed=s, scales=SCALES, places=32), uneven)) for s in range(20)]
    planted = planted_response(2.3, seed=1, scales=SCALES, places=32)

    assert sum(f.abstained is not None for f in flat) >= 19
    assert octaves(estimate_response(at_scales(planted, uneven)).scale, estimate_response(planted).scale) < 0.03


def test_merging_parts_gives_the_whole() -> None:
    whole = asked_of(planted_response(2.0, seed=1, scales=SCALES, places=10))
    odd, even = np.arange(1, len(SCALES), 2), np.arange(0, len(SCALES), 2)
    few, rest = np.arange(4), np.arange(4, 10)

    by_scale = merge_responses(at_scales(whole, odd), at_scales(whole, even), along="scales")
    by_place = merge_responses(whole.take(few), whole.take(rest), along="places")

    for merged in (by_scale, by_place):
        assert np.array_equal(merged.scales, whole.scales)
        for ours, theirs in ((merged, whole), (merged.views[STRUCTURE_VIEW], whole.views[STRUCTURE_VIEW])):
            assert ours.outputs is not None
            assert theirs.outputs is not None
            assert np.array_equal(ours.outputs.logits, theirs.outputs.logits)
            assert np.array_equal(ours.features, theirs.features)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="same scale"):
        merge_responses(whole, whole, along="scales")
    with pytest.raises(OptionError, match="different scales"):
        merge_responses(at_scales(whole, odd), whole, along="places")


def everywhere(image: np.ndarray) -> np.ndarray:
    return np.ones(image.shape[:2], bool)


def test_from_pixels_the_search_answers_as_the_full_grid_and_says_what_it_cost() -> None:
    slide = planted_slide(6 * 2.3, seed=1, size=900)
    arguments: dict[str, Any] = {"scale_range": (1, 8), "tile_size": 64, "detector": everywhere, "places": 32}
    arguments["criterion"] = "confidence"
    heard: list[tuple[int, int]] = []

    full = ws.estimate(slide, planted_network(6.0), precision=None, **arguments)
    found, again = (
        ws.estimate(slide, planted_network(6.0), progress=lambda *at: heard.append(at), **arguments) for _ in range(2)
    )

    assert full.forwards == 32 * 25 * 2
    assert octaves(found.scale, full.scale) <= 0.1
    assert found.forwards <= full.forwards / 3  # a quarter of 64 places'
    assert found.places < 32
    assert (found.scale, found.ci90, found.forwards) == (again.scale, again.ci90, again.forwards)
    assert heard[-1] == (found.forwards, found.forwards)


def test_a_scale_is_asked_from_the_same_level_whichever_others_are_asked_with_it() -> None:
    pixels = planted_slide(12.0, seed=3, size=768).read(level=0, y=0, x=0, height=768, width=768)
    coarser = np.full((192, 192, 3), 200, np.uint8)  # a level that shows another picture altogether
    slide = ws.ArrayReader((pixels, coarser))
    arguments: dict[str, Any] = {"scale_range": (1, 8), "tile_size": 64, "detector": everywhere, "places": 20}
    arguments["criterion"] = "confidence"

    full, found = (ws.estimate(slide, planted_network(6.0), precision=p, **arguments) for p in (None, 0.1))

    assert full.abstained is None
    assert octaves(found.scale, full.scale) <= 0.1


def test_a_criterion_is_asked_for_every_scale_unless_it_says_that_it_takes_each_by_itself() -> None:
    slide = planted_slide(6 * 2.3, seed=1, size=900)
    seen: list[int] = []

    def score(response: ScaleResponse) -> np.ndarray:
        seen.append(len(response.scales))
        assert response.outputs is not None
        return response.outputs.confidence.mean(axis=0)

    for pointwise in (False, True):
        seen.clear()
        rule = Criterion("mine", score, pointwise=pointwise)
        ws.estimate(
            slide, planted_network(6.0), criterion=rule, scale_range=(1, 8), tile_size=64, detector=everywhere, places=16
        )
        assert (max(seen) == 25) is not pointwise


def test_a_precision_of_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="octaves, above 0"):
        ws.estimate(planted_slide(12.0, seed=0, size=400), planted_network(6.0), precision=0.0)


def test_a_scale_weighs_as_much_as_the_octaves_that_it_stands_for() -> None:
    assert np.allclose(_weight(SCALES), 1)
    uneven = _weight(SCALES[[0, 4, 8, 9, 10, 11, 12, 16]])
    assert uneven[1] / uneven[3] == pytest.approx(4)
    assert uneven.mean() == pytest.approx(1)
