"""The true µm/px of a slide from its pixels: each opinion alone, how they are joined, and what becomes of the tag."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import small_segmenter
from PIL import Image

import wsiscale as ws
from wsiscale.card import read_card
from wsiscale.cli import main
from wsiscale.errors import MppError, OptionError
from wsiscale.nuclei import NUCLEUS_UM, blobs, nucleus_px
from wsiscale.profile import interval
from wsiscale.regressor import ScaleRegressor, save_regressor
from wsiscale.slide_mpp import Opinion, SlideMpp, _compared, _joined, find_mpp, with_mpp_from_pixels
from wsiscale.testing.procedural import random_stain, slide_image
from wsiscale.tissue import find_tissue
from wsiscale.types import Abstention, Reader
from wsiscale.upsampling import find_upsampling

SAMPLES = Path(__file__).parents[1] / "sample_slides"
MPP = 0.4


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return slide_image(1280, 1280, MPP, 31, stain=random_stain(31))


@pytest.fixture(scope="module")
def found(image: np.ndarray) -> SlideMpp:
    return find_mpp(ws.ArrayReader(image))


def slide_of(image: np.ndarray, times: float, how: Image.Resampling = Image.Resampling.BOX) -> Reader:
    size = (round(image.shape[1] * times), round(image.shape[0] * times))
    return ws.ArrayReader(np.asarray(Image.fromarray(image).resize(size, how)))


def off(mpp: float | None, truth: float) -> float:
    assert mpp is not None
    return abs(math.log2(mpp / truth))


# --- each opinion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [5, 8])
def test_a_disc_of_haematoxylin_is_a_blob_as_wide_as_it_is(radius: int) -> None:
    y, x = np.mgrid[:160, :160]
    centers = [(40, 40), (40, 110), (110, 75)]
    inside = np.any([(y - a) ** 2 + (x - b) ** 2 <= radius**2 for a, b in centers], axis=0)
    image = np.where(inside[..., None], np.array([80, 60, 150]), 240).astype(np.uint8)

    widths, contrasts = blobs(image, smallest=1.0 if radius < 6 else 2.0)

    strongest = widths[np.argsort(contrasts)[-3:]]
    # A disc answers most to a Gaussian of its radius over the root of two (Lindeberg 1998).
    assert strongest == pytest.approx(radius / math.sqrt(2), rel=0.25)


def test_nuclei_of_half_the_pixels_are_half_as_wide(image: np.ndarray) -> None:
    whole, half = slide_of(image, 1), slide_of(image, 0.5)

    found = [nucleus_px(slide, find_tissue(slide)) for slide in (whole, half)]

    assert found[0] is not None
    assert found[1] is not None
    assert found[0] / found[1] == pytest.approx(2, rel=0.2)
    assert off(NUCLEUS_UM / found[0], MPP) < 0.4


def test_a_slide_too_small_for_a_field_has_no_nuclei_to_measure(image: np.ndarray) -> None:
    slide = ws.ArrayReader(image[:100, :100])

    assert nucleus_px(slide, find_tissue(slide)) is None


@pytest.mark.parametrize("how", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
def test_interpolated_pixels_are_told_from_a_scanners(image: np.ndarray, how: Image.Resampling) -> None:
    rng = np.random.default_rng(0)
    scanned = np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)  # what no scanner is without
    slide, larger = ws.ArrayReader(scanned), slide_of(scanned, 2, how)

    assert find_upsampling(slide, find_tissue(slide)).found is False
    assert find_upsampling(larger, find_tissue(larger)).found is True


def test_of_a_slide_without_texture_nothing_is_said_of_its_pixels() -> None:
    flat = np.full((600, 600, 3), (200, 120, 180), np.uint8)
    slide = ws.ArrayReader(flat)
    everywhere = replace(find_tissue(slide), mask=np.ones_like(find_tissue(slide).mask))

    assert find_upsampling(slide, everywhere).found is None


# --- together --------------------------------------------------------------------------------------------------------------


def test_a_slides_mpp_is_found_from_its_pixels_alone(found: SlideMpp) -> None:
    assert [opinion.name for opinion in found.opinions] == ["registration", "regression", "nuclei"]
    assert off(found.mpp, MPP) < 0.35
    assert found.ci90 is not None
    assert found.ci90[0] < MPP < found.ci90[1]
    assert found.verdict == "fills in"
    assert found.claimed is None
    assert found.abstained is None


def test_a_tag_has_no_say_in_what_the_pixels_say(image: np.ndarray, found: SlideMpp) -> None:
    wrong = find_mpp(ws.ArrayReader(image, mpp=4 * MPP))

    assert wrong.mpp == found.mpp
    assert wrong.verdict == "conflicts"
    assert wrong.claimed == 4 * MPP


def test_a_slide_without_tissue_is_abstained_on() -> None:
    found = find_mpp(ws.ArrayReader(np.full((1024, 1024, 3), 243, np.uint8), mpp=0.5))

    assert found.verdict == "abstained"
    assert found.abstained is not None
    assert found.abstained.reason == "no_tissue"


def test_noise_of_tissues_colours_is_abstained_on() -> None:
    rng = np.random.default_rng(3)
    noise = np.clip(rng.normal((190, 120, 170), 40, (1500, 1500, 3)), 0, 255).astype(np.uint8)

    found = find_mpp(ws.ArrayReader(noise))

    assert found.mpp is None
    assert found.abstained is not None
    assert found.abstained.reason in ("unlike_bank", "flat")


def test_a_network_that_knows_no_slides_of_known_mpp_is_an_error(image: np.ndarray) -> None:
    with pytest.raises(OptionError, match=r"neither a profile nor a regressor.*wsiscale profile"):
        find_mpp(ws.ArrayReader(image), ws.load_network(small_segmenter(), tile_size=64))


def test_a_network_with_a_regressor_alone_tells_by_any_of_its_layers(image: np.ndarray, tmp_path: Path) -> None:
    # The layer that a probe cuts at need not be one of the stages that a profile watches.
    network = ws.load_network(small_segmenter(), tile_size=64)
    regressor = ScaleRegressor(
        layer="coarse.0",
        mean=np.zeros(8, np.float32),
        std=np.ones(8, np.float32),
        weights=np.ones(8, np.float32),
        intercept=0.0,
        octaves=np.arange(-3, 3, 0.25).astype(np.float32),
        expected=np.zeros(24, np.float32),
        slide_sd=0.3,
        mpp_range=(0.125, 7.0),
        slides=9,
        tile_size=64,
    )
    save_regressor(regressor, tmp_path / "card.json", fields={"factory": "unused"})

    found = find_mpp(ws.ArrayReader(image), replace(network, card=read_card(tmp_path / "card.json")))

    assert [o.name for o in found.opinions] == ["registration", "regression", "nuclei"]
    assert found.opinions[0].refused is not None
    assert found.opinions[0].refused.reason == "no_profile"


def opinion(name: str, mpp: float, sd: float) -> Opinion:
    return Opinion(name, mpp, interval(mpp, sd))


def test_opinions_that_agree_are_surer_than_those_that_do_not() -> None:
    same, _ = _joined([opinion("registration", 0.5, 0.2), opinion("regression", 0.5, 0.2)])
    apart, _ = _joined([opinion("registration", 0.4, 0.2), opinion("regression", 0.625, 0.2)])

    assert same is not None
    assert apart is not None
    assert same[0] == pytest.approx(0.5)
    assert apart[0] == pytest.approx(0.5)
    assert apart[1][1] / apart[1][0] > 1.2 * (same[1][1] / same[1][0])
    assert apart[1][0] < 0.4 < 0.625 < apart[1][1]


def test_the_surer_opinion_weighs_more() -> None:
    joined, _ = _joined([opinion("registration", 0.25, 0.1), opinion("nuclei", 0.5, 0.4)])

    assert joined is not None
    assert joined[0] == pytest.approx(0.25, rel=0.06)


def test_opinions_that_contradict_each_other_are_no_answer() -> None:
    joined, why = _joined([opinion("registration", 0.1, 0.1), opinion("regression", 1.0, 0.1)])

    assert joined is None
    assert why is not None
    assert why.reason == "opinions_disagree"
    assert "registration 0.1, regression 1 µm/px" in why.detail


def test_nuclei_alone_do_not_know_tissue_from_anything_else() -> None:
    refused = Opinion("registration", None, None, Abstention("too_few_scales", "small"))

    assert _joined([refused, opinion("nuclei", 0.5, 0.3)])[0] is None
    assert _joined([refused, opinion("regression", 0.5, 0.3)])[0] is not None


def test_what_the_network_has_never_seen_is_no_business_of_the_others() -> None:
    unlike = Opinion("registration", None, None, Abstention("unlike_bank", "nothing like it"))

    joined, why = _joined([unlike, opinion("regression", 0.5, 0.3), opinion("nuclei", 0.5, 0.3)])

    assert joined is None
    assert why == unlike.refused


@pytest.mark.parametrize(
    ("claimed", "verdict"), [(None, "fills in"), (0.5, "agrees"), (0.68, "agrees"), (1.0, "conflicts"), (0.00499, "conflicts")]
)
def test_a_tag_conflicts_a_quarter_octave_beyond_the_interval(claimed: float | None, verdict: str) -> None:
    assert _compared(0.5, (0.42, 0.6), claimed, None)[0] == verdict


# --- what is made of it ----------------------------------------------------------------------------------------------------


def test_the_mpp_of_the_pixels_is_taken_where_the_tag_does_not_agree(image: np.ndarray, found: SlideMpp) -> None:
    tagged = ws.ArrayReader(image, mpp=4 * MPP)

    kept = with_mpp_from_pixels(tagged, replace(found, verdict="agrees"))
    taken = with_mpp_from_pixels(tagged, replace(found, verdict="conflicts"))

    assert kept.pyramid.mpp == 4 * MPP
    assert taken.pyramid.mpp == found.mpp
    assert taken.calibration.source == "estimated"
    with pytest.raises(MppError, match="give --slide-mpp"):
        with_mpp_from_pixels(tagged, replace(found, mpp=None, ci90=None, verdict="abstained"))


def test_the_command_finds_that_a_tag_lies(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["mpp", str(SAMPLES / "wrong_mpp.svs"), "--json"])

    record = json.loads(capsys.readouterr().out)
    assert code == 0
    assert record["verdict"] == "conflicts"
    assert record["claimed"] == 0.0025
    assert off(record["mpp"], 0.25) < 0.35
    assert {o["name"] for o in record["opinions"]} == {"registration", "regression", "nuclei"}
    assert record["upsampling"]["found"] is False


def test_the_command_says_it_in_words_and_exits_3_without_an_answer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.fromarray(np.full((900, 900, 3), 240, np.uint8)).save(tmp_path / "glass.tif")

    code = main(["mpp", str(tmp_path / "glass.tif"), "--reader", "tiffslide"])

    assert code == 3
    assert "do not tell its µm/px (no_tissue" in capsys.readouterr().out


def test_tiles_of_a_slide_without_a_tag_by_its_pixels(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    slide = str(SAMPLES / "no_mpp.svs")  # 0.35 µm/px

    refused = main(["stack", slide, "--mpp", "1", "--places", "2", "-o", str(tmp_path / "no.zarr")])
    code = main(["stack", slide, "--mpp", "1", "--places", "2", "-o", str(tmp_path / "yes.zarr"), "--mpp-from-pixels"])

    said = capsys.readouterr().err
    assert refused == 1
    assert code == 0
    assert "by its pixels" in said
    assert (tmp_path / "yes.zarr").is_dir()


def test_info_asks_the_pixels_where_it_is_told_to(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("wsiscale.slide_mpp.find_mpp", lambda slide, **_: _told(slide.source.name))
    slide = str(SAMPLES / "wrong_mpp.svs")

    main(["info", slide])
    without = capsys.readouterr().out
    main(["info", slide, "--pixels"])

    assert "wsiscale mpp" in without
    assert "0.24 µm/px by its pixels" in capsys.readouterr().out


def _told(slide: str) -> SlideMpp:
    return SlideMpp(
        slide=slide,
        mpp=0.24,
        ci90=(0.2, 0.3),
        verdict="conflicts",
        claimed=0.0025,
        tag="aperio.MPP",
        detail="with the tag",
        abstained=None,
        opinions=(),
        upsampling=None,
        model="embedded",
        seconds=0.1,
        seed=0,
    )


@pytest.mark.slow
def test_real_slides_are_judged_as_they_should(real_data: Path) -> None:
    slides = real_data / "slides"
    verdicts = {}
    for name in ("CMU-1-Small-Region.svs", "CMU-1-Small-Region.jpeg.tiff", "TCGA-CR-7395-01A-01-TS1.svs"):
        with ws.open_slide(slides / name) as slide:
            verdicts[name] = find_mpp(slide).verdict
    with ws.open_slide(slides / "test3-DAPI-2-(387).ndpi") as slide:
        verdicts["fluorescence"] = find_mpp(slide).verdict

    assert list(verdicts.values()) == ["agrees", "conflicts", "fills in", "abstained"]


@pytest.mark.slow
def test_a_real_slide_that_was_made_larger_is_known(real_data: Path) -> None:
    with ws.open_slide(real_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        height, width = slide.pyramid.shape
        image = slide.read(level=0, y=0, x=0, height=height, width=width)
    original, larger = ws.ArrayReader(image), slide_of(image, 2, Image.Resampling.BILINEAR)

    assert find_upsampling(original, find_tissue(original)).found is False
    assert find_upsampling(larger, find_tissue(larger)).found is True
