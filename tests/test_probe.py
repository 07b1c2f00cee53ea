"""Where a network keeps scale: planted in a layer, found there, cut there; and µm/px from that layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from wsiscale.analyzer import respond
from wsiscale.card import update_card
from wsiscale.cli import main
from wsiscale.cutting import cut_network, randomised
from wsiscale.errors import ModelError, OptionError, ScaleError
from wsiscale.networks import load_network, network_digest
from wsiscale.nuclear_area import PUBLISHED_AREAS, cohen_kappa, magnification_kappa, mean_nuclear_area, nearest_class
from wsiscale.probe import Answers, Probe, ask_layers, probe_answers, probe_slides
from wsiscale.readers.array import ArrayReader
from wsiscale.regressor import (
    ScaleRegressor,
    fit_regressor,
    load_regressor,
    predict_log2_mpp,
    regressed_mpp,
    regressor_of,
    save_regressor,
)
from wsiscale.ridge import PENALTIES, fit_ridges
from wsiscale.testing import tissue, write_svs
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


# --- networks ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slides() -> list[ArrayReader]:
    """Procedural tissue scanned at different µm/px."""
    mpps = (0.25, 0.35, 0.5, 0.3, 0.45, 0.4)
    return [ArrayReader(tissue(340, 340, mpp=m, seed=s)[0], mpp=m, name=f"slide{s}") for s, m in enumerate(mpps)]


@pytest.fixture(scope="module")
def probed(slides: list[ArrayReader]) -> tuple[Probe, list[Answers]]:
    return probe_slides(slides, load_network(tile_size=32), places=8, factors=8)


def test_an_embedded_network_knows_scale_better_than_random_weights(probed: tuple[Probe, list[Answers]]) -> None:
    probe, answers = probed

    best = probe.peak
    assert best.r2 > 0.6
    assert best.random is not None
    assert best.random < best.r2
    assert best.shuffled < 0.05
    assert 0 < best.depth < 1
    assert probe.cut is not None
    assert probe.cut.cut < probe.cut.whole
    # No two slides share a grid, and none is seen as it was scanned.
    starts = [float(2 ** each.log2_mpp[0]) / mpp for each, mpp in zip(answers, (0.25, 0.35, 0.5, 0.3, 0.45, 0.4), strict=True)]
    assert len(set(np.round(starts, 6))) == 6
    assert all(1.04 < start < 1.21 for start in starts)
    assert all(each.log2_mpp[-1] - each.log2_mpp[0] == pytest.approx(3) for each in answers)


def test_the_cut_network_answers_what_the_layer_does_and_runs_no_further(slides: list[ArrayReader]) -> None:
    network = load_network(tile_size=32)
    layer = "fine.1.2"
    tiles = [slides[0].read(level=0, y=0, x=0, height=32, width=32)[None]]
    expected = respond(network, tiles, scales=[1.0], layers=[layer]).layers[layer].mean

    cut = cut_network(network, layer)

    found = respond(cut, tiles, scales=[1.0], layers="none")
    np.testing.assert_array_equal(found.features, expected)
    size = [sum(p.numel() for p in each.module.parameters()) for each in (network, cut)]
    assert size[1] < size[0] / 4
    assert network.module.head.weight is not None  # the whole one keeps all that it had
    with pytest.raises(ModelError, match=r"no layer 'fine\.9'"):
        cut_network(network, "fine.9")


def test_every_layer_can_be_cut_at_whatever_the_networks_forward_looks_like() -> None:
    # A module that runs twice, a residual sum, an output that nobody asks for, and a projection that is used but not run.
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, stride=4)
            self.relu = nn.ReLU(inplace=True)
            self.norm = nn.BatchNorm2d(8)
            self.look = nn.MultiheadAttention(8, 2, batch_first=True)
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.norm(self.stem(x)))
            tokens = x.flatten(2).mT
            tokens = tokens + self.look(tokens, tokens, tokens)[0]
            return self.head(self.drop(self.relu(tokens)).mean(1))

    network = load_network(Odd().eval(), tile_size=16)
    tiles = [np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)]
    whole = respond(network, tiles, scales=[1.0], layers="every")

    assert list(whole.layers) == ["stem", "relu@0", "relu", "head"]  # dropout and BatchNorm say nothing new
    for layer, moments in whole.layers.items():
        found = respond(cut_network(network, layer), tiles, scales=[1.0], layers="none")
        np.testing.assert_allclose(found.features, moments.mean, rtol=1e-6, atol=1e-7)


def test_random_weights_are_the_same_each_time_and_leave_the_network_alone() -> None:
    network = load_network(tile_size=32)
    before = network_digest(network)

    first, again, other = randomised(network, seed=1), randomised(network, seed=1), randomised(network, seed=2)

    assert network_digest(first) == network_digest(again)
    assert len({before, network_digest(first), network_digest(other)}) == 3
    assert network_digest(network) == before


def test_what_the_layers_answered_is_kept_and_read_again(
    slides: list[ArrayReader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_network(tile_size=32)
    first = ask_layers(slides[0], network, places=3, factors=4, keep=tmp_path)
    monkeypatch.setattr("wsiscale.analyzer.respond", None)

    again = ask_layers(slides[0], network, places=3, factors=4, keep=tmp_path)

    assert list(again.layers) == list(first.layers)
    for name, values in first.layers.items():
        np.testing.assert_array_equal(again.layers[name], values)
    with pytest.raises(TypeError):
        ask_layers(slides[0], network, places=3, factors=5, keep=tmp_path)


def test_a_slide_too_small_for_the_coarsest_tile_says_what_to_do(slides: list[ArrayReader]) -> None:
    with pytest.raises(ScaleError, match="--tile-size or fewer --octaves"):
        ask_layers(slides[0], load_network(tile_size=64))


# --- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("slides")
    for seed, mpp in enumerate((0.25, 0.5, 0.3, 0.4)):
        write_svs(folder / f"{seed}.svs", tissue(340, 340, mpp=mpp, seed=seed)[0], mpp=mpp, power=None, levels=(1,))
    (folder / "junk.svs").write_bytes(b"no slide")
    return [str(path) for path in sorted(folder.glob("*.svs"))]


def test_the_command_probes_fits_and_cuts(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--tile-size", "32", "--places", "4", "--factors", "5", "--keep", "kept"]

    code = main(["probe", *files, *given, "-o", "out", "--fit", "fit.json", "--cut", "cut.json", "--json"])

    said = capsys.readouterr()
    record = json.loads(said.out)
    assert code == 0
    assert "junk.svs is left out" in said.err
    assert [each["slide"] for each in record["left_out"]] == ["junk.svs"]
    assert json.loads((tmp_path / "out" / "probe.json").read_text()) == record
    assert (tmp_path / "out" / "probe.png").stat().st_size > 10_000
    # The card is the network's, and its regressor asks for the layer that the cut network ends with.
    network, cut = load_network("fit.json"), load_network("cut.json")
    regressor = regressor_of(network.card)
    assert regressor is not None
    assert regressor.layer == record["prune_at"]
    assert regressor.network == network_digest(network)
    image = tissue(64, 64, mpp=0.5, seed=9)[0]
    tiles = [image[None, :32, :32], image[None, 32:, 32:]]
    asked = respond(network, tiles, scales=[1.0, 2.0], layers=[regressor.layer])
    answered = respond(cut, tiles, scales=[1.0, 2.0], layers="none").features
    assert answered is not None
    np.testing.assert_allclose(answered[..., 0], predict_log2_mpp(asked, regressor), atol=1e-4)
    assert cut.card.get("profile") is None

    code = main(["probe", *files, *given, "--as-published"])

    assert code == 0
    assert "as published" in capsys.readouterr().out


def test_the_command_refuses_one_card_for_two_networks_and_a_card_that_is_there(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "card.json"

    assert main(["probe", *files, "--fit", str(card), "--cut", str(card)]) == 2
    card.write_text("{}")
    assert main(["probe", *files, "--fit", str(card)]) == 2
    assert main(["probe", *files, "--known-mpp", "0"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_slides_without_a_tag_are_probed_by_what_is_known(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for seed in range(3):
        write_svs(tmp_path / f"{seed}.svs", tissue(340, 340, mpp=0.4, seed=seed)[0], mpp=None, power=None, levels=(1,))
    given = [*map(str, sorted(tmp_path.glob("*.svs"))), "--tile-size", "32", "--places", "3", "--factors", "4"]

    assert main(["probe", *given]) == 2
    assert "0 slides to probe with" in capsys.readouterr().err
    assert main(["probe", *given, "--known-mpp", "0.4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mpp_range"][0] > 0.4


# --- mean nuclear area ------------------------------------------------------------------------------------------------------


def test_mean_nuclear_area_leaves_out_the_border_and_specks() -> None:
    mask = np.zeros((40, 60), bool)
    mask[5:10, 5:15] = True  # 50 px²
    mask[20:26, 30:35] = True  # 30 px²
    mask[30:40, 50:60] = True  # touches the border
    mask[2, 40] = True  # a speck

    assert mean_nuclear_area(mask) == 40
    assert mean_nuclear_area(mask.astype(np.uint8) * 255) == 40
    assert np.isnan(mean_nuclear_area(np.zeros((9, 9))))


def test_mean_nuclear_area_goes_with_the_square_of_magnification() -> None:
    areas = []
    for mpp in (0.25, 0.5, 1.0):
        _, nuclei = tissue(int(200 / mpp), int(200 / mpp), mpp=mpp, seed=3)
        # Nuclei that touch would be one: what is known of each apart is eroded by a pixel.
        inner = nuclei * (nuclei == np.roll(nuclei, 1, 0)) * (nuclei == np.roll(nuclei, 1, 1))
        areas.append(mean_nuclear_area(inner > 0))

    slopes = np.diff(np.log2(areas))
    assert ((slopes > -2.4) & (slopes < -1.4)).all()


def test_kappa_is_cohens() -> None:
    # The textbook's table: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no.
    truth = np.repeat(["yes", "yes", "no", "no"], [20, 5, 10, 15])
    found = np.repeat(["yes", "no", "yes", "no"], [20, 5, 10, 15])

    assert cohen_kappa(truth, found) == pytest.approx(0.4)
    assert cohen_kappa(truth, truth) == 1
    assert np.isnan(cohen_kappa(["a"], ["a"]))
    with pytest.raises(OptionError, match="of one length"):
        cohen_kappa([1, 2], [1])


def test_areas_are_classed_by_the_nearest_class_mean() -> None:
    np.testing.assert_array_equal(nearest_class([20, 60, 900], PUBLISHED_AREAS), [0, 2, 6])
    magnification = np.repeat([10, 20, 40], 4)
    area = np.repeat([60.0, 230.0, 900.0], 4) + np.tile([-5, 5, -2, 2], 3)
    predicted = area.copy()
    predicted[0] = 240  # one 10x tile is taken for 20x
    predicted[5] = np.nan

    assert magnification_kappa(area, magnification, area) == 1
    assert magnification_kappa(predicted, magnification, area) == pytest.approx(
        cohen_kappa(np.delete(magnification, 5), np.delete(np.r_[20, magnification[1:]], 5))
    )


def test_monuseg_nuclei_have_a_tenth_of_the_published_area_at_a_quarter_of_the_magnification(real_data: Path) -> None:
    masks = sorted((real_data / "patches" / "monuseg" / "masks").glob("*.png"))[:3]
    pictures = [np.asarray(Image.open(path)) > 0 for path in masks]

    fine = [mean_nuclear_area(mask) for mask in pictures]
    coarse = [mean_nuclear_area(mask[:, :].reshape(250, 4, 250, 4).mean(axis=(1, 3))) for mask in pictures]

    assert all(200 < area < 2000 for area in fine)
    assert all(8 < f / c < 20 for f, c in zip(fine, coarse, strict=True))
