"""Any torch network -> its pooled answers to a scale stack. The one home of torch.

Nothing here keeps a feature map: hooks reduce what passes to a mean and a mean square per channel while the network runs.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import os
import pickle
import re
import sys
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wsiscale.card import read_card
from wsiscale.errors import ModelError, OptionError
from wsiscale.objects import objects_of
from wsiscale.plugins import load_object
from wsiscale.scramble import SCRAMBLES
from wsiscale.training_tiles import referring
from wsiscale.types import BatchNormStatistics, LayerMoments, Outputs, ScaleResponse, ScaleStack

log = logging.getLogger(__name__)

OutputKind = Literal["classification", "segmentation", "features"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
View = Literal["rot90", "rot180", "rot270", "flip", "phase_scrambled", "pixel_shuffled"]

DEFAULT_CARD = Path(__file__).parent / "cards" / "default.json"

# Photographs' mean and spread: what every network of torchvision is trained with.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Older unpicklers let a prepared file past weights_only=True: CVE-2025-32434, CVE-2026-24747.
_SAFE_UNPICKLER = (2, 10)

_SPECS = "torchvision:NAME, timm:NAME, file.py:factory, package.module:factory, model.pt2 or card.json"
_TRUST = "if you trust it, say so with --trust-model (trust_model=True)"
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".ts", ".torchscript"}
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_READERS = min(4, os.cpu_count() or 1)  # threads that read while the network runs
_READ_AHEAD = 2 * _READERS  # places
# Layers of a deep network tell much the same; all 121 of a DenseNet would be gigabytes of response.
MOST_BATCHNORM = 24
_LARGE = 1_000_000_000  # bytes of a response from which on it is announced


@dataclass(frozen=True)
class Network:
    """A torch module and what has to be known to feed it tiles: a model card's fields."""

    module: nn.Module
    name: str
    tile_size: int = 224  # px, height and width
    # Applied to pixels in 0..value_range, in the channel order that the network gets.
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channels: Literal["rgb", "bgr"] = "rgb"
    value_range: Literal[1, 255] = 1
    output: OutputKind | None = None  # None: told from the shape of the answer
    layers: tuple[str, ...] | None = None  # to watch, as in module.named_modules(); None: found
    training_mpp: float | None = None  # µm/px of the tiles that it was trained on
    licence: str | None = None
    card: Mapping[str, object] = field(default_factory=dict)  # the card's other fields

    def __post_init__(self) -> None:
        def check(fine: bool, name: str, allowed: str) -> None:
            if not fine:
                raise ModelError(f"{self.name}: {name} is {getattr(self, name)!r}; it has to be {allowed}")

        check(isinstance(self.tile_size, int) and self.tile_size >= 1, "tile_size", "a number of pixels")
        for name in ("mean", "std"):
            values = getattr(self, name)
            check(isinstance(values, tuple) and len(values) == 3, name, "three numbers")
            check(all(isinstance(v, int | float) and math.isfinite(v) for v in values), name, "three numbers")
        check(all(v > 0 for v in self.std), "std", "above 0")
        check(self.channels in ("rgb", "bgr"), "channels", "rgb or bgr")
        check(self.value_range in (1, 255), "value_range", "1 or 255")
        check(self.output in (None, *get_args(OutputKind)), "output", " or ".join(get_args(OutputKind)))
        check(self.training_mpp is None or self.training_mpp > 0, "training_mpp", "µm/px above 0")


def load_network(
    spec: str | Path | nn.Module | Network | None = None,
    *,
    weights: str | Path | None = None,
    name: str | None = None,
    tile_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels: Literal["rgb", "bgr"] | None = None,
    value_range: Literal[1, 255] | None = None,
    output: OutputKind | None = None,
    layers: Sequence[str] | None = None,
    training_mpp: float | None = None,
    trust_model: bool = False,
) -> Network:
    """The network that `spec` is or names (docs/model-cards.md), tried once on a tile; None is the embedded one.

    `weights` is a state dict, safetensors or one that torch reads with weights_only=True. Files that can run code when they
    are read (pickled modules, TorchScript, torch.export, cards that name Python files) need `trust_model`. What is not given
    comes from the card or the factory. Raises ModelError where the network cannot be had or cannot take the tile.
    """
    file = None if weights is None else Path(weights)
    module, known = _build(DEFAULT_CARD if spec is None else spec, weights=file, trust=trust_model)
    if module is not spec and module is not getattr(spec, "module", None):
        # A factory hands over a fresh module in training mode; a module of the caller's stays as it is. Flags and not
        # module.eval(), which torch.export's modules refuse.
        for layer in module.modules():
            layer.training = False
    given = {
        "name": name,
        "tile_size": tile_size,
        "mean": mean,
        "std": std,
        "channels": channels,
        "value_range": value_range,
        "output": output,
        "layers": layers,
        "training_mpp": training_mpp,
    }
    known |= {key: value for key, value in given.items() if value is not None}
    known |= {key: tuple(known[key]) for key in ("mean", "std", "layers") if isinstance(known.get(key), Sequence)}
    own = {f.name for f in fields(Network)} - {"module", "card"}
    network = Network(
        module,
        **{key: value for key, value in known.items() if key in own},
        card={key: value for key, value in known.items() if key not in own},
    )
    with _evaluating(module), torch.inference_mode():
        plan = _plan(network, network.tile_size, network.tile_size, "auto")
    return replace(network, output=plan.output)


