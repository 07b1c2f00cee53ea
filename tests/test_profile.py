"""A network's profile: made from reference slides, kept in a card, registered to, settled with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from wsiscale.criteria import Criterion
from wsiscale.errors import ModelError, OptionError
from wsiscale.geometry import scale_grid
from wsiscale.profile import (
    Profile,
    from_record,
    load_profile,
    make_profile,
    profile_digest,
    profile_of,
    register,
    registration_of,
    registration_record,
    save_profile,
    settle,
    to_record,
)
from wsiscale.testing.responses import noise_response, planted_response, response_of
from wsiscale.types import Abstention, LayerMoments, ScaleEstimate, ScaleResponse

CLASSES = 8
CHANNELS = 40
OPTIMUM = 0.6  # µm/px at which the synthetic network is surest


def tissue_response(
    classes: Sequence[int],
    *,
    seed: int,
    mpp: float = 0.25,
    scales: NDArray[np.float64] | None = None,
    places: int = 32,
    tagged: float | None = None,
) -> ScaleResponse:
    """What one network answers to a slide that holds `classes` of tissue, in shares that `seed` draws.

    Of each class every channel has a curve over log2 µm/px of its own; tiles differ by their level and by noise, slides by a
    level of theirs (stain). `mpp` is the truth about level 0, `tagged` what the slide claims (None: the truth).
    """
    rng = np.random.default_rng(seed)
    grid = scale_grid(1, 16) if scales is None else scales
    octaves = np.log2(grid * mpp)
    each = rng.choice(classes, size=places, p=rng.dirichlet(np.full(len(classes), 2.0)))
    network = np.random.default_rng(1234)
    centers = network.uniform(-2.5, 2.5, size=(max(CLASSES, max(classes) + 1), CHANNELS))
    heights = network.gamma(2.0, 1.0, size=centers.shape)
    shape = heights[each][:, None] * np.exp(-((octaves[:, None] - centers[each][:, None]) ** 2) / (2 * 0.8**2))
    level = rng.normal(0, 0.2, size=(places, 1, CHANNELS)) + rng.normal(0, 0.2, size=CHANNELS)
    values = shape + level + rng.normal(0, 0.1, size=shape.shape)  # (N, S, CHANNELS)
    # Few features, and a head on them that is surest at OPTIMUM.
    surest = np.exp(-((octaves - np.log2(OPTIMUM)) ** 2) / 2)
    features = np.stack([surest, -surest], axis=1) + rng.normal(0, 0.05, size=(places, len(grid), 2))
    response = response_of(scales=grid, features=features, head_weight=np.eye(2), stages=[values[..., :16], values[..., 16:]])
    # Without the features, which know the scale of every class alike: each class has only its own curves to go by.
    return replace(response, slide_mpp=mpp if tagged is None else tagged, features=None, head_weight=None, head_bias=None)


# These networks have no more to tell than how sure they are, of which the default makes nothing.
confident_profile = partial(make_profile, criterion="confidence")


@pytest.fixture(scope="module")
def profile() -> Profile:
    return confident_profile(references())


def references(count: int = 8) -> list[ScaleResponse]:
    """Slides with several of six of the network's eight classes each, from two scanners."""
    held = [np.random.default_rng(100 + i).permutation(6)[:4] for i in range(count)]
    return [tissue_response(list(c), seed=i, mpp=(0.25, 0.5)[i % 2]) for i, c in enumerate(held)]


def octaves_off(found: float | None, truth: float) -> float:
    assert found is not None
    return abs(float(np.log2(found / truth)))


def test_the_pooled_optimum_is_the_networks_own(profile: Profile) -> None:
    assert profile.optimum is not None
    assert profile.ci90 is not None
    assert octaves_off(profile.optimum, OPTIMUM) < 0.05
    assert profile.ci90[0] < OPTIMUM < profile.ci90[1]
    assert profile.spread < 0.2


@pytest.mark.parametrize("factor", [1 / 2.5, 0.7, 1.0, 1.5, 2.5])
def test_the_true_scale_is_found_whatever_the_tag_says(profile: Profile, factor: float) -> None:
    slide = tissue_response([0, 2, 3, 5], seed=50, mpp=0.3, tagged=0.3 * factor)

    found = register(profile, slide)

    assert found.refused is None
    assert octaves_off(found.mpp, 0.3) < 0.15
    assert found.shift is not None
    assert found.shift == pytest.approx(-np.log2(factor), abs=0.15)


