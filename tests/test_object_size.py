"""The size of a segmenter's objects: measured without bias, and held against itself over scale."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import wsiscale as ws
from wsiscale.analyzer import respond
from wsiscale.criteria import CRITERIA, peak
from wsiscale.errors import ModelError, OptionError
from wsiscale.geometry import scale_grid
from wsiscale.judging import estimate_response
from wsiscale.networks import load_network
from wsiscale.objects import objects_of
from wsiscale.stacks import scale_stack
from wsiscale.testing.responses import planted_response
from wsiscale.types import Outputs, ScaleResponse

SCALES = scale_grid(1, 16)
OCTAVES = np.log2(SCALES)
OBJECT_SIZE = CRITERIA["object_size"]


def discs(side: int, diameters: NDArray[np.float64], seed: int = 0, gap: int = 4) -> NDArray[np.bool_]:
    """Discs anywhere on a grid of cells, so that none touches another: (side, side)."""
    rng = np.random.default_rng(seed)
    cell = int(diameters.max()) + gap
    mask = np.zeros((side, side), bool)
    y, x = np.mgrid[:side, :side]
    corners = [(r, c) for r in range(0, side - cell, cell) for c in range(0, side - cell, cell)]
    for (row, column), diameter in zip(corners, rng.choice(diameters, len(corners)), strict=True):
        cy, cx = (
            row + diameter / 2 + rng.uniform(1, cell - diameter - 1),
            column + diameter / 2 + rng.uniform(1, cell - diameter - 1),
        )
        near = slice(row, row + cell), slice(column, column + cell)
        mask[near] |= (y[near] - cy) ** 2 + (x[near] - cx) ** 2 < (diameter / 2) ** 2
    return mask


# --- measured ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diameter", [6.0, 12.0, 25.0])
def test_the_diameter_of_discs_is_found(diameter: float) -> None:
    mask = discs(160, np.array([diameter]))

    found, share = objects_of(mask)

    assert found == pytest.approx(diameter, rel=0.05)
    assert share == pytest.approx(mask.mean())


def test_specks_do_not_count() -> None:
    mask = discs(160, np.array([12.0]))
    empty = ~mask & np.roll(~mask, 1, axis=0) & np.roll(~mask, 1, axis=1)
    specks = empty & (np.random.default_rng(0).random(mask.shape) < 0.05)

    assert objects_of(mask | specks)[0] == pytest.approx(12, rel=0.1)


def test_an_object_that_touches_the_border_is_cut_off_and_left_out() -> None:
    mask = np.zeros((40, 40), bool)
    mask[:20, 5:35] = True
    mask[25:31, 10:16] = True

    assert objects_of(mask)[0] == pytest.approx(2 * math.sqrt(36 / math.pi))


def test_large_objects_are_not_missed_because_they_touch_the_border_more_often() -> None:
    # Half of the area is of discs of 6 px and half of discs of 24, which a window of 128 px cuts in two three times as often.
    field = discs(1600, np.array([24.0] + [6.0] * 12), seed=1)
    rng = np.random.default_rng(2)
    windows = [field[y : y + 128, x : x + 128] for y, x in rng.integers(0, 1472, (400, 2))]

    large = [objects_of(window)[0] > 15 for window in windows if np.isfinite(objects_of(window)[0])]

    # The large ones have 0.56 of the area.
    assert 0.45 < np.mean(large) < 0.67


@pytest.mark.parametrize("mask", [np.zeros((20, 20), bool), np.ones((20, 20), bool)])
def test_where_no_object_lies_whole_there_is_no_size(mask: NDArray[np.bool_]) -> None:
    found, share = objects_of(mask)

    assert math.isnan(found)
    assert share == mask.mean()


class Darkness(nn.Module):
    """A segmenter: class 1 is what is dark, at half of the tile's resolution."""

    def forward(self, tiles: Tensor) -> Tensor:
        dark = 20 * (0.5 - nn.functional.avg_pool2d(tiles.mean(1, keepdim=True), 2))
        return torch.cat([-dark, dark], dim=1)


@pytest.fixture(scope="module")
def dark() -> ScaleResponse:
    """A segmenter that sees discs of 24 level-0 px as they are, at 10 places."""
    image = np.where(discs(900, np.array([24.0]), seed=3, gap=20), 40, 220).astype(np.uint8)
    slide = ws.ArrayReader(np.repeat(image[..., None], 3, axis=2))
    places = np.random.default_rng(4).uniform(300, 600, (10, 2))
    network = load_network(Darkness(), tile_size=96, output="segmentation")
    return respond(network, scale_stack(slide, places, scales=[1, 2, 4], size=96), views=["rot90"], device="cpu")


def test_a_segmenters_objects_are_measured_in_px_of_the_tile(dark: ScaleResponse) -> None:
    assert dark.outputs is not None

    np.testing.assert_allclose(np.nanmedian(dark.outputs.object_px, axis=0), [24, 12, 6], rtol=0.12)
    np.testing.assert_allclose(dark.outputs.object_share.mean(axis=0), dark.outputs.object_share.mean(), rtol=0.1)