def respond(
    network: Network,
    stack: ScaleStack | Sequence[NDArray[np.uint8]],
    *,
    scales: Sequence[float] | NDArray[np.floating] | None = None,
    views: Sequence[str] = (),
    layers: str | Sequence[str] = "auto",
    device: str = "auto",
    batch_size: int | None = None,
    precision: Precision = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ScaleResponse:
    """What `network` answers to each tile of `stack`, pooled over positions while it runs.

    `stack` may also be one (N, H, W, 3) array per scale, whose H and W may differ by scale; `scales` then says which.
    `views` are asked beside the plain tile: rot90, rot180, rot270, flip, and with `seed` phase_scrambled, pixel_shuffled.
    `agreement` with a turned view is one minus the total variation distance of the two softmaxes, mean over pixels mapped
    back to the plain frame.
    `layers` is "auto" (stages and BatchNorm inputs, or the card's), "stages", "batchnorm" (every k-th, so that no more than
    `MOST_BATCHNORM` are watched), "none", or names as in named_modules(); a BatchNorm is watched at its input, everything else
    at its output. Values that are not finite stay so.
    `progress` hears of (done, total) tiles, views counted. Raises ModelError before the first tile is read where the network
    cannot take them. The module stays on `device`.
    """
    tiles = _tiles_of(stack, scales)
    for view in views:
        if view not in get_args(View):
            raise OptionError(f"no view {view!r}; there are {', '.join(get_args(View))}")
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"a batch has at least one tile, not {batch_size}")
    target = choose_device(device)
    # channels_last is what tensor cores want, and on a CPU makes convolutions 1.4 to 2 times faster too.
    module = network.module.to(device=target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with _evaluating(module), torch.inference_mode():
        plan = _plan(network, *max(tiles.shapes), layers)
        if min(tiles.shapes) != max(tiles.shapes):
            _plan(network, *min(tiles.shapes), layers)
        size = plan.bytes_per_tile * len(tiles) * (1 + len(views))
        if size > _LARGE:
            log.warning("the response will take %.1f GB; watch fewer layers (layers=) if that is too much", size / 1e9)
        recorded: dict[str, _Arrays] = {view: {} for view in ("plain", *views)}
        done, total = 0, len(tiles) * (1 + len(views))
        batches = _batches(tiles, views=views, seed=seed, batch_size=batch_size, device=target)
        dtype = _autocast_dtype(precision, target)
        with closing(batches), torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
            for batch, answers in _within_memory(batches, lambda batch: _answer(network, plan, batch, views, target)):
                for view, columns in answers.items():
                    _record(recorded[view], columns, batch.index, len(tiles))
                done += len(batch.index) * (1 + len(views))
                if progress is not None:
                    progress(done, total)
    responses = {view: _response(tiles, plan, arrays) for view, arrays in recorded.items()}
    agreement = {view: arrays[_AGREEMENT].reshape(tiles.grid) for view, arrays in recorded.items() if _AGREEMENT in arrays}
    plain = responses.pop("plain")
    return referring(replace(plain, views=responses, agreement=agreement), network.card)


def response_bytes(network: Network, *, places: int, scales: int, views: int = 0, layers: str | Sequence[str] = "auto") -> int:
    """How much memory `respond` will fill. Watching every BatchNorm input of a large network is most of it."""
    with _evaluating(network.module), torch.inference_mode():
        plan = _plan(network, network.tile_size, network.tile_size, layers)
    return plan.bytes_per_tile * places * scales * (1 + views)


def network_digest(network: Network) -> str:
    """What a network's answers depend on - modules, weights, preparation of its tiles - as one SHA-256.

    Code inside of modules is not seen: two classes of one name and one structure are one network.
    """
    # Some modules print functions, and those their address.
    structure = re.sub(r"0x[0-9a-f]+", "", repr(network.module))
    prepared = (network.mean, network.std, network.channels, network.value_range, network.output, network.layers)
    digest = hashlib.sha256(repr((structure, prepared)).encode())
    for name, value in sorted(network.module.state_dict().items()):
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(repr((name, plain.dtype, tuple(plain.shape))).encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def choose_device(device: str = "auto") -> torch.device:
    """The device meant by "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1"."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"no device {device!r}; write auto, cpu or cuda:0") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"{device} was asked for, and torch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    return chosen


def import_torchvision() -> Any:
    """torchvision, also where a wheel built for CUDA lies next to a torch built for the CPU.

    There its library of operators does not load, which goes unnoticed until torchvision describes operators that are not
    there. Declaring them is enough: classifiers and segmenters call none.
    """
    global _declared_operators
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared_operators = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            signature = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _declared_operators.define(signature)  # type: ignore[no-untyped-call]
        import torchvision
    return torchvision


_declared_operators: torch.library.Library | None = None  # the declarations last as long as this object


# --- loading ------------------------------------------------------------------------------------------------------------


def _build(spec: str | Path | nn.Module | Network, *, weights: Path | None, trust: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The module with its weights, and the card's fields that are known with it."""
    if isinstance(spec, Network):
        known = {f.name: getattr(spec, f.name) for f in fields(Network) if f.name not in ("module", "card")}
        return _with_weights(lambda: spec.module, weights, trust), {**spec.card, **known}
    if isinstance(spec, nn.Module):
        return _with_weights(lambda: spec, weights, trust), {"name": type(spec).__name__}
    text = str(spec)
    path = Path(text)
    if text.startswith("torchvision:"):
        return _from_torchvision(text.removeprefix("torchvision:"), weights, trust)
    if text.startswith("timm:"):
        return _from_timm(text.removeprefix("timm:"), weights, trust)
    if path.suffix == ".json":
        return _from_card(path, weights, trust)
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} holds weights and no architecture; name that, and give the file as weights")
    if path.suffix == ".pt2" or path.suffix in _PICKLES:
        if weights is not None:
            raise ModelError(f"{path} brings its own weights; leave out {weights}")
        return _from_file(path, trust), {"name": path.name}
    if ":" in text:
        return _from_factory(text, weights, trust)
    near = difflib.get_close_matches(text, _torchvision_names(), 1)
    raise ModelError(f"no network {text!r}; " + (f"did you mean torchvision:{near[0]}?" if near else f"give {_SPECS}"))


def _from_torchvision(name: str, weights: Path | None, trust: bool) -> tuple[nn.Module, dict[str, Any]]:
    models = import_torchvision().models
    names = _torchvision_names()
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, 3)) or "resnet18, densenet121, deeplabv3_resnet50"
        raise ModelError(f"torchvision has no classifier or segmenter {name!r}; near it are {near}")
    segments = name in models.list_models(module=models.segmentation)
    # A segmenter would fetch its backbone's weights from the internet.
    own = {"weights": None, "weights_backbone": None} if segments else {"weights": None}
    module = _with_weights(lambda **options: models.get_model(name, **own, **options), weights, trust)
    if weights is None:
        log.warning("torchvision:%s has random weights, so that its answers mean nothing; give weights", name)
    return module, {
        "name": f"torchvision:{name}",
        "mean": _IMAGENET_MEAN,
        "std": _IMAGENET_STD,
        "output": "segmentation" if segments else "classification",
    }


