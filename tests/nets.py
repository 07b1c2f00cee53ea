"""Networks for tests and for trying the command line, `--model tests/nets.py:nuclei32`: each factory takes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from wsiscale.networks import import_torchvision

DATA = Path(os.environ.get("WSISCALE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def small_classifier() -> nn.Module:
    """Convolutions, BatchNorm with statistics of its own, 5 classes; takes tiles of any size from 8 px."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    return _lived_in(network)


def small_segmenter() -> nn.Module:
    """A U-Net of one step, 3 classes at the tile's resolution."""
    return _lived_in(_SmallUNet())


def fixed_size_classifier() -> tuple[nn.Module, dict[str, Any]]:
    """Flattens its maps, and so takes 16 px tiles only, which its card says."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16 * 16, 2))
    return network, {"tile_size": 16, "training_mpp": 0.5, "stain": "H&E"}


def nuclei32() -> tuple[nn.Module, dict[str, Any]]:
    """Fold 1 of nuclei32_5folds: is there a nucleus in the middle of the 32 px tile?"""
    weights = load_file(DATA / "weights" / "nuclei32_5folds.safetensors")
    network = Nuclei32(weights["mean.DB_train_w32_1"])
    state = {key.removeprefix("fold1."): value for key, value in weights.items() if key.startswith("fold1.")}
    network.load_state_dict({**state, "mean": network.mean})
    return network, {"name": "nuclei32", "tile_size": 32, "channels": "bgr", "value_range": 255, "training_mpp": 0.25}


def crc9() -> tuple[nn.Module, dict[str, Any]]:
    """Nine tissue classes (and 15 unused outputs) on DenseNet121's ImageNet features, 0.5 µm/px."""
    network = _Crc9()
    trunk = load_file(DATA / "weights" / "densenet121_imagenet_features.safetensors")
    head = load_file(DATA / "weights" / "crc9_head_on_densenet121.safetensors")
    features = {key.removeprefix("features."): value.float() for key, value in trunk.items() if key.startswith("features.")}
    network.features.load_state_dict(features)
    network.head.load_state_dict(head)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1.001e-5
    return network, {"name": "crc9", "tile_size": 224, "training_mpp": 0.5}


class Nuclei32(nn.Module):
    """(B, 3, 32, 32) BGR 0..255 -> logits (B, 2); class 1 is a nucleus at the centre."""

    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)  # (3, 32, 32)
        self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.pool2 = nn.AvgPool2d(3, 2, ceil_mode=True, count_include_pad=False)
        self.pool3 = nn.AvgPool2d(3, 2, ceil_mode=True, count_include_pad=False)
        self.relu = nn.ReLU()
        self.ip1 = nn.Linear(1024, 64)
        self.ip2 = nn.Linear(64, 2)

    def forward(self, tiles: Tensor) -> Tensor:
        x = self.relu(self.pool1(self.conv1(tiles - self.mean)))
        x = self.pool2(self.relu(self.conv2(x)))
        x = self.pool3(self.relu(self.conv3(x)))
        return self.ip2(self.ip1(x.flatten(1)))


class _Crc9(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = import_torchvision().models.densenet121(weights=None).features
        self.head = nn.Linear(1024, 24)

    def forward(self, tiles: Tensor) -> Tensor:
        return self.head(F.relu(self.features(tiles)).mean((2, 3)))


class _SmallUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Conv2d(8, 6, 1)
        self.smooth = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, tiles: Tensor) -> Tensor:
        fine = self.fine(tiles)
        coarse = F.interpolate(self.up(self.coarse(fine)), size=fine.shape[2:])
        return self.head(self.smooth(fine + coarse))


def _lived_in(network: nn.Module) -> nn.Module:
    """With BatchNorm statistics other than 0 and 1, so that forgetting them shows."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (layer.running_mean, layer.bias):
                nn.init.uniform_(value, -0.3, 0.3)
            for value in (layer.running_var, layer.weight):
                nn.init.uniform_(value, 0.5, 1.5)
    return network
