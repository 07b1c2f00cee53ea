"""Tiles without structure: their pixels shuffled, or the phases of their waves. Pure numpy and scipy.

What a network still answers to such a tile it owes to colour alone (pixels), or to colour and texture energy (phases).
Criteria compare it with the answer to the tile itself.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray
from scipy import fft


def phase_scramble(images: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Each of (B, H, W, 3) with random phases, the same in its three channels: (B, H, W, 3).

    That keeps each channel's mean and power spectrum and, because the channels stay in step, the covariance of the colours,
    all but for what rounding and clipping to 0..255 take: little in tissue, four grey levels of the mean where fat lies on
    white. Depends on `seed` and the tile alone, not on its place in the batch.
    """
    return np.stack([_scramble(image, seed) for image in images]) if len(images) else images.copy()


def pixel_shuffle(images: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Each of (B, H, W, 3) with its pixels in random order: the same colours as often, and nothing else: (B, H, W, 3).

    Depends on `seed` and the tile alone, not on its place in the batch.
    """
    return np.stack([_shuffle(image, seed) for image in images]) if len(images) else images.copy()


# What a name of a view stands for; the other views are turned tiles.
SCRAMBLES = {"phase_scrambled": phase_scramble, "pixel_shuffled": pixel_shuffle}


def _shuffle(image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng((seed, zlib.crc32(image.tobytes())))
    return rng.permutation(image.reshape(-1, 3), axis=0).reshape(image.shape)


def _scramble(image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng((seed, zlib.crc32(image.tobytes())))
    height, width = image.shape[:2]
    # The phases of real noise have the symmetry that makes the result real, at the Nyquist frequencies too.
    noise = fft.rfft2(rng.standard_normal((height, width), np.float32))  # (H, W // 2 + 1)
    turn = noise / np.abs(noise)
    turn[0, 0] = 1  # the mean
    spectrum = fft.rfft2(image.astype(np.float32), axes=(0, 1)) * turn[..., None]
    scrambled = fft.irfft2(spectrum, s=(height, width), axes=(0, 1))
    return np.clip(np.rint(scrambled), 0, 255).astype(np.uint8)
