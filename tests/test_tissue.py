"""Tissue is found on any stain, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage import data

from wsiscale.errors import OptionError
from wsiscale.readers import ArrayReader, open_slide
from wsiscale.tissue import find_tissue
from wsiscale.types import Tissue

PINK = (225, 160, 200)  # eosin-rich stroma
PALE = (238, 222, 233)  # the same after years in the light
BROWN = (150, 100, 60)  # DAB
GLASS = (243, 243, 241)
SPOT = (slice(300, 900), slice(1200, 1500))  # off-centre and not square, so that swapped axes show


def slide(
    colour: tuple[int, int, int], *, where: tuple[slice, slice] = SPOT, shape: tuple[int, int] = (1400, 2000)
) -> ArrayReader:
    rng = np.random.default_rng(0)
    image = np.full((*shape, 3), GLASS, float)
    image[where] = colour
    return ArrayReader(np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8), mpp=0.5)


def share(tissue: Tissue, where: tuple[slice, slice]) -> float:
    rows, columns = (slice(int(s.start / tissue.step) + 1, int(s.stop / tissue.step) - 1) for s in where)
    return float(tissue.mask[rows, columns].mean())


@pytest.mark.parametrize("colour", [PINK, PALE, BROWN], ids=["H&E", "pale", "DAB"])
def test_a_stained_spot_is_found_where_it_is_and_nowhere_else(colour: tuple[int, int, int]) -> None:
    tissue = find_tissue(slide(colour))

    assert share(tissue, SPOT) >= 0.98
    border = 2 * tissue.step  # at most a mask pixel on every side
    assert 600 * 300 * 0.9 <= tissue.mask.sum() * tissue.step**2 <= (600 + border) * (300 + border)
    assert tissue.area_mm2 == pytest.approx(tissue.mask.sum() * tissue.step**2 * 0.25e-6)


@pytest.mark.parametrize(
    "colour",
    [GLASS, (255, 255, 255), (200, 200, 200), (60, 60, 62), (25, 24, 28)],
    ids=["glass", "white", "shadow", "dust", "black ink"],
)
def test_what_has_no_colour_is_no_tissue(colour: tuple[int, int, int]) -> None:
    assert not find_tissue(slide(colour)).mask.any()


@pytest.mark.parametrize(
    "colour", [(20, 60, 160), (30, 140, 70), (20, 20, 25), (215, 35, 40)], ids=["blue", "green", "black", "red"]
)
def test_pen_on_a_slide_is_no_tissue_and_hides_none_beside_it(colour: tuple[int, int, int]) -> None:
    pen = (slice(100, 1300), slice(200, 320))
    marked = slide(PINK).read(level=0, y=0, x=0, height=1400, width=2000)
    marked[pen] = colour

    tissue = find_tissue(ArrayReader(marked, mpp=0.5))

    assert share(tissue, pen) == 0
    assert share(tissue, SPOT) == 1


@pytest.mark.parametrize("level", [0, 3, 40], ids=["black", "nearly black", "dim"])
def test_a_slide_without_light_is_empty(level: int) -> None:
    dark = np.full((1400, 2000, 3), level, np.uint8)
    dark[300:900, 1200:1500] = (0, 0, 220)  # DAPI

    assert not find_tissue(ArrayReader(dark, mpp=0.5)).mask.any()


def test_an_immunostain_is_tissue_though_it_has_no_eosin() -> None:
    stain: NDArray[np.uint8] = data.immunohistochemistry()

    assert find_tissue(ArrayReader(stain, mpp=0.5)).fraction > 0.6


def test_a_detector_of_the_users_own_is_used(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def left(image):\n    mask = image[..., 0] < 0\n    mask[:, :10] = True\n    return mask\n"
    )

    tissue = find_tissue(slide(PINK), f"{tmp_path}/mine.py:left")

    assert tissue.mask[:, :10].all()
    assert not tissue.mask[:, 10:].any()


def test_a_detector_that_answers_for_another_shape_is_refused() -> None:
    with pytest.raises(OptionError, match="one bool a pixel"):
        find_tissue(slide(PINK), lambda image: np.zeros(image.shape[1::-1], bool))


def test_tissue_outside_of_what_was_scanned_does_not_count() -> None:
    whole = slide(PINK)
    bounded = ArrayReader(whole.read(level=0, y=0, x=0, height=1400, width=2000), mpp=0.5)
    object.__setattr__(bounded, "_pyramid", _with_bounds(bounded, (0, 0, 600, 2000)))

    tissue = find_tissue(bounded)

    assert share(tissue, (slice(300, 600), SPOT[1])) == 1
    assert not tissue.mask[int(np.ceil(600 / tissue.step)) :].any()


def _with_bounds(reader: ArrayReader, bounds: tuple[int, int, int, int]) -> object:
    from dataclasses import replace

    return replace(reader.pyramid, bounds=bounds)


def test_real_slides_have_the_tissue_one_sees(real_data: Path) -> None:
    with open_slide(real_data / "slides/CMU-1-Small-Region.svs") as cmu:
        assert find_tissue(cmu).fraction == pytest.approx(0.39, abs=0.06)
    with open_slide(real_data / "slides/TCGA-CR-7395-01A-01-TS1.svs") as tcga:
        assert find_tissue(tcga).fraction == pytest.approx(0.65, abs=0.08)
    with open_slide(real_data / "slides/test3-DAPI-2-(387).ndpi") as dapi:
        assert not find_tissue(dapi).mask.any()
