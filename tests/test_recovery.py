"""From pixels to answer: what was planted in a slide is found, and what holds nothing gives nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import wsiscale as ws
from wsiscale.default_network import default_network
from wsiscale.testing import planted_network, planted_slide

TRUE_SCALES = np.exp2(np.linspace(0.4, 2.6, 20))  # of the range 1 to 8, clear of its ends by a little


def everywhere(image: np.ndarray) -> np.ndarray:
    return np.ones(image.shape[:2], bool)


def shuffled(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The module with every tensor's numbers in random order: the same weights, and no knowledge."""
    order = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *(b for b in module.buffers() if b.ndim)]:
            flat = tensor.flatten()
            tensor.copy_(flat[torch.randperm(len(flat), generator=order)].reshape(tensor.shape))
    return module


def test_a_planted_optimum_is_recovered_at_twenty_scales_over_the_range() -> None:
    errors = {}
    for seed, scale in enumerate(TRUE_SCALES):
        blob = 6.0
        slide = planted_slide(blob * scale, seed=seed, size=900)
        found = ws.estimate(
            slide,
            planted_network(blob),
            criterion="confidence",
            scale_range=(1, 8),
            places=16,
            tile_size=96,
            detector=everywhere,
            seed=seed,
        )
        assert found.abstained is None, (scale, found.abstained)
        assert found.scale is not None
        errors[round(float(scale), 2)] = abs(float(np.log2(found.scale / scale)))

    assert max(errors.values()) <= 0.1, errors


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_shuffled_weights_on_noise_tiles_abstain(kind: str) -> None:
    answers = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise = (
            rng.integers(0, 256, (640, 640, 3)) if kind == "uniform" else np.clip(rng.normal(170, 40, (640, 640, 3)), 0, 255)
        )
        slide = ws.ArrayReader(noise.astype(np.uint8))
        found = ws.estimate(
            slide,
            shuffled(default_network(), seed),
            scale_range=(1, 8),
            places=12,
            per_octave=4,
            tile_size=64,
            detector=everywhere,
            seed=seed,
        )
        if found.abstained is None:
            answers.append((seed, found.scale))

    assert len(answers) <= 1, answers


def test_a_rescaled_copy_moves_the_answer_by_its_factor_and_a_wrong_tag_only_the_units() -> None:
    network = planted_network(6.0)
    arguments = {"criterion": "confidence", "scale_range": (1, 8), "places": 16, "tile_size": 96, "detector": everywhere}
    fine, coarse = planted_slide(6 * 3.6, seed=0, size=900), planted_slide(6 * 2.0, seed=0, size=900)
    pixels = fine.read(level=0, y=0, x=0, height=900, width=900)

    first, second = (ws.estimate(slide, network, **arguments).scale for slide in (fine, coarse))
    tagged, mistagged = (ws.estimate(ws.ArrayReader(pixels, mpp=mpp), network, **arguments) for mpp in (0.25, 0.4))

    assert first is not None
    assert second is not None
    assert np.log2(first / second) == pytest.approx(np.log2(1.8), abs=0.1)
    assert tagged.scale == mistagged.scale == first
    assert tagged.mpp == pytest.approx(first * 0.25)
    assert mistagged.mpp == pytest.approx(first * 0.4)