def _torchvision_names() -> list[str]:
    models = import_torchvision().models
    return [*models.list_models(module=models), *models.list_models(module=models.segmentation)]


def _from_timm(name: str, weights: Path | None, trust: bool) -> tuple[nn.Module, dict[str, Any]]:
    import_torchvision()  # timm imports it, and would stumble
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"timm:{name} needs timm; pip install 'wsiscale[timm]'") from error
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3))
        raise ModelError(f"timm has no model {name!r}" + (f"; near it are {near}" if near else ""))
    module = _with_weights(lambda **options: timm.create_model(name, pretrained=False, **options), weights, trust)
    if weights is None:
        log.warning("timm:%s has random weights, so that its answers mean nothing; give weights", name)
    wanted: Any = module.pretrained_cfg
    return module, {"name": f"timm:{name}", "mean": wanted["mean"], "std": wanted["std"], "tile_size": wanted["input_size"][-1]}


def _from_factory(spec: str, weights: Path | None, trust: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A factory takes nothing, and returns a module or a (module, card fields) pair."""
    made = _seeded(load_object(spec))
    module, known = made if isinstance(made, tuple) else (made, {})
    if not isinstance(module, nn.Module):
        raise ModelError(f"{spec} made a {type(module).__name__}; a factory returns a torch.nn.Module or (module, card fields)")
    return _with_weights(lambda: module, weights, trust), {"name": spec, **known}


def _from_card(path: Path, weights: Path | None, trust: bool) -> tuple[nn.Module, dict[str, Any]]:
    card = read_card(path)
    if not isinstance(card.get("factory"), str):
        raise ModelError(f"the card {path} needs the field factory; give torchvision:NAME, file.py:factory or the like")
    factory = card.pop("factory")
    own = card.pop("weights", None)
    if weights is None and own is not None:
        weights = path.parent / own
    # Unlike a file named on the command line, what a card names may be as foreign as the card.
    is_file = ".py:" in factory or ":" not in factory
    ours = factory.startswith(("torchvision:", "timm:", "wsiscale."))
    if (is_file or not ours) and not trust:
        raise ModelError(f"the card {path} runs the code of {factory}; {_TRUST}")
    if is_file:
        factory = str(path.parent / factory)
    module, known = _build(factory, weights=weights, trust=trust)
    return module, {**known, "name": path.stem, **card}


def _from_file(path: Path, trust: bool) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    if not trust:
        # torch.export files too: reading one parses expressions with sympify, which evaluates them, and unpickles constants.
        raise ModelError(
            f"{path} can run code when it is read; {_TRUST}, or name the architecture and give its weights as safetensors"
        )
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    loaded = _unpickle(path, trust)
    if isinstance(loaded, nn.Module):
        return loaded
    raise ModelError(
        f"{path} holds a {type(loaded).__name__} and no network; name the architecture and give the file as weights"
    )


def _with_weights(build: Callable[..., nn.Module], weights: Path | None, trust: bool) -> nn.Module:
    module: nn.Module = _seeded(build)
    if weights is None:
        return module
    own = module.state_dict()
    # The auxiliary head of torchvision's segmenters serves training alone.
    read = _read_weights(weights, trust)
    state = {key: value for key, value in read.items() if key in own or not key.startswith("aux_classifier.")}
    # A head for other classes than the library's own: its last weight says how many.
    head = next((key for key in reversed(own) if key.endswith("weight") and own[key].ndim > 1), None)
    if head in state and len(state[head]) != len(own[head]):
        # TypeError: not the library's own; what does not fit is said below.
        with suppress(TypeError):
            module = _seeded(lambda: build(num_classes=len(state[head])))
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise ModelError(f"the weights {weights} do not fit {type(module).__name__}: {' '.join(lines)[:400]}") from error
    return module


def _seeded(build: Callable[..., Any]) -> Any:
    """Random weights that are the same each time, without touching the caller's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build()


def _read_weights(path: Path, trust: bool) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        try:
            loaded: Any = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path} is not a safetensors file: {error}") from error
    else:
        loaded = _unpickle(path, trust)
    if isinstance(loaded, nn.Module):
        loaded = loaded.state_dict()
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelError(f"{path} holds no state dict; save one with safetensors.torch.save_file(module.state_dict(), ...)")
    # nn.DataParallel puts this before every name.
    wrapped = all(key.startswith("module.") for key in loaded)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in loaded.items()}


