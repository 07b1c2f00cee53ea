"""The criteria of our own recover what is planted, keep silent on noise, and fail where their docstrings say."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from wsiscale.analyzer import respond
from wsiscale.criteria import (
    CRITERIA,
    Criterion,
    batchnorm_distance,
    batchnorm_tangent,
    batchnorm_trust,
    combined,
    mutual_information,
    peak,
)
from wsiscale.criteria.fingerprint import Standardised, standardised
from wsiscale.criteria.shares import singular_values_without
from wsiscale.errors import OptionError
from wsiscale.geometry import scale_grid
from wsiscale.judging import estimate_response
from wsiscale.networks import load_network
from wsiscale.profile import _scores_of
from wsiscale.responses import at_scales
from wsiscale.testing.responses import noise_response, planted_response, response_of, with_batchnorm, with_views
from wsiscale.types import LayerMoments, Outputs, ScaleResponse

SCALES = scale_grid(0.5, 16)
OCTAVES = np.log2(SCALES)
SEEDS = {"confidence", "penkin2022", "penkin2023", "bagamaev2022"}
OWN = [
    criterion for name, criterion in CRITERIA.items() if name not in {*SEEDS, "object_size", "reference"}
]  # two have tests of their own
FINGERPRINTS = ("batchnorm_distance", "batchnorm_tangent")

ALL = pytest.mark.parametrize("criterion", OWN, ids=lambda c: c.name)
BOTH = pytest.mark.parametrize("name", FINGERPRINTS)
WITH_SHARES = pytest.mark.parametrize("criterion", [c for c in OWN if c.shares is not None], ids=lambda c: c.name)


def score(name: str, response: ScaleResponse) -> NDArray[np.float64]:
    return CRITERIA[name].score(response)


def answer(name: str, response: ScaleResponse) -> float:
    return peak(response.scales, score(name, response))


def off(found: float | None, scale: float) -> float:
    assert found is not None
    return abs(float(np.log2(found / scale)))


def bump(scale: float, width: float = 0.75) -> NDArray[np.float64]:
    return np.exp(-((np.log2(SCALES / scale) / width) ** 2) / 2)


def spread_features(scale: float, *, places: int = 24, channels: int = 12, seed: int = 0) -> ScaleResponse:
    """A feature extractor that tells places apart at `scale`, and gives all the same answer far from it."""
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(places, 1, channels)) * bump(scale)[:, None]
    return replace(noise_response(scales=SCALES), outputs=None, features=np.float32(own + 3), layers={}, stages=())


# ---- every one of them ----


@ALL
def test_a_planted_optimum_is_recovered_wherever_it_lies(criterion: Criterion) -> None:
    for seed, scale in enumerate((1.6, 3.0, 5.0, 10.0)):
        if criterion.name == "effective_rank":
            response = spread_features(scale, seed=seed)
        else:
            response = planted_response(scale, seed=seed, scales=SCALES, everything=True)

        assert off(answer(criterion.name, response), scale) < 0.2


@ALL
def test_what_is_planted_gets_an_estimate(criterion: Criterion) -> None:
    if criterion.name == "effective_rank":
        response = spread_features(4.0)
    else:
        response = planted_response(4.0, seed=2, scales=SCALES, everything=True)

    found = estimate_response(response, criterion)

    assert found.abstained is None, found.abstained
    assert off(found.scale, 4.0) < 0.2


@ALL
@pytest.mark.parametrize("kind", ["white", "walk"])
def test_noise_gives_no_estimate(criterion: Criterion, kind: Literal["white", "walk"]) -> None:
    responses = [noise_response(seed=seed, scales=SCALES, kind=kind, everything=True) for seed in range(6)]

    assert all(estimate_response(response, criterion).abstained is not None for response in responses)


@ALL
def test_the_order_of_places_channels_and_classes_says_nothing(criterion: Criterion) -> None:
    response = planted_response(2.0, places=9, channels=5, classes=3, noise=0.2, everything=True)
    rng = np.random.default_rng(0)

    np.testing.assert_allclose(criterion.score(shuffled(response, rng)), criterion.score(response), rtol=1e-4, atol=1e-6)


def shuffled(response: ScaleResponse, rng: np.random.Generator) -> ScaleResponse:
    order, k, c = rng.permutation(response.places), rng.permutation(5), rng.permutation(3)

    def within(one: ScaleResponse) -> ScaleResponse:
        assert one.outputs is not None
        assert one.features is not None
        assert one.head_weight is not None
        return replace(
            one,
            features=one.features[..., k],
            head_weight=one.head_weight[c][:, k],
            outputs=replace(one.outputs, probabilities=one.outputs.probabilities[..., c], logits=one.outputs.logits[..., c]),
            layers={name: LayerMoments(m.mean[..., k], m.square[..., k]) for name, m in one.layers.items()},
            batchnorm={
                name: replace(norm, mean=norm.mean[k], var=norm.var[k], weight=norm.weight[k], bias=norm.bias[k])
                for name, norm in one.batchnorm.items()
            },
            views={name: within(view) for name, view in one.views.items()},
        )

    return within(response.take(order))


def damaged(response: ScaleResponse, wrong: float) -> ScaleResponse:
    """Place 1 answers `wrong` at scale 4, in every view."""
    for one in (response, *response.views.values()):
        assert one.outputs is not None
        assert one.features is not None
        for values in vars(one.outputs).values():
            values[1, 4] = wrong
        one.features[1, 4] = wrong
    response.layers["norm2"].mean[1, 4, 2] = wrong
    for values in response.agreement.values():
        values[1, 4] = wrong
    return response


@ALL
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_an_answer_that_is_not_finite_gives_no_answer(criterion: Criterion, wrong: float) -> None:
    response = damaged(planted_response(3.0, places=6, scales=SCALES, everything=True), wrong)

    assert not np.isfinite(criterion.score(response)).all()
    assert np.isnan(peak(SCALES, criterion.score(response)))


@ALL
def test_one_broken_place_of_many_is_left_out_and_counted(criterion: Criterion) -> None:
    response = damaged(planted_response(3.0, seed=5, places=24, scales=SCALES, everything=True), np.nan)

    assert estimate_response(response, criterion).places == 23


@ALL
def test_a_network_that_lacks_what_is_needed_is_told_so(criterion: Criterion) -> None:
    bare = ScaleResponse(scales=np.array([1.0, 2, 4]), slide_mpp=None, outputs=None, features=None)

    if criterion.name == "consensus":  # goes by what there is, and here there is nothing
        assert np.isnan(criterion.score(bare)).all()
        return
    with pytest.raises(OptionError, match=f"{criterion.name} "):
        criterion.score(bare)


@pytest.mark.parametrize("name", ["margin_over_null", "confidence_over_null"])
def test_a_view_that_was_not_taken_is_named(name: str) -> None:
    with pytest.raises(OptionError, match=r"views=\('phase_scrambled',\)"):
        score(name, planted_response(3.0))


@ALL
def test_one_scale_or_two_and_one_place_are_no_crash(criterion: Criterion) -> None:
    for scales in (np.array([2.0]), np.array([2.0, 4.0])):
        for places in (1, 3):
            response = noise_response(scales=scales, places=places, everything=True)

            assert criterion.score(response).shape == scales.shape
            if criterion.shares is not None:
                assert criterion.shares(response).shape == (places, len(scales))


@ALL
def test_the_guard_against_colours_works_with_every_criterion(criterion: Criterion) -> None:
    response = planted_response(4.0, seed=2, scales=SCALES, everything=True)
    if criterion.name == "effective_rank":
        response = spread_features(4.0)
    shuffled_pixels = noise_response(seed=9, scales=SCALES, places=response.places, channels=12, everything=True)

    found = estimate_response(replace(response, views={**response.views, "pixel_shuffled": shuffled_pixels}), criterion)

    assert found.abstained is None or found.abstained.reason == "no_structure"
    if criterion.views:  # these have taken their null away, or ask another question
        assert found.abstained is None


@BOTH
def test_shuffled_tiles_that_the_fingerprint_does_not_know_speak_for_structure(name: str) -> None:
    response = planted_response(4.0, seed=2, scales=SCALES, everything=True)
    moved = {n: LayerMoments(m.mean + 9, m.square + 18 * m.mean + 81) for n, m in response.layers.items()}

    found = estimate_response(replace(response, views={"pixel_shuffled": replace(response, layers=moved, views={})}), name)

    assert found.abstained is None


# ---- shares: what each place adds ----


@WITH_SHARES
def test_shares_average_to_the_score(criterion: Criterion) -> None:
    response = planted_response(3.0, places=11, scales=SCALES, everything=True)
    assert criterion.shares is not None

    np.testing.assert_allclose(criterion.shares(response).mean(axis=0), criterion.score(response), rtol=1e-9, atol=1e-12)


@WITH_SHARES
def test_a_broken_place_has_no_share_and_changes_no_other(criterion: Criterion) -> None:
    whole = planted_response(3.0, places=12, scales=SCALES, everything=True)
    broken = damaged(planted_response(3.0, places=12, scales=SCALES, everything=True), np.nan)
    rest = np.delete(np.arange(12), 1)
    assert criterion.shares is not None

    found = criterion.shares(broken)

    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[rest], criterion.shares(whole.take(rest)))


@pytest.mark.parametrize("name", ["mutual_information", "nuclear_norm", "hyperplane", *FINGERPRINTS])
def test_resampled_shares_vary_as_resampled_places_do(name: str) -> None:
    response = planted_response(3.0, seed=1, places=40, scales=scale_grid(0.75, 12), everything=True, noise=0.2, spread=0.4)
    criterion = CRITERIA[name]
    assert criterion.shares is not None
    draws = np.random.default_rng(0).integers(40, size=(60, 40))

    again = np.log2([peak(response.scales, criterion.score(response.take(draw))) for draw in draws])
    cheap = np.log2([peak(response.scales, curve) for curve in criterion.shares(response)[draws].mean(axis=1)])

    assert cheap.std() == pytest.approx(again.std(), rel=0.25)
    assert np.corrcoef(cheap, again)[0, 1] > 0.8
    assert cheap.mean() == pytest.approx(again.mean(), abs=0.02)


# ---- margin and confidence over the null ----


def two_modes(scale: float, *, texture: bool = False) -> ScaleResponse:
    """Sure at `scale` by structure and surer at the fine end by colour; with `texture` the structure is in the null too."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(4, 16))
    shown = weight[rng.integers(4, size=24)][:, None] / 4
    colour = 1.6 * np.exp2(-3 * (OCTAVES - OCTAVES[0]))[:, None]
    seen = np.maximum(bump(scale)[:, None], colour)

    def noisy(clean: NDArray[np.float64]) -> NDArray[np.float64]:
        return clean * shown + rng.normal(0, 0.05, (24, len(SCALES), 16))

    plain, null = (
        response_of(scales=SCALES, features=noisy(f), head_weight=weight) for f in (seen, seen if texture else colour)
    )
    return with_views(plain, {"phase_scrambled": null})


