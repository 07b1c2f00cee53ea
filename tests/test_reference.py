"""References from training tiles: a slide's scale found by them, kept in a card, refused where nothing fits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

import wsiscale as ws
from tests.nets import small_classifier
from wsiscale.analyzer import respond
from wsiscale.cli import main
from wsiscale.criteria import CRITERIA, DEFAULT_CRITERION, default_criterion, peak
from wsiscale.errors import ModelError, OptionError
from wsiscale.estimation import estimate
from wsiscale.geometry import scale_grid
from wsiscale.judging import estimate_response
from wsiscale.networks import Network, load_network
from wsiscale.stacks import scale_stack
from wsiscale.training_tiles import (
    Reference,
    calibrate,
    distances,
    find_images,
    from_record,
    offsets,
    reference_of,
    save_reference,
    to_record,
)
from wsiscale.types import ScaleResponse

TILE = 32
NETS = Path(__file__).parent / "nets.py"


def texture(side: int, blob: float, seed: int) -> NDArray[np.uint8]:
    """Violet blobs on pink, `blob` px wide, in colours that differ a little from image to image: (side, side, 3)."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((side, side)), blob / 4, mode="wrap")
    inside = np.clip(0.5 + 2 * smooth / smooth.std(), 0, 1)[..., None]
    paper, ink = np.array([235, 190, 215]) + rng.normal(0, 6, 3), np.array([110, 70, 150]) + rng.normal(0, 12, 3)
    return np.clip(paper + (ink - paper) * inside, 0, 255).astype(np.uint8)


def images(count: int = 24, side: int = 80) -> list[NDArray[np.uint8]]:
    return [texture(side, 8, seed) for seed in range(count)]


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(7)
    return load_network(small_classifier(), tile_size=TILE)


@pytest.fixture(scope="module")
def reference(network: Network) -> Reference:
    return calibrate(network, images(), mpp=0.5, device="cpu")


def slide_response(network: Network, blob: float, *, scales: Sequence[float] | None = None, seed: int = 100) -> ScaleResponse:
    """The network's answers to a slide with blobs of `blob` level-0 px at 24 places."""
    slide = ws.ArrayReader(texture(1600, blob, seed))
    places = np.random.default_rng(seed).uniform(256, 1344, (24, 2))
    grid = scale_grid(1, 16, per_octave=4) if scales is None else np.array(scales)
    return respond(network, scale_stack(slide, places, scales=grid, size=TILE), device="cpu")


@pytest.fixture(scope="module")
def seen(network: Network, reference: Reference) -> ScaleResponse:
    """A slide on which the training scale is 3.2."""
    return replace(slide_response(network, 8 * 3.2), reference=reference)


def octaves_off(found: float | None, truth: float) -> float:
    assert found is not None
    return abs(float(np.log2(found / truth)))


@pytest.mark.parametrize("factor", [2.2, 3.2, 6.0])
def test_the_training_scale_is_found_on_a_slide(network: Network, reference: Reference, factor: float) -> None:
    response = replace(slide_response(network, 8 * factor), reference=reference)

    found = estimate_response(response, "reference")

    assert found.abstained is None
    assert octaves_off(found.scale, factor) < 0.2


def test_the_ridge_reads_off_how_many_octaves_a_slide_is_off(seen: ScaleResponse, reference: Reference) -> None:
    truth = np.log2(seen.scales / 3.2)
    near = (truth >= 0) & (truth <= 1.25)

    read = offsets(reference, seen).mean(axis=0)

    assert np.abs(read - truth)[near].max() < 0.3


def test_the_distance_alone_is_least_at_the_training_scale(seen: ScaleResponse, reference: Reference) -> None:
    away = distances(reference, seen).mean(axis=0)

    assert octaves_off(peak(seen.scales, -away), 3.2) < 0.2
    assert away.min() - reference.distance_floor < 1


def test_a_ridge_that_makes_no_sense_on_a_slide_has_no_say(seen: ScaleResponse, reference: Reference) -> None:
    # Of tissue that was not among the tiles a ridge may say anything; here it is certain of the coarsest scale.
    senseless = replace(reference, slopes=np.zeros_like(reference.slopes), intercept=0.0)

    found = estimate_response(replace(seen, reference=senseless), "reference")

    assert octaves_off(found.scale, 3.2) < 0.2


