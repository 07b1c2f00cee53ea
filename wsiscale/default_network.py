"""The embedded network: nuclei at 0.5 µm/px, so that `wsiscale estimate slide.svs` needs nothing else.

Made by training/train_default.py on procedural tissue alone; what it is good for is in docs/default-network.md.
"""

from __future__ import annotations

from importlib import resources

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import nn


def default_network() -> nn.Module:
    """The trained network, in eval mode: `NucleiNetwork` with the weights that come with the package."""
    network = NucleiNetwork()
    weights = resources.files("wsiscale") / "cards" / "nuclei_default.safetensors"
    network.load_state_dict(load(weights.read_bytes()))
    return network.eval()


class NucleiNetwork(nn.Module):
    """(B, 3, H, W) normalised RGB -> logits (B, 2, H, W): background, nucleus. H and W are multiples of 8.

    A small U-Net (Ronneberger et al. 2015) that adds its skips instead of stacking them. Half the tile's resolution is the
    finest that it works at: a nucleus is 12 to 24 px at 0.5 µm/px.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 16, stride=2)
        self.fine = nn.Sequential(_block(16, 24), _block(24, 24))  # 1/2
        self.middle = nn.Sequential(_block(24, 48, stride=2), _block(48, 48))  # 1/4
        # The dilation lets a position see 60 µm, several nuclei: what it needs to know its scale in the spaces between.
        self.coarse = nn.Sequential(_block(48, 64, stride=2), _block(64, 64, dilation=2), _block(64, 64, dilation=3))  # 1/8
        self.to_middle = nn.Conv2d(64, 48, 1, bias=False)
        self.up_middle = _block(48, 48)
        self.to_fine = nn.Conv2d(48, 24, 1, bias=False)
        self.up_fine = _block(24, 24)
        self.head = nn.Conv2d(24, 2, 1)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        fine = self.fine(self.stem(tiles))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = self.up_middle(middle + _larger(self.to_middle(coarse)))
        fine = self.up_fine(fine + _larger(self.to_fine(middle)))
        return _larger(self.head(fine))


def _block(channels: int, out: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride=stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


def _larger(maps: torch.Tensor) -> torch.Tensor:
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