@pytest.mark.parametrize("name", ["margin_over_null", "confidence_over_null"])
def test_a_fine_end_that_is_sure_by_its_colour_fools_confidence_and_not_the_null(name: str) -> None:
    response = two_modes(4.0)

    assert answer("confidence", response) == SCALES[0]
    assert off(answer(name, response), 4.0) < 0.15


def test_an_optimum_that_lies_in_the_texture_is_subtracted_with_the_null() -> None:
    found = estimate_response(two_modes(4.0, texture=True), "margin_over_null")

    assert found.abstained is not None
    assert found.abstained.reason == "flat_curve"


# ---- agreement ----


def collapsing(scale: float) -> ScaleResponse:
    """Right at `scale`, and at the coarse end very sure of one and the same class."""
    rng = np.random.default_rng(4)
    weight = np.eye(4) * 6
    right = np.eye(4)[rng.integers(4, size=24)][:, None] * bump(scale, 0.5)[:, None]
    collapsed = np.eye(4)[0] * 2 * (1 / (1 + np.exp(-6 * (OCTAVES - 3))))[:, None]

    def seen() -> ScaleResponse:
        return response_of(scales=SCALES, features=right + collapsed + rng.normal(0, 0.05, (24, 41, 4)), head_weight=weight)

    return with_views(seen(), {"rot90": seen()})