def test_shares_add_up_to_the_score(seen: ScaleResponse) -> None:
    criterion = CRITERIA["reference"]

    assert criterion.shares is not None
    np.testing.assert_allclose(criterion.shares(seen).mean(axis=0), criterion.score(seen))


def test_shares_say_what_a_place_less_changes(seen: ScaleResponse) -> None:
    criterion = CRITERIA["reference"]
    assert criterion.shares is not None
    shares = criterion.shares(seen)

    without = criterion.score(seen.take(np.arange(1, seen.places)))

    predicted = shares[1:].mean(axis=0) - shares.mean(axis=0)
    exact = without - criterion.score(seen)
    assert np.corrcoef(predicted, exact)[0, 1] > 0.95


def test_places_with_infinite_answers_are_gaps(seen: ScaleResponse) -> None:
    name = next(iter(seen.layers))
    broken = seen.layers[name].mean.copy()
    broken[3, 2, 0] = np.inf
    layers = {**seen.layers, name: replace(seen.layers[name], mean=broken)}
    criterion = CRITERIA["reference"]
    assert criterion.shares is not None

    with np.errstate(invalid="ignore"):
        rows = criterion.shares(replace(seen, layers=layers))

    assert np.isnan(rows[3]).all()
    assert np.isfinite(np.delete(rows, 3, axis=0)).all()


def test_a_slide_unlike_the_tiles_at_every_scale_gets_no_estimate(network: Network, reference: Reference) -> None:
    green = np.zeros((800, 800, 3), np.uint8)
    green[..., 1] = np.random.default_rng(0).integers(0, 256, (800, 800))
    places = np.random.default_rng(1).uniform(300, 500, (12, 2))
    stack = scale_stack(ws.ArrayReader(green), places, scales=scale_grid(1, 16, per_octave=4), size=TILE)
    response = replace(respond(network, stack, device="cpu"), reference=reference)

    found = estimate_response(response, "reference")

    assert found.scale is None
    assert np.isnan(CRITERIA["reference"].score(response)).all()


def test_without_a_reference_the_error_says_how_to_make_one(seen: ScaleResponse) -> None:
    with pytest.raises(OptionError, match="wsiscale calibrate"):
        CRITERIA["reference"].score(replace(seen, reference=None))


def test_another_networks_reference_is_an_error(seen: ScaleResponse, reference: Reference) -> None:
    others = replace(reference, layers=(("trunk.conv", 8), *reference.layers[1:]))

    with pytest.raises(OptionError, match=r"trunk\.conv"):
        CRITERIA["reference"].score(replace(seen, reference=others))


def test_few_or_small_images_are_refused(network: Network) -> None:
    with pytest.raises(OptionError, match="at least 5 are needed"):
        calibrate(network, images(3), device="cpu")
    with pytest.raises(OptionError, match="at least 30 are needed"):
        calibrate(network, images(8, side=TILE), device="cpu")
    with pytest.raises(OptionError, match="at least 32 px"):
        calibrate(network, [*images(30), texture(20, 8, 99)], device="cpu")


def test_images_of_the_tiles_own_size_are_enough(network: Network) -> None:
    small = calibrate(network, images(60, side=TILE), device="cpu")
    response = replace(slide_response(network, 8 * 3.2), reference=small)

    assert (small.tiles, small.images) == (60, 60)
    assert octaves_off(estimate_response(response, "reference").scale, 3.2) < 2 * small.distance_error


def test_the_same_tiles_give_the_same_reference(network: Network, reference: Reference) -> None:
    assert to_record(calibrate(network, images(), mpp=0.5, device="cpu")) == to_record(reference)


# --- in the card ------------------------------------------------------------------------------------------------------------


def test_a_card_gives_the_reference_back(reference: Reference, seen: ScaleResponse, tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    card.write_text(json.dumps({"factory": "nets.py:small", "licence": "mine", "reference": "an old one"}))

    save_reference(reference, card)
    fields = json.loads(card.read_text())
    again = reference_of(fields)

    assert (fields["factory"], fields["licence"]) == ("nets.py:small", "mine")
    assert card.stat().st_size < 1e6
    assert again is not None
    assert (again.mpp, again.tiles, again.images, again.layers) == (0.5, reference.tiles, 24, reference.layers)
    np.testing.assert_array_equal(
        CRITERIA["reference"].score(replace(seen, reference=again)), CRITERIA["reference"].score(seen)
    )


def test_a_card_without_one_has_none() -> None:
    assert reference_of({"factory": "x"}) is None


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 99},
        {"arrays": "AAAA"},
        {"arrays": None},
        {"layers": [["0", 1]]},
        {"rest": float("nan")},
        {"tiles": "many"},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_a_damaged_reference_is_an_error(reference: Reference, damage: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="calibrate again"):
        from_record({**to_record(reference), **damage})


