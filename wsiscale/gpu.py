"""What a GPU does in the CPU's place: the same views from one window, and tiles without structure. In torch, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from wsiscale.geometry import ReadPlan
from wsiscale.resample import parts


def upload(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """To the device, through pinned memory where that is a GPU, so that the copy does not wait."""
    tensor = torch.from_numpy(pixels)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def resample_stack(plans: Sequence[ReadPlan], window: Tensor, *, y: int, x: int) -> Tensor:
    """`resample.resample_stack` of (H, W, 3) uint8, on the window's device: (S, h, w, 3), the same to one grey level."""
    with torch.inference_mode(), torch.autocast(window.device.type, enabled=False):
        mips = [window.permute(2, 0, 1).float()]  # (3, H, W)
        views = []
        for part in parts(plans, window.shape[:2], y=y, x=x):
            while len(mips) <= part.octave:
                mips.append(_halved_up(mips[-1]))
            rows, columns = (_dense(weights, window.device) for weights in part.weights)
            view = rows @ mips[part.octave][:, part.rows, part.columns] @ columns.T
            views.append((view - part.brighter).round().clamp(0, 255).to(torch.uint8))
        return torch.stack(views).permute(0, 2, 3, 1)


def _halved_up(image: Tensor) -> Tensor:
    """2 x 2 means of (3, H, W), rounded, halves up; an odd last row or column is repeated."""
    odd = (0, image.shape[2] % 2, 0, image.shape[1] % 2)
    padded = torch.nn.functional.pad(image[None], odd, mode="replicate")
    return torch.floor(torch.nn.functional.avg_pool2d(padded, 2)[0] + 0.5)


def _dense(weights: sparse.csr_array, device: torch.device) -> Tensor:
    return torch.from_numpy(weights.toarray()).to(device)


def phase_scramble(tiles: Tensor, seed: int) -> Tensor:
    """`scramble.phase_scramble` of (B, H, W, 3) uint8, with other random phases, which depend on the seed and the shape."""
    with torch.inference_mode(), torch.autocast(tiles.device.type, enabled=False):
        noise = torch.randn(tiles.shape[:3], generator=_generator(tiles, seed), device=tiles.device)
        turn = torch.fft.rfft2(noise)
        turn = turn / turn.abs()
        turn[:, 0, 0] = 1  # the mean
        spectrum = torch.fft.rfft2(tiles.permute(0, 3, 1, 2).float()) * turn[:, None]
        scrambled: Tensor = torch.fft.irfft2(spectrum, s=tiles.shape[1:3])
        return scrambled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def pixel_shuffle(tiles: Tensor, seed: int) -> Tensor:
    """`scramble.pixel_shuffle` of (B, H, W, 3), in another random order, which depends on the seed and the shape."""
    count = tiles.shape[1] * tiles.shape[2]
    order = torch.rand((len(tiles), count), generator=_generator(tiles, seed), device=tiles.device).argsort(dim=1)
    flat = tiles.reshape(len(tiles), count, 3)
    return flat.gather(1, order[..., None].expand(-1, -1, 3)).reshape(tiles.shape)


SCRAMBLES = {"phase_scrambled": phase_scramble, "pixel_shuffled": pixel_shuffle}


def _generator(tiles: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(tiles.device).manual_seed(seed)