@pytest.mark.parametrize("name", ["agreement", "neighbour_agreement", "pixel_entropy", "confidence"])
def test_a_network_that_collapses_agrees_with_itself_and_is_sure(name: str) -> None:
    assert answer(name, collapsing(2.0)) > 8


@pytest.mark.parametrize("name", ["mutual_information", "nuclear_norm"])
def test_dispersity_sees_a_collapse(name: str) -> None:
    assert off(answer(name, collapsing(2.0)), 2.0) < 0.3


def test_neighbours_are_those_within_a_quarter_octave_and_else_the_next() -> None:
    p = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]], float)
    far, near = np.exp2(np.arange(5)), np.exp2(np.arange(5) / 8)

    def stability(scales: NDArray[np.float64]) -> list[float]:
        features = np.log(p + 1e-30)[None]
        return [
            round(float(v), 6)
            for v in score("neighbour_agreement", response_of(scales=scales, features=features, head_weight=np.eye(2)))
        ]

    assert stability(far) == [1, 0.5, 0.5, 1, 1]
    assert stability(near) == [0.5, round(1 / 3, 6), 0.5, round(2 / 3, 6), 1]


# ---- dispersity and its failures ----


def single_class(scale: float) -> ScaleResponse:
    """Every place shows the same class, and the network is right at `scale`."""
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(4, 16))
    features = bump(scale)[:, None] * weight[1] / 4 + rng.normal(0, 0.05, (24, 41, 16))
    return response_of(scales=SCALES, features=features, head_weight=weight)


