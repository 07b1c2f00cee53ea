"""What of a network is watched: its stages, its BatchNorm inputs, its head, found by one dry run."""

from __future__ import annotations

import difflib
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wsiscale.errors import ModelError, OptionError
from wsiscale.types import BatchNormStatistics

if TYPE_CHECKING:
    from wsiscale.networks import Network

OutputKind = Literal["classification", "segmentation", "features"]

# Layers of a deep network tell much the same; all 121 of a DenseNet would be gigabytes of response.
MOST_BATCHNORM = 24
_DRY = 2  # tiles of the dry run

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# An activation in place gives the tensor that it got, too, but changed.
_HANDING_ON = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class _Call:
    """One pass through one module, as the dry run saw it."""

    module: str  # as in named_modules()
    layer: nn.Module
    count: int  # 0 for the module's first pass
    shape: tuple[int, ...] | None  # of the output; None where that is not one tensor
    axis: int  # of the output's channels
    repeats: bool  # it hands on what the call before it made: a container its last layer's, an identity, dropout
    inputs: int  # channels of the input of a linear layer or convolution, else 0
    pooled: Tensor | None  # (B, C) the output's mean over positions, of linear layers and convolutions

    @property
    def pixels(self) -> tuple[int, ...]:
        """The shape of the output's map."""
        assert self.shape is not None
        return tuple(n for i, n in enumerate(self.shape) if i not in (0, self.axis % len(self.shape)))


@dataclass(frozen=True)
class Tap:
    """Where to pick up a layer's answer."""

    name: str  # in the response
    module: str
    count: int  # which pass through the module
    at_input: bool
    axis: int  # of the channels
    channels: int


@dataclass(frozen=True)
class Plan:
    """What to pick up in a forward pass."""

    output: OutputKind
    classes: int
    softmaxed: bool  # the network answers with probabilities
    taps: tuple[Tap, ...]
    stages: tuple[str, ...]
    batchnorm: dict[str, BatchNormStatistics]
    head: Tap | None
    head_weight: NDArray[np.float32] | None
    head_bias: NDArray[np.float32] | None

    @property
    def bytes_per_tile(self) -> int:
        channels = sum(tap.channels for tap in self.taps)
        features = self.classes if self.output == "features" else 0 if self.head is None else self.head.channels
        answers = 0 if self.output == "features" else 2 * max(self.classes, 2) + 6
        return 4 * (2 * channels + features + answers)


def plan_of(network: Network, height: int, width: int, layers: str | Sequence[str]) -> Plan:
    """Runs the network on two tiles of noise, and says what to watch. Raises ModelError where it cannot take them."""
    calls, answer = _dry_run(network, height, width)
    output = network.output or _kind(answer, height, width)
    shape = tuple(answer.shape)
    answer = as_maps(answer, output)
    if output != "features" and answer.ndim != 4:
        raise ModelError(f"{network.name} answers {shape} to two tiles, which is no {output}; is its output 'features'?")
    classes = answer.shape[1]
    softmaxed = output != "features" and classes > 1 and bool((answer >= 0).all() and ((answer.sum(1) - 1).abs() < 1e-3).all())
    at, matches = (len(calls), False) if output == "features" else _find_head(calls, answer, output)
    head = weight = bias = None
    if at < len(calls):
        call = calls[at]
        # A linear layer has its channels last, a convolution second.
        head = Tap("", call.module, call.count, True, -1 if isinstance(call.layer, nn.Linear) else 1, call.inputs)
        if matches and _is_pointwise(call.layer):
            weight = to_numpy(_tensor(call.layer, "weight")).reshape(classes, -1)
            bias = np.zeros(classes, np.float32) if call.layer.bias is None else to_numpy(_tensor(call.layer, "bias"))
    stages = _stages(calls[:at])
    taps = _taps(network, calls, stages, layers)
    return Plan(
        output=output,
        classes=classes,
        softmaxed=softmaxed,
        taps=taps,
        stages=tuple(tap.name for tap in taps if not tap.at_input),
        batchnorm={tap.name: _statistics(network.module.get_submodule(tap.module)) for tap in taps if tap.at_input},
        head=head,
        head_weight=weight,
        head_bias=bias,
    )