def test_views_are_not_measured(dark: ScaleResponse) -> None:
    turned = dark.views["rot90"].outputs

    assert turned is not None
    assert np.isnan(turned.object_px).all()


def test_a_classifier_has_no_objects() -> None:
    response = planted_response(4.0, seed=0)

    assert response.outputs is not None
    assert np.isnan(response.outputs.object_px).all()
    with pytest.raises(OptionError, match="segmenter"):
        OBJECT_SIZE.score(response)


# --- held against itself ----------------------------------------------------------------------------------------------------


def response_with(sizes: NDArray[np.float64], areas: NDArray[np.float64], **fields: float) -> ScaleResponse:
    """A segmenter's response at 20 places with these log2 diameters (S,) and shares (S,), and noise on both."""
    rng = np.random.default_rng(0)
    count = np.zeros((20, len(SCALES)), np.float32)
    outputs = Outputs(
        logits=np.zeros((*count.shape, 2), np.float32),
        probabilities=np.full((*count.shape, 2), 0.5, np.float32),
        confidence=count,
        margin=count,
        entropy=count,
        energy=count,
        object_px=np.exp2(sizes + rng.normal(0, 0.15, count.shape)).astype(np.float32),
        object_share=(areas * np.exp2(rng.normal(0, 0.1, count.shape))).astype(np.float32),
    )
    return ScaleResponse(scales=SCALES, slide_mpp=0.25, outputs=outputs, features=None, **fields)  # type: ignore[arg-type]


def followed_around(scale: float, width: float = 0.8) -> ScaleResponse:
    """Objects of 16 px at `scale`, which the network follows `width` octaves to either side and elsewhere invents."""
    from_best = OCTAVES - np.log2(scale)
    sizes = 4 - np.clip(from_best, -width, width)
    beyond = np.maximum(np.abs(from_best) - width, 0)
    return response_with(sizes, 0.2 * np.exp2(-0.7 * beyond))


@pytest.mark.parametrize("scale", [2.5, 4.0, 7.0])
def test_the_middle_of_where_objects_are_followed_is_found(scale: float) -> None:
    found = estimate_response(followed_around(scale), "object_size")

    assert found.scale is not None
    assert abs(np.log2(found.scale / scale)) < 0.25


@pytest.mark.parametrize("scale", [3.0, 4.0, 6.0])
def test_the_size_in_training_finds_the_scale_where_everything_is_followed(scale: float) -> None:
    everywhere = response_with(4 - (OCTAVES - np.log2(scale)), np.full(len(SCALES), 0.2))

    score = OBJECT_SIZE.score(replace(everywhere, object_px=16.0))

    assert abs(np.log2(peak(SCALES, score) / scale)) < 0.1


def test_area_that_is_lost_counts_as_much_as_size_that_is_not_followed() -> None:
    followed = 4 - OCTAVES
    lost = 0.2 * np.exp2(-2 * np.abs(OCTAVES - 2))  # constant nowhere, least changing around its peak
    lost[np.abs(OCTAVES - 2) < 0.6] = 0.2

    score = OBJECT_SIZE.score(response_with(followed, lost))

    assert abs(np.log2(peak(SCALES, score)) - 2) < 0.25


def test_shares_add_up_to_the_score() -> None:
    response = followed_around(4.0)

    assert OBJECT_SIZE.shares is not None
    np.testing.assert_allclose(OBJECT_SIZE.shares(response).mean(axis=0), OBJECT_SIZE.score(response))


def test_scales_at_which_nothing_is_found_are_the_worst() -> None:
    response = followed_around(4.0)
    assert response.outputs is not None
    sizes, areas = response.outputs.object_px.copy(), response.outputs.object_share.copy()
    sizes[:, -4:], areas[:, -4:] = np.nan, 0

    score = OBJECT_SIZE.score(replace(response, outputs=replace(response.outputs, object_px=sizes, object_share=areas)))

    assert np.isfinite(score).all()
    assert (score[-4:] == score.min()).all()


def test_nothing_found_at_all_is_no_estimate() -> None:
    response = followed_around(4.0)
    assert response.outputs is not None
    nothing = replace(
        response.outputs,
        object_px=np.full_like(response.outputs.object_px, np.nan),
        object_share=np.zeros_like(response.outputs.object_share),
    )

    assert estimate_response(replace(response, outputs=nothing), "object_size").scale is None


def test_a_card_that_knows_the_size_hands_it_to_the_response() -> None:
    network = load_network(Darkness(), tile_size=16, output="segmentation")
    tiles = [np.zeros((1, 16, 16, 3), np.uint8)]

    assert respond(replace(network, card={"object_px": 12}), tiles, scales=[1], device="cpu").object_px == 12
    with pytest.raises(ModelError, match="object_px"):
        respond(replace(network, card={"object_px": "large"}), tiles, scales=[1], device="cpu")
