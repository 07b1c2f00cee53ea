"""Looking into a network: what the figures are made of, and that they are drawn."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from wsiscale.errors import ModelError, OptionError
from wsiscale.figures import (
    gradcam_figure,
    noise_answers,
    noise_figure,
    passing_by_chance,
    passing_channels,
    passing_figure,
    prediction_figure,
    probe_figure,
    response_to_image,
    tiles_of,
)
from wsiscale.gradcam import gradcam
from wsiscale.networks import Network, load_network
from wsiscale.probe import Answers, probe_answers
from wsiscale.testing import planted_network, planted_slide
from wsiscale.types import LayerMoments, ScaleResponse


@pytest.fixture(scope="module")
def blobs() -> Network:
    """Most confident where blobs are 8 px wide."""
    return load_network(planted_network(8), tile_size=96)


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    """Blobs of 16 px."""
    slide = planted_slide(16, seed=0, size=512)
    return slide.read(level=0, y=0, x=0, height=512, width=512)


def drawn(figure: Figure) -> int:
    """Bytes of the figure as PNG: more than an empty one's."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return len(file.getvalue())


def test_the_prediction_over_scale_is_surest_where_it_was_planted(blobs: Network, image: NDArray[np.uint8]) -> None:
    response = response_to_image(blobs, image)

    assert response.outputs is not None
    assert response.scales[response.outputs.confidence[0].argmax()] == pytest.approx(2)
    figure = prediction_figure(response, classes=["blobs", "none"])
    assert drawn(figure) > 8000
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["blobs"]


def test_without_classes_there_is_no_prediction_to_draw(blobs: Network, image: NDArray[np.uint8]) -> None:
    with pytest.raises(OptionError, match="no prediction to draw"):
        prediction_figure(ScaleResponse(np.ones(1), None, None, None))


def test_tiles_of_an_image_are_nested_on_its_centre_and_mirrored_beyond() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 200  # dark left, bright right
    picture[:32, :, 0] = 90  # red above

    tiles = tiles_of(picture, size=16, scales=[0.5, 1, 4, 8])

    assert tiles.shape == (4, 16, 16, 3)
    for tile in tiles[:3]:
        assert tile[:, :7].max() == 90
        assert tile[9:, :7].max() == 0
        assert tile[9:, 9:].min() == 200
    right = tiles_of(picture, size=16, scales=[1], center=(20, 44))[0]
    assert (right == (90, 200, 200)).all()
    # Beyond the edge the mirror image: bright inside, dark on the far side.
    np.testing.assert_array_equal(tiles[3][12, [0, 3, 4, 7, 8, 11, 12, 15], 1], [0, 0, 0, 0, 200, 200, 200, 200])


def test_gradcam_looks_at_the_blob(image: NDArray[np.uint8]) -> None:
    class Finder(nn.Module):
        """Class 0 where it is dark, class 1 where it is red."""

        def __init__(self) -> None:
            super().__init__()
            self.look = nn.Conv2d(3, 2, 1)
            self.relu = nn.ReLU(inplace=True)
            with torch.no_grad():
                self.look.weight.copy_(torch.tensor([[-1.0, -1, -1], [1, -1, -1]])[..., None, None])
                self.look.bias.copy_(torch.tensor([1.0, 0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.look(x)).mean((2, 3))

    network = load_network(Finder().eval(), tile_size=32)
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[24:32, 16:24] = 0  # dark, up and left of the middle
    picture[40:48, 44:52] = (255, 0, 0)

    found = gradcam(network, picture, scales=[1, 2], target=0, layer="relu")

    assert found.maps.shape == (2, 32, 32)
    assert np.unravel_index(found.maps[1].argmax(), (32, 32)) < (16, 16)
    dark = found.maps[1][12:16, 8:12].mean()
    assert dark > 10 * found.maps[1][20:24, 22:26].mean()
    red = gradcam(network, picture, scales=[2], target=1, layer="relu").maps[0]
    assert red[20:24, 22:26].mean() > 10 * red[12:16, 8:12].mean()
    assert network.module.relu.inplace
    assert drawn(gradcam_figure(picture, found, classes=["dark", "red"])) > 3000


def test_gradcam_of_a_segmenter_and_of_the_class_that_it_predicts(image: NDArray[np.uint8]) -> None:
    found = gradcam(load_network(tile_size=64), image, scales=[1, 2])

    assert found.maps.shape == (2, 64, 64)
    assert (found.maps >= 0).all()
    assert set(found.targets.tolist()) <= {0, 1}


def test_without_captum_it_says_how_to_install_it(
    blobs: Network, image: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)

    with pytest.raises(ModelError, match=r"pip install 'wsiscale\[captum\]'"):
        gradcam(blobs, image)


def test_channels_that_are_constant_or_monotone_do_not_pass_and_noise_does() -> None:
    rng = np.random.default_rng(0)
    ramp, bump = np.linspace(0, 1, 9), np.exp(-(np.linspace(-2, 2, 9) ** 2))
    curves = np.stack([ramp, -ramp, np.ones(9), bump], axis=1)[None].astype(np.float32)  # (1, 9, 4)
    noise = rng.normal(size=(200, 9, 20)).astype(np.float32)
    layers = {"few": LayerMoments(curves, curves**2), "noise": LayerMoments(noise, noise**2)}

    shares = passing_channels(ScaleResponse(np.arange(1.0, 10), None, None, None, layers=layers))

    assert shares["few"] == 0.25
    assert shares["noise"] == pytest.approx(passing_by_chance(9), abs=0.01)
    assert passing_by_chance(9) == pytest.approx(1 - 2 / 72)
    assert drawn(passing_figure(shares, scales=9, noise=shares)) > 8000
    with pytest.raises(OptionError, match="layers='every'"):
        passing_channels(ScaleResponse(np.ones(1), None, None, None))


def test_a_ring_filter_answers_noise_of_its_own_grain_most(blobs: Network) -> None:
    grains = (1, 2, 4, 8, 16)

    found = noise_answers(blobs, grains=grains, images=2)

    rings = found["relu"]
    assert rings.mean() == pytest.approx(1)
    # A Gaussian of half the grain looks like blobs of some two grains.
    assert grains[int(rings.argmax())] in (4, 8)
    assert drawn(noise_figure(found, grains)) > 6000


def test_the_size_of_an_image_is_told_by_padding_alone() -> None:
    torch.manual_seed(0)
    padded = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(4)))
    circular = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular", bias=False) for _ in range(4)))
    circular.load_state_dict(padded.state_dict())
    moved = []
    for module in (padded, circular):
        network = load_network(module.eval(), tile_size=16, output="features")
        last = list(noise_answers(network, sides=(8, 16, 64), images=4).values())[-1]
        moved.append(np.ptp(np.log2(last)))

    assert moved[0] > 3 * moved[1]


def test_the_probes_figure_shows_where_to_cut() -> None:
    rng = np.random.default_rng(0)
    octaves = np.linspace(0, 3, 8)

    def slide(number: int, know: float) -> Answers:
        along = np.random.default_rng(5).normal(size=6)
        layers = {
            n: (rng.normal(size=(4, 8, 6)) + k * octaves[:, None] * along).astype(np.float32)
            for n, k in (("stem", 0.0), ("body.2", know), ("head", know / 4))
        }
        return Answers(f"s{number}", octaves, layers)

    probe = probe_answers([slide(i, 2) for i in range(5)], [slide(i, 0.1) for i in range(5)], model="tiny")

    figure = probe_figure(probe)

    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "tiny"
    assert [text.get_text() for text in axes.texts] == ["cut at body.2"]
    assert drawn(figure) > 8000