def _unpickle(path: Path, trust: bool) -> Any:
    """The pickle in `path`; without trust only tensors and plain containers, and never anything else instead."""
    way_out = f"use safetensors, or, {_TRUST}"
    if not trust and _is_torchscript(path):
        raise ModelError(f"{path} is TorchScript, which is a program; {way_out}")
    if not trust and tuple(map(int, torch.__version__.split(".")[:2])) < _SAFE_UNPICKLER:
        raise ModelError(f"torch {torch.__version__} cannot read {path} safely (2.10 can); {way_out}")
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path} is no plain state dict, and could run code when it is read; {way_out}") from error
    # A mutated file raises anything from AssertionError to struct.error in the unpickler.
    except Exception as error:
        raise ModelError(f"{path} cannot be read: {type(error).__name__}: {_line(error)}") from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):  # what it is instead, torch will say
        return False


# --- what to watch ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """One pass through one module, as the dry run saw it."""

    module: str  # as in named_modules()
    layer: nn.Module
    count: int  # 0 for the module's first pass
    shape: tuple[int, ...] | None  # of the output; None where that is not one tensor
    axis: int  # of the output's channels
    inputs: int  # channels of the input of a linear layer or convolution, else 0
    pooled: Tensor | None  # (B, C) the output's mean over positions, of linear layers and convolutions

    @property
    def pixels(self) -> tuple[int, ...]:
        """The shape of the output's map."""
        assert self.shape is not None
        return tuple(n for i, n in enumerate(self.shape) if i not in (0, self.axis % len(self.shape)))


@dataclass(frozen=True)
class _Tap:
    """Where to pick up a layer's answer."""

    name: str  # in the response
    module: str
    count: int  # which pass through the module
    at_input: bool
    axis: int  # of the channels
    channels: int


@dataclass(frozen=True)
class _Plan:
    """What to pick up in a forward pass."""

    output: OutputKind
    classes: int
    softmaxed: bool  # the network answers with probabilities
    taps: tuple[_Tap, ...]
    stages: tuple[str, ...]
    batchnorm: dict[str, BatchNormStatistics]
    head: _Tap | None
    head_weight: NDArray[np.float32] | None
    head_bias: NDArray[np.float32] | None

    @property
    def bytes_per_tile(self) -> int:
        channels = sum(tap.channels for tap in self.taps)
        features = self.classes if self.output == "features" else 0 if self.head is None else self.head.channels
        answers = 0 if self.output == "features" else 2 * max(self.classes, 2) + 6
        return 4 * (2 * channels + features + answers)