def test_on_a_slide_of_one_class_mutual_information_is_lost_and_confidence_is_not() -> None:
    response = single_class(4.0)

    assert off(answer("mutual_information", response), 4.0) > 0.5
    assert off(answer("nuclear_norm", response), 4.0) < 0.2  # the norm is a confidence there
    assert off(answer("confidence", response), 4.0) < 0.1


def test_dispersity_by_hand() -> None:
    logits = np.log(np.array([[[1, 1e-30]], [[1e-30, 1]]]))  # two places, sure of different classes
    perfect = response_of(scales=np.array([1.0]), features=logits, head_weight=np.eye(2))
    alike = response_of(scales=np.array([1.0]), features=logits[[0, 0]], head_weight=np.eye(2))

    assert score("mutual_information", perfect) == pytest.approx(np.log(2))
    assert score("nuclear_norm", perfect) == pytest.approx(1)
    assert score("mutual_information", alike) == pytest.approx(0)
    assert score("nuclear_norm", alike) == pytest.approx(np.sqrt(0.5))


def test_effective_rank_counts_directions_and_takes_noise_for_many() -> None:
    features = np.zeros((6, 3, 5), np.float32)
    features[:, 0] = np.eye(6, 5)  # five directions, the sixth place has none
    features[:, 1, 0] = 1
    response = replace(noise_response(), scales=np.array([1.0, 2, 4]), features=features)

    assert score("effective_rank", response) == pytest.approx([5, 1, 0])
    # At its scale a good network gives few directions, one a class; where it is lost, all of them.
    assert off(answer("effective_rank", planted_response(3.0, scales=SCALES)), 3.0) > 0.5


# ---- energy ----


def test_energy_rises_with_a_constant_that_changes_no_answer() -> None:
    response = planted_response(3.0, scales=SCALES)
    assert response.outputs is not None
    trend = np.float32(2 * np.log2(SCALES))
    shifted = replace(response, outputs=replace(response.outputs, energy=response.outputs.energy + trend))

    assert off(answer("energy", response), 3.0) < 0.1
    assert answer("energy", shifted) > 6


# ---- hyperplane ----


def test_the_distance_to_the_nearest_hyperplane_by_hand() -> None:
    # The runner-up by logit is class 1, and the boundary to class 2 is nearer.
    weight = np.array([[4.0, 0], [-4, 0], [3, 0.5]])
    features = np.array([[[1.0, 0]], [[1, 0]]])
    response = replace(
        response_of(scales=np.array([1.0]), features=features, head_weight=weight), head_bias=np.array([0, 0, 0.5], np.float32)
    )

    # Class 0 has logit 4, class 1 -4, class 2 3.5; planes at 8/8 and 0.5/sqrt(1.25).
    assert score("hyperplane", response) == pytest.approx([0.5 / np.sqrt(1.25)])


def test_a_class_that_is_there_twice_has_no_hyperplane() -> None:
    response = planted_response(3.0, scales=SCALES)
    assert response.head_weight is not None
    assert response.head_bias is not None
    twice = replace(
        response,
        head_weight=np.concatenate([response.head_weight, response.head_weight[:1]]),
        head_bias=np.append(response.head_bias, response.head_bias[:1]),
    )

    np.testing.assert_allclose(score("hyperplane", twice), score("hyperplane", response))


def test_a_place_far_from_everything_is_trimmed() -> None:
    response = planted_response(3.0, seed=6, places=20, scales=SCALES)
    assert response.features is not None
    response.features[0] = 1e-3
    response.features[0, -1] = 1e3 * np.sign(response.features[1, 0])

    assert off(answer("hyperplane", response), 3.0) < 0.1


# ---- BatchNorm ----


def norms(
    change: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None, *, scale: float = 4.0, places: int = 24
) -> ScaleResponse:
    """Two layers of 40 channels that reach their memory at `scale`; `change` is made to the means (N, S, K) of one."""
    rng = np.random.default_rng(7)
    inputs = {}
    for name in ("first", "second", "third"):
        drift = np.tanh(np.log2(SCALES / scale))[:, None] * rng.normal(size=40)
        mean = drift + rng.normal(0, 0.4, (places, 1, 40)) + rng.normal(0, 0.05, (places, 41, 40))
        inputs[name] = (mean if change is None or name != "second" else change(mean), np.ones_like(mean))
    return with_batchnorm(noise_response(places=places, scales=SCALES), inputs)


