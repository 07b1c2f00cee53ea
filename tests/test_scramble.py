"""Phase scrambling keeps colours and power spectrum, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from wsiscale.scramble import phase_scramble, pixel_shuffle


def discs(*, height: int = 96, width: int = 80, seed: int = 0) -> NDArray[np.uint8]:
    """Blue discs on a soft pink ground, far enough from 0 and 255 that nothing is clipped."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width, 3), (150.0, 120.0, 135.0))
    for cy, cx in rng.uniform(0, (height, width), (12, 2)):
        image[(y - cy) ** 2 + (x - cx) ** 2 < 25] = (120, 110, 140)
    return np.rint(image + rng.normal(0, 2, image.shape[:2])[..., None]).astype(np.uint8)


def test_power_spectrum_is_kept_in_every_channel() -> None:
    image = discs()

    scrambled = phase_scramble(image[None], seed=0)[0]

    before, after = (np.abs(np.fft.fft2(i.astype(float), axes=(0, 1))) for i in (image, scrambled))
    # Rounding adds noise of 0.3 grey levels, which shows where there is little power.
    strong = before > 10 * np.median(before)
    assert strong.sum() > 100
    assert np.abs(after / before - 1)[strong].max() < 0.1


def test_mean_and_covariance_of_the_colours_are_kept() -> None:
    image = discs()

    scrambled = phase_scramble(image[None], seed=0)[0]

    before, after = (i.reshape(-1, 3).astype(float) for i in (image, scrambled))
    assert after.mean(0) == pytest.approx(before.mean(0), abs=0.1)
    assert np.cov(after.T) == pytest.approx(np.cov(before.T), abs=0.5)


def test_structure_is_gone() -> None:
    image = discs()

    scrambled = phase_scramble(image[None], seed=0)[0]

    before, after = (i[..., 0].astype(float).ravel() for i in (image, scrambled))
    assert abs(np.corrcoef(before, after)[0, 1]) < 0.2
    # Discs on a ground have a lopsided histogram; random phases a normal one.
    skew = [float((((v - v.mean()) / v.std()) ** 3).mean()) for v in (before, after)]
    assert skew[0] < -1
    assert abs(skew[1]) < 0.4


def test_a_tile_scrambles_alike_in_any_batch() -> None:
    images = np.stack([discs(seed=s) for s in range(3)])

    together = phase_scramble(images, seed=5)
    alone = [phase_scramble(image[None], seed=5)[0] for image in images]

    assert np.array_equal(together, alone)


def test_seeds_and_tiles_have_phases_of_their_own() -> None:
    image = discs()
    other = image.copy()
    other[0, 0] += 1

    first, reseeded = (phase_scramble(image[None], seed=s)[0].astype(float) for s in (0, 1))
    neighbour = phase_scramble(other[None], seed=0)[0].astype(float)

    for different in (reseeded, neighbour):
        assert abs(np.corrcoef(first.ravel(), different.ravel())[0, 1]) < 0.9
        assert np.abs(first - different).mean() > 3


def test_odd_sizes_flat_tiles_and_empty_batches_pass() -> None:
    flat = np.full((1, 7, 9, 3), (10, 20, 30), np.uint8)

    assert np.array_equal(phase_scramble(flat, seed=0), flat)
    assert phase_scramble(flat[:0], seed=0).shape == (0, 7, 9, 3)


def test_shuffled_pixels_are_the_same_ones_elsewhere_whatever_the_batch() -> None:
    images = np.stack([discs(seed=0), discs(seed=1)])

    shuffled = pixel_shuffle(images, seed=0)

    for before, after in zip(images, shuffled, strict=True):
        assert (np.sort(before.reshape(-1, 3), axis=0) == np.sort(after.reshape(-1, 3), axis=0)).all()
        colours = {tuple(pixel) for pixel in before.reshape(-1, 3)}
        assert {tuple(pixel) for pixel in after.reshape(-1, 3)} == colours  # the channels stay together
        assert (before != after).any(axis=2).mean() > 0.8
    assert (pixel_shuffle(images[1:], seed=0)[0] == shuffled[1]).all()
    assert (pixel_shuffle(images, seed=1) != shuffled).any()