def test_a_missing_tag_changes_nothing(profile: Profile) -> None:
    slide = tissue_response([1, 2, 4], seed=51, mpp=0.4)

    tagged, untagged = register(profile, slide), register(profile, replace(slide, slide_mpp=None))

    assert untagged.mpp == tagged.mpp
    assert untagged.ci90 == tagged.ci90
    assert untagged.shift is None


@pytest.mark.parametrize("mpp", [0.2, 0.33, 0.5, 0.8])
@pytest.mark.parametrize("window", [(1.0, 8.0), (1.5, 16.0), (1.0, 16.0)])
def test_slides_of_any_scanner_and_range_are_registered(profile: Profile, mpp: float, window: tuple[float, float]) -> None:
    slide = tissue_response([0, 1, 3, 4], seed=52, mpp=mpp, scales=scale_grid(*window))

    found = register(profile, slide)

    assert octaves_off(found.mpp, mpp) < 0.2
    assert found.ci90 is not None
    assert found.ci90[0] <= mpp <= found.ci90[1]


@pytest.mark.parametrize("tissue", range(6))
def test_a_slide_of_one_class_is_registered_where_the_bank_has_that_class(profile: Profile, tissue: int) -> None:
    # The mean curve of a mixture does not fit such a slide; its tiles' nearest neighbours do.
    slide = tissue_response([tissue], seed=60 + tissue, mpp=0.35)

    found = register(profile, slide)

    assert octaves_off(found.mpp, 0.35) < 0.25


@pytest.mark.parametrize("tissue", [6, 7])
def test_a_class_that_the_bank_has_not_is_refused(profile: Profile, tissue: int) -> None:
    slide = tissue_response([tissue], seed=70, mpp=0.35)

    found = register(profile, slide)

    assert found.mpp is None
    assert found.refused is not None
    assert found.refused.reason == "unlike_bank"


def test_answers_that_do_not_depend_on_scale_are_refused_as_flat(profile: Profile) -> None:
    slide = tissue_response([0, 1], seed=71)
    noise = np.random.default_rng(0)
    layers = {n: LayerMoments(noise.normal(size=m.mean.shape).astype(np.float32), m.square) for n, m in slide.layers.items()}

    found = register(profile, replace(slide, layers=layers))

    assert found.refused is not None
    assert found.refused.reason == "flat"


def test_noise_of_every_kind_is_never_registered(profile: Profile) -> None:
    for seed in range(10):
        slide = tissue_response([0, 1], seed=seed)
        walk = np.random.default_rng(seed)

        def noisy(shape: tuple[int, ...], walk: np.random.Generator = walk) -> NDArray[np.float32]:
            return walk.normal(size=shape).cumsum(axis=1).astype(np.float32)

        layers = {name: LayerMoments(noisy(m.mean.shape), m.square) for name, m in slide.layers.items()}

        assert register(profile, replace(slide, layers=layers)).mpp is None


def test_a_slide_beyond_the_profiles_range_is_refused_and_not_put_at_its_end(profile: Profile) -> None:
    for mpp in (0.03, 3.0):
        assert register(profile, tissue_response([0, 1, 3, 4], seed=52, mpp=mpp, scales=scale_grid(1, 8))).mpp is None


def test_two_shifts_that_fit_alike_are_refused_as_ambiguous() -> None:
    # Curves that come back every octave: a slide fits an octave off as well as at home.
    def periodic(seed: int) -> ScaleResponse:
        slide = tissue_response([0], seed=seed)
        rng = np.random.default_rng(seed)
        wave = np.sin(2 * np.pi * (np.log2(slide.scales)[:, None] + np.linspace(0, 1, 16, endpoint=False)))
        values = (wave + rng.normal(0, 0.5, size=(32, len(slide.scales), 16))).astype(np.float32)
        return replace(slide, layers={"stage": LayerMoments(values, values**2)}, stages=("stage",))

    found = register(confident_profile([periodic(seed) for seed in range(5)]), periodic(9))

    assert found.refused is not None
    assert found.refused.reason == "ambiguous"


def test_the_offset_of_other_slides_is_taken_off(profile: Profile) -> None:
    # Slides that all come out too coarse are in truth finer.
    slide = tissue_response([0, 2, 3], seed=3)

    found, corrected = register(profile, slide), register(replace(profile, offset=0.25), slide)

    assert found.mpp is not None
    assert found.ci90 is not None
    assert corrected.mpp == pytest.approx(found.mpp * 2**-0.25)
    assert corrected.ci90 == pytest.approx((found.ci90[0] * 2**-0.25, found.ci90[1] * 2**-0.25))
    np.testing.assert_allclose(corrected.tried, found.tried * 2**-0.25)


