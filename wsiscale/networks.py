"""A name, a file, a card or a module -> a Network, tried once: what has to be known to feed it tiles."""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wsiscale.card import CARDS, DEFAULT_CARD, read_card, shipped_card
from wsiscale.errors import ModelError, OptionError
from wsiscale.layers import OutputKind, evaluating, one_line, plan_of
from wsiscale.plugins import load_object

log = logging.getLogger(__name__)

# Photographs' mean and spread: what every network of torchvision is trained with.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Older unpicklers let a prepared file past weights_only=True: CVE-2025-32434, CVE-2026-24747.
_SAFE_UNPICKLER = (2, 10)

_SPECS = "torchvision:NAME, timm:NAME, card:NAME, file.py:factory, package.module:factory, model.pt2 or card.json"
_TRUST = "if you trust it, say so with --trust-model (trust_model=True)"
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".ts", ".torchscript"}


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
    answer: str | int | None = None  # which of several answers: a key of a dict, a place in a tuple; None: out, logits, first
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
        check(self.answer is None or isinstance(self.answer, str | int), "answer", "a key or a number")
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
    answer: str | int | None = None,
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
    _say_if_random(spec, file)
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
        "answer": answer,
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
    with evaluating(module), torch.inference_mode():
        plan = plan_of(network, network.tile_size, network.tile_size, "auto")
    return replace(network, output=plan.output)


def network_digest(network: Network) -> str:
    """What a network's answers depend on - modules, weights, preparation of its tiles - as one SHA-256.

    Code inside of modules is not seen: two classes of one name and one structure are one network.
    """
    # Some modules print functions, and those their address.
    structure = re.sub(r"0x[0-9a-f]+", "", repr(network.module))
    prepared: tuple[object, ...] = (
        network.mean,
        network.std,
        network.channels,
        network.value_range,
        network.output,
        network.layers,
    )
    if network.answer is not None:
        prepared = (*prepared, network.answer)
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


