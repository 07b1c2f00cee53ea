"""Two segmenters of nuclei, asked about a whole image at any scale: the bundled U-Net, and a classifier of 32 px windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.recovery.real import _fold
from wsiscale.analyzer import respond
from wsiscale.geometry import View
from wsiscale.networks import Network, load_network
from wsiscale.readers.array import ArrayReader
from wsiscale.views import read_view

STRIDE = 8  # level-0 px between the windows of a classifier, where its own pixels are no coarser: a third of a nucleus
BATCH = 2048  # windows
# The best of 0.0001 to 0.8 on the development half of the images at 0.18 µm/px (mean Dice 0.575; at 0.5 0.540).
NUCLEI32_THRESHOLD = 0.2


@dataclass(frozen=True)
class Segmenter:
    """A network, and how to have it say of every level-0 pixel how likely it is nucleus."""

    name: str
    network: Network
    training_mpp: float
    threshold: float  # one for all images and scales
    probability: Callable[[NDArray[np.uint8], float], NDArray[np.float32]]  # (H, W, 3) at a scale -> (H, W) 0..1


def bundled() -> Segmenter:
    network = load_network()
    return Segmenter("bundled", network, 0.5, 0.5, lambda image, scale: _by_unet(network, image, scale))


def nuclei32(data: Path, fold: str) -> Segmenter:
    network = _fold(data, fold)
    return Segmenter("nuclei32", network, 0.25, NUCLEI32_THRESHOLD, lambda image, scale: _by_windows(network, image, scale))


def _by_unet(network: Network, image: NDArray[np.uint8], scale: float) -> NDArray[np.float32]:
    height, width = image.shape[:2]
    rows, columns = (8 * math.ceil(side / scale / 8) for side in (height, width))  # the U-Net halves three times
    pixels = _seen(image, scale, rows, columns, margin=0)
    normalised = (pixels / np.float32(255) - np.float32(network.mean)) / np.float32(network.std)
    with torch.inference_mode():
        logits = network.module(torch.from_numpy(normalised).permute(2, 0, 1)[None])
        nucleus = logits.softmax(dim=1)[:, 1:]
        return _at_level_0(nucleus, rows * scale, columns * scale, height, width)


def _by_windows(network: Network, image: NDArray[np.uint8], scale: float) -> NDArray[np.float32]:
    height, width = image.shape[:2]
    size = network.tile_size
    step = max(1, round(STRIDE / scale))  # px at `scale`
    rows, columns = (math.ceil(side / scale / step) for side in (height, width))
    # A window around the middle of each step x step square.
    pixels = _seen(image, scale, rows * step, columns * step, margin=size)
    first = size + step // 2 - size // 2
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (size, size), axis=(0, 1))[first::step, first::step]
    windows = windows[:rows, :columns].reshape(-1, 3, size, size)
    found = []
    for start in range(0, len(windows), BATCH):
        tiles = np.ascontiguousarray(windows[start : start + BATCH].transpose(0, 2, 3, 1))
        outputs = respond(network, [tiles], scales=[scale], layers="none").outputs
        assert outputs is not None
        found.append(outputs.probabilities[:, 0, 1])
    nucleus = torch.from_numpy(np.concatenate(found).reshape(1, 1, rows, columns))
    return _at_level_0(nucleus, rows * step * scale, columns * step * scale, height, width)


def _seen(image: NDArray[np.uint8], scale: float, rows: int, columns: int, *, margin: int) -> NDArray[np.uint8]:
    """The image at `scale` with `margin` px around it; what lies beyond its edges is mirrored."""
    pad = math.ceil(margin * scale) + math.ceil(max(rows * scale - image.shape[0], columns * scale - image.shape[1], 0)) + 8
    canvas = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
    origin = pad - margin * scale
    view = View(y=origin, x=origin, height=rows + 2 * margin, width=columns + 2 * margin, scale=scale)
    return read_view(ArrayReader(canvas), view)


def _at_level_0(maps: torch.Tensor, covered_y: float, covered_x: float, height: int, width: int) -> NDArray[np.float32]:
    """(1, 1, h, w) that cover so many level-0 px -> (H, W)."""
    size = (max(round(covered_y), height), max(round(covered_x), width))
    fine = nn.functional.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False)
    found: NDArray[np.float32] = fine[0, 0, :height, :width].numpy()
    return found
