"""Stressors do to a slide what they are called, and the tables on stability and by family say what was measured."""

# ruff: noqa: E402

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wsiscale.geometry import View, scale_grid
from wsiscale.testing.responses import planted_response
from wsiscale.types import ScaleResponse

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recovery import cases, methods, photos, real, run, stress, tables
from benchmarks.recovery.cases import Case, MissingDataError, Oracle, Setting
from benchmarks.recovery.photos import Steadiness
from benchmarks.recovery.stress import Stressed, Stressor
from benchmarks.recovery.tables import Record

GRID = scale_grid(0.5, 16, per_octave=4)


def picture(height: int = 90, width: int = 120) -> np.ndarray:
    """Pink with a purple disc off its middle, and a little noise."""
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width, 3), (230, 170, 200), np.float64)
    image[(y - 30) ** 2 + (x - 80) ** 2 < 15**2] = (90, 60, 140)
    image += np.random.default_rng(0).normal(0, 4, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


# --- what stressors do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stressor", stress.STRESSORS, ids=lambda s: s.name)
def test_a_changed_image_has_the_pixels_that_its_factor_says_and_differs(stressor: Stressor) -> None:
    image = picture()

    changed = stressor.change(image)

    assert changed.dtype == np.uint8
    assert changed.shape == (round(90 * stressor.factor), round(120 * stressor.factor), 3)
    assert stressor.kernel != "area" or changed.shape != image.shape or (changed != image).any()


def test_stressors_have_files_of_their_own() -> None:
    files = [stress._file(s) for s in (stress.UNSTRESSED, *stress.STRESSORS)]

    assert len(set(files)) == len(files)
    assert all(c.isalnum() or c in ".-" for name in files for c in name)


def test_more_hematoxylin_darkens_nuclei_more_than_what_has_none() -> None:
    image = picture().astype(float)

    changed = stress.stained(picture(), hematoxylin=1.3, eosin=1.0).astype(float)

    nucleus, ground = (30, 80), (80, 10)
    assert image[nucleus].mean() - changed[nucleus].mean() > 5
    assert abs(image[ground].mean() - changed[ground].mean()) < image[nucleus].mean() - changed[nucleus].mean()


def test_no_more_and_no_less_dye_is_the_same_image() -> None:
    image = picture()

    np.testing.assert_allclose(stress.stained(image, hematoxylin=1, eosin=1).astype(int), image, atol=1)


def test_jpeg_of_a_lower_quality_is_further_from_the_image() -> None:
    image = picture().astype(int)

    fine, coarse = (np.abs(stress.jpeg(picture(), quality=q).astype(int) - image).mean() for q in (60, 30))

    assert 0 < fine < coarse < 10


def test_blur_spreads_along_both_axes_and_not_between_colours() -> None:
    image = np.zeros((31, 41, 3), np.uint8)
    image[10, 20, 1] = 255

    spread = stress.blurred(image, sigma=1)

    assert spread[10, 21, 1] == spread[11, 20, 1] > 0
    assert not spread[..., [0, 2]].any()


def test_sampling_without_anti_aliasing_sees_one_colour_where_the_mean_is_grey() -> None:
    # Stripes of two pixels: every fourth pixel, as bilinear sampling between equals takes them, is always in the same stripe.
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = stripes[:, 1::4] = 255
    view = View(y=0, x=-1, height=8, width=8, scale=4.0)

    aliased = stress.sampled(stripes, view, kernel="bilinear")
    mean = real._look(stripes, view)

    assert set(np.unique(aliased[:, 1:])) == {255}
    assert abs(float(mean[:, 1:].mean()) - 127.5) < 1


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_at_scale_one_sampled_tiles_are_the_pixels_themselves_in_the_right_place(kernel: str) -> None:
    image = picture()
    places = np.array([[30.0, 80.0], [45.0, 20.0]])

    (tiles,) = stress.sampled_tiles(image, places, np.array([1.0]), size=16, kernel=kernel)

    np.testing.assert_array_equal(tiles[0], image[22:38, 72:88])
    np.testing.assert_array_equal(tiles[1], image[37:53, 12:28])


def test_sampled_tiles_show_what_area_means_show_where_there_is_no_detail() -> None:
    y, x = np.mgrid[:100, :140]
    smooth = np.stack([y + 20, x, x + y], axis=2).astype(np.uint8)
    places, scales = np.array([[40.0, 70.0], [60.0, 50.0]]), np.array([1.0, 2.0, 3.0])
    reader, pad = real._mirrored(smooth, 60)

    area = real.scale_stack(reader, places + pad, scales=scales, size=16).images.compute(scheduler="synchronous")
    sampled = stress.sampled_tiles(smooth, places, scales, size=16, kernel="bilinear")

    for s in range(3):
        np.testing.assert_allclose(sampled[s].astype(int), area[:, s], atol=1)


def test_a_mask_follows_its_image_to_another_size() -> None:
    mask = np.zeros((100, 200), bool)
    mask[20:40, 150:190] = True

    smaller = stress.resized_mask(mask, (60, 120))

    assert smaller.shape == (60, 120)
    assert smaller[18, 102]
    assert smaller.mean() == pytest.approx(mask.mean(), rel=0.1)
    np.testing.assert_array_equal(stress.resized_mask(mask, mask.shape), mask)


# --- what is measured under them -----------------------------------------------------------------------------------------


def planted(best: float, *, seed: int = 0, places: int = 64) -> ScaleResponse:
    """A network that answers most at `best`, and on pixels without structure alike everywhere."""
    response = planted_response(best, scales=GRID, places=places, seed=seed)
    alike = {name: np.zeros_like(value) + 0.5 for name, value in vars(response.outputs).items()}
    return replace(response, views={"pixel_shuffled": replace(response, outputs=type(response.outputs)(**alike))})


def falling_from(best: float) -> Oracle:
    quality = 0.9 - 0.1 * np.abs(np.log2(GRID / best))
    return Oracle(scales=GRID, quality=quality, lo=quality - 0.01, hi=quality + 0.01)


@pytest.fixture(scope="module")
def under_stress(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Stressed]:
    """One network, trained at 0.5 µm/px, on one slide of 0.25: best at 2, and where copies are concerned, at 2 x factor."""

    def subjects(setting: Setting, halves: object) -> list[stress._Subject]:
        def ask(stressor: Stressor, count: int) -> ScaleResponse:
            return planted(2 * stressor.factor).take(np.arange(count))

        def label(stressor: Stressor) -> Oracle:
            return falling_from(2 * stressor.factor)

        return [stress._Subject(real.EMBEDDED, real.EMBEDDED, real.MONUSEG[0], "develop", 0.5, ask, label)]

    quiet = Setting(cache=tmp_path_factory.mktemp("cache"), log=lambda line: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stress, "_subjects", subjects)
        patch.setattr(stress, "COLUMNS", ("confidence",))
        return {(s.stressor, s.criterion): s for s in stress.stressed(quiet, ("develop",))}


def test_an_answer_that_follows_its_slide_has_not_shifted_and_the_middle_of_the_range_has(
    under_stress: dict[tuple[str, str], Stressed],
) -> None:
    for name, factor in (("copy x0.6", 0.6), ("copy x1.5", 1.5), ("empty magnification x2", 2.0)):
        follows, stays = under_stress[name, "confidence"], under_stress[name, "range centre (log)"]

        assert follows.scale == pytest.approx(2 * factor, rel=0.1)
        assert follows.shift < 0.15
        assert follows.regret < 0.03
        assert stays.shift == pytest.approx(abs(np.log2(factor)))


def test_every_stressor_is_in_the_table_and_unstressed_is_no_shift(under_stress: dict[tuple[str, str], Stressed]) -> None:
    table = stress.stress_table(list(under_stress.values()))

    assert under_stress["none", "confidence"].shift is None
    assert under_stress["JPEG, quality 30", "confidence"].shift == pytest.approx(0)
    for name in ("none", *(s.name for s in stress.STRESSORS), "1 place", "16 places", "64 places", "tag x0.4", "no tag"):
        assert f"| {name} |" in table


def test_fewer_places_than_an_interval_needs_give_no_estimate(under_stress: dict[tuple[str, str], Stressed]) -> None:
    assert under_stress["4 places", "confidence"].abstained
    assert under_stress["4 places", "confidence"].scale is not None
    assert not under_stress["64 places", "confidence"].abstained


def test_a_wrong_tag_shifts_nothing_while_the_range_holds_the_answer(under_stress: dict[tuple[str, str], Stressed]) -> None:
    # 0.5 to 16 at a tag of x2.5 is asked as 0.5 to 6.4, at x0.4 as 1.25 to 16: both hold the best scale, 2.
    for wrong in ("tag x0.4", "tag x2.5"):
        assert under_stress[wrong, "confidence"].shift < 0.1
        assert under_stress[wrong, "range centre (log)"].shift == pytest.approx(np.log2(2.5) / 2, abs=0.13)
    assert under_stress["no tag", "confidence"].shift == pytest.approx(0)


def test_an_answer_far_from_the_training_by_a_wrong_tag_is_not_given() -> None:
    assert stress._conflicts(0.5 * 2.9, 0.5)
    assert not stress._conflicts(0.5 * 2.7, 0.5)


def test_the_share_of_places_sets_without_an_estimate_decides_on_abstention() -> None:
    oracle = falling_from(2.0)
    subject = stress._Subject("f", "n", "s", "develop", 0.5, lambda s, n: planted(2), lambda s: oracle)
    answers = iter([2.0, None, None])
    three = [planted(2, places=8)] * 3

    told = stress._told(
        subject, Stressor("x"), "c", lambda case: methods.Answer(4.0), lambda case: methods.Answer(next(answers)),
        three, oracle, before=2.0,
    )  # fmt: skip

    assert told.abstained
    assert told.shift == pytest.approx(1)
    assert told.regret == pytest.approx(0.1, abs=0.02)
    assert told.estimate_regret == pytest.approx(0, abs=0.02)


# --- photographs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(photos.PHOTOS))
def test_a_photograph_is_there_and_its_object_lies_in_it(name: str) -> None:
    photo = photos.PHOTOS[name]

    height, width, colours = photos._photograph(photo).shape

    assert colours == 3
    assert 0 < photo.centre[0] < height
    assert 0 < photo.centre[1] < width
    assert photo.side <= max(height, width)


def test_objects_fill_the_tile_on_the_fine_side_of_one_range_and_on_the_coarse_side_of_the_other() -> None:
    middles = {cut.tag: np.sqrt(cut.lo * cut.hi) for cut in photos.RANGES}

    for photo in photos.PHOTOS.values():
        filled = np.log2(photo.side / photos.TILE)

        assert np.log2(middles["B"]) + 0.25 < filled < np.log2(middles["A"]) - 0.25


def test_the_quality_of_a_photograph_is_the_probability_of_all_that_is_right() -> None:
    response = planted_response(2.0, scales=GRID, places=5)

    oracle = photos._probability_oracle(response, (0, 3))

    expected = response.outputs.probabilities[..., 0] + response.outputs.probabilities[..., 3]
    np.testing.assert_allclose(oracle.quality, expected.mean(axis=0), rtol=1e-6)


# --- stability -----------------------------------------------------------------------------------------------------------


def steady_of(best_by_part: tuple[float, float], copies: tuple[float, ...] = (), criterion: str = "confidence") -> Steadiness:
    """Answers of a network whose best scale is another one for either half of the places, and for copies of the slide."""
    rows = methods.methods()
    first, second = (planted(best, seed=i, places=16) for i, best in enumerate(best_by_part))
    estimate = rows[criterion + methods.ABSTAINS]
    scaled = [planted(best, places=16) for best in copies]
    return photos._steady(
        "net", "tissue", "slide", criterion, rows[criterion], estimate, first, [first, second], scaled, None
    )  # fmt: skip


def test_halves_that_agree_are_near_and_halves_that_do_not_are_as_far_as_they_are() -> None:
    alike, apart = steady_of((2.0, 2.0)), steady_of((2.0, 8.0))

    assert alike.halves < 0.3  # 16 places are noisy
    assert apart.halves == pytest.approx(2, abs=0.2)
    assert apart.halves_estimated == pytest.approx(2, abs=0.2)


def test_halves_share_no_place_and_leave_none_out() -> None:
    response = planted(2.0, places=7)

    first, second = (photos._part(response, start).outputs.logits[:, 0, 0] for start in (0, 1))

    assert not set(first) & set(second)
    assert set(first) | set(second) == set(response.outputs.logits[:, 0, 0])


def test_copies_are_compared_after_the_factor() -> None:
    follows, stays = steady_of((4.0, 4.0), (4 * 0.6, 4 * 1.5)), steady_of((4.0, 4.0), (4.0, 4.0))

    assert max(follows.rescaled) < 0.2
    assert stays.rescaled == pytest.approx([-np.log2(0.6), np.log2(1.5)], abs=0.15)


def test_a_table_of_stability_counts_pairs_in_which_one_abstained() -> None:
    answered = Steadiness("net", "tissue", "a", "c", 0.1, 0.2, (0.3, 0.5), (0.3, None), None)
    silent = Steadiness("net", "tissue", "b", "c", 0.3, None, (0.7, 0.9), (None, None), None)

    row = photos.stability_table([answered, silent]).splitlines()[2]

    assert row == "| net | tissue | c | 2 | 0.20, 0.30 | 0.20, 0.20 | 50% | 0.60, 0.90 | 0.30, 0.30 | 25% | - |"


def test_rescaled_copies_are_as_large_as_their_factor_and_as_bright() -> None:
    image = picture(100, 140)

    for factor in (0.6, 1.5):
        copy = photos.rescaled(image, factor)

        assert copy.shape == (round(100 * factor), round(140 * factor), 3)
        np.testing.assert_allclose(copy.mean((0, 1)), image.mean((0, 1)), atol=1)


# --- by family, and in the report ----------------------------------------------------------------------------------------


def record(family: str, method: str, regret: float, *, half: str = "develop", case: str = "a") -> Record:
    nothing = {"abstained": None, "error": None, "error_train": None, "covered": None, "covered_train": None}
    return Record(
        case=f"{family}/{case}", family=family, half=half, network="n", slide="s", range="A", upsampled=False, tags="",
        clear=True, method=method, scale=2.0, regret=regret, fallback_regret=regret, forwards=1, **nothing,
    )  # fmt: skip


# `first` is the best on f alone, `second` on the two others.
BY_FAMILY = [
    record(family, f"{name}{suffix}", regret)
    for name, regrets in {"first": (0.0, 0.5, 0.5), "second": (0.3, 0.1, 0.2)}.items()
    for family, regret in zip("fgh", regrets, strict=True)
    for suffix in ("", methods.ABSTAINS)
]


def test_what_is_chosen_for_a_family_has_not_seen_it() -> None:
    seen = {}

    def choose(records: list[Record]) -> str:
        others = frozenset(r.family for r in records)
        seen[others] = True
        return tables.best_criterion(records)

    chosen = tables.chosen_elsewhere(BY_FAMILY, choose)

    assert set(seen) == {frozenset("gh"), frozenset("fh"), frozenset("fg")}
    assert chosen["f"] == "second"  # and not `first`, which is better on f
    table = tables.family_table(BY_FAMILY, chosen=chosen)
    assert "| f | 1 |" in table
    assert "0.300 | second |" in table


def test_a_criterion_that_one_family_cannot_be_asked_for_is_not_chosen() -> None:
    only_on_f = [record("f", f"narrow{suffix}", 0.0) for suffix in ("", methods.ABSTAINS)]

    assert tables.best_criterion([*BY_FAMILY, *only_on_f]) in ("first", "second")


def test_a_criterion_that_never_answers_is_not_chosen_for_what_doing_nothing_loses() -> None:
    # `batchnorm_distance`, which trusts no fingerprint on some families, was the best of all.
    answers = [record(family, f"silent{suffix}", 0.0) for family in "fgh" for suffix in ("", methods.ABSTAINS)]
    silent = [replace(r, scale=None, regret=None) for r in answers]

    assert tables.best_criterion([*BY_FAMILY, *silent]) in ("first", "second")
    assert tables.best_criterion([*BY_FAMILY, *answers]) == "silent"


def test_sections_are_in_the_report_under_their_titles(tmp_path: Path) -> None:
    run.write_report(
        tmp_path, [], [], absent={}, not_asked=run.Counter(), sections={"Stressors": "| stressor |\n| --- |\n| none |"}
    )

    text = (tmp_path / "benchmark.md").read_text()
    assert "\n## Stressors\n" in text
    assert "| none |" in text


def test_every_family_and_section_can_be_loaded() -> None:
    for name in [*run.FAMILIES.values(), *(function for _, function in run.SECTIONS.values())]:
        assert callable(run.load_object(name))


def test_without_data_sections_say_so(tmp_path: Path) -> None:
    setting = Setting(cache=tmp_path, data=tmp_path / "absent", log=lambda line: None)

    for section in (stress.section, photos.section):
        with pytest.raises(MissingDataError):
            section(setting, ("develop",))


def test_a_section_ends_where_the_cache_does_and_says_so() -> None:
    def two_rows() -> Iterator[int]:
        yield 1
        yield 2
        raise MissingDataError("before slide c")

    found, end = photos.as_far_as_it_goes(two_rows())

    assert found == [1, 2]
    assert "before slide c" in end


def test_slides_of_stressors_are_on_the_side_of_the_split_where_the_families_have_them() -> None:
    families = stress.split() | photos.split()

    for half in ("develop", "report"):
        for slide in [s for f in ("stress", "stability") for s in families[f]["slides"][half] if s in real.MONUSEG]:
            assert cases.half_of("embedded", network=real.EMBEDDED, slide=slide) == half
            assert real.monuseg_mpp(slide) == 0.25
        for network in families["stress"]["networks"][half]:
            assert network == real.EMBEDDED or network in real.split()["nuclei32"]["networks"][half]


# --- slides that were scanned at another µm/px ----------------------------------------------------------------------------


def test_a_cached_response_is_tagged_when_it_is_loaded_views_too() -> None:
    response = planted(2.0, places=3)

    tagged = real._tagged(response, 0.5)

    assert tagged.slide_mpp == tagged.views["pixel_shuffled"].slide_mpp == 0.5
    np.testing.assert_array_equal(tagged.outputs.logits, response.outputs.logits)


def test_slides_of_half_the_magnification_have_half_the_training_scale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Both were taken for 0.25 µm/px, so that "training µm/px" answered an octave too coarse on them.
    def fine_or_coarse(family: str, slide: str) -> Case:
        monkeypatch.setattr(real, "MONUSEG", (slide,))
        monkeypatch.setattr(Setting, "cached_response", lambda self, key, make: planted(2.0, places=3))
        monkeypatch.setattr(Setting, "cached_oracle", lambda self, key, make: falling_from(2.0))
        (first, *_) = getattr(real, family)(Setting(cache=tmp_path, data=tmp_path, log=lambda line: None))
        return first

    for family, train_scale in (("nuclei32", 1.0), ("embedded", 2.0)):
        usual, other = (fine_or_coarse(family, f"TCGA-{slide}-01Z-00-DX1") for slide in ("18-5592", "HE-7128"))

        assert (usual.train_scale, usual.response.slide_mpp) == (train_scale, 0.25)
        assert (other.train_scale, other.response.slide_mpp) == (train_scale / 2, 0.5)


# --- with weights that are not shipped -----------------------------------------------------------------------------------


def test_squeezenet_knows_a_cat_that_fills_the_tile_and_not_one_that_is_a_speck(real_data: Path) -> None:
    cat = photos.PHOTOS["cat"]
    network = photos.imagenet_network(photos.SQUEEZENET, real_data / "weights", tile_size=photos.TILE)
    reader, pad = real._mirrored(photos._photograph(cat), 64)
    # On grey, an eighth as wide.
    near = real.scale_stack(reader, np.array([cat.centre]) + pad, scales=[cat.side / photos.TILE], size=photos.TILE)
    tile = near.images.compute(scheduler="synchronous")[0, 0]
    speck = np.full_like(tile, 128)
    speck[98:126, 98:126] = tile[::8, ::8]

    answers = photos.respond(network, [tile[None], speck[None]], scales=[1.0, 2.0], layers="none", device="cpu")

    filled, tiny = answers.outputs.probabilities[0][:, list(cat.classes)].sum(axis=1)
    assert filled > 0.8
    assert tiny < filled / 2


@pytest.mark.parametrize(("name", "channels"), [("vgg16", 512), ("densenet121", 1024)])
def test_trunks_are_extractors_of_features(real_data: Path, name: str, channels: int) -> None:
    network = photos.imagenet_network(name, real_data / "weights", tile_size=64)

    answers = photos.respond(network, [picture(64, 64)[None]], scales=[1.0], layers="none", device="cpu")

    assert answers.outputs is None
    assert answers.features.shape == (1, 1, channels)
