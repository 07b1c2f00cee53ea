"""Where a network keeps scale: planted in a layer, found there, cut there; and µm/px from that layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from wsiscale.card import update_card
from wsiscale.errors import ModelError, OptionError
from wsiscale.probe import (
    Answers,
    ScaleRegressor,
    fit_regressor,
    load_regressor,
    predict_log2_mpp,
    probe_answers,
    regressed_mpp,
    regressor_of,
    save_regressor,
)
from wsiscale.ridge import PENALTIES, fit_ridges
from wsiscale.types import LayerMoments, ScaleResponse

CHANNELS = 24
# How much of a layer is scale: nothing at first, most in the middle, less at the end.
KNOWS = {"first": 0.0, "early": 0.3, "middle": 1.0, "late": 0.5, "last": 0.15}


def answers_of(
    slide: int, *, knows: dict[str, float] = KNOWS, level0: float | None = None, places: int = 6, stain: float = 0.5
) -> Answers:
    """A slide's answers: in every layer some channels move with log2 µm/px, all with the place, the slide and noise."""
    rng = np.random.default_rng(slide)
    mpp = (0.25, 0.5)[slide % 2] if level0 is None else level0
    octaves = np.log2(mpp) + np.linspace(0.1, 3.1, 12)
    network = np.random.default_rng(99)
    layers = {}
    for name, share in knows.items():
        along = network.normal(size=CHANNELS) * share
        seen = octaves[None, :, None] * along
        noise = rng.normal(size=(places, 12, CHANNELS)) + stain * rng.normal(size=CHANNELS)
        layers[name] = (seen + noise).astype(np.float32)
    return Answers(f"slide{slide}", octaves, layers)


def cohort(count: int = 10) -> list[Answers]:
    return [answers_of(slide) for slide in range(count)]


def response_of(answers: Answers, level0: float) -> ScaleResponse:
    layers = {name: LayerMoments(values, values**2) for name, values in answers.layers.items()}
    return ScaleResponse(np.exp2(answers.log2_mpp) / level0, level0, None, None, layers=layers)


# --- the ridge --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [5, 100])
def test_left_out_groups_in_closed_form_are_what_leaving_them_out_gives(channels: int) -> None:
    rng = np.random.default_rng(channels)
    values, group = rng.normal(size=(60, channels)), np.repeat(np.arange(6), 10)
    target = values[:, 0] + rng.normal(size=60)

    (ridge,) = fit_ridges(values, target[:, None], group)

    standard = (values - ridge.center) / ridge.unit
    missed = np.empty(60)
    for g in range(6):
        test = group == g
        design = np.c_[np.ones((~test).sum()), standard[~test]]
        penalty = np.diag([0.0] + [ridge.penalty * 60] * channels)
        slopes = np.linalg.solve(design.T @ design + penalty, design.T @ target[~test])
        missed[test] = np.c_[np.ones(test.sum()), standard[test]] @ slopes - target[test]
    assert ridge.left_out == pytest.approx(np.square(missed).mean())
    assert ridge.penalty in PENALTIES


def test_a_channel_that_never_changes_has_no_say() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 3)).astype(np.float32)
    values[:, 1] = 7.3

    (ridge,) = fit_ridges(values, values[:, :1].astype(float), np.repeat(np.arange(6), 10))

    moved = values.copy()
    moved[:, 1] += 1e6
    np.testing.assert_allclose(ridge.predict(moved), ridge.predict(values))
    np.testing.assert_allclose(ridge.predict(values), values[:, 0], atol=0.01)


# --- µm/px from a layer -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def regressor() -> ScaleRegressor:
    return fit_regressor(cohort(), "middle", tile_size=64, network="digest")


def test_the_regressor_tells_the_scale_of_tiles_of_a_slide_that_it_has_not_seen(regressor: ScaleRegressor) -> None:
    slide = answers_of(50, level0=0.35)

    found = predict_log2_mpp(response_of(slide, 0.35), regressor)

    assert found.shape == (6, 12)
    assert np.abs(found - slide.log2_mpp).mean() < 0.4
    np.testing.assert_array_equal(found, predict_log2_mpp(slide.layers["middle"], regressor))


@pytest.mark.parametrize("truth", [0.25, 0.35, 0.5])
@pytest.mark.parametrize("said", [0.1, 1.0])
def test_slides_mpp_are_told_whatever_their_tags_say(regressor: ScaleRegressor, truth: float, said: float) -> None:
    held = []
    for slide in range(60, 80):
        response = response_of(answers_of(slide, level0=truth, places=24), truth)
        claimed = ScaleResponse(response.scales, said, None, None, layers=response.layers)

        found = regressed_mpp(claimed, regressor)

        assert found is not None
        assert abs(np.log2(found.mpp / truth)) < 0.5
        held.append(found.ci90[0] < truth < found.ci90[1])
    # Of ten slides its error is known to within a quarter or so: 90 % intervals hold 75 % and more.
    assert np.mean(held) >= 0.75


def test_a_slide_beyond_the_regressors_range_is_not_put_at_its_end(regressor: ScaleRegressor) -> None:
    assert regressed_mpp(response_of(answers_of(60, level0=40.0), 40.0), regressor) is None


def test_another_layer_or_another_width_is_refused(regressor: ScaleRegressor) -> None:
    slide = answers_of(1)
    without = ScaleResponse(np.ones(1), None, None, None)

    with pytest.raises(OptionError, match="layer 'middle' was not watched"):
        predict_log2_mpp(without, regressor)
    with pytest.raises(OptionError, match="23 channels"):
        predict_log2_mpp(slide.layers["middle"][..., 1:], regressor)