def test_a_slide_whose_tiles_are_all_alike_is_not_held_against_mixtures(profile: Profile) -> None:
    # Noise is alike everywhere, and its mean curve may look like a mixture's: here it is one.
    slide = tissue_response([0, 2, 3, 5], seed=4)
    alike = {
        n: LayerMoments(m.mean.mean(axis=0, keepdims=True) + 0.1 * (m.mean - m.mean.mean(axis=0)), m.square)
        for n, m in slide.layers.items()
    }

    found = register(profile, replace(slide, layers=alike))

    assert found.method != "mean curves" or found.refused is not None


def test_few_places_and_few_scales_are_refused_by_name(profile: Profile) -> None:
    few = tissue_response([0, 1], seed=1, places=7)
    narrow = tissue_response([0, 1], seed=1, scales=scale_grid(1, 2))

    for slide, reason in ((few, "too_few_places"), (narrow, "too_few_scales")):
        refused = register(profile, slide).refused
        assert refused is not None
        assert refused.reason == reason


def test_places_with_nan_are_left_out_and_not_spread(profile: Profile) -> None:
    slide = tissue_response([0, 2, 3], seed=2)
    slide.layers["stage1"].mean[3, 5, 0] = np.nan

    found = register(profile, slide)

    assert found.places == 31
    assert octaves_off(found.mpp, 0.25) < 0.15


def test_scales_finer_than_level_0_do_not_count() -> None:
    # Interpolated tiles show the scanner's pixels: a bank would recognise those, wherever the tissue is.
    fine = scale_grid(0.5, 16)
    slides = [tissue_response([0, 1, 2], seed=i, scales=fine) for i in range(4)]
    slide = tissue_response([0, 1, 2], seed=9, scales=fine)
    marked = {n: LayerMoments(np.where(fine[:, None] < 0.99, 50, m.mean), m.square) for n, m in slide.layers.items()}

    known = confident_profile(slides)

    assert known.octaves[0] == -2
    assert known.score_octaves[0] == -3
    assert register(known, replace(slide, layers=marked)).mpp == register(known, slide).mpp


def test_a_slide_wider_than_the_profile_is_not_drawn_to_the_far_end() -> None:
    # Few shared scales fit somewhere by chance: the shift has to share enough of them.
    known = confident_profile([tissue_response([0, 1, 2, 3], seed=i, scales=scale_grid(1, 6)) for i in range(6)])
    slide = tissue_response([0, 1, 2, 3], seed=30, mpp=0.125, scales=scale_grid(1, 32))

    assert octaves_off(register(known, slide).mpp, 0.125) < 0.2


def test_the_same_seed_gives_the_same_answer(profile: Profile) -> None:
    slide = tissue_response([0, 2, 4], seed=3)

    assert register(profile, slide, seed=4).ci90 == register(profile, slide, seed=4).ci90
    assert to_record(confident_profile(references(3), seed=1)) == to_record(confident_profile(references(3), seed=1))


# --- in the card --------------------------------------------------------------------------------------------------------