def _build(
    spec: str | Path | nn.Module | Network,
    *,
    weights: Path | None,
    trust: bool,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The module with its weights, and the card's fields that are known with it. Code takes a card's `arguments`."""
    if isinstance(spec, Network):
        known = {f.name: getattr(spec, f.name) for f in fields(Network) if f.name not in ("module", "card")}
        return _with_weights(lambda: spec.module, weights, trust), {**spec.card, **known}
    if isinstance(spec, nn.Module):
        return _with_weights(lambda: spec, weights, trust), {"name": type(spec).__name__}
    text = str(spec)
    path = Path(text)
    if text.startswith("card:"):
        return _from_card(shipped_card(text.removeprefix("card:")), weights, trust)
    if path.suffix == ".json":
        return _from_card(path, weights, trust)
    given = dict(arguments or {})
    if text.startswith("torchvision:"):
        return _from_torchvision(text.removeprefix("torchvision:"), weights, trust, given)
    if text.startswith("timm:"):
        return _from_timm(text.removeprefix("timm:"), weights, trust, given)
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} holds weights and no architecture; name that, and give the file as weights")
    if path.suffix == ".pt2" or path.suffix in _PICKLES:
        if weights is not None:
            raise ModelError(f"{path} brings its own weights; leave out {weights}")
        return _from_file(path, trust), {"name": path.name}
    if ":" in text:
        return _from_factory(text, weights, trust, given)
    near = difflib.get_close_matches(text, _torchvision_names(), 1)
    raise ModelError(f"no network {text!r}; " + (f"did you mean torchvision:{near[0]}?" if near else f"give {_SPECS}"))


def _from_torchvision(
    name: str, weights: Path | None, trust: bool, given: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    models = import_torchvision().models
    names = _torchvision_names()
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, 3)) or "resnet18, densenet121, deeplabv3_resnet50"
        raise ModelError(f"torchvision has no classifier or segmenter {name!r}; near it are {near}")
    segments = name in models.list_models(module=models.segmentation)
    # A segmenter would fetch its backbone's weights from the internet.
    own = {"weights": None, "weights_backbone": None, **given} if segments else {"weights": None, **given}
    module = _with_weights(partial(models.get_model, name, **own), weights, trust)
    return module, {
        "name": f"torchvision:{name}",
        "mean": _IMAGENET_MEAN,
        "std": _IMAGENET_STD,
        "output": "segmentation" if segments else "classification",
    }


def _torchvision_names() -> list[str]:
    models = import_torchvision().models
    return [*models.list_models(module=models), *models.list_models(module=models.segmentation)]


def _from_timm(name: str, weights: Path | None, trust: bool, given: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    import_torchvision()  # timm imports it, and would stumble
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"timm:{name} needs timm; pip install 'wsiscale[timm]'") from error
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3))
        raise ModelError(f"timm has no model {name!r}" + (f"; near it are {near}" if near else ""))
    module = _with_weights(partial(timm.create_model, name, pretrained=False, **given), weights, trust)
    wanted: Any = module.pretrained_cfg
    return module, {"name": f"timm:{name}", "mean": wanted["mean"], "std": wanted["std"], "tile_size": wanted["input_size"][-1]}


def _from_factory(spec: str, weights: Path | None, trust: bool, given: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A factory takes nothing but a card's arguments, and returns a module or a (module, card fields) pair."""
    made = _seeded(partial(load_object(spec), **given))
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
    arguments = card.pop("arguments", {})
    cut = card.pop("cut", None)
    if not isinstance(arguments, dict):
        raise ModelError(f"the card {path} has {arguments!r} as arguments; they are an object, by name")
    if weights is None and own is not None:
        weights = path.parent / own
    where = card.get("weights_from")
    if weights is None and where is not None:
        raise ModelError(
            f"the network of {path.stem} comes without weights: get them from {where} (licence: "
            f"{card.get('licence', 'see there')}), and give their file with --weights (weights=)"
        )
    # Unlike a file named on the command line, what a card names may be as foreign as the card.
    is_file = ".py:" in factory or ":" not in factory
    objects = [value for value in arguments.values() if isinstance(value, str) and ":" in value]
    ours = path.parent == CARDS or (factory.startswith(("torchvision:", "timm:", "wsiscale.")) and not objects)
    if (is_file or not ours) and not trust:
        raise ModelError(f"the card {path} runs the code of {', '.join((factory, *objects))}; {_TRUST}")
    if is_file:
        factory = str(path.parent / factory)
    try:
        if "package" in card:
            import_torchvision()  # most packages of networks import it, and would stumble
        given = {name: load_object(value) if value in objects else value for name, value in arguments.items()}
        module, known = _build(factory, weights=None if cut is not None else weights, trust=trust, arguments=given)
    except OptionError as error:
        if "package" in card and isinstance(error.__cause__, ModuleNotFoundError):
            raise ModelError(f"the network of {path.stem} needs {card['package']}: pip install {card['package']}") from error
        raise
    if cut is not None:
        module = _cut(path, module, cut, weights, trust, tile_size=card.get("tile_size", known.get("tile_size", 224)))
    else:
        _say_if_random(factory, weights)
    return module, {**known, "name": path.stem, **card}


def _cut(path: Path, module: nn.Module, cut: object, weights: Path | None, trust: bool, *, tile_size: int) -> nn.Module:
    """What `wsiscale.cutting.save_cut` wrote: the network up to a layer, and the weights of that part."""
    from wsiscale.cutting import cut_module

    if not isinstance(cut, Mapping) or not isinstance(cut.get("layer"), str):
        raise ModelError(f"the card {path} has {cut!r} as cut; it is an object with the name of a layer")
    layer, head = cut["layer"], bool(cut.get("head"))
    return _with_weights(lambda: cut_module(module, layer, tile_size=tile_size, head=head), weights, trust)


def _say_if_random(spec: object, weights: Path | None) -> None:
    if weights is None and isinstance(spec, str) and spec.startswith(("torchvision:", "timm:")):
        log.warning("%s has random weights, so that its answers mean nothing; give weights", spec)


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
        raise ModelError(f"{path} cannot be read: {type(error).__name__}: {one_line(error)}") from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):  # what it is instead, torch will say
        return False