@BOTH
def test_a_fingerprint_of_tiles_is_found_and_trusted(name: str) -> None:
    response = norms()

    assert batchnorm_trust(response) > 0.9
    assert off(answer(name, response), 4.0) < 0.1


@BOTH
def test_a_fingerprint_that_no_scale_comes_near_is_not_trusted(name: str) -> None:
    rng = np.random.default_rng(8)
    elsewhere = norms()
    frozen = {n: replace(s, mean=s.mean + 3 * rng.normal(size=40).astype(np.float32)) for n, s in elsewhere.batchnorm.items()}
    untrained = {n: replace(s, mean=0 * s.mean, var=0 * s.var + 1) for n, s in elsewhere.batchnorm.items()}

    for memory in (frozen, untrained):
        response = replace(elsewhere, batchnorm=memory)
        found = estimate_response(response, name)

        assert batchnorm_trust(response) < 0.6
        assert np.isnan(score(name, response)).all()
        assert batchnorm_tangent.decide(response) is None
        assert found.abstained is not None
        assert "not to be trusted" in found.abstained.detail
    assert batchnorm_trust(replace(elsewhere, batchnorm=untrained)) == 0


@BOTH
def test_a_slide_of_one_tissue_whose_contents_lie_elsewhere_is_not_trusted(name: str) -> None:
    rng = np.random.default_rng(9)
    inputs = {}
    for layer in ("first", "second"):
        drift = np.tanh(np.log2(SCALES / 4))[:, None] * rng.normal(size=40)
        one_class = rng.normal(0, 1, 40)  # what this tissue has and the training's mix has not, alike at all places
        inputs[layer] = (drift + one_class + rng.normal(0, 0.1, (24, 41, 40)), np.ones((24, 41, 40)))

    assert np.isnan(score(name, with_batchnorm(noise_response(places=24, scales=SCALES), inputs))).all()


@BOTH
def test_a_layer_that_stain_has_moved_away_does_not_decide(name: str) -> None:
    stain = np.random.default_rng(10).normal(0, 0.8, 40)

    assert off(answer(name, norms(lambda mean: mean + stain)), 4.0) < 0.2


@BOTH
def test_a_channel_that_was_dead_in_training_says_nothing(name: str) -> None:
    response = norms()
    dead = np.zeros(40, bool)
    dead[3] = True
    memory = {n: replace(s, var=np.where(dead, 1e-9, s.var).astype(np.float32)) for n, s in response.batchnorm.items()}
    without = replace(
        response,
        layers={n: LayerMoments(m.mean[..., ~dead], m.square[..., ~dead]) for n, m in response.layers.items() if n in memory},
        stages=(),
        batchnorm={n: replace(s, mean=s.mean[~dead], var=s.var[~dead]) for n, s in response.batchnorm.items()},
    )

    np.testing.assert_allclose(score(name, replace(response, batchnorm=memory)), score(name, without), rtol=1e-6)


def test_contents_that_vary_from_tile_to_tile_count_less_for_the_tangent_than_for_the_distance() -> None:
    # In half of the channels tiles differ widely, and this slide's mix is one spread away from the training's, the more so
    # at finer scales: an error along the way, in channels that their own scatter tells to distrust.
    rng = np.random.default_rng(11)
    inputs = {}
    for layer in ("first", "second"):
        loud = np.arange(40) < 20
        drift = np.log2(SCALES / 4)[:, None] * np.where(loud, 0.5, 0.3) * rng.choice([-1, 1], 40)
        contents = rng.normal(0, 1, (32, 1, 40)) * np.where(loud, 1.5, 0.15)
        mixed = np.where(loud, 0.5 * np.sign(drift[-1]), 0)
        inputs[layer] = (drift + mixed + contents, np.ones((32, 41, 40)))
    response = with_batchnorm(noise_response(places=32, scales=SCALES), inputs)

    assert off(answer("batchnorm_tangent", response), 4.0) < 0.5 * off(answer("batchnorm_distance", response), 4.0)


