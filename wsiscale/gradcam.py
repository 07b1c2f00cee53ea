"""Where a network looks, at several scales: Grad-CAM (Selvaraju et al., ICCV 2017) by captum, an extra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsiscale.errors import ModelError, OptionError
from wsiscale.figures import tiles_of
from wsiscale.layers import evaluating, normalised, plan_of, tensor_of
from wsiscale.networks import Network

SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Attention:
    """How much each pixel of a tile spoke for a class, at each scale."""

    maps: NDArray[np.float32]  # (S, H, W) of 0 and above, in units of the class's logit's gradient times activation
    targets: NDArray[np.int64]  # (S,) class
    scales: NDArray[np.float64]  # (S,) image px per px
    center: tuple[float, float]  # (y, x) of the image
    layer: str


def gradcam(
    network: Network,
    image: NDArray[np.uint8],
    *,
    scales: Sequence[float] | NDArray[np.floating] = SCALES,
    center: tuple[float, float] | None = None,
    layer: str | None = None,
    target: int | None = None,
) -> Attention:
    """Grad-CAM of one image (H, W, 3) around `center` (y, x) at `scales`, for class `target` or the predicted one.

    `layer` is a name as in named_modules(), the last stage if not said; a segmenter's logits are averaged over its pixels.
    Raises ModelError where captum is missing, or where the network answers no classes.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError as error:
        raise ModelError("Grad-CAM needs captum; pip install 'wsiscale[captum]'") from error

    if network.output == "features":
        raise OptionError(f"{network.name} answers features and no classes; Grad-CAM is of a class")
    at = np.asarray(scales, float)
    middle = (image.shape[0] / 2, image.shape[1] / 2) if center is None else center
    tiles = tiles_of(image, size=network.tile_size, scales=at, center=middle)
    module = network.module
    with evaluating(module), torch.inference_mode():
        if layer is None:
            stages = plan_of(network, network.tile_size, network.tile_size, "stages").stages
            if not stages:
                raise ModelError(f"{network.name} has no layer of maps to look at; name one with layer=")
            layer = stages[-1].partition("@")[0]

    def logits(batch: Tensor) -> Tensor:
        answer = tensor_of(network, module(batch))
        return answer.flatten(2).mean(2) if answer.ndim > 2 else answer

    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    maps, targets = [], []
    with evaluating(module), _out_of_place(module):
        found: Any = LayerGradCam(logits, module.get_submodule(layer))
        for tile in tiles:
            batch = normalised(network, torch.from_numpy(tile[None].copy()).to(device)).requires_grad_()
            with torch.no_grad():
                which = int(logits(batch).argmax(1)) if target is None else target
            coarse = found.attribute(batch, target=which, relu_attributions=True)
            size = (network.tile_size, network.tile_size)
            fine = nn.functional.interpolate(coarse.detach(), size, mode="bilinear", align_corners=False)
            maps.append(fine[0, 0].cpu().numpy())
            targets.append(which)
    return Attention(np.stack(maps).astype(np.float32), np.array(targets), at, (float(middle[0]), float(middle[1])), layer)


@contextmanager
def _out_of_place(module: nn.Module) -> Iterator[None]:
    """Activations that work in place would change what the gradient is of."""
    layers: list[Any] = [layer for layer in module.modules() if getattr(layer, "inplace", False)]
    for layer in layers:
        layer.inplace = False
    try:
        yield
    finally:
        for layer in layers:
            layer.inplace = True
