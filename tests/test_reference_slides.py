"""A profile from slides, and what `estimate` makes of it. Blobs of 3 µm, and a network that likes them 6 px wide."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

import wsiscale as ws
from wsiscale.analyzer import respond
from wsiscale.criteria import default_criterion
from wsiscale.errors import ModelError, OptionError
from wsiscale.estimation import _settled, as_record
from wsiscale.networks import Network, load_network, network_digest
from wsiscale.profile import Profile, load_profile, profile_of, refusal, register, save_profile, to_record
from wsiscale.readers import ArrayReader
from wsiscale.reference_slides import References, card_fields, profile_slides
from wsiscale.stacks import scale_stack
from wsiscale.testing import planted_network, planted_slide
from wsiscale.types import Abstention, ScaleEstimate

BLOBS = 3.0  # µm
BEST = 0.5  # µm/px
# On slides of blobs alone the default has nothing to tell the scale by (`one_tissue`).
QUICK: dict[str, Any] = {"places": 16, "detector": lambda image: np.ones(image.shape[:2], bool), "criterion": "confidence"}


@pytest.fixture(scope="module")
def network() -> Network:
    return load_network(planted_network(6.0), tile_size=96)


def blobs(mpp: float, seed: int, *, tagged: float | None = -1) -> ArrayReader:
    """A slide at `mpp` of 1,000 px; `tagged` is what it says, None nothing, by default the truth."""
    pixels = planted_slide(BLOBS / mpp, seed=seed, size=1000).read(level=0, y=0, x=0, height=1000, width=1000)
    return ArrayReader(pixels, mpp=mpp if tagged == -1 else tagged, name=f"blobs-{seed}")


@pytest.fixture(scope="module")
def made(network: Network) -> References:
    return profile_slides([blobs(mpp, seed) for seed, mpp in enumerate((0.2, 0.25, 0.3, 0.2, 0.25, 0.4))], network, **QUICK)


def octaves(found: float | None, truth: float) -> float:
    assert found is not None
    return float(np.log2(found / truth))


def test_a_profile_of_slides_has_the_networks_optimum_and_knows_whose_it_is(made: References, network: Network) -> None:
    assert abs(octaves(made.profile.optimum, BEST)) < 0.1
    assert made.profile.network == network_digest(network)
    assert made.profile.tile_size == 96
    assert made.slides == tuple(f"blobs-{seed}" for seed in range(6))
    assert made.doubtful == ()
    assert json.loads(json.dumps(made.as_record(), allow_nan=False))["errors"]["mean curves"]["blobs-3"] is not None


def test_slides_that_will_not_do_are_left_out_by_name(network: Network, tmp_path: Path) -> None:
    heard: list[tuple[str, str | None]] = []
    slides = [blobs(0.25, 0), blobs(0.25, 1, tagged=None), tmp_path / "none.svs", blobs(0.3, 2)]

    made = profile_slides(slides, network, told=lambda *about: heard.append(about), **QUICK)

    assert made.slides == ("blobs-0", "blobs-2")
    assert [name for name, _ in made.left_out] == ["blobs-1", "none.svs"]
    assert "µm/px" in made.left_out[0][1]
    assert [name for name, why in heard if why is None] == ["blobs-0", "blobs-2"]


def test_one_slide_is_too_few_and_the_error_says_what_became_of_the_others(network: Network) -> None:
    with pytest.raises(OptionError, match=r"there are 1 to make it of \(blobs-1: no µm/px"):
        profile_slides([blobs(0.25, 0), blobs(0.25, 1, tagged=None)], network, **QUICK)


def test_a_reference_slide_with_a_wrong_tag_is_named(network: Network) -> None:
    tags = (None, None, None, None, None, 2)
    slides = [blobs(0.25, seed, tagged=0.25 * (factor or 1)) for seed, factor in enumerate(tags)]

    assert profile_slides(slides, network, **QUICK).doubtful == ("blobs-5",)


def test_kept_answers_are_gone_on_from_and_other_options_ask_anew(network: Network, tmp_path: Path) -> None:
    slides = [blobs(0.25, seed) for seed in range(3)]
    first = profile_slides(slides[:2], network, keep=tmp_path, **QUICK)
    asked: list[int] = []

    again = profile_slides(slides[:2], network, keep=tmp_path, progress=lambda *at: asked.append(at[0]), **QUICK)

    assert not asked
    np.testing.assert_array_equal(again.profile.tiles, first.profile.tiles)
    profile_slides(slides, network, keep=tmp_path, **QUICK)
    assert len(list(tmp_path.iterdir())) == 3
    profile_slides(slides[:2], network, keep=tmp_path, **(QUICK | {"places": 12}))
    assert len(list(tmp_path.iterdir())) == 5


# --- an estimate with a profile -------------------------------------------------------------------------------------------


def asked(slide: ws.Reader, network: Network, profile: Profile | None, **options: Any) -> ScaleEstimate:
    return ws.estimate(slide, network, profile=profile, **(QUICK | options))


def test_an_estimate_rests_on_the_profile_and_its_own_curve_and_says_so(made: References, network: Network) -> None:
    found = asked(blobs(0.3, 50), network, made.profile)
    alone = asked(blobs(0.3, 50), network, None)

    assert abs(octaves(found.mpp, BEST)) < 0.1
    assert found.registration is not None
    assert abs(octaves(found.registration.mpp, 0.3)) < 0.15
    assert 0 < found.own_share < 1
    assert found.forwards > alone.forwards + 16 * 7
    assert (alone.registration, alone.own_share) == (None, 1.0)
    record = json.loads(json.dumps(as_record(found), allow_nan=False))
    assert record["own_share"] == found.own_share
    assert record["registration"]["mpp"] == found.registration.mpp
    assert record["registration"]["refused"] is None


def test_a_slide_without_mpp_gets_one_from_its_tissue(made: References, network: Network) -> None:
    slide = blobs(0.3, 51, tagged=None)

    found = asked(slide, network, made.profile)
    in_scale = ws.estimate(slide, network, scale_range=(1, 8), **QUICK)

    assert found.mpp_source == "estimated"
    assert any("by the tissue" in note for note in found.notes)
    assert abs(octaves(found.slide_mpp, 0.3)) < 0.15
    assert abs(octaves(found.scale, BEST / 0.3)) < 0.1
    assert (in_scale.mpp, in_scale.mpp_source, in_scale.registration) == (None, "none", None)


def test_a_wrong_tag_is_noted_and_where_it_is_not_trusted_changes_nothing_at_all(made: References, network: Network) -> None:
    trusted = asked(blobs(0.3, 52, tagged=0.75), network, made.profile)
    answers = [asked(blobs(0.3, 52, tagged=tag), network, made.profile, trust_tag=False) for tag in (0.3, 0.75, None)]

    assert any("the tag says 0.75 µm/px, the tissue" in note for note in trusted.notes)
    assert trusted.slide_mpp == 0.75
    assert answers[0].scale == answers[1].scale == answers[2].scale
    assert {answer.mpp_source for answer in answers} == {"estimated"}
    assert abs(octaves(answers[0].scale, BEST / 0.3)) < 0.1


def test_without_a_profile_an_untrusted_tag_leaves_the_relative_scale(network: Network) -> None:
    found, untagged = (asked(blobs(0.3, 53, tagged=tag), network, None, trust_tag=False) for tag in (0.75, None))

    assert found.scale == untagged.scale
    assert found.mpp is None


@pytest.mark.parametrize("factor", [0.6, 1.5])
def test_a_rescaled_copy_moves_the_answer_by_the_factor(made: References, network: Network, factor: float) -> None:
    for profile in (made.profile, None):
        slide, copy = (asked(blobs(mpp, 54), network, profile, trust_tag=False) for mpp in (0.2, 0.2 / factor))

        assert octaves(copy.scale, 1) - octaves(slide.scale, 1) == pytest.approx(np.log2(factor), abs=0.1)


def test_kept_answers_hold_the_registration(made: References, network: Network, tmp_path: Path) -> None:
    slide = blobs(0.3, 55, tagged=None)
    first = asked(slide, network, made.profile, keep=tmp_path / "kept.zarr")

    again = asked(slide, network, made.profile, reuse=tmp_path / "kept.zarr", progress=lambda *_: pytest.fail("asked"))

    assert (again.scale, again.slide_mpp, again.own_share) == (first.scale, first.slide_mpp, first.own_share)
    assert again.forwards == 0


def test_kept_answers_of_another_profile_say_that_it_has_no_say(made: References, network: Network, tmp_path: Path) -> None:
    slide = blobs(0.3, 55)
    asked(slide, network, made.profile, keep=tmp_path / "kept.zarr")

    again = asked(slide, network, replace(made.profile, offset=0.1), reuse=tmp_path / "kept.zarr")

    assert again.registration is None
    assert any("no say" in note for note in again.notes)


def test_a_profile_of_other_weights_or_tiles_is_refused_and_in_a_card_passed_over(made: References) -> None:
    other = load_network(planted_network(7.0), tile_size=96)
    smaller = load_network(planted_network(6.0), tile_size=64)
    slide = blobs(0.3, 56)

    for network, why in ((other, "other weights"), (smaller, "tiles of 96 px")):
        with pytest.raises(ModelError, match=why):
            asked(slide, network, made.profile)
        with_card = replace(network, card={"profile": to_record(made.profile)})
        found = ws.estimate(slide, with_card, **QUICK)
        assert found.registration is None
        assert any(why in note for note in found.notes)


def test_a_cards_profile_is_used_unasked_unless_it_was_made_with_another_criterion(made: References, network: Network) -> None:
    with_card = replace(network, card={"profile": to_record(made.profile)})

    by_itself = ws.estimate(blobs(0.3, 57), with_card, **QUICK)
    other = ws.estimate(blobs(0.3, 57), with_card, **(QUICK | {"criterion": "energy"}))

    assert by_itself.registration is not None
    assert other.registration is None
    assert any("criterion confidence" in note for note in other.notes)


def test_a_range_in_scale_and_a_named_profile_contradict_each_other(made: References, network: Network) -> None:
    with pytest.raises(OptionError, match="a profile is in µm/px"):
        asked(blobs(0.3, 58), network, made.profile, scale_range=(1, 8))


# --- who has a say -----------------------------------------------------------------------------------------------------------


def own(scale: float | None, reason: str = "bimodal") -> ScaleEstimate:
    return ScaleEstimate(
        scale=scale,
        ci90=None if scale is None else (scale / 1.1, scale * 1.1),
        slide_mpp=0.25,
        abstained=None if scale is not None else Abstention(reason, "why"),
        criterion="confidence",
        curve=None,
        votes=np.empty(0),
        places=16,
        seed=0,
        mpp_source="metadata",
    )


def test_where_the_own_curve_abstains_the_profile_answers_and_says_so(made: References) -> None:
    found = _settled(own(None), made.profile, refusal("boundary", "why", claimed=0.25), 1, 16)

    assert found.abstained is None
    assert abs(octaves(found.mpp, BEST)) < 0.1
    assert found.own_share == 0
    assert any("own curve has no answer (bimodal)" in note for note in found.notes)


@pytest.mark.parametrize("reason", ["unlike_bank", "flat", "too_few_places", "too_few_scales"])
def test_a_slide_that_the_profile_does_not_know_has_its_own_curve_alone(made: References, reason: str) -> None:
    registration = refusal(reason, "why", claimed=0.25)

    answered, abstained = (_settled(own(scale), made.profile, registration, 1, 16) for scale in (3.3, None))

    assert answered.scale == 3.3
    assert any(reason in note for note in answered.notes)
    assert abstained.abstained is not None
    assert abstained.abstained.reason == "bimodal"


def test_an_optimum_beyond_the_range_is_its_end_or_no_answer(made: References) -> None:
    registration = refusal("boundary", "why", claimed=0.25)
    best = octaves(made.profile.optimum, 0.25)

    near, far = (_settled(own(None), made.profile, registration, 2 ** (best + d), 16) for d in (0.02, 1.0))

    assert near.scale == 2 ** (best + 0.02)
    assert any("this is that end" in note for note in near.notes)
    assert far.abstained is not None
    assert far.abstained.reason == "boundary_optimum"
    assert "finer than the range" in far.abstained.detail


# --- the card ---------------------------------------------------------------------------------------------------------------


def test_a_card_beside_the_networks_file_is_that_network(made: References, tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "mine.py").write_text(
        "from wsiscale.testing import planted_network\n\ndef net():\n    return planted_network(6)\n"
    )
    spec = f"{tmp_path}/nets/mine.py:net"
    network = load_network(spec, tile_size=96)
    card = tmp_path / "card.json"

    save_profile(replace(made.profile, network=network_digest(network)), card, fields=card_fields(network, spec, None, card))

    again = load_network(card, trust_model=True)
    assert json.loads(card.read_text())["factory"] == "nets/mine.py:net"
    assert network_digest(again) == network_digest(network)
    assert again.tile_size == 96
    assert profile_of(again.card) is not None
    assert load_profile(card).network == network_digest(network)
    # A copy of that card elsewhere still finds the network.
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "card.json"
    assert card_fields(again, str(card), None, copy)["factory"] == "../nets/mine.py:net"


# --- the embedded network's own ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Network:
    return load_network()


@pytest.fixture(scope="module")
def bundled(embedded: Network) -> Profile:
    found = profile_of(embedded.card)
    assert found is not None
    return found


def test_the_embedded_networks_profile_is_its_own_and_small(embedded: Network, bundled: Profile) -> None:
    card = Path(ws.__file__).parent / "cards" / "default.json"

    assert bundled.network == network_digest(embedded)
    assert bundled.tile_size == embedded.tile_size
    assert bundled.criterion == default_criterion(embedded.card)
    assert abs(octaves(bundled.optimum, 0.5)) < 0.2
    assert card.stat().st_size < 400_000


def _white(rng: np.random.Generator, side: int) -> NDArray[np.floating]:
    return rng.normal(0, rng.uniform(10, 60), (side, side, 3))


def _smooth(rng: np.random.Generator, side: int) -> NDArray[np.floating]:
    sigma = float(rng.choice([1, 2, 4, 6]))
    noise = ndimage.gaussian_filter(rng.standard_normal((side, side, 3)), (sigma, sigma, 0))
    return noise / noise.std() * rng.uniform(10, 50)


def _pink(rng: np.random.Generator, side: int) -> NDArray[np.floating]:
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = np.inf
    waves = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / frequency).real for _ in range(3)]
    noise = np.stack(waves, axis=2) @ rng.normal(size=(3, 3))
    return noise / noise.std() * rng.uniform(15, 50)


def _flat(rng: np.random.Generator, side: int) -> NDArray[np.floating]:
    return rng.normal(0, 1.5, (side, side, 3))


def test_noise_is_not_registered_to_the_embedded_networks_profile(embedded: Network, bundled: Profile) -> None:
    registered = []
    for noise in (_white, _smooth, _pink, _flat):
        for seed in range(5):
            rng = np.random.default_rng([seed, 99])
            pixels = np.clip(rng.uniform(120, 230, 3) + noise(rng, 900), 0, 255).astype(np.uint8)
            centers = rng.uniform(330, 570, (12, 2))
            stack = scale_stack(ArrayReader(pixels), centers, scales=2 ** (np.arange(10) / 4), size=128)
            found = register(bundled, respond(embedded, stack, layers="stages", device="cpu"))
            registered += [(noise.__name__, seed, found.mpp)] if found.refused is None else []

    assert len(registered) <= 1, registered  # of 20
