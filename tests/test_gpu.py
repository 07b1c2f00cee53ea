"""What a GPU does in the CPU's place is the same work: tried on the CPU, since torch's arithmetic is the same there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import small_classifier

from wsiscale import gpu
from wsiscale.analyzer import respond
from wsiscale.geometry import centered_view, plan_read
from wsiscale.networks import load_network
from wsiscale.places import sample_places
from wsiscale.readers import ArrayReader
from wsiscale.resample import resample_stack
from wsiscale.scramble import phase_scramble
from wsiscale.stacks import scale_stack
from wsiscale.testing.procedural import slide_image
from wsiscale.tissue import find_tissue
from wsiscale.types import Pyramid


@pytest.mark.parametrize("centre", [(700.0, 650.0), (660.3, 652.8)])
def test_views_are_those_of_the_cpu_to_a_grey_level(centre: tuple[float, float]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1401, 1303, 3), dtype=np.uint8)
    pyramid = Pyramid(shapes=((1401, 1303),), downsamples=(1.0,))
    scales = [0.7, 1.0, 1.37, 2.0, 3.9, 6.2, 11.0, 19.9]
    plans = [plan_read(pyramid, centered_view(centre, size=64, scale=s), level=0) for s in scales]
    widest = plans[-1]
    window = image[widest.y : widest.y + widest.height, widest.x : widest.x + widest.width]

    theirs = resample_stack(plans, window, y=widest.y, x=widest.x)
    ours = gpu.resample_stack(plans, torch.from_numpy(window.copy()), y=widest.y, x=widest.x)

    assert ours.dtype == torch.uint8
    difference = np.abs(ours.numpy().astype(int) - theirs)
    assert difference.max() <= 1
    assert difference.mean() < 0.001  # a tie may round the other way


def test_phases_are_random_and_nothing_else_is() -> None:
    tiles = np.stack([slide_image(128, 128, 0.5, seed)[:96, :128] for seed in range(3)])

    ours = gpu.phase_scramble(torch.from_numpy(tiles), seed=1).numpy()

    assert (ours == gpu.phase_scramble(torch.from_numpy(tiles), seed=1).numpy()).all()
    assert (ours != gpu.phase_scramble(torch.from_numpy(tiles), seed=2).numpy()).any()
    theirs = phase_scramble(tiles, 1)  # clipped as much
    np.testing.assert_allclose(ours.mean(axis=(1, 2)), theirs.mean(axis=(1, 2)), atol=2)
    np.testing.assert_allclose(ours.std(axis=(1, 2)), theirs.std(axis=(1, 2)), rtol=0.1)


def test_shuffling_keeps_every_pixel() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)

    shuffled = gpu.pixel_shuffle(torch.from_numpy(tiles), seed=1).numpy()

    for one, other in zip(tiles, shuffled, strict=True):
        assert (one != other).any()
        assert (np.unique(one.reshape(-1, 3), axis=0) == np.unique(other.reshape(-1, 3), axis=0)).all()


def test_a_network_answers_the_same_to_tiles_made_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    slide = ArrayReader(slide_image(900, 900, 0.5, 3), mpp=0.5)
    places = sample_places(find_tissue(slide), 5, seed=0, field=64 * 4)
    stack = scale_stack(slide, places, scales=[1.0, 1.7, 4.0], size=64)
    views = ["rot90", "phase_scrambled"]

    network = load_network(small_classifier(), tile_size=64)
    plain = respond(network, stack, views=views, device="cpu", seed=3)
    monkeypatch.setattr("wsiscale.analyzer._makes_tiles", lambda device: True)
    there = respond(network, stack, views=views, device="cpu", seed=3)

    assert plain.outputs is not None
    assert there.outputs is not None
    np.testing.assert_allclose(there.outputs.probabilities, plain.outputs.probabilities, atol=2e-3)
    np.testing.assert_allclose(there.agreement["rot90"], plain.agreement["rot90"], atol=2e-3)
    # Other phases, but answers of the same kind.
    ours, theirs = (r.views["phase_scrambled"].outputs for r in (there, plain))
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(ours.probabilities.mean(axis=(0, 1)), theirs.probabilities.mean(axis=(0, 1)), atol=0.05)
