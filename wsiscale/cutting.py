"""A network cut off at a layer (Graziani et al., 2021, prune so), and the same architecture with random weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wsiscale.card import update_card
from wsiscale.errors import ModelError
from wsiscale.layers import Tap, evaluating, first_tensor, plan_of, spatial_mean
from wsiscale.networks import Network

if TYPE_CHECKING:
    from wsiscale.regressor import ScaleRegressor


class CutNetwork(nn.Module):
    """(B, 3, H, W) -> (B, K), one layer's channels averaged over positions; with a head (B, 1), log2 µm/px.

    Runs the network up to the layer and no further, whatever the network's forward looks like: the layer's hook ends it.
    """

    def __init__(self, network: nn.Module, tap: Tap, *, head: bool = False) -> None:
        super().__init__()
        self.network = network
        self.tap = tap
        self.head: nn.Linear | None = nn.Linear(tap.channels, 1) if head else None

    def forward(self, tiles: Tensor) -> Tensor:
        pooled = spatial_mean(self._reach(tiles), self.tap.axis)  # (B, K)
        return pooled if self.head is None else self.head(pooled)

    def _reach(self, tiles: Tensor) -> Tensor:
        passes = 0

        def stop(tensor: object) -> None:
            nonlocal passes
            if passes == self.tap.count and isinstance(tensor, Tensor):
                raise _ReachedError(tensor)
            passes += 1

        layer = self.network.get_submodule(self.tap.module)
        if self.tap.at_input:
            handle = layer.register_forward_pre_hook(lambda _, args, kwargs: stop(first_tensor(args, kwargs)), with_kwargs=True)
        else:
            handle = layer.register_forward_hook(lambda _, __, result: stop(result))
        try:
            self.network(tiles)
        except _ReachedError as reached:
            return reached.values
        finally:
            handle.remove()
        raise ModelError(f"the layer {self.tap.name!r} was not reached; cut at one that runs for every tile")


class _ReachedError(Exception):
    """Not a failure: the layer's answer, on its way out of the network."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values


def cut_network(network: Network, layer: str, *, regressor: ScaleRegressor | None = None) -> Network:
    """`network` up to `layer` (a name as in `Probe.layers`), whose answer is that layer's channels, averaged over the tile.

    With a `regressor` of that layer the answer is log2 µm/px, (B, 1). The weights are copies, and what lies behind the layer is
    let go. Raises ModelError where there is no such layer.
    """
    if regressor is not None and regressor.layer != layer:
        raise ModelError(f"the regressor is of layer {regressor.layer!r}, and the cut at {layer!r}; give one of that layer")
    module = cut_module(copy.deepcopy(network.module), layer, tile_size=network.tile_size, head=regressor is not None)
    if regressor is not None:
        assert module.head is not None
        slopes = torch.from_numpy(regressor.weights).double() / torch.from_numpy(regressor.std).double()
        with torch.no_grad():
            module.head.weight.copy_(slopes[None])
            module.head.bias.fill_(regressor.intercept - float(slopes @ torch.from_numpy(regressor.mean).double()))
    module.train(network.module.training)
    kept = {name: value for name, value in network.card.items() if name not in _OF_THE_WHOLE}
    name = f"{network.name} to {layer}"
    return replace(network, module=module, name=name, output="features", layers=None, answer=None, card=kept)


# What is known of the whole network's layers and answers holds of no part of it.
_OF_THE_WHOLE = ("profile", "profile_data", "reference", "scale_regressor", "classes", "answer", "layers", "cut")


def cut_module(module: nn.Module, layer: str, *, tile_size: int, head: bool = False) -> CutNetwork:
    """The module itself, cut: what lies behind the layer is taken out of it."""
    with evaluating(module), torch.inference_mode():
        whole = Network(module, type(module).__name__, tile_size=tile_size)
        (tap,) = plan_of(whole, tile_size, tile_size, [layer]).taps
    cut = CutNetwork(module, tap, head=head)
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    noise = torch.rand((2, 3, tile_size, tile_size), generator=torch.Generator().manual_seed(0))
    with evaluating(module), torch.inference_mode():
        _let_go(cut, noise.to(weight.device, weight.dtype))
    return cut


def _let_go(cut: CutNetwork, tiles: Tensor) -> None:
    """Puts an identity in the place of every module that does not run before the cut."""
    ran: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda m, _: ran.add(m)) for m in cut.network.modules()]
    expected = cut._reach(tiles)
    for handle in handles:
        handle.remove()
    removed: list[tuple[nn.Module, str, nn.Module]] = []

    def walk(parent: nn.Module) -> None:
        for name, child in parent.named_children():
            if any(inner in ran for inner in child.modules()):
                walk(child)
            # Multi-head attention uses its projection's weights without running it.
            elif not isinstance(parent, nn.MultiheadAttention):
                removed.append((parent, name, child))
                setattr(parent, name, nn.Identity())

    walk(cut.network)
    try:
        same = torch.equal(cut._reach(tiles), expected)
    except (RuntimeError, AttributeError, TypeError, KeyError, IndexError):
        same = False
    if not same:  # weights of a module that does not run are used all the same: everything stays
        for parent, name, child in removed:
            setattr(parent, name, child)


def save_cut(cut: Network, card: str | Path, *, fields: Mapping[str, Any]) -> None:
    """The cut network as a card for `--model`, its weights as safetensors beside it.

    `fields` are the whole network's, as `reference_slides.card_fields` gives them.
    """
    module = cut.module
    if not isinstance(module, CutNetwork):
        raise ModelError(f"{cut.name} is not cut; give what cut_network made")
    path = Path(card)
    weights = path.with_suffix(".safetensors")
    partial = weights.with_name(f"{weights.name}.{os.getpid()}.partial")
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}, partial)
    partial.replace(weights)
    kept = {name: value for name, value in fields.items() if name not in _OF_THE_WHOLE}
    known = {
        "name": cut.name,
        "weights": weights.name,
        "output": "features",
        "cut": {"layer": module.tap.name, "head": module.head is not None},
    }
    update_card(path, {}, fields=kept | known)


def randomised(network: Network, *, seed: int = 0) -> Network:
    """The same architecture with weights as before any training (He et al., 2015), BatchNorm's memory empty.

    Parameters that no layer of torch's own knows how to begin are shuffled within themselves.
    """
    module = copy.deepcopy(network.module)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for layer in module.modules():
            own = list(layer.parameters(recurse=False))
            if isinstance(layer, _CONVOLUTIONS):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif callable(begin := getattr(layer, "reset_parameters", None)):
                begin()
            else:
                for parameter in own:
                    flat = parameter.flatten()
                    parameter.copy_(flat[torch.randperm(flat.numel()).to(flat.device)].view_as(parameter))
    return replace(network, module=module, name=f"{network.name}, random weights", card={})


_CONVOLUTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