def test_the_offset_says_how_far_and_which_way_and_the_decision_is_its_zero_and_the_peak() -> None:
    response = norms(scale=3.0)
    z, error = batchnorm_tangent.offset(response)
    near = np.abs(np.log2(SCALES / 3)) < 0.4

    np.testing.assert_allclose(z[near], np.log2(SCALES / 3)[near], atol=0.12)
    assert (z[np.log2(SCALES / 3) < -0.5] < -0.2).all()
    assert (z[np.log2(SCALES / 3) > 0.5] > 0.2).all()
    assert (error > 0).all()
    decided = batchnorm_tangent.decide(response)
    assert off(decided, 3.0) < 0.1
    assert off(decided, answer("batchnorm_tangent", response)) < 1 / 16


def test_a_memory_beyond_the_range_is_an_end_and_no_zero() -> None:
    for scale, name in ((0.3, "finest"), (30.0, "coarsest")):
        response = norms(scale=scale)
        found = estimate_response(response, "batchnorm_tangent")

        assert batchnorm_tangent.decide(response) is None
        assert found.abstained is not None
        assert name in found.abstained.detail or "not to be trusted" in found.abstained.detail


def test_the_floor_is_what_tiles_of_the_training_set_would_have() -> None:
    rng = np.random.default_rng(12)
    mean = rng.normal(0, 0.5, (20, 41, 300))  # every scale is a draw from the memory itself
    response = with_batchnorm(noise_response(places=20, scales=SCALES), {"only": (mean, np.ones_like(mean) - 0.25)})
    layer = next(iter(standardised(response, "test")))

    distances = batchnorm_distance._distance(layer)

    assert abs(distances.mean()) < 3 * distances.std() / np.sqrt(len(distances)) + 5e-4
    assert distances.mean() < 0.1 * 0.25 / 20  # the floor is about 0.0125