def _plan(network: Network, height: int, width: int, layers: str | Sequence[str]) -> _Plan:
    """Runs the network on two tiles of noise, and says what to watch. Raises ModelError where it cannot take them."""
    calls, answer = _dry_run(network, height, width)
    output = network.output or _kind(answer, height, width)
    shape = tuple(answer.shape)
    answer = _as_maps(answer, output)
    if output != "features" and answer.ndim != 4:
        raise ModelError(f"{network.name} answers {shape} to two tiles, which is no {output}; is its output 'features'?")
    classes = answer.shape[1]
    softmaxed = output != "features" and classes > 1 and bool((answer >= 0).all() and ((answer.sum(1) - 1).abs() < 1e-3).all())
    at, matches = (len(calls), False) if output == "features" else _find_head(calls, answer, output)
    head = weight = bias = None
    if at < len(calls):
        call = calls[at]
        # A linear layer has its channels last, a convolution second.
        head = _Tap("", call.module, call.count, True, -1 if isinstance(call.layer, nn.Linear) else 1, call.inputs)
        if matches and _is_pointwise(call.layer):
            weight = _numpy(_tensor(call.layer, "weight")).reshape(classes, -1)
            bias = np.zeros(classes, np.float32) if call.layer.bias is None else _numpy(_tensor(call.layer, "bias"))
    stages = _stages(calls[:at])
    taps = _taps(network, calls, stages, layers)
    return _Plan(
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

    def before(name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        given = _first_tensor(args, kwargs)
        running.append((name, layer, None if given is None else tuple(given.shape)))

    def after(name: str, layer: nn.Module, _: Any, result: Any) -> None:
        nonlocal made, usual
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
                inputs=given[usual] if linear and given is not None else 0,
                pooled=_mean(result, axis) if linear else None,
            )
        )
        counts[name] += 1

    noise = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    module = network.module
    handles: list[RemovableHandle] = []
    for name, layer in module.named_modules():
        if not isinstance(layer, torch.jit.ScriptModule):  # takes no hooks
            handles += [
                layer.register_forward_pre_hook(partial(before, name), with_kwargs=True),
                layer.register_forward_hook(partial(after, name)),
            ]
    try:
        answer = _tensor_of(network, module(_normalised(network, torch.from_numpy(noise).to(_device_of(module)))))
    # AssertionError: vision transformers assert their input size.
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if _out_of_memory(error):
            raise ModelError(f"two tiles of {height} x {width} px are too much for the memory: {_line(error)}") from error
        name, layer, shape = running[-1] if running else ("", module, None)
        where = f"its layer {name!r} ({type(layer).__name__})" if name else f"its {type(layer).__name__}"
        raise ModelError(
            f"{network.name} cannot take a tile of {height} x {width} px, 3 channels: {where} fails on an input of "
            f"{shape}: {_line(error)}; give the tile size that it was made for (--tile-size, tile_size=)"
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
    pooled = _mean(answer, 1)
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


def _taps(network: Network, calls: list[_Call], stages: list[_Call], layers: str | Sequence[str]) -> tuple[_Tap, ...]:
    last = {call.module: call for call in calls}
    if layers in ("auto", "stages") and network.layers is not None:
        layers = network.layers
    if isinstance(layers, str):
        if layers not in ("auto", "none", "stages", "batchnorm"):
            raise OptionError(f"layers is {layers!r}; give auto, none, stages, batchnorm or a list of names")
        chosen = stages if layers in ("auto", "stages") else []
        norms = [call for call in last.values() if _is_batchnorm(call.layer)] if layers in ("auto", "batchnorm") else []
        norms = norms[:: -(-len(norms) // MOST_BATCHNORM)] if layers == "batchnorm" and norms else norms
        wanted = {(call.module, call.count) for call in [*chosen, *norms]}
    else:
        names = dict(network.module.named_modules())
        for name in layers:
            if name not in names:
                near = ", ".join(difflib.get_close_matches(name, names, 3))
                raise ModelError(f"{network.name} has no layer {name!r}" + (f"; near it are {near}" if near else ""))
            if name not in last or last[name].shape is None:
                raise ModelError(f"{network.name}'s layer {name!r} is not run or gives no one tensor; watch one inside it")
        wanted = {(name, last[name].count) for name in layers}
    taps = []
    for call in calls:
        if (call.module, call.count) in wanted:
            assert call.shape is not None
            # A module that runs several times goes by its name where it runs last.
            name = call.module if call is last[call.module] else f"{call.module}@{call.count}"
            if _is_batchnorm(call.layer):
                taps.append(_Tap(name, call.module, call.count, True, 1, call.shape[1]))
            else:
                taps.append(_Tap(name, call.module, call.count, False, call.axis, call.shape[call.axis]))
    return tuple(taps)


def _is_batchnorm(layer: nn.Module) -> bool:
    """Has running statistics: BatchNorm of any kind, torchvision's frozen one too."""
    return all(isinstance(getattr(layer, name, None), Tensor) for name in ("running_mean", "running_var"))


def _statistics(layer: nn.Module) -> BatchNormStatistics:
    mean = _numpy(_tensor(layer, "running_mean"))
    affine = getattr(layer, "weight", None) is not None
    return BatchNormStatistics(
        mean=mean,
        var=_numpy(_tensor(layer, "running_var")),
        weight=_numpy(_tensor(layer, "weight")) if affine else np.ones_like(mean),
        bias=_numpy(_tensor(layer, "bias")) if affine else np.zeros_like(mean),
        eps=float(getattr(layer, "eps", 0.0)),
    )


def _kind(answer: Tensor, height: int, width: int) -> OutputKind:
    if answer.ndim <= 2:
        return "classification"
    return "segmentation" if tuple(answer.shape[-2:]) == (height, width) else "features"


# --- the forward pass ---------------------------------------------------------------------------------------------------

_Key = tuple[str, str]  # (what, layer)
_Arrays = dict[_Key, NDArray[np.float32]]
_AGREEMENT: _Key = ("agreement", "")
_FEATURES: _Key = ("features", "")


@dataclass(frozen=True)
class _Batch:
    index: NDArray[np.intp]  # (B,) place * S + scale
    tiles: NDArray[np.uint8]  # (B, H, W, 3)
    scrambled: Mapping[str, NDArray[np.uint8]]  # by view, (B, H, W, 3) each

    def __getitem__(self, part: slice) -> _Batch:
        return _Batch(self.index[part], self.tiles[part], {view: tiles[part] for view, tiles in self.scrambled.items()})


def _within_memory(
    batches: Iterator[_Batch], answer: Callable[[_Batch], dict[str, _Arrays]]
) -> Iterator[tuple[_Batch, dict[str, _Arrays]]]:
    """Each batch with its answers, in parts half as large wherever memory runs out, and from then on."""
    limits: dict[tuple[int, ...], int] = {}  # tiles, by their shape
    for whole in batches:
        waiting = [whole]
        while waiting:
            batch = waiting.pop()
            shape, count = batch.tiles.shape[1:], len(batch.index)
            answers = None
            if count <= limits.get(shape, count):
                try:
                    answers = answer(batch)
                except RuntimeError as error:
                    if not _out_of_memory(error):
                        raise
                    if count == 1:
                        what = f"one tile of {shape[0]} x {shape[1]} px is too much for the memory"
                        raise ModelError(f"{what}: {_line(error)}") from error
                    limits[shape] = count // 2
                    log.warning("out of memory with %d tiles of %d x %d px; going on with %d", count, *shape[:2], count // 2)
            if answers is not None:
                yield batch, answers
                continue
            # Here and not in the handler, where the error's frames still hold the tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            half = limits[shape]
            waiting += [batch[half:], batch[:half]]


def _answer(network: Network, plan: _Plan, batch: _Batch, views: Sequence[str], device: torch.device) -> dict[str, _Arrays]:
    """What the network answers to a batch, plain and in each view."""
    tiles = torch.from_numpy(batch.tiles).to(device)
    pooled: dict[str, dict[_Key, Tensor]] = {}
    plain: Tensor | None = None
    for view in ("plain", *views):
        seen = tiles
        if view in batch.scrambled:
            seen = torch.from_numpy(batch.scrambled[view]).to(device)
        elif view != "plain":
            seen = _turned(tiles, view, rows=1)
        pooled[view], probabilities = _forward(network, plan, seen)
        if view == "plain":
            plain = probabilities
            if plan.output == "segmentation" and probabilities is not None:
                pooled[view] |= _objects(probabilities, tile=tiles.shape[1])
        elif view not in batch.scrambled and plain is not None and probabilities is not None:
            distance = (plain - _turned(probabilities, view, rows=2, back=True)).abs().sum(1) / 2  # (B, h, w)
            pooled[view][_AGREEMENT] = 1 - distance.flatten(1).mean(1)
    return {view: _download(columns) for view, columns in pooled.items()}


def _forward(network: Network, plan: _Plan, tiles: Tensor) -> tuple[dict[_Key, Tensor], Tensor | None]:
    """One forward pass of (B, H, W, 3) uint8: everything pooled to (B, ...), and the softmax (B, C, h, w) if there is one."""
    taps = plan.taps if plan.head is None else (*plan.taps, plan.head)
    with _picked_up(network.module, taps) as pooled:
        answer = _tensor_of(network, network.module(_normalised(network, tiles)))
    if plan.head is not None:
        pooled[_FEATURES] = pooled.pop(("mean", ""))
        del pooled[("square", "")]
    answer = _as_maps(answer, plan.output).float()
    if plan.output == "features":
        pooled[_FEATURES] = _mean(answer, 1)
        return pooled, None
    if plan.softmaxed:
        answer = answer.clamp_min(torch.finfo(torch.float32).tiny).log()
    if answer.shape[1] == 1:
        # The two classes whose softmax is the sigmoid of the one logit, neither preferred.
        answer = torch.cat([-answer / 2, answer / 2], dim=1)
    probabilities = answer.softmax(1)  # (B, C, h, w)
    top = answer.topk(2, dim=1).values
    pooled["logits", ""] = _mean(answer, 1)
    pooled["probabilities", ""] = _mean(probabilities, 1)
    per_pixel = {
        "confidence": probabilities.amax(1),
        "margin": top[:, 0] - top[:, 1],
        "entropy": torch.special.entr(probabilities).sum(1),
        "energy": answer.logsumexp(1),
    }
    pooled |= {(name, ""): values.flatten(1).mean(1) for name, values in per_pixel.items()}
    return pooled, probabilities


def _objects(probabilities: Tensor, *, tile: int) -> dict[_Key, Tensor]:
    """Diameter in px of the tile, and share, (B,) each, of what is likelier another class than 0, from (B, C, h, w)."""
    found = (probabilities.argmax(1) != 0).cpu().numpy()
    measured = torch.tensor([objects_of(mask) for mask in found], dtype=torch.float32, device=probabilities.device)  # (B, 2)
    return {("object_px", ""): measured[:, 0] * (tile / found.shape[1]), ("object_share", ""): measured[:, 1]}


@contextmanager
def _picked_up(module: nn.Module, taps: Sequence[_Tap]) -> Iterator[dict[_Key, Tensor]]:
    """What the taps pick up in the forward pass inside: (B, K) means and mean squares."""
    pooled: dict[_Key, Tensor] = {}
    passes: Counter[_Tap] = Counter()

    def pick_up(tap: _Tap, tensor: Any) -> None:
        if passes[tap] == tap.count and isinstance(tensor, Tensor):
            pooled["mean", tap.name], pooled["square", tap.name] = _moments(tensor, tap.axis)
        passes[tap] += 1

    def before(tap: _Tap, _: nn.Module, args: Any, kwargs: Any) -> None:
        pick_up(tap, _first_tensor(args, kwargs))

    def after(tap: _Tap, _: nn.Module, __: Any, result: Any) -> None:
        pick_up(tap, result)

    handles: list[RemovableHandle] = []
    for tap in taps:
        layer = module.get_submodule(tap.module)
        if tap.at_input:
            handles.append(layer.register_forward_pre_hook(partial(before, tap), with_kwargs=True))
        else:
            handles.append(layer.register_forward_hook(partial(after, tap)))
    try:
        yield pooled
    finally:
        for handle in handles:
            handle.remove()


def _moments(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and mean square over all axes but the first and the channels': (B, K) each, in float32."""
    positions = _positions(values, axis)
    if not positions:
        return values.float(), values.float().square()
    dtype = torch.promote_types(values.dtype, torch.float32)
    if values.device.type == "cpu":
        # Squares of one tile at a time stay in the cache: 4 to 50 times faster than values.square().mean() or the norm.
        squares, inner = torch.empty_like(values[0], dtype=dtype), tuple(i - 1 for i in positions)
        return _mean(values, axis), torch.stack([torch.square(tile.to(dtype), out=squares).mean(inner) for tile in values])
    # The norm makes no copy of the map.
    norm = torch.linalg.vector_norm(values, dim=positions, dtype=dtype)
    return _mean(values, axis), norm.square() / math.prod(values.shape[i] for i in positions)


def _mean(values: Tensor, axis: int) -> Tensor:
    """(B, K) in float32"""
    positions = _positions(values, axis)
    return values.mean(positions, dtype=torch.float32) if positions else values.float()


def _positions(values: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(1, values.ndim) if i != axis % values.ndim)


def _normalised(network: Network, tiles: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) as the network was trained."""
    weight = next((p for p in network.module.parameters() if p.is_floating_point()), None)
    pixels = tiles.permute(0, 3, 1, 2).to(torch.float32 if weight is None else weight.dtype)
    if network.channels == "bgr":
        pixels = pixels.flip(1)
    if network.value_range == 1:
        pixels = pixels / 255
    mean, std = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1) for v in (network.mean, network.std))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def _tensor_of(network: Network, answer: object) -> Tensor:
    """The answer's one tensor: torchvision's segmenters give {"out": ...}, others (answer, auxiliary answers)."""
    found = answer
    if isinstance(answer, Mapping):
        found = answer.get("out", answer.get("logits"))
    elif isinstance(answer, tuple | list) and answer:
        found = answer[0]
    if isinstance(found, Tensor):
        return found
    inside = f" with {', '.join(map(str, answer))}" if isinstance(answer, Mapping) else ""
    raise ModelError(f"{network.name} answers a {type(answer).__name__}{inside}; let it return a tensor, or a dict with 'out'")


def _as_maps(answer: Tensor, output: OutputKind) -> Tensor:
    """(B, C, h, w), h = w = 1 for what is no map; features keep (B, F) where they have no map."""
    if answer.ndim == 1:
        answer = answer[:, None]
    if output == "features":
        # Tokens have their channels last.
        return answer.mT if answer.ndim == 3 else answer
    if output == "segmentation" and answer.ndim == 3:
        answer = answer[:, None]
    return answer[..., None, None] if answer.ndim == 2 else answer


def _turned(images: Tensor, view: str, *, rows: int, back: bool = False) -> Tensor:
    """The view of images whose rows are axis `rows` and columns the next, or back from it."""
    if view == "flip":
        return images.flip(rows + 1)
    quarters = {"rot90": 1, "rot180": 2, "rot270": 3}[view]
    return torch.rot90(images, -quarters if back else quarters, (rows, rows + 1))


def _download(columns: dict[_Key, Tensor]) -> _Arrays:
    """All to the host in one copy."""
    flat = [tensor.float().reshape(len(tensor), -1) for tensor in columns.values()]
    together = torch.cat(flat, dim=1).cpu().numpy()
    ends = np.cumsum([tensor.shape[1] for tensor in flat])
    return dict(zip(columns, np.split(together, ends[:-1], axis=1), strict=True))


def _record(arrays: _Arrays, columns: _Arrays, index: NDArray[np.intp], tiles: int) -> None:
    for key, values in columns.items():
        if key not in arrays:
            arrays[key] = np.empty((tiles, values.shape[1]), np.float32)
        arrays[key][index] = values


def _response(tiles: _Tiles, plan: _Plan, arrays: _Arrays) -> ScaleResponse:
    shaped = {key: values.reshape(*tiles.grid, -1) for key, values in arrays.items()}  # (N, S, K)
    outputs = None
    if plan.output != "features":
        outputs = Outputs(
            logits=shaped["logits", ""],
            probabilities=shaped["probabilities", ""],
            **{name: shaped[name, ""][..., 0] for name in ("confidence", "margin", "entropy", "energy")},
            **{name: shaped[name, ""][..., 0] for name in ("object_px", "object_share") if (name, "") in shaped},
        )
    return ScaleResponse(
        scales=tiles.scales,
        slide_mpp=tiles.slide_mpp,
        outputs=outputs,
        features=shaped.get(_FEATURES),
        layers={tap.name: LayerMoments(shaped["mean", tap.name], shaped["square", tap.name]) for tap in plan.taps},
        stages=plan.stages,
        batchnorm=plan.batchnorm,
        head_weight=plan.head_weight,
        head_bias=plan.head_bias,
    )


# --- reading ahead ------------------------------------------------------------------------------------------------------


T = TypeVar("T")
_Tile = NDArray[np.uint8]  # (H, W, 3)


@dataclass(frozen=True)
class _Tiles:
    """The tiles of a stack, place by place."""

    places: int
    scales: NDArray[np.float64]  # (S,)
    slide_mpp: float | None
    shapes: tuple[tuple[int, int], ...]  # (S,) (height, width)
    read: Callable[[int], Sequence[NDArray[np.uint8]]]  # place -> S tiles (H, W, 3); from any thread

    def __len__(self) -> int:
        return self.places * len(self.scales)

    @property
    def grid(self) -> tuple[int, int]:
        return self.places, len(self.scales)


def _tiles_of(stack: ScaleStack | Sequence[NDArray[np.uint8]], scales: Sequence[float] | NDArray[np.floating] | None) -> _Tiles:
    if isinstance(stack, ScaleStack):
        images = stack.images
        places, _, height, width, _ = images.shape
        tiles = _Tiles(
            places=places,
            scales=stack.scales,
            slide_mpp=stack.slide_mpp,
            shapes=((height, width),) * len(stack.scales),
            read=lambda place: images[place].compute(scheduler="synchronous"),
        )
    else:
        if scales is None or len(scales) != len(stack):
            raise OptionError(f"{len(stack)} arrays need as many scales= (level-0 px per px), finest first; got {scales}")
        for array in stack:
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or len(array) != len(stack[0]):
                raise OptionError(
                    f"an array is {array.dtype} {array.shape}; give uint8 (places, height, width, 3) for each scale"
                )
        tiles = _Tiles(
            places=len(stack[0]) if len(stack) else 0,
            scales=np.asarray(scales, np.float64),
            slide_mpp=None,
            shapes=tuple((array.shape[1], array.shape[2]) for array in stack),
            read=lambda place: [array[place] for array in stack],
        )
    if not len(tiles):
        raise OptionError("the stack is empty: a network has nothing to answer")
    return tiles


def _batches(
    tiles: _Tiles, *, views: Sequence[str], seed: int, batch_size: int | None, device: torch.device
) -> Generator[_Batch]:
    """Tiles of one shape at a time, in batches."""
    scrambles = {view: SCRAMBLES[view] for view in views if view in SCRAMBLES}
    waiting: dict[tuple[int, int], list[tuple[int, _Tile, dict[str, _Tile]]]] = {shape: [] for shape in tiles.shapes}

    def read(place: int) -> list[tuple[_Tile, dict[str, _Tile]]]:
        found = tiles.read(place)
        return [(tile, {view: scramble(tile[None], seed)[0] for view, scramble in scrambles.items()}) for tile in found]

    def batch(shape: tuple[int, int]) -> _Batch:
        index, plain, scrambled = zip(*waiting[shape], strict=True)
        waiting[shape].clear()
        return _Batch(np.array(index), np.stack(plain), {view: np.stack([s[view] for s in scrambled]) for view in scrambles})

    for place, found in enumerate(_read_ahead(read, tiles.places)):
        for scale, (tile, scrambled) in enumerate(found):
            shape = tiles.shapes[scale]
            waiting[shape].append((place * len(tiles.scales) + scale, tile, scrambled))
            if len(waiting[shape]) >= (batch_size or _batch_size(shape, device)):
                yield batch(shape)
    for shape in waiting:
        if waiting[shape]:
            yield batch(shape)


def _batch_size(shape: tuple[int, int], device: torch.device) -> int:
    """Tiles: 20 of 224 px on a CPU, where more gain nothing, and eight times as many on a GPU."""
    pixels = 2**20 if device.type == "cpu" else 2**23
    return min(max(pixels // math.prod(shape), 1), 1024)


def _read_ahead(read: Callable[[int], T], count: int) -> Iterator[T]:
    """read(0), read(1), ... in order, a few ahead of the caller in threads of their own."""
    ahead: deque[Future[T]] = deque()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="wsiscale-read") as threads:
        try:
            for n in range(count):
                while len(ahead) < _READ_AHEAD and n + len(ahead) < count:
                    ahead.append(threads.submit(read, n + len(ahead)))
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


# --- small things -------------------------------------------------------------------------------------------------------


def _autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision not in get_args(Precision):
        raise OptionError(f"precision is {precision!r}; give {', '.join(get_args(Precision))}")
    if precision == "auto":
        precision = "float32" if device.type == "cpu" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each submodule's own mode afterwards."""
    flags = [(layer, layer.training) for layer in module.modules()]
    for layer, _ in flags:
        layer.training = False
    try:
        yield
    finally:
        for layer, training in flags:
            layer.training = training


def _out_of_memory(error: Exception) -> bool:
    message = str(error).lower()
    return any(sign in message for sign in ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed"))


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in [*module.parameters(), *module.buffers()]), torch.device("cpu"))


def _first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    return next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)


def _tensor(layer: nn.Module, name: str) -> Tensor:
    value = getattr(layer, name)
    assert isinstance(value, Tensor)
    return value


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy().copy()