def _dry_run(network: Network, height: int, width: int) -> tuple[list[_Call], Tensor]:
    """Every pass through every module, in the order in which they end, and the network's answer to two tiles of noise."""
    running: list[tuple[str, nn.Module, tuple[int, ...] | None]] = []
    calls: list[_Call] = []
    counts: Counter[str] = Counter()
    made, usual = 0, 1  # channels of the last layer that says how many it makes, and the axis where its kind has them
    previous: object = None

    def before(name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        given = first_tensor(args, kwargs)
        running.append((name, layer, None if given is None else tuple(given.shape)))

    def after(name: str, layer: nn.Module, _: Any, result: Any) -> None:
        nonlocal made, usual, previous
        given = running.pop()[2]
        made, usual = _channels_made(layer) or (made, usual)
        shape = tuple(result.shape) if isinstance(result, Tensor) and result.ndim > 1 else None
        axis = 1 if shape is None else _channel_axis(shape, made, usual)
        linear = isinstance(layer, _LINEAR) and shape is not None and given is not None
        calls.append(
            _Call(
                module=name,
                layer=layer,
                count=counts[name],
                shape=shape,
                axis=axis,
                repeats=result is previous and (isinstance(layer, _HANDING_ON) or next(layer.children(), None) is not None),
                inputs=given[usual] if linear and given is not None else 0,
                pooled=spatial_mean(result, axis) if linear else None,
            )
        )
        counts[name] += 1
        previous = result

    noise = np.random.default_rng(0).integers(0, 256, (_DRY, height, width, 3), np.uint8)
    module = network.module
    handles: list[RemovableHandle] = []
    for name, layer in module.named_modules():
        if not isinstance(layer, torch.jit.ScriptModule):  # takes no hooks
            handles += [
                layer.register_forward_pre_hook(partial(before, name), with_kwargs=True),
                layer.register_forward_hook(partial(after, name)),
            ]
    try:
        answer = tensor_of(network, module(normalised(network, torch.from_numpy(noise).to(_device_of(module)))))
    # AssertionError: vision transformers assert their input size.
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if out_of_memory(error):
            raise ModelError(f"two tiles of {height} x {width} px are too much for the memory: {one_line(error)}") from error
        name, layer, shape = running[-1] if running else ("", module, None)
        where = f"its layer {name!r} ({type(layer).__name__})" if name else f"its {type(layer).__name__}"
        raise ModelError(
            f"{network.name} cannot take a tile of {height} x {width} px, 3 channels: {where} fails on an input of "
            f"{shape}: {one_line(error)}; give the tile size that it was made for (--tile-size, tile_size=)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if answer.ndim < 1 or len(answer) != 2:
        raise ModelError(f"{network.name} answers {tuple(answer.shape)} to two tiles; the first axis has to be the tiles'")
    return calls, answer


def _channels_made(layer: nn.Module) -> tuple[int, int] | None:
    """How many channels a layer makes and on which axis it has them, where its kind says so."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, -1
    if isinstance(layer, _CONVOLUTIONS):
        return layer.out_channels, 1
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1], -1
    if _is_batchnorm(layer):
        return len(_tensor(layer, "running_mean")), 1
    return None


def _channel_axis(shape: tuple[int, ...], made: int, usual: int) -> int:
    """Where the channels are: transformers have them last, and permute in ways that no hook sees."""
    if len(shape) == 2:
        return 1
    for axis in (usual, 1, -1):
        if shape[axis] == made:
            return axis
    return 1 if len(shape) > 3 else -1


def _find_head(calls: list[_Call], answer: Tensor, output: OutputKind) -> tuple[int, bool]:
    """Which call is the head, and whether its output is the answer: the last layer for which that is so.

    Compared by their means over positions, which pooling and interpolation keep. An auxiliary head may run after the head.
    """
    pooled = spatial_mean(answer, 1)
    slack = 1e-4 * float(pooled.abs().nan_to_num().max())
    linear = [i for i, call in enumerate(calls) if call.pooled is not None and call.inputs]
    for i in reversed(linear):
        made = calls[i].pooled
        assert made is not None
        if made.shape == pooled.shape and torch.allclose(made, pooled, rtol=1e-3, atol=slack):
            return i, True
    # What follows the last layer is not linear (SqueezeNet has a ReLU there): its input still is the features.
    dense = [i for i in linear if isinstance(calls[i].layer, nn.Linear)] if output == "classification" else []
    return (dense or linear or [len(calls)])[-1], False


def _is_pointwise(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return set(layer.kernel_size) == {1} and layer.groups == 1
    return isinstance(layer, nn.Linear)


def _stages(calls: list[_Call]) -> list[_Call]:
    """The last convolution or activation of each run of layers at one resolution."""
    maps = [call for call in calls if call.shape is not None and len(call.shape) == 4 and _is_active(call.layer)]
    kept: list[_Call] = []
    largest = 1
    for call in reversed(maps):
        # A single pixel that maps follow is the gate of a squeeze-and-excitation or image pooling, not a stage.
        if math.prod(call.pixels) > 1 or largest == 1:
            kept.append(call)
        largest = max(largest, math.prod(call.pixels))
    stages: list[_Call] = []
    for pixels, run in groupby(reversed(kept), key=lambda call: call.pixels):
        # Parallel branches that each halve the map (Inception, RegNet) go small, large, small: one step down, not three.
        if len(stages) > 1 and stages[-2].pixels == pixels < stages[-1].pixels:
            del stages[-2]
            if len(stages) > 1 and stages[-2].pixels == stages[-1].pixels:
                del stages[-2]
        stages.append(deque(run, maxlen=1)[0])
    return stages


def _is_active(layer: nn.Module) -> bool:
    """A convolution or an activation, torch's or timm's."""
    return isinstance(layer, _CONVOLUTIONS) or "activation" in type(layer).__module__


def _taps(network: Network, calls: list[_Call], stages: list[_Call], layers: str | Sequence[str]) -> tuple[Tap, ...]:
    last = {call.module: call for call in calls}
    if layers in ("auto", "stages") and network.layers is not None:
        layers = network.layers
    if isinstance(layers, str):
        if layers not in ("auto", "none", "stages", "batchnorm", "every"):
            raise OptionError(f"layers is {layers!r}; give auto, none, stages, batchnorm, every or a list of names")
        chosen = stages if layers in ("auto", "stages") else []
        norms = [call for call in last.values() if _is_batchnorm(call.layer)] if layers in ("auto", "batchnorm") else []
        norms = norms[:: -(-len(norms) // MOST_BATCHNORM)] if layers == "batchnorm" and norms else norms
        every = [call for call in calls if _says_something_new(call)] if layers == "every" else []
        wanted = {(call.module, call.count) for call in [*chosen, *norms, *every]}
    else:
        names = dict(network.module.named_modules())
        wanted = set()
        for each in layers:
            name, _, count = each.partition("@")  # an earlier pass through the same module
            if name not in names:
                near = ", ".join(difflib.get_close_matches(name, names, 3))
                raise ModelError(f"{network.name} has no layer {name!r}" + (f"; near it are {near}" if near else ""))
            if name not in last or last[name].shape is None:
                raise ModelError(f"{network.name}'s layer {name!r} is not run or gives no one tensor; watch one inside it")
            wanted.add((name, int(count) if count.isdecimal() else last[name].count))
    taps = []
    for call in calls:
        if (call.module, call.count) in wanted:
            assert call.shape is not None
            # A module that runs several times goes by its name where it runs last.
            name = call.module if call is last[call.module] else f"{call.module}@{call.count}"
            if _is_batchnorm(call.layer):
                taps.append(Tap(name, call.module, call.count, True, 1, call.shape[1]))
            else:
                taps.append(Tap(name, call.module, call.count, False, call.axis, call.shape[call.axis]))
    return tuple(taps)


def _says_something_new(call: _Call) -> bool:
    """Whether its pooled output is not another's: BatchNorm's is its input's in other units, a container's its last layer's."""
    same = call.repeats or _is_batchnorm(call.layer) or isinstance(call.layer, nn.Flatten)
    # Windows of a tile, as shifted-window attention has them, are no tiles.
    return call.module != "" and call.shape is not None and call.shape[0] == _DRY and not same


def _is_batchnorm(layer: nn.Module) -> bool:
    """Has running statistics: BatchNorm of any kind, torchvision's frozen one too."""
    return all(isinstance(getattr(layer, name, None), Tensor) for name in ("running_mean", "running_var"))


def _statistics(layer: nn.Module) -> BatchNormStatistics:
    mean = to_numpy(_tensor(layer, "running_mean"))
    affine = getattr(layer, "weight", None) is not None
    return BatchNormStatistics(
        mean=mean,
        var=to_numpy(_tensor(layer, "running_var")),
        weight=to_numpy(_tensor(layer, "weight")) if affine else np.ones_like(mean),
        bias=to_numpy(_tensor(layer, "bias")) if affine else np.zeros_like(mean),
        eps=float(getattr(layer, "eps", 0.0)),
    )


def _kind(answer: Tensor, height: int, width: int) -> OutputKind:
    if answer.ndim <= 2:
        return "classification"
    return "segmentation" if tuple(answer.shape[-2:]) == (height, width) else "features"


# --- tensors and modules -------------------------------------------------------------------------------------------------


def spatial_mean(values: Tensor, axis: int) -> Tensor:
    """(B, K) in float32"""
    positions = spatial_axes(values, axis)
    return values.mean(positions, dtype=torch.float32) if positions else values.float()


def spatial_axes(values: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(1, values.ndim) if i != axis % values.ndim)


def normalised(network: Network, tiles: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) as the network was trained."""
    weight = next((p for p in network.module.parameters() if p.is_floating_point()), None)
    pixels = tiles.permute(0, 3, 1, 2).to(torch.float32 if weight is None else weight.dtype)
    if network.channels == "bgr":
        pixels = pixels.flip(1)
    if network.value_range == 1:
        pixels = pixels / 255
    mean, std = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1) for v in (network.mean, network.std))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def tensor_of(network: Network, answer: object) -> Tensor:
    """The answer's one tensor: torchvision's segmenters give {"out": ...}, others (answer, auxiliary answers)."""
    found = answer
    if isinstance(answer, Mapping):
        found = answer.get("out", answer.get("logits")) if network.answer is None else answer.get(network.answer)
    elif isinstance(answer, tuple | list) and answer:
        which = 0 if network.answer is None else network.answer
        found = answer[which] if isinstance(which, int) and -len(answer) <= which < len(answer) else None
    if isinstance(found, Tensor):
        return found
    inside = f" with {', '.join(map(str, answer))}" if isinstance(answer, Mapping) else ""
    wanted = "let it return a tensor, or a dict with 'out'" if network.answer is None else f"none of it is {network.answer!r}"
    raise ModelError(f"{network.name} answers a {type(answer).__name__}{inside}; {wanted}, or say which with answer=")


def as_maps(answer: Tensor, output: OutputKind) -> Tensor:
    """(B, C, h, w), h = w = 1 for what is no map; features keep (B, F) where they have no map."""
    if answer.ndim == 1:
        answer = answer[:, None]
    if output == "features":
        # Tokens have their channels last.
        return answer.mT if answer.ndim == 3 else answer
    if output == "segmentation" and answer.ndim == 3:
        answer = answer[:, None]
    return answer[..., None, None] if answer.ndim == 2 else answer


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each submodule's own mode afterwards."""
    flags = [(layer, layer.training) for layer in module.modules()]
    for layer, _ in flags:
        layer.training = False
    try:
        yield
    finally:
        for layer, training in flags:
            layer.training = training


def out_of_memory(error: Exception) -> bool:
    message = str(error).lower()
    return any(sign in message for sign in ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed"))


def one_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in [*module.parameters(), *module.buffers()]), torch.device("cpu"))


def first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    return next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)


def _tensor(layer: nn.Module, name: str) -> Tensor:
    value = getattr(layer, name)
    assert isinstance(value, Tensor)
    return value


def to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy().copy()