@pytest.mark.parametrize("end", [0.3, 0.9])
def test_a_cut_off_reference_is_an_error(reference: Reference, end: float) -> None:
    record = to_record(reference)
    arrays = str(record["arrays"])

    with pytest.raises(ModelError, match="calibrate again"):
        from_record({**record, "arrays": arrays[: 4 * int(len(arrays) * end / 4)]})


def test_a_reference_that_is_no_object_is_an_error() -> None:
    with pytest.raises(ModelError, match="calibrate again"):
        reference_of({"reference": [1, 2]})


# --- from end to end --------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_default_where_the_card_has_one() -> None:
    assert default_criterion({"reference": {}}) == "reference"
    assert default_criterion({"factory": "x"}) == DEFAULT_CRITERION


def test_estimate_goes_by_the_cards_reference(network: Network, reference: Reference) -> None:
    known = replace(network, card={"reference": to_record(reference)})
    slide = ws.ArrayReader(texture(1200, 8 * 3.2, 7), mpp=0.25)

    found = estimate(slide, known, scale_range=(1, 12), places=24, device="cpu", detector=everywhere)

    assert found.criterion == "reference"
    assert octaves_off(found.scale, 3.2) < 0.15


def test_kept_answers_are_judged_by_the_reference_again(network: Network, reference: Reference, tmp_path: Path) -> None:
    known = replace(network, card={"reference": to_record(reference)})
    slide = ws.ArrayReader(texture(1200, 8 * 3.2, 7), mpp=0.25)
    asked = {"scale_range": (1, 12), "places": 16, "device": "cpu", "detector": everywhere}

    first = estimate(slide, known, keep=tmp_path / "kept", **asked)
    second = estimate(slide, known, reuse=tmp_path / "kept", **asked)

    assert second.scale == first.scale
    assert second.forwards == 0


def everywhere(thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.ones(thumbnail.shape[:2], bool)


def test_calibrate_writes_a_card_that_estimate_goes_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    for number, image in enumerate(images(12)):
        Image.fromarray(image).save(tiles / f"{number:02}.png")
    card = tmp_path / "card.json"
    command = ["calibrate", str(tiles), "--tile-mpp", "0.5", "--tile-size", str(TILE), "--device", "cpu"]

    code = main([*command, "--model", f"{NETS}:small_classifier", "-o", str(card), "--json"])

    assert code == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12
    loaded = load_network(card, trust_model=True)
    assert (loaded.training_mpp, loaded.tile_size) == (0.5, TILE)
    assert reference_of(loaded.card) is not None
    # Not over a card that is another network's.
    assert main([*command, "--model", f"{NETS}:small_segmenter", "-o", str(card)]) == 2
    # Over its own, whose other fields stay.
    card.write_text(json.dumps({**json.loads(card.read_text()), "licence": "mine"}))
    assert main([*command, "--model", str(card), "--trust-model", "-o", str(card)]) == 0
    assert json.loads(card.read_text())["licence"] == "mine"


def test_tiles_of_another_scale_than_the_cards_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(texture(128, 8, 0)).save(tmp_path / "a.png")

    code = main(["calibrate", str(tmp_path), "--tile-mpp", "0.25", "-o", str(tmp_path / "card.json")])

    assert code == 2
    assert "trained at 0.5 µm/px" in capsys.readouterr().err


def test_folders_files_and_patterns_name_images(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.JPG", "deep/c.tif", "notes.txt"):
        (tmp_path / name).write_bytes(b"")

    found = find_images([tmp_path, tmp_path / "*.png"])

    assert [path.name for path in found] == ["a.JPG", "b.png", "c.tif"]
    with pytest.raises(OptionError, match="no images"):
        find_images([tmp_path / "*.gif"])