def test_the_default_networks_memory_knows_the_scale_of_real_tissue(real_data: Path) -> None:
    # It was trained on made-up tissue at 0.5 µm/px; these are real, at 0.25.
    images = [
        np.asarray(Image.open(path).convert("RGB"))
        for path in sorted((real_data / "patches" / "monuseg" / "images").glob("*.png"))[:8]
    ]
    scales = np.exp2(np.arange(0, 2.6, 0.5))

    def tile(image: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
        side = round(128 * scale)
        start = (1000 - side) // 2
        crop = Image.fromarray(image[start : start + side, start : start + side])
        return np.asarray(crop.resize((128, 128), Image.Resampling.LANCZOS))

    stack = [np.stack([tile(image, float(scale)) for image in images]) for scale in scales]
    response = respond(load_network(None), stack, scales=scales, layers="batchnorm", device="cpu")

    assert batchnorm_trust(response) > 0.85
    for name in FINGERPRINTS:
        assert off(answer(name, response), 2.0) < 0.5


# ---- combined ----


def test_a_sum_survives_where_either_part_alone_is_fooled() -> None:
    rng = np.random.default_rng(13)
    fine = two_modes(4.0)
    agreement = 0.7 + 0.2 * bump(4.0) + 0.18 * (OCTAVES > 3.4) + rng.normal(0, 0.02, (24, 41))
    response = replace(fine, agreement={"rot90": np.float32(agreement)})

    found = combined("margin_over_null", "agreement").score(response)

    assert off(peak(SCALES, found), 4.0) < 0.2


def test_parts_ask_for_views_and_layers_together() -> None:
    both = combined("margin_over_null", "agreement", "batchnorm_tangent", "energy", name="all")

    assert both.name == "all"
    assert both.views == ("phase_scrambled", "rot90")
    assert both.layers == "batchnorm"
    assert combined("penkin2022", "batchnorm_tangent").layers == "auto"
    assert combined("energy", "confidence").name == "energy+confidence"
    assert pickle.loads(pickle.dumps(both)).views == both.views
    with pytest.raises(OptionError, match="at least one part"):
        combined()


def test_a_part_that_is_not_trusted_is_left_out_and_none_left_is_no_answer() -> None:
    planted = planted_response(3.0, seed=1, scales=SCALES, everything=True)
    memory = {n: replace(s, mean=0 * s.mean, var=0 * s.var + 1) for n, s in planted.batchnorm.items()}
    response = replace(planted, batchnorm=memory)

    found = estimate_response(response, combined("energy", "batchnorm_tangent"))
    alone = estimate_response(response, combined("batchnorm_distance", "batchnorm_tangent"))

    assert off(found.scale, 3.0) < 0.1
    assert alone.abstained is not None
    assert alone.abstained.reason == "non_finite"


def test_an_optional_part_may_be_missing_and_a_needed_one_may_not() -> None:
    response = planted_response(3.0, scales=SCALES)  # no BatchNorm, no views

    found = combined("energy", optional=["batchnorm_tangent"]).score(response)

    np.testing.assert_allclose(found, combined("energy").score(response))
    with pytest.raises(OptionError, match="BatchNorm"):
        combined("energy", "batchnorm_tangent").score(response)


def test_a_flat_part_adds_nothing() -> None:
    response = planted_response(3.0, scales=SCALES)
    flat = Criterion("flat", lambda r: np.full(len(r.scales), 0.3))

    np.testing.assert_allclose(combined("energy", flat).score(response), combined("energy").score(response))


def test_parts_count_by_the_ranks_of_their_scales_at_each_place() -> None:
    response = planted_response(3.0, scales=SCALES, everything=True)
    outputs = response.outputs
    assert outputs is not None
    share = np.gradient(OCTAVES) / np.ptp(OCTAVES)

    def ranks(values: np.ndarray) -> np.ndarray:
        worse = np.array([[share[row < value].sum() - share[row > value].sum() for value in row] for row in values])
        return worse.mean(axis=0)

    expected = ranks(outputs.energy) + ranks(np.mean(list(response.agreement.values()), axis=0))

    found = combined("energy", "agreement").score(response)

    np.testing.assert_allclose(found, expected * np.ptp(OCTAVES) / np.gradient(OCTAVES).sum(), atol=1e-6)


def test_a_part_whose_places_disagree_has_little_say() -> None:
    response = planted_response(3.0, seed=4, scales=SCALES, everything=True)
    rng = np.random.default_rng(0)
    noise = Criterion("noise", lambda r: 1e6 * rng.normal(size=len(r.scales)))

    assert off(peak(SCALES, combined("energy", noise).score(response)), 3.0) < 0.1


def test_a_grid_that_is_finer_somewhere_gives_the_same_score() -> None:
    response = planted_response(3.0, scales=scale_grid(0.5, 16, per_octave=16), everything=True)
    uneven = np.unique(np.r_[np.arange(0, 81, 4), np.arange(30, 50)])
    both = combined("energy", "agreement")

    whole, part = both.score(response), both.score(at_scales(response, uneven))

    np.testing.assert_allclose(part, whole[uneven], atol=0.1)


# ---- consensus ----


def one_class(response: ScaleResponse) -> ScaleResponse:
    """As sure as it was, but everywhere of the same class."""
    assert response.outputs is not None
    outputs = response.outputs
    order = np.argsort(outputs.probabilities, axis=2)
    same = {name: np.take_along_axis(getattr(outputs, name), order, axis=2) for name in ("logits", "probabilities")}
    return replace(response, outputs=replace(outputs, **same), batchnorm={}, layers={})


def test_dispersity_counts_where_answers_differ_and_is_left_out_where_they_do_not() -> None:
    response = planted_response(3.0, seed=2, scales=SCALES, everything=True)
    rows = CRITERIA["consensus"].rows
    assert rows is not None

    assert mutual_information.dispersed(response, 3.0)
    assert not mutual_information.dispersed(one_class(response), 3.0)
    assert len(rows(replace(response, batchnorm={}))) - len(rows(one_class(response))) == 1


def test_a_classifier_that_says_the_same_everywhere_gets_no_estimate() -> None:
    response = planted_response(3.0, seed=2, scales=SCALES, everything=True)

    found = estimate_response(one_class(response), "consensus")

    assert off(estimate_response(response, "consensus").scale, 3.0) < 0.15
    assert found.abstained is not None
    assert found.abstained.reason == "one_tissue"


def test_in_a_profile_slides_of_several_tissues_are_scored_alone_and_those_of_one_among_the_others() -> None:
    rule = CRITERIA["consensus"]
    planted = [planted_response(3.0, seed=seed, scales=SCALES, everything=True) for seed in (2, 3)]
    several = [replace(response, slide_mpp=0.25, batchnorm={}, layers={}) for response in planted]
    one = one_class(several[0])

    scores = _scores_of([*several, one], rule)

    for response, score in zip(several, scores, strict=False):
        np.testing.assert_allclose(score, rule.score(response))
    assert not np.allclose(scores[2], rule.score(one))
    assert SCALES[scores[2].argmax()] == pytest.approx(3.0, rel=0.1)


def test_answers_that_differ_only_where_the_network_is_lost_do_not_identify_a_scale() -> None:
    response = planted_response(3.0, seed=2, scales=SCALES, everything=True)
    lost = np.abs(np.log2(SCALES / 3)) > 1.2
    assert response.outputs is not None
    outputs = one_class(response).outputs
    assert outputs is not None
    rng = np.random.default_rng(0)
    confused = outputs.probabilities.copy()
    confused[:, lost] = rng.permuted(np.eye(confused.shape[2])[np.zeros(confused[:, lost].shape[:2], int)], axis=2)
    entropy = np.where(lost, 0, outputs.entropy)
    seen = replace(one_class(response), outputs=replace(outputs, probabilities=confused, entropy=entropy))

    assert mutual_information.dispersed(seen, 0.5)
    assert not mutual_information.dispersed(seen, 3.0)


def test_answers_that_a_small_change_of_scale_changes_are_chance() -> None:
    response = planted_response(3.0, seed=2, scales=SCALES, everything=True)
    assert response.outputs is not None
    rng = np.random.default_rng(0)
    told = np.sort(response.outputs.probabilities, axis=2)
    drawn = rng.permuted(told, axis=2)  # as sure at each scale, of any class
    lost = replace(response, outputs=replace(response.outputs, probabilities=drawn), batchnorm={}, layers={})

    found = estimate_response(lost, "consensus")

    assert mutual_information.kept(response, 3.0) > 0.95
    assert mutual_information.kept(lost, 3.0) == pytest.approx(0, abs=0.15)
    assert found.abstained is not None
    assert found.abstained.reason == "unsettled"


def test_places_of_nearly_one_class_keep_it_by_chance() -> None:
    response = planted_response(3.0, seed=2, scales=SCALES, places=200)
    assert response.outputs is not None
    classes = np.random.default_rng(0).choice(4, p=[0.94, 0.02, 0.02, 0.02], size=response.outputs.logits.shape[:2])
    probabilities = np.eye(4, dtype=np.float32)[classes]
    drawn = replace(response, outputs=replace(response.outputs, probabilities=probabilities))
    here, on = classes[:, np.abs(SCALES - 3).argmin()], classes[:, np.abs(SCALES - 3 * 2**0.25).argmin()]

    assert (here == on).mean() > 0.8
    assert mutual_information.kept(drawn, 3.0) < 0.3


def test_mutual_information_of_a_segmenter_is_that_of_its_pixels() -> None:
    # Every tile half nucleus: places tell nothing of the class, pixels all of it.
    half = np.full((6, 3, 2), 0.5, np.float32)
    sure, unsure = np.zeros((6, 3), np.float32), np.full((6, 3), np.log(2), np.float32)

    def of(entropy: np.ndarray) -> ScaleResponse:
        outputs = Outputs(logits=half, probabilities=half, confidence=half[..., 0], margin=sure, entropy=entropy, energy=sure)
        return ScaleResponse(scales=np.array([1.0, 2, 4]), slide_mpp=None, outputs=outputs, features=None)

    np.testing.assert_allclose(score("mutual_information", of(sure)), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(score("mutual_information", of(unsure)), 0, atol=1e-6)
    assert mutual_information.of_pixels(of(sure))
    assert not mutual_information.of_pixels(of(unsure))


# ---- the algebra ----


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5)])
def test_singular_values_without_each_place_are_those_of_the_rest(shape: tuple[int, int, int]) -> None:
    tables = np.random.default_rng(14).normal(size=shape)

    found = singular_values_without(tables)

    for i in range(shape[1]):
        rest = np.linalg.svd(np.delete(tables, i, axis=1), compute_uv=False)
        np.testing.assert_allclose(found[i].sum(axis=1), rest.sum(axis=1), rtol=1e-6)


def test_the_tangents_metric_is_the_shrunken_covariance_from_tile_to_tile() -> None:
    mean = np.random.default_rng(15).normal(size=(6, 1, 4)) + np.random.default_rng(16).normal(size=(6, 3, 4))
    scatter = mean - mean.mean(axis=0)
    expected = 6 / (6 + 4) * np.cov(scatter.mean(axis=1), rowvar=False)
    np.fill_diagonal(expected, (scatter**2).sum(axis=(0, 1)) / 3 / 5)

    metric = batchnorm_tangent._metric(Standardised(mean, mean**2 + 1, untrained=False))

    np.testing.assert_allclose(metric.solve(np.eye(4)), np.linalg.inv(expected), rtol=1e-9)


def test_layers_that_fit_nowhere_speak_softly_and_the_odd_ones_out_are_left_out() -> None:
    assert batchnorm_tangent._weight(np.array([80.0, 120]), 40) == 0.5
    assert batchnorm_tangent._weight(np.array([10.0, 120]), 40) == 1
    assert batchnorm_distance._middle_half(np.array([[30.0], [1], [2], [0]])) == [1.5]