def test_a_profile_comes_back_from_its_card_and_answers_the_same(profile: Profile, tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    card.write_text('{"factory": "nets.py:factory", "tile_size": 64}')
    slide = tissue_response([0, 2, 4], seed=5, mpp=0.3)

    save_profile(profile, card)
    fields = json.loads(card.read_text())
    back = profile_of(fields)

    assert fields["factory"] == "nets.py:factory"
    assert fields["profile"]["optimum"] == profile.optimum
    assert back is not None
    assert register(back, slide).mpp == register(profile, slide).mpp
    assert back.ci90 == profile.ci90
    assert back.notes == profile.notes


def test_a_card_with_a_wide_networks_profile_stays_below_half_a_megabyte() -> None:
    rng = np.random.default_rng(0)
    wide = [
        response_of(
            scales=scale_grid(0.5, 32, per_octave=4),
            features=rng.normal(size=(33, 25, 1000)) + np.linspace(0, 3, 25)[:, None],
            head_weight=rng.normal(size=(4, 1000)),
        )
        for _ in range(6)
    ]

    assert len(json.dumps(to_record(confident_profile(wide)))) < 500_000


def test_a_card_without_a_profile_has_none() -> None:
    assert profile_of({"factory": "nets.py:factory"}) is None


def test_a_card_that_is_named_for_its_profile_has_to_have_one(tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    card.write_text('{"factory": "nets.py:factory"}')

    with pytest.raises(ModelError, match="wsiscale profile SLIDES"):
        load_profile(card)


def test_a_profile_and_a_registration_are_known_again_after_they_were_written(profile: Profile) -> None:
    own = replace(profile, network="ab12", tile_size=96, offset=0.1)
    found = register(own, tissue_response([0, 2, 4], seed=5))

    back, again = from_record(to_record(own)), registration_of(json.loads(json.dumps(registration_record(found))))

    assert (back.network, back.tile_size, back.offset) == ("ab12", 96, 0.1)
    assert profile_digest(back) == profile_digest(own) != profile_digest(profile)
    assert (again.mpp, again.ci90, again.claimed, again.places) == (found.mpp, found.ci90, found.claimed, found.places)


def test_a_tag_just_outside_of_the_interval_is_not_called_wrong(profile: Profile) -> None:
    # One right tag in ten lies outside of a 90 % interval.
    found = register(profile, tissue_response([0, 2, 4], seed=5, mpp=0.3))
    assert found.ci90 is not None

    near, far = (settle(profile, replace(found, claimed=found.ci90[1] * 2**octaves)).notes for octaves in (0.2, 0.3))

    assert not near
    assert "the tag says" in far[0]


@pytest.mark.parametrize("change", [{"version": 2}, {"arrays": "nonsense"}, {"arrays": "AAAA"}, {"ci90": [1]}, {"layers": [1]}])
def test_a_damaged_or_newer_profile_is_a_model_error(profile: Profile, change: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="make it again"):
        from_record(to_record(profile) | change)


def test_a_card_that_is_not_json_is_left_as_it_was(profile: Profile, tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    card.write_text("not json")

    with pytest.raises(ModelError, match="not a model card"):
        save_profile(profile, card)

    assert card.read_text() == "not json"


def test_another_networks_response_is_an_error(profile: Profile) -> None:
    with pytest.raises(OptionError, match="another network"):
        register(profile, planted_response(2.0))


# --- making one ---------------------------------------------------------------------------------------------------------


def test_a_profile_needs_two_slides_with_mpp() -> None:
    slides = references(2)

    with pytest.raises(OptionError, match="slide 2 of 2 has no µm/px"):
        confident_profile([slides[0], replace(slides[1], slide_mpp=None)])
    with pytest.raises(OptionError, match="two slides or more"):
        confident_profile(slides[:1])
    assert any("made of 2 slides" in note for note in confident_profile(slides).notes)


def test_slides_whose_ranges_do_not_meet_are_an_error() -> None:
    fine, coarse = tissue_response([0], seed=0, mpp=0.1), tissue_response([0], seed=1, mpp=4.0)

    with pytest.raises(OptionError, match="overlap"):
        confident_profile([fine, coarse])


def test_a_slide_with_too_little_is_left_out_and_named() -> None:
    made = confident_profile([*references(3), tissue_response([0], seed=9, places=3)])

    assert made.slides == 3
    assert any("slide 4 of 4 was left out" in note for note in made.notes)


def test_a_network_that_answers_nothing_of_scale_has_no_optimum() -> None:
    made = confident_profile([noise_response(seed=seed, kind="walk") for seed in range(6)])

    assert made.optimum is None
    assert settle(made, register(made, noise_response(seed=20, kind="walk"))).scale is None


def test_a_score_that_only_grows_has_no_optimum() -> None:
    growing = Criterion("growing", lambda response: np.log2(response.scales * (response.slide_mpp or 1)))

    made = make_profile(references(4), criterion=growing)

    assert made.optimum is None
    assert any("coarsest end" in note for note in made.notes)


def test_where_a_slide_begins_or_ends_the_pooled_score_does_not_step() -> None:
    # Each slide has a level of its own: a plain mean over the slides that reach would show their ends as an optimum.
    def level(response: ScaleResponse) -> NDArray[np.float64]:
        octaves = np.log2(response.scales * (response.slide_mpp or 1))
        return 1 - (octaves - np.log2(OPTIMUM)) ** 2 / 10 + (5 if response.slide_mpp == 0.5 else 0)

    made = make_profile(references(4), criterion=Criterion("level", level))

    assert octaves_off(made.optimum, OPTIMUM) < 0.02


# --- settling -----------------------------------------------------------------------------------------------------------


def own_estimate(scale: float | None, octaves: float = 0.1) -> ScaleEstimate:
    """A slide's own estimate with an interval of `octaves` to either side."""
    return ScaleEstimate(
        scale=scale,
        ci90=None if scale is None else (scale / 2**octaves, scale * 2**octaves),
        slide_mpp=None,
        abstained=None if scale is not None else Abstention("flat_curve", "flat"),
        criterion="confidence",
        curve=None,
        votes=np.empty(0),
        places=32,
        seed=0,
    )


def test_a_right_tag_and_the_profile_give_the_networks_optimum(profile: Profile) -> None:
    slide = tissue_response([0, 2, 4], seed=5, mpp=0.3)

    settled = settle(profile, register(profile, slide))

    assert octaves_off(settled.mpp, OPTIMUM) < 0.05
    assert settled.slide_mpp == 0.3
    assert settled.own_share == 0
    assert settled.notes == ()


def test_a_wrong_tag_is_told_and_if_not_trusted_overruled(profile: Profile) -> None:
    slide = tissue_response([0, 2, 4], seed=5, mpp=0.3, tagged=0.6)
    registration = register(profile, slide)

    trusted, distrusted = settle(profile, registration), settle(profile, registration, trust_tag=False)

    assert trusted.slide_mpp == 0.6
    assert "the tag says 0.6 µm/px, the tissue 0.3" in trusted.notes[0].replace("0.29", "0.3").replace("0.31", "0.3")
    # What counts is the pixels that are read: the scale relative to level 0.
    assert octaves_off(distrusted.scale, OPTIMUM / 0.3) < 0.2
    assert octaves_off(trusted.scale, OPTIMUM / 0.6) < 0.05


def test_without_a_tag_the_registration_is_gone_by_and_widens_the_interval(profile: Profile) -> None:
    slide = tissue_response([0, 2, 4], seed=5, mpp=0.3)

    known = settle(profile, register(profile, slide))
    unknown = settle(profile, register(profile, replace(slide, slide_mpp=None)))

    assert octaves_off(unknown.scale, OPTIMUM / 0.3) < 0.2
    assert known.ci90 is not None
    assert unknown.ci90 is not None
    assert unknown.ci90[1] / unknown.ci90[0] > known.ci90[1] / known.ci90[0]


def test_the_own_curve_weighs_more_the_surer_it_is(profile: Profile) -> None:
    registration = register(profile, tissue_response([0, 2, 4], seed=5, mpp=0.3))
    scale = OPTIMUM / 0.3 * 2**0.1

    sure, unsure = (settle(profile, registration, own_estimate(scale, octaves)) for octaves in (0.1, 1.0))

    assert 0.9 > sure.own_share > 2 * unsure.own_share > 0
    assert sure.scale is not None
    assert unsure.scale is not None
    assert unsure.scale < sure.scale < scale


def test_the_own_curve_weighs_less_for_a_network_whose_single_slides_miss(profile: Profile) -> None:
    registration = register(profile, tissue_response([0, 2, 4], seed=5, mpp=0.3))
    own = own_estimate(OPTIMUM / 0.3)

    steady, fickle = (settle(replace(profile, spread=spread), registration, own).own_share for spread in (0.05, 0.5))

    assert steady > 5 * fickle > 0


def test_an_own_curve_that_peaks_elsewhere_is_left_out_and_said(profile: Profile) -> None:
    registration = register(profile, tissue_response([0, 2, 4], seed=5, mpp=0.3))

    settled = settle(profile, registration, own_estimate(0.5))

    assert settled.own_share == 0
    assert "left out" in settled.notes[0]
    assert octaves_off(settled.mpp, OPTIMUM) < 0.05


def test_a_refused_slide_without_a_tag_has_only_its_own_curve(profile: Profile) -> None:
    slide = replace(tissue_response([6], seed=70, mpp=0.35), slide_mpp=None)

    alone = settle(profile, register(profile, slide), own_estimate(3.0))
    nothing = settle(profile, register(profile, slide), own_estimate(None))

    assert alone.scale == pytest.approx(3.0)
    assert alone.mpp is None
    assert alone.own_share == 1
    assert nothing.scale is None
    assert nothing.abstained is not None
    assert nothing.abstained.reason == "nothing_known"
