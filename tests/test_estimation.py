"""The estimate finds what was planted, moves with it, and says nothing where there is nothing to say."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from wsiscale.criteria import CRITERIA, peak
from wsiscale.estimation import as_record
from wsiscale.geometry import scale_grid
from wsiscale.judging import estimate_response
from wsiscale.testing.responses import noise_response, planted_response
from wsiscale.types import ScaleResponse

SCALES = scale_grid(0.5, 16)
PLANTED = np.exp2(np.linspace(-0.3, 3.3, 20))  # the true scale of each seed, spread over the range


def octaves(a: float, b: float) -> float:
    return abs(float(np.log2(a / b)))


def test_a_planted_optimum_is_found_wherever_it_is() -> None:
    errors = []
    for seed, scale in enumerate(PLANTED):
        found = estimate_response(planted_response(float(scale), seed=seed, scales=SCALES), seed=seed)
        assert found.abstained is None, (scale, found.abstained)
        assert found.scale is not None
        errors.append(octaves(found.scale, float(scale)))

    assert max(errors) <= 0.1, np.round(errors, 3)


def test_the_interval_holds_the_planted_optimum_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(60):
        scale = float(PLANTED[4 + seed % 12])  # clear of the ends, where it would abstain
        found = estimate_response(planted_response(scale, seed=100 + seed, scales=SCALES, spread=0.4), seed=seed)
        assert found.ci90 is not None
        held += found.ci90[0] <= scale <= found.ci90[1]

    assert 0.8 <= held / 60 <= 1.0


@pytest.mark.parametrize("kind", ["white", "walk"])
def test_noise_gives_no_estimate(kind: Literal["white", "walk"]) -> None:
    silent = 0
    for seed in range(20):
        found = estimate_response(noise_response(seed=seed, scales=SCALES, kind=kind, everything=True), seed=seed)
        silent += found.abstained is not None

    assert silent >= 19


# Segmenters and cards with training tiles have their own tests.
@pytest.mark.parametrize("criterion", sorted(CRITERIA.keys() - {"object_size", "reference"}))
def test_more_or_other_places_of_the_same_kind_move_no_method_off_its_scale(criterion: str) -> None:
    response = planted_response(2.0, seed=1, scales=SCALES, places=24, everything=True)
    order = np.random.default_rng(0).permutation(24)

    found, shuffled = (estimate_response(r, criterion) for r in (response, response.take(order)))

    assert found.curve is not None
    assert shuffled.curve is not None
    assert np.allclose(found.curve.score, shuffled.curve.score)
    assert (found.scale is None) == (shuffled.scale is None)


def test_a_peak_at_the_end_of_the_range_is_not_an_optimum() -> None:
    for scale, end in ((0.5, "finest"), (16.0, "coarsest")):
        found = estimate_response(planted_response(scale, seed=2, scales=SCALES), "confidence")
        assert found.abstained is not None
        assert found.abstained.reason == "boundary_optimum"
        assert end in found.abstained.detail


def test_joined_criteria_take_the_finest_there_is_for_an_answer_and_no_other_end() -> None:
    at_the_finest = planted_response(1.0, seed=2, scales=SCALES[SCALES >= 1], everything=True)
    cut_off = planted_response(2.0, seed=2, scales=SCALES[SCALES >= 2], everything=True)
    at_the_coarsest = planted_response(16.0, seed=2, scales=SCALES, everything=True)

    answer, *none = [estimate_response(response) for response in (at_the_finest, cut_off, at_the_coarsest)]

    assert answer.scale == pytest.approx(1.0, rel=0.05)
    assert [found.abstained and found.abstained.reason for found in none] == ["boundary_optimum", "boundary_optimum"]


def test_two_equally_good_scales_are_bimodal() -> None:
    fine, coarse = (
        planted_response(1.0, seed=3, scales=SCALES, places=20),
        planted_response(8.0, seed=3, scales=SCALES, places=20),
    )

    found = estimate_response(mixed(fine, coarse))

    assert found.abstained is not None
    assert found.abstained.reason == "bimodal"


def mixed(a: ScaleResponse, b: ScaleResponse) -> ScaleResponse:
    assert a.outputs is not None
    assert b.outputs is not None
    joined = {name: np.concatenate([value, vars(b.outputs)[name]]) for name, value in vars(a.outputs).items()}
    return replace(a, outputs=replace(a.outputs, **joined), features=None, layers={}, stages=())


def test_few_places_and_answers_that_are_no_numbers_give_no_estimate() -> None:
    few = estimate_response(planted_response(2.0, seed=4, scales=SCALES, places=7))
    broken = planted_response(2.0, seed=4, scales=SCALES, places=20)
    assert broken.outputs is not None
    broken.outputs.confidence[:3, 5] = np.nan

    assert few.abstained is not None
    assert few.abstained.reason == "too_few_places"
    found = estimate_response(broken)
    assert found.abstained is not None
    assert found.abstained.reason == "non_finite"


def test_one_broken_place_in_twenty_is_left_out_and_counted() -> None:
    response = planted_response(2.0, seed=4, scales=SCALES, places=20)
    assert response.outputs is not None
    response.outputs.confidence[3, 5] = np.nan

    found = estimate_response(response)

    assert found.places == 19
    assert found.scale is not None
    assert octaves(found.scale, 2.0) < 0.1


@pytest.mark.parametrize("criterion", ["confidence", "consensus"])
def test_a_curve_that_shuffled_tiles_give_too_is_not_structure(criterion: str) -> None:
    reasons = []
    for seed in range(20):
        both = planted_response(2.0, seed=seed, scales=SCALES, places=80)
        response, again = both.take(np.arange(40)), both.take(np.arange(40, 80))
        noise = noise_response(seed=seed, scales=SCALES, places=40)

        found = estimate_response(replace(response, views={"pixel_shuffled": again}), criterion)
        believed = estimate_response(replace(response, views={"pixel_shuffled": noise}), criterion)

        reasons.append(found.abstained and found.abstained.reason)
        assert believed.abstained is None

    assert reasons.count("no_structure") >= 18


def test_any_callable_is_a_criterion() -> None:
    response = planted_response(4.0, seed=8, scales=SCALES)

    found = estimate_response(response, lambda r: r.features.std(axis=2).mean(axis=0))

    assert found.scale is not None
    assert octaves(found.scale, 4.0) < 0.15


def test_the_record_is_in_mpp_where_the_slide_has_one_and_in_scale_where_not() -> None:
    response = planted_response(2.0, seed=9, scales=SCALES)
    known, unknown = (as_record(estimate_response(replace(response, slide_mpp=mpp))) for mpp in (0.25, None))

    assert known["mpp"] == pytest.approx(0.5, rel=0.1)
    assert known["magnification"] == pytest.approx(20, rel=0.1)
    assert known["ci90"][0] < known["mpp"] < known["ci90"][1]
    assert known["curve"]["mpp"][0] == pytest.approx(0.125)
    assert unknown["mpp"] is None
    assert unknown["magnification"] is None
    assert unknown["scale"] == pytest.approx(2, rel=0.1)
    assert unknown["curve"]["scale"][0] == pytest.approx(0.5)
    wanted = "slide mpp ci90 magnification scale abstained criterion model layers places forwards seconds slide_mpp mpp_source"
    assert set(f"{wanted} curve votes versions seed".split()) <= set(known)


def test_the_same_seed_gives_the_same_answer() -> None:
    response = planted_response(2.0, seed=10, scales=SCALES)

    assert as_record(estimate_response(response, seed=3)) == as_record(estimate_response(response, seed=3))


def test_refinement_is_finer_than_the_grid() -> None:
    true = 2.07
    score = -np.square(np.log2(SCALES / true))

    assert peak(SCALES, score) == pytest.approx(true, rel=1e-6)