def test_a_regressor_in_a_card_is_small_and_comes_back_whole(regressor: ScaleRegressor, tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    update_card(card, {"factory": "torchvision:resnet18", "licence": "mine"})

    save_regressor(regressor, card)
    back = load_regressor(card)

    assert card.stat().st_size < 3000
    assert json.loads(card.read_text())["licence"] == "mine"
    for name, value in vars(regressor).items():
        np.testing.assert_array_equal(getattr(back, name), value)
    assert regressor_of({}) is None


@pytest.mark.parametrize("harm", [{"version": 99}, {"arrays": "rubbish"}, {"mpp_range": 3}, {"layer": None, "weights": 1}])
def test_a_damaged_regressor_is_an_error_and_not_a_guess(
    regressor: ScaleRegressor, tmp_path: Path, harm: dict[str, object]
) -> None:
    card = tmp_path / "card.json"
    save_regressor(regressor, card)
    known = json.loads(card.read_text())
    known["scale_regressor"] |= harm
    if "weights" in harm:
        del known["scale_regressor"]["slide_sd"]

    with pytest.raises(ModelError, match="wsiscale probe --fit"):
        regressor_of(known)


# --- the probe --------------------------------------------------------------------------------------------------------------


def shares(names: Sequence[str]) -> NDArray[np.float64]:
    return np.array([KNOWS[name] for name in names])


def test_the_layer_that_knows_scale_is_found_and_cut_at() -> None:
    control = [answers_of(slide, knows=dict.fromkeys(KNOWS, 0.05)) for slide in range(10)]

    probe = probe_answers(cohort(), control, model="planted")

    assert probe.peak.name == probe.prune_at == "middle"
    assert probe.peak.r2 > 0.9
    assert probe.peak.lo <= probe.peak.r2 <= probe.peak.hi
    order = np.argsort([layer.r2 for layer in probe.layers])
    assert (np.argsort(shares([layer.name for layer in probe.layers])) == order).all()
    assert all(layer.random is not None and layer.random < 0.2 for layer in probe.layers)
    assert all(layer.shuffled < 0.05 for layer in probe.layers)
    assert probe.layer("first").r2 < 0.05
    assert [layer.depth for layer in probe.layers] == [0, 0.25, 0.5, 0.75, 1]


def test_knowing_the_slide_is_worth_nothing() -> None:
    # A layer that tells the slides apart, whose µm/px differ, and nothing of scale within them.
    def stained(slide: int) -> Answers:
        answers = answers_of(slide, knows={"stain": 0.0})
        answers.layers["stain"][..., 0] += 50 * (slide % 2)
        return answers

    probe = probe_answers([stained(slide) for slide in range(10)])

    assert probe.layers[0].r2 < 0.02


def test_cut_at_the_earliest_of_layers_that_are_as_good() -> None:
    knows = {"first": 0.0, "a": 1.0, "b": 1.0, "last": 0.2}

    def alike(slide: int) -> Answers:
        answers = answers_of(slide, knows=knows)
        rng = np.random.default_rng(slide + 500)
        layers = dict(answers.layers)
        layers["b"] = layers["a"] + rng.normal(0, 0.01, layers["a"].shape).astype(np.float32)
        return Answers(answers.slide, answers.log2_mpp, layers)

    probe = probe_answers([alike(slide) for slide in range(8)])

    assert probe.peak.name in ("a", "b")
    assert probe.prune_at == "a"


def test_cut_there_held_out_slides_are_told_better_than_by_the_whole_network() -> None:
    probe = probe_answers(cohort())

    assert probe.cut is not None
    assert probe.cut.cut < probe.cut.whole
    assert probe.cut.gain == pytest.approx(probe.cut.whole - probe.cut.cut)
    assert 0 < probe.cut.lo < probe.cut.gain < probe.cut.hi


def test_as_published_is_least_squares_that_overfits_where_channels_are_many() -> None:
    # The publication's negative early layers: more channels than tiles can tell apart from noise.
    slides = [answers_of(slide, level0=0.25) for slide in range(3)]
    wide = [
        Answers(s.slide, s.log2_mpp, {"wide": np.random.default_rng(i).normal(size=(6, 12, 140)).astype(np.float32)})
        for i, s in enumerate(slides)
    ]

    published, ours = probe_answers(wide, as_published=True), probe_answers(wide)

    assert published.layers[0].r2 < -1
    assert published.layers[0].shuffled < -1
    assert ours.layers[0].r2 == pytest.approx(0, abs=0.1)
    assert published.cut is None
    assert published.as_record()["method"] == "published"


def test_as_published_finds_the_middle_too() -> None:
    probe = probe_answers(cohort(), as_published=True)

    assert probe.peak.name == probe.prune_at == "middle"


def test_the_same_seed_gives_the_same_probe() -> None:
    assert probe_answers(cohort(5), seed=3) == probe_answers(cohort(5), seed=3)


def test_too_few_slides_are_refused_and_say_why() -> None:
    with pytest.raises(OptionError, match=r"2 slides to probe with \(x.svs: no µm/px\)"):
        probe_answers(cohort(2), left_out=[("x.svs", "no µm/px")])
    with pytest.raises(OptionError, match="three or more"):
        fit_regressor(cohort(2), "middle", tile_size=64)


def test_answers_of_other_layers_are_refused() -> None:
    other = answers_of(5, knows={"other": 1.0})

    with pytest.raises(OptionError, match="different layers"):
        probe_answers([*cohort(4), other])


def test_a_tile_that_is_not_finite_is_left_out() -> None:
    slides = cohort(5)
    slides[0].layers["middle"][0, 0, 0] = np.nan

    assert probe_answers(slides).layer("middle").r2 > 0.9
