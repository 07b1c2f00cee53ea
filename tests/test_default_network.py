"""The embedded network segments nuclei and knows its scale, on tissue that it was not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from scipy.stats import rankdata
from torch import nn

import wsiscale
from wsiscale.default_network import default_network
from wsiscale.geometry import centered_view, scale_grid
from wsiscale.networks import Network
from wsiscale.readers.array import ArrayReader
from wsiscale.testing import random_stain, tissue
from wsiscale.views import read_view

WEIGHTS = Path(wsiscale.__file__).parent / "cards" / "nuclei_default.safetensors"
HELD_OUT = 90_000  # training draws its fields from seeds above 20 million


@pytest.fixture(scope="module")
def network() -> Network:
    return wsiscale.load_network()


def probabilities(network: Network, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(B, H, W, 3) -> (B, 2, H, W)"""
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(network.mean)[:, None, None]) / torch.tensor(network.std)[:, None, None]
    with torch.inference_mode():
        return network.module(images).softmax(dim=1).numpy()


def area_under_curve(score: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    rank, positives = rankdata(score.ravel()), int(truth.sum())
    return float((rank[truth.ravel()].sum() - positives * (positives + 1) / 2) / (positives * (truth.size - positives)))


def most_confident_mpp(network: Network, image: NDArray[np.uint8], mpp: float, *, places: int = 8) -> float:
    """Where mean maximum softmax peaks over 0.125 to 2 µm/px or as far as the image reaches."""
    slide, size = ArrayReader(image, mpp=mpp), network.tile_size
    mpps = scale_grid(max(0.125, mpp / 2), min(2.0, min(image.shape[:2]) * mpp / size), per_octave=6)
    curves = []
    for fraction in np.random.default_rng(0).random((places, 2)):
        tiles = []
        for asked in mpps:
            scale = asked / mpp
            room = np.array(image.shape[:2]) - size * scale
            tiles.append(read_view(slide, centered_view(tuple(size * scale / 2 + fraction * room), size=size, scale=scale)))
        curves.append(probabilities(network, np.stack(tiles)).max(axis=1).mean(axis=(1, 2)))
    return float(mpps[np.mean(curves, axis=0).argmax()])


def test_the_weights_are_small_and_plain_tensors() -> None:
    assert WEIGHTS.stat().st_size < 1_500_000
    with safe_open(WEIGHTS, "pt") as file:
        values = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (a handle, not a dictionary)
    assert all(torch.isfinite(value.float()).all() for value in values)


def test_the_card_and_the_factory_are_the_same_network(network: Network) -> None:
    made = default_network()

    assert network.training_mpp == 0.5
    assert network.output == "segmentation"
    # In training mode every answer would depend on its batch, and would change the stored statistics.
    assert not made.training
    assert not network.module.training
    tiles = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(made(tiles), network.module(tiles))
        assert made(tiles).shape == (2, 2, 64, 96)


def test_batchnorm_holds_the_fingerprint_of_the_training_scale(network: Network) -> None:
    layers = [m for m in network.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(layers) >= 8

    drift = []
    for mpp in (0.125, 0.5, 2.0):
        stem = network.module.get_submodule("coarse")
        seen: list[torch.Tensor] = []
        first = next(m for m in stem.modules() if isinstance(m, nn.BatchNorm2d))
        handle = first.register_forward_pre_hook(lambda _m, inputs, seen=seen: seen.append(inputs[0]))
        tiles = [tissue(128, 128, mpp=mpp, seed=HELD_OUT + s, stain=random_stain(s))[0] for s in range(6)]
        probabilities(network, np.stack(tiles))
        handle.remove()
        answer = seen[0].mean(dim=(0, 2, 3)) - first.running_mean
        drift.append(float((answer**2 / first.running_var).mean()))

    assert np.argmin(drift) == 1


@pytest.mark.parametrize("seed", range(HELD_OUT, HELD_OUT + 3))
def test_nuclei_of_held_out_tissue_are_found(network: Network, seed: int) -> None:
    image, nuclei = tissue(384, 512, mpp=0.5, seed=seed, stain=random_stain(seed))

    nucleus = probabilities(network, image[None])[0, 1]

    assert area_under_curve(nucleus, nuclei > 0) > 0.97


@pytest.mark.parametrize("seed", range(HELD_OUT, HELD_OUT + 4))
def test_confidence_on_held_out_tissue_peaks_at_the_training_scale(network: Network, seed: int) -> None:
    image, _ = tissue(1024, 1100, mpp=0.25, seed=seed, stain=random_stain(seed))

    best = most_confident_mpp(network, image, 0.25)

    assert np.log2(best / 0.5) == pytest.approx(0, abs=0.35)


def test_noise_and_glass_leave_the_network_undecided(network: Network) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, 128, 128, 3), np.uint8)
    glass = np.clip(rng.normal(243, 2, (2, 128, 128, 3)), 0, 255).astype(np.uint8)

    confidence = probabilities(network, np.concatenate([noise, glass])).max(axis=1).mean(axis=(1, 2))

    assert confidence.max() < 0.6


def test_the_answer_is_the_same_every_time(network: Network) -> None:
    image, _ = tissue(128, 128, mpp=0.5, seed=HELD_OUT)

    assert np.array_equal(probabilities(network, image[None]), probabilities(network, image[None]))


def test_a_real_image_of_unknown_scale_has_a_peak_too(network: Network) -> None:
    image = skimage.data.immunohistochemistry()

    scale = most_confident_mpp(network, image, 0.5) / 0.5

    assert 0.6 < scale < 1.9


def test_real_nuclei_are_found(network: Network, real_data: Path) -> None:
    found = []
    for path in sorted((real_data / "patches" / "monuseg" / "images").glob("*.png")):
        image = np.asarray(Image.open(path).convert("RGB"))
        truth = np.asarray(Image.open(path.parents[1] / "masks" / path.name)) > 0
        half = image.reshape(500, 2, 500, 2, 3).mean(axis=(1, 3)).astype(np.uint8)[:496, :496]
        found.append(area_under_curve(probabilities(network, half[None])[0, 1], truth[::2, ::2][:496, :496]))

    assert np.mean(found) > 0.88
