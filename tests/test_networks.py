"""Networks of every kind are loaded safely, and what they answer is pooled right."""

from __future__ import annotations

import gzip
import io
import json
import logging
import operator
import os
import pickle
import subprocess
import tarfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dask.array as da
import nets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from wsiscale.analyzer import respond, response_bytes
from wsiscale.errors import ModelError, OptionError
from wsiscale.networks import Network, choose_device, import_torchvision, load_network, network_digest
from wsiscale.scramble import phase_scramble, pixel_shuffle
from wsiscale.types import ScaleResponse, ScaleStack

NETS = Path(nets.__file__)


def tiles(*, places: int = 3, scales: int = 2, height: int = 16, width: int = 16, seed: int = 0) -> NDArray[np.uint8]:
    """(N, S, H, W, 3), each tile another colour and texture."""
    rng = np.random.default_rng(seed)
    colour = rng.uniform(40, 215, (places, scales, 1, 1, 3))
    ramp = np.linspace(-20, 20, height)[:, None, None] + np.linspace(-10, 10, width)[:, None]
    return np.clip(colour + ramp + rng.normal(0, 15, (places, scales, height, width, 3)), 0, 255).astype(np.uint8)


def stack_of(images: NDArray[np.uint8]) -> ScaleStack:
    places, scales = images.shape[:2]
    return ScaleStack(
        images=da.from_array(images, chunks=(1, *images.shape[1:])),
        scales=np.exp2(np.arange(scales) / 2),
        centers=np.zeros((places, 2)),
        slide_mpp=0.25,
        source_level=0,
        upsampled=np.zeros(scales, bool),
    )


def small(factory: Callable[[], nn.Module] = nets.small_classifier, **fields: Any) -> Network:
    torch.manual_seed(0)
    return load_network(factory(), **{"tile_size": 16, "mean": (0.7, 0.5, 0.6), "std": (0.2, 0.3, 0.25), **fields})


def as_input(images: NDArray[np.uint8]) -> Tensor:
    """What `small` networks get: (N * S, 3, H, W)."""
    pixels = images.reshape(-1, *images.shape[2:]).astype(np.float32) / 255
    return torch.tensor((pixels - np.float32([0.7, 0.5, 0.6])) / np.float32([0.2, 0.3, 0.25])).permute(0, 3, 1, 2)


def flat(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, S, K) -> (N * S, K)"""
    return values.reshape(-1, values.shape[-1])


class Means(nn.Module):
    """Answers with each channel's mean: the planted value."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Maps(nn.Module):
    """Answers with the pixels themselves: a segmenter whose logits are known."""

    def forward(self, x: Tensor) -> Tensor:
        return x


# --- loading ------------------------------------------------------------------------------------------------------------


def test_a_file_names_a_factory() -> None:
    network = load_network(f"{NETS}:small_classifier", tile_size=16)

    assert (network.output, network.tile_size) == ("classification", 16)
    assert network.name.endswith("nets.py:small_classifier")


def test_a_package_names_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo_of_tests.py").write_text("from torch import nn\ndef make(): return nn.Conv2d(3, 2, 1)\n")
    monkeypatch.syspath_prepend(tmp_path)

    network = load_network("zoo_of_tests:make", tile_size=8)

    assert network.output == "segmentation"


def test_a_factory_may_bring_card_fields_and_arguments_win() -> None:
    network = load_network(f"{NETS}:fixed_size_classifier", training_mpp=1.0)

    assert network.tile_size == 16
    assert network.training_mpp == 1.0
    assert network.card == {"stain": "H&E"}


def test_a_network_passes_through_with_changes() -> None:
    network = small(training_mpp=0.5)

    again = load_network(network, tile_size=32)

    assert again.module is network.module
    assert (again.tile_size, again.training_mpp, again.mean) == (32, 0.5, network.mean)


def test_a_factory_that_makes_no_module_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def make(): return 3\n")

    with pytest.raises(ModelError, match=r"mine\.py:make made a int"):
        load_network(f"{tmp_path / 'mine.py'}:make")


def test_torchvision_without_weights_is_random_says_so_and_is_the_same_each_time(caplog: pytest.LogCaptureFixture) -> None:
    state = torch.get_rng_state()

    with caplog.at_level(logging.WARNING):
        first, second = (load_network("torchvision:mobilenet_v3_small", tile_size=32) for _ in range(2))

    assert "random weights" in caplog.text
    assert torch.equal(first.module.features[0][0].weight, second.module.features[0][0].weight)
    assert torch.equal(state, torch.get_rng_state())
    assert first.mean == (0.485, 0.456, 0.406)


def test_a_timm_name_works_with_its_own_normalisation() -> None:
    import_torchvision()  # timm imports it, and would stumble
    pytest.importorskip("timm")

    network = load_network("timm:test_resnet")

    assert network.output == "classification"
    assert network.tile_size == network.module.pretrained_cfg["input_size"][-1]
    with pytest.raises(ModelError, match="near it are"):
        load_network("timm:resnet_18")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet19", "resnet18"),
        ("resnet18", "did you mean torchvision:resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classifier or segmenter"),
        ("weights.safetensors", "no architecture"),
        ("nowhere.pt2", "no file"),
        ("nowhere.json", "cannot be read"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_network(spec)


def test_torchvision_takes_a_head_for_other_classes_from_the_weights(tmp_path: Path) -> None:
    trained = import_torchvision().models.mobilenet_v3_small(weights=None, num_classes=9)
    save_file(trained.state_dict(), tmp_path / "nine.safetensors")

    network = load_network("torchvision:mobilenet_v3_small", weights=tmp_path / "nine.safetensors", tile_size=32)

    assert torch.equal(network.module.classifier[3].weight, trained.classifier[3].weight)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {f"module.{k}": v for k, v in s.items()}]
)
def test_state_dicts_load_as_trainers_save_them(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any]) -> None:
    trained = nets.small_classifier()
    torch.save(wrap(trained.state_dict()), tmp_path / "trained.pt")

    network = load_network(f"{NETS}:small_classifier", weights=tmp_path / "trained.pt", tile_size=16)

    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in network.module.state_dict().items())


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    trained = nets.small_classifier()
    save_file(
        {key: v.half() if v.is_floating_point() else v for key, v in trained.state_dict().items()}, tmp_path / "w.safetensors"
    )

    network = load_network(f"{NETS}:small_classifier", weights=tmp_path / "w.safetensors", tile_size=16)

    assert network.module[0].weight.dtype == torch.float32
    assert torch.equal(network.module[0].weight, trained[0].weight.half().float())


def test_weights_that_do_not_fit_name_what_is_missing(tmp_path: Path) -> None:
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "other.safetensors")

    with pytest.raises(ModelError, match=r"do not fit Sequential.*0\.weight.*other\.weight"):
        load_network(f"{NETS}:small_classifier", weights=tmp_path / "other.safetensors")


def test_a_card_says_everything(tmp_path: Path) -> None:
    card = {
        "factory": "torchvision:mobilenet_v3_small",
        "weights": "trained.safetensors",
        "tile_size": 32,
        "mean": [104, 117, 123],
        "std": [1, 1, 1],
        "channels": "bgr",
        "value_range": 255,
        "output": "classification",
        "training_mpp": 0.5,
        "layers": ["features.0", "features.12"],
        "licence": "CC0",
        "trained_on": "nothing",
    }
    trained = import_torchvision().models.mobilenet_v3_small(weights=None)
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    (tmp_path / "tumour.json").write_text(json.dumps(card))

    network = load_network(tmp_path / "tumour.json")
    response = respond(network, stack_of(tiles(height=32, width=32)))

    assert (network.name, network.channels, network.value_range, network.training_mpp) == ("tumour", "bgr", 255, 0.5)
    assert network.card == {"trained_on": "nothing"}
    assert network.licence == "CC0"
    assert tuple(response.layers) == ("features.0", "features.12")


def test_a_card_has_arguments_for_its_factory(tmp_path: Path) -> None:
    card = {"factory": "torchvision:mobilenet_v3_small", "arguments": {"num_classes": 7, "norm_layer": "torch.nn:BatchNorm2d"}}
    (tmp_path / "card.json").write_text(json.dumps(card))

    with pytest.raises(ModelError, match=r"runs the code of .*torch.nn:BatchNorm2d.*trust"):
        load_network(tmp_path / "card.json", tile_size=32)
    response = respond(
        load_network(tmp_path / "card.json", tile_size=32, trust_model=True), stack_of(tiles(height=32, width=32))
    )

    assert response.outputs is not None
    assert response.outputs.logits.shape[2] == 7


def test_a_network_of_published_weights_says_where_they_are(tmp_path: Path) -> None:
    card = {"factory": "torchvision:mobilenet_v3_small", "weights_from": "a place", "licence": "CC-BY-4.0", "tile_size": 32}
    (tmp_path / "card.json").write_text(json.dumps(card))
    save_file(import_torchvision().models.mobilenet_v3_small().state_dict(), tmp_path / "w.safetensors")

    with pytest.raises(ModelError, match=r"without weights: get them from a place \(licence: CC-BY-4.0\)"):
        load_network(tmp_path / "card.json")
    assert load_network(tmp_path / "card.json", weights=tmp_path / "w.safetensors").licence == "CC-BY-4.0"


class Several(nn.Module):
    """Answers two things."""

    def __init__(self, *, named: bool) -> None:
        super().__init__()
        self.boundary, self.nucleus = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)
        self.named = named

    def forward(self, x: torch.Tensor) -> object:
        answers = {"boundary": self.boundary(x), "nucleus": self.nucleus(x)}
        return answers if self.named else tuple(answers.values())


@pytest.mark.parametrize(("named", "answer"), [(True, "nucleus"), (False, 1)])
def test_of_several_answers_the_named_one_is_the_networks(named: bool, answer: str | int) -> None:
    response = respond(load_network(Several(named=named), tile_size=16, answer=answer), stack_of(tiles(height=16, width=16)))

    assert response.outputs is not None
    assert response.outputs.logits.shape[2] == 2


def test_networks_that_differ_in_which_answer_counts_are_different_networks() -> None:
    module = Several(named=False)
    digests = {network_digest(load_network(module, name="n", tile_size=16, answer=answer)) for answer in (None, 1)}

    assert len(digests) == 2


@pytest.mark.parametrize(("named", "answer"), [(True, None), (True, "nuclei"), (False, 2), (False, "nucleus")])
def test_an_answer_that_is_not_there_is_an_error_that_lists_them(named: bool, answer: str | int | None) -> None:
    with pytest.raises(ModelError, match="boundary, nucleus" if named else "tuple"):
        load_network(Several(named=named), tile_size=16, answer=answer)


def test_a_card_that_does_not_come_along_is_an_error_with_a_name_near_it() -> None:
    with pytest.raises(ModelError, match=r"no card 'defualt'.*default"):
        load_network("card:defualt")
    assert load_network("card:default").name == "nuclei_default"


def test_without_a_spec_there_is_the_embedded_network() -> None:
    network = load_network()

    response = respond(network, stack_of(tiles(places=1, height=128, width=128)), layers="stages")

    assert network.output == "segmentation"
    assert network.training_mpp == 0.5
    assert response.head_weight is not None
    assert response.stages


@pytest.mark.parametrize(
    "wrong",
    [
        {"tile_size": "224"},
        {"mean": [0.5, 0.5]},
        {"mean": 0.5},
        {"mean": ["a", "b", "c"]},
        {"std": [1, 0, 1]},
        {"channels": "gbr"},
        {"value_range": 65535},
        {"output": "boxes"},
        {"training_mpp": -1},
    ],
)
def test_a_card_with_nonsense_names_the_field(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (tmp_path / "card.json").write_text(json.dumps({"factory": "torchvision:mobilenet_v3_small", **wrong}))

    with pytest.raises(ModelError, match=next(iter(wrong))):
        load_network(tmp_path / "card.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"factory": 3}', "[" * 100_000])
def test_what_is_no_card_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "card.json").write_text(text)

    with pytest.raises(ModelError, match="the card"):
        load_network(tmp_path / "card.json")


def test_an_exported_program_runs_if_trusted(tmp_path: Path) -> None:
    module = nets.small_classifier().eval()
    several = torch.export.Dim("tiles", min=1, max=4096)
    exported = torch.export.export(module, (torch.zeros(2, 3, 16, 16),), dynamic_shapes={"input": {0: several}})
    torch.export.save(exported, tmp_path / "model.pt2")
    images = tiles()

    with pytest.raises(ModelError, match="trust"):
        load_network(tmp_path / "model.pt2")
    network = load_network(tmp_path / "model.pt2", tile_size=16, trust_model=True)
    response = respond(network, stack_of(images), batch_size=5)

    assert response.outputs is not None
    expected = module(torch.tensor(images.reshape(-1, 16, 16, 3)).permute(0, 3, 1, 2) / 255)
    assert flat(response.outputs.logits) == pytest.approx(expected.detach().numpy(), abs=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torchscript_runs_if_trusted(tmp_path: Path) -> None:
    torch.jit.script(nets.small_classifier().eval()).save(tmp_path / "model.pt")

    with pytest.raises(ModelError, match="trust"):
        load_network(tmp_path / "model.pt")
    with pytest.raises(ModelError, match="TorchScript"):
        load_network(f"{NETS}:small_classifier", weights=tmp_path / "model.pt")
    network = load_network(tmp_path / "model.pt", tile_size=16, trust_model=True)

    outputs = respond(network, stack_of(tiles())).outputs
    assert outputs is not None
    assert outputs.logits.shape == (3, 2, 5)


def test_a_pickled_module_runs_if_trusted(tmp_path: Path) -> None:
    torch.save(nets.small_classifier(), tmp_path / "model.pt")

    with pytest.raises(ModelError, match="trust"):
        load_network(tmp_path / "model.pt")
    assert load_network(tmp_path / "model.pt", tile_size=16, trust_model=True).output == "classification"


class Trap:
    """A pickle that makes a file when it is read, with a function that runs a text."""

    def __init__(self, canary: Path, run: Callable[[str], Any] = exec) -> None:
        self.run = run
        self.text = f"open({str(canary)!r}, 'w').close()" if run in (exec, eval) else f"touch '{canary}'"

    def __reduce__(self) -> tuple[Any, ...]:
        return self.run, (self.text,)


class Imports:
    """A pickle that is a module when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("os",)


class Calls(Trap):
    """A pickle that names no function to run: it calls a method of what it has imported."""

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.methodcaller("system", self.text), (Imports(),)


def _plain(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(canary)))


def _by_os_system(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(canary, os.system), protocol=0))


def _by_a_method(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": Calls(canary, os.system)}, protocol=5))


def _zipped(path: Path, canary: Path) -> None:
    torch.save(Trap(canary), path)


def _within_a_state_dict(path: Path, canary: Path) -> None:
    torch.save({"state_dict": nets.small_classifier().state_dict() | {"extra": Trap(canary)}}, path)


def _as_a_key_of_what_is_allowed(path: Path, canary: Path) -> None:
    torch.save(OrderedDict([(("weight", Trap(canary, subprocess.getoutput)), torch.zeros(2))]), path)


def _old_format(path: Path, canary: Path) -> None:
    torch.save({"weight": torch.zeros(2), "trap": Trap(canary, eval)}, path, _use_new_zipfile_serialization=False)


def _oldest_format(path: Path, canary: Path) -> None:
    # Before torch 0.1.10 a file was a tar; reading it went past weights_only=True once: CVE-2025-32434.
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Trap(canary))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _in_a_module(path: Path, canary: Path) -> None:
    module = nets.small_classifier()
    module.trap = Trap(canary)
    torch.save(module, path)


def _as_torchscript(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"model/{name}", pickle.dumps(Trap(canary), protocol=2))
        archive.writestr("model/code/__torch__.py", "")
        archive.writestr("model/version", "3\n")


def _in_an_array(path: Path, canary: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, weight=np.array([Trap(canary)], dtype=object))


def _compressed(path: Path, canary: Path) -> None:
    path.write_bytes(gzip.compress(pickle.dumps(Trap(canary, os.system))))


MALICIOUS = [
    _plain,
    _by_os_system,
    _by_a_method,
    _zipped,
    _within_a_state_dict,
    _as_a_key_of_what_is_allowed,
    _old_format,
    _oldest_format,
    _in_a_module,
    _as_torchscript,
    _in_an_array,
    _compressed,
]


def read_carelessly(path: Path) -> None:
    """As software does that trusts every file, whichever kind it takes this one for."""
    content = path.read_bytes()
    with path.open("rb") as file:  # by its name, torch would go by the suffix
        for read in (
            lambda: torch.load(file, weights_only=False),
            lambda: pickle.loads(content),
            lambda: pickle.loads(gzip.decompress(content)),
            lambda: np.load(path, allow_pickle=True)["weight"],
            lambda: pickle.loads(zipfile.ZipFile(path).read("model/data.pkl")),
        ):
            with suppress(Exception):
                read()


@pytest.mark.parametrize("make", MALICIOUS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".joblib"])
@pytest.mark.filterwarnings("ignore")
def test_a_malicious_file_is_refused_and_does_not_run(tmp_path: Path, make: Callable[[Path, Path], None], suffix: str) -> None:
    canary, file = tmp_path / "canary", tmp_path / f"weights{suffix}"
    make(file, canary)

    with pytest.raises(ModelError):
        load_network(f"{NETS}:small_classifier", weights=file)
    with pytest.raises(ModelError):
        load_network(file)

    assert not canary.exists()
    read_carelessly(file)
    assert canary.exists()  # or else there was nothing to refuse


def test_the_trap_does_spring_where_it_is_trusted(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    _zipped(tmp_path / "weights.pt", canary)

    with pytest.raises(ModelError, match="no network"):
        load_network(tmp_path / "weights.pt", trust_model=True)

    assert canary.exists()


@pytest.mark.parametrize("factory", ["evil.py:make", "os.path:make", "wsiscale.evil.py:make", "evil.pt", "other.json"])
def test_a_card_runs_no_foreign_code_untrusted(tmp_path: Path, factory: str) -> None:
    canary = tmp_path / "canary"
    for name in ("evil.py", "wsiscale.evil.py"):
        (tmp_path / name).write_text(f"open({str(canary)!r}, 'w').close()\n")
    (tmp_path / "other.json").write_text(json.dumps({"factory": "evil.py:make"}))
    (tmp_path / "card.json").write_text(json.dumps({"factory": factory}))

    with pytest.raises(ModelError, match="trust"):
        load_network(tmp_path / "card.json")

    assert not canary.exists()


def test_a_card_names_a_file_beside_it_if_trusted(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from torch import nn\ndef make(): return nn.Conv2d(3, 2, 1)\n")
    (tmp_path / "card.json").write_text(json.dumps({"factory": "mine.py:make", "tile_size": 8}))

    assert load_network(tmp_path / "card.json", trust_model=True).tile_size == 8


def test_old_torch_is_not_trusted_with_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(nets.small_classifier().state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")

    with pytest.raises(ModelError, match=r"2\.9\.1\+cpu cannot read .* safely"):
        load_network(f"{NETS}:small_classifier", weights=tmp_path / "w.pt")


def test_broken_weights_are_an_error_of_ours_whatever_is_broken(tmp_path: Path) -> None:
    torch.save(nets.small_classifier().state_dict(), tmp_path / "whole.pt")
    save_file(nets.small_classifier().state_dict(), tmp_path / "whole.safetensors")
    rng = np.random.default_rng(0)
    refused = 0

    for name in ("whole.pt", "whole.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for cut in rng.integers(0, len(whole), 30):
            broken = bytearray(whole[:cut] if cut % 2 else whole)
            for at in rng.integers(0, max(len(broken), 1), 8):
                broken[at : at + 1] = rng.bytes(1)
            path = tmp_path / f"broken{Path(name).suffix}"
            path.write_bytes(broken)
            try:
                load_network(f"{NETS}:small_classifier", weights=path, tile_size=16)
            except ModelError:
                refused += 1

    assert refused > 30  # a flipped bit within the numbers shows nowhere


# --- the dry run --------------------------------------------------------------------------------------------------------


def test_a_wrong_tile_size_names_the_layer_and_the_shapes() -> None:
    with pytest.raises(ModelError, match=r"24 x 24 px.*'3' \(Linear\) fails on an input of \(2, 2304\).*tile size"):
        load_network(f"{NETS}:fixed_size_classifier", tile_size=24)


def test_wrong_channels_name_the_layer() -> None:
    with pytest.raises(ModelError, match=r"'0' \(Conv2d\) fails on an input of \(2, 3, 8, 8\)"):
        load_network(nn.Sequential(nn.Conv2d(4, 2, 1)), tile_size=8)


def test_a_transformer_names_its_tile_size() -> None:
    with pytest.raises(ModelError, match="Wrong image height"):
        load_network("torchvision:vit_b_16", tile_size=64)


def test_a_stack_of_another_size_fails_before_a_tile_is_read() -> None:
    network = load_network(f"{NETS}:fixed_size_classifier")
    reads: list[int] = []

    def read(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
        reads.append(1)
        return block

    stack = stack_of(tiles(height=24, width=24))
    stack = ScaleStack(**{**vars(stack), "images": stack.images.map_blocks(read, meta=np.empty((0,) * 5, np.uint8))})

    with pytest.raises(ModelError, match="24 x 24 px"):
        respond(network, stack)
    assert not reads


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: {"boxes": x}, "dict with boxes"),
        (lambda x: "cat", "a str"),
        (lambda x: x.mean((0, 2, 3))[None], "the first axis"),
    ],
)
def test_an_answer_of_no_use_is_described(answer: Callable[[Tensor], Any], message: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return answer(x)

    with pytest.raises(ModelError, match=message):
        load_network(Odd(), tile_size=8)


def test_tokens_are_no_classification() -> None:
    tokens = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Flatten(2))

    with pytest.raises(ModelError, match=r"\(2, 6, 4\).*'features'"):
        load_network(tokens, tile_size=8, output="classification")


# --- what is watched ----------------------------------------------------------------------------------------------------


def test_stages_end_where_the_resolution_changes() -> None:
    response = respond(small(), stack_of(tiles()))

    assert response.stages == ("2", "6")  # the ReLUs before pooling
    assert tuple(response.batchnorm) == ("1", "5")
    assert tuple(response.layers) == ("1", "2", "5", "6")


def test_a_decoder_has_stages_too_and_the_head_is_none() -> None:
    response = respond(small(nets.small_segmenter), stack_of(tiles()), layers="stages")

    assert response.stages == ("fine.2", "up", "smooth.1")
    assert tuple(response.layers) == response.stages


def test_resnet_ends_its_stages_after_the_addition() -> None:
    network = load_network("torchvision:resnet18", tile_size=64)

    stages = respond(network, stack_of(tiles(places=1, scales=1, height=64, width=64))).stages

    assert stages == ("relu", "layer1.1.relu", "layer2.1.relu", "layer3.1.relu", "layer4.1.relu")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("squeezenet1_1", 4),  # ends in a convolution, a ReLU and pooling
        ("mobilenet_v3_small", 5),  # squeeze-and-excitation
        ("regnet_y_400mf", 5),  # each block's shortcut runs first
        ("convnext_tiny", 4),  # channels last within its blocks
    ],
)
def test_stages_are_not_fooled_by_branches_and_gates(name: str, count: int) -> None:
    network = load_network(f"torchvision:{name}", tile_size=64)

    response = respond(network, stack_of(tiles(places=1, scales=1, height=64, width=64)), layers="stages")

    assert len(response.stages) == count


def test_one_module_used_at_several_depths_is_told_apart() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU()
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.relu(self.two(self.relu(self.one(x)))).mean((2, 3)))

    torch.manual_seed(1)
    network = load_network(Shared(), tile_size=16)
    images = tiles()

    response = respond(network, stack_of(images), layers="stages")

    assert response.stages == ("relu@0", "relu")
    assert response.features is not None
    assert np.array_equal(response.layers["relu"].mean, response.features)
    maps = network.module.one(torch.tensor(images.reshape(-1, 16, 16, 3)).permute(0, 3, 1, 2) / 255).relu()
    assert flat(response.layers["relu@0"].mean) == pytest.approx(maps.mean((2, 3)).detach().numpy(), abs=1e-6)


def test_layers_may_be_named_none_or_wrong() -> None:
    network, stack = small(), stack_of(tiles())

    assert respond(network, stack, layers="none").layers == {}
    assert tuple(respond(network, stack, layers=["9", "0"]).layers) == ("0", "9")
    assert tuple(respond(network, stack, layers="batchnorm").layers) == ("1", "5")
    with pytest.raises(ModelError, match="no layer 'conv1'"):
        respond(network, stack, layers=["conv1"])
    with pytest.raises(OptionError, match="conv1"):
        respond(network, stack, layers="conv1")


def test_a_layer_that_does_not_run_cannot_be_watched() -> None:
    class Spare(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 2, 1)
            self.spare = nn.ReLU()

    with pytest.raises(ModelError, match="'spare' is not run"):
        load_network(Spare(), tile_size=8, layers=["spare"])


# --- pooled answers -----------------------------------------------------------------------------------------------------


def test_planted_colours_come_back_as_the_means() -> None:
    images = np.zeros((2, 3, 8, 8, 3), np.uint8)
    images[..., 0] = np.arange(6).reshape(2, 3, 1, 1) * 10
    images[..., 1] = 100
    images[:, :, :4, :, 2] = 200  # half the rows

    outputs = respond(load_network(Means(), tile_size=8), stack_of(images)).outputs

    assert outputs is not None
    expected = np.stack([np.arange(6).reshape(2, 3) * 10, np.full((2, 3), 100), np.full((2, 3), 100)], axis=-1) / 255
    assert outputs.logits == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value_range", [1, 255])
def test_the_network_gets_its_own_channel_order_range_and_normalisation(value_range: Any) -> None:
    images = np.full((1, 1, 8, 8, 3), (10, 60, 250), np.uint8)
    network = load_network(Means(), tile_size=8, channels="bgr", value_range=value_range, mean=(1, 2, 3), std=(2, 4, 8))

    outputs = respond(network, stack_of(images)).outputs

    assert outputs is not None
    bgr = np.array([250, 60, 10]) / (255 if value_range == 1 else 1)
    assert outputs.logits[0, 0] == pytest.approx((bgr - (1, 2, 3)) / (2, 4, 8), rel=1e-5)


def test_batchnorm_inputs_are_what_batchnorm_would_measure() -> None:
    network, images = small(), tiles(places=4)
    watched = respond(network, stack_of(images))

    # An independent measurement: one pass in training mode with momentum 1 replaces the running statistics by the batch's.
    twin = small().module
    stored = watched.batchnorm["1"]
    for layer in twin.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        twin[1].train()(twin[0](as_input(images)))

    moments = watched.layers["1"]
    mean = moments.mean.mean((0, 1))
    variance = moments.square.mean((0, 1)) - mean**2
    count = images[..., 0].size
    assert mean == pytest.approx(twin[1].running_mean.numpy(), abs=1e-5)
    assert variance * count / (count - 1) == pytest.approx(twin[1].running_var.numpy(), rel=1e-4)
    assert np.array_equal(stored.mean, network.module[1].running_mean.numpy())
    assert np.array_equal(stored.weight, network.module[1].weight.detach().numpy())


def test_batchnorm_without_affine_has_unit_weight() -> None:
    network = load_network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1)), tile_size=8)

    statistics = respond(network, stack_of(tiles(height=8, width=8))).batchnorm["1"]

    assert np.array_equal(statistics.weight, np.ones(4))
    assert np.array_equal(statistics.bias, np.zeros(4))


def test_pooled_layers_equal_whole_maps_pooled_afterwards() -> None:
    network, images = small(), tiles(height=24, width=16)
    with torch.no_grad():
        modules = list(network.module.eval())
        maps = as_input(images)
        for module in modules[:6]:
            maps = module(maps)  # the second BatchNorm's output, before its in-place ReLU
        ahead = maps.numpy().copy()
        after = modules[6](maps).numpy()

    response = respond(network, stack_of(images), layers=["6", "7"], batch_size=4)

    assert response.stages == ("6", "7")
    assert flat(response.layers["6"].mean) == pytest.approx(after.mean((2, 3)), abs=1e-5)
    assert flat(response.layers["6"].square) == pytest.approx((after**2).mean((2, 3)), rel=1e-4, abs=1e-6)
    assert flat(response.layers["7"].square) == pytest.approx(after.mean((2, 3)) ** 2, rel=1e-4, abs=1e-6)
    assert not np.allclose(ahead.mean((2, 3)), after.mean((2, 3)))  # the ReLU does something
    assert np.array_equal(response.features, response.layers["6"].mean)


@pytest.mark.parametrize("factory", [nets.small_classifier, nets.small_segmenter])
def test_any_batch_size_gives_the_same_answers(factory: Callable[[], nn.Module]) -> None:
    network, stack = small(factory), stack_of(tiles(places=5, scales=3))
    views = ("rot90", "phase_scrambled")

    whole = respond(network, stack, views=views)

    for size in (1, 3, 7, 64):
        parts = respond(network, stack, views=views, batch_size=size)
        for one, other in [(whole, parts), *((whole.views[v], parts.views[v]) for v in views)]:
            assert_close(one, other)
        assert parts.agreement["rot90"] == pytest.approx(whole.agreement["rot90"], abs=1e-5)


def assert_close(one: ScaleResponse, other: ScaleResponse, tolerance: float = 1e-5) -> None:
    assert one.outputs is not None
    assert other.outputs is not None
    for name, value in vars(one.outputs).items():
        assert getattr(other.outputs, name) == pytest.approx(value, abs=tolerance, nan_ok=True), name
    assert other.features == pytest.approx(one.features, abs=tolerance)
    assert tuple(one.layers) == tuple(other.layers)
    for name, moments in one.layers.items():
        assert other.layers[name].mean == pytest.approx(moments.mean, abs=tolerance), name
        assert other.layers[name].square == pytest.approx(moments.square, rel=1e-4, abs=tolerance), name


def test_places_and_scales_keep_their_order_and_can_be_taken() -> None:
    images = tiles(places=4, scales=3)
    network = small()

    whole = respond(network, stack_of(images), batch_size=5)
    reordered = respond(network, stack_of(images[[2, 0]]))

    assert_close(whole.take(np.array([2, 0])), reordered)
    assert whole.places == 4
    assert whole.scales.tolist() == pytest.approx([1, 2**0.5, 2])
    assert whole.slide_mpp == 0.25


def test_a_segmenter_is_averaged_over_its_pixels() -> None:
    images = tiles()
    logits = images.reshape(-1, 256, 3).astype(np.float64) / 255 * 8  # (N * S, pixels, C)
    network = load_network(Maps(), tile_size=16, std=(1 / 8, 1 / 8, 1 / 8))

    outputs = respond(network, stack_of(images)).outputs

    assert outputs is not None
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ordered = np.sort(logits, axis=-1)
    assert flat(outputs.logits) == pytest.approx(logits.mean(1), abs=1e-4)
    assert flat(outputs.probabilities) == pytest.approx(p.mean(1), abs=1e-5)
    assert outputs.confidence.ravel() == pytest.approx(p.max(-1).mean(1), abs=1e-5)
    assert outputs.margin.ravel() == pytest.approx((ordered[..., -1] - ordered[..., -2]).mean(1), abs=1e-4)
    assert outputs.entropy.ravel() == pytest.approx(-(p * np.log(p)).sum(-1).mean(1), abs=1e-4)
    assert outputs.energy.ravel() == pytest.approx(np.log(np.exp(logits).sum(-1)).mean(1), abs=1e-4)


def test_torchvisions_dict_and_an_auxiliary_answer_are_understood() -> None:
    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.aux = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.head(x), "aux": self.aux(x)}

    class Pair(Dictionary):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return tuple(super().forward(x).values())  # type: ignore[return-value]

    for kind in (Dictionary, Pair):
        network = load_network(kind(), tile_size=8)
        response = respond(network, stack_of(tiles(height=8, width=8)))
        assert network.output == "segmentation"
        # The auxiliary head runs last, and is not the head.
        assert np.array_equal(response.head_weight, network.module.head.weight.detach().flatten(1).numpy())


@pytest.mark.parametrize("factory", [nets.small_classifier, nets.small_segmenter])
def test_head_and_features_give_the_logits(factory: Callable[[], nn.Module]) -> None:
    response = respond(small(factory), stack_of(tiles()))

    assert response.outputs is not None
    assert response.features is not None
    assert response.head_weight is not None
    logits = response.features @ response.head_weight.T + response.head_bias
    assert logits == pytest.approx(response.outputs.logits, abs=1e-5)


def test_a_head_that_is_not_linear_to_the_end_still_has_features() -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.head(self.trunk(x).mean((2, 3))))

    response = respond(load_network(Bounded(), tile_size=8), stack_of(tiles(height=8, width=8)))

    assert response.head_weight is None
    assert np.array_equal(response.features, response.layers["trunk"].mean)


def test_a_network_that_answers_with_probabilities_is_taken_at_its_word() -> None:
    raw = small()
    softmaxed = small(lambda: nn.Sequential(nets.small_classifier(), nn.Softmax(dim=1)))

    one, other = (respond(network, stack_of(tiles())).outputs for network in (raw, softmaxed))

    assert one is not None
    assert other is not None
    assert other.probabilities == pytest.approx(one.probabilities, abs=1e-6)
    assert other.entropy == pytest.approx(one.entropy, abs=1e-5)


def test_a_single_logit_becomes_two_classes() -> None:
    class OneLogit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3)) * 6 - 3

    images = tiles()

    outputs = respond(load_network(OneLogit(), tile_size=16), stack_of(images)).outputs

    assert outputs is not None
    z = images.mean((2, 3, 4)) / 255 * 6 - 3
    positive = 1 / (1 + np.exp(-z))
    assert outputs.probabilities == pytest.approx(np.stack([1 - positive, positive], -1), abs=1e-5)
    assert outputs.margin == pytest.approx(np.abs(z), abs=1e-4)
    assert outputs.logits.shape == (3, 2, 2)


def test_a_feature_extractor_has_features_and_no_outputs() -> None:
    trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2))
    images = tiles()

    response = respond(load_network(trunk, tile_size=16), stack_of(images), views=("rot90",))

    maps = trunk(torch.tensor(images.reshape(-1, 16, 16, 3)).permute(0, 3, 1, 2) / 255)
    assert response.outputs is None
    assert response.features is not None
    assert flat(response.features) == pytest.approx(maps.mean((2, 3)).detach().numpy(), abs=1e-6)
    assert response.agreement == {}
    assert response.places == 3


def test_vectors_and_tokens_are_features_if_said_so() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).mT  # (B, tokens, 3)

    images = tiles()
    expected = images.reshape(3, 2, 256, 3).mean(2) / 255

    for module in (Means(), Tokens()):
        response = respond(load_network(module, tile_size=16, output="features"), stack_of(images))
        assert response.outputs is None
        assert response.features == pytest.approx(expected, abs=1e-5)


def test_transformers_are_pooled_over_their_positions() -> None:
    network = load_network("torchvision:swin_t", tile_size=32)
    images = tiles(places=1, scales=2, height=32, width=32)
    seen: list[Tensor] = []
    handle = network.module.features[1].register_forward_hook(lambda *call: seen.append(call[2]))

    response = respond(network, stack_of(images), layers=["features.1"])

    handle.remove()
    maps = seen[-1]  # (B, h, w, C)
    assert maps.shape == (2, 8, 8, 96)
    assert flat(response.layers["features.1"].mean) == pytest.approx(maps.mean((1, 2)).numpy(), abs=1e-5)
    assert response.outputs is not None
    assert response.features @ response.head_weight.T + response.head_bias == pytest.approx(response.outputs.logits, abs=1e-4)  # type: ignore[union-attr, operator]


def test_as_many_tokens_as_channels_do_not_swap_the_axes() -> None:
    class Square(nn.Module):
        """16 tokens of 16 channels: channel k is k everywhere."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(48, 16)
            nn.init.zeros_(self.embed.weight)
            self.embed.bias = nn.Parameter(torch.arange(16.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.embed(x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)).mean(1)

    response = respond(load_network(Square(), tile_size=16), stack_of(tiles()), layers=["embed"])

    assert np.array_equal(response.layers["embed"].mean[0, 0], np.arange(16))


def test_what_is_not_finite_stays_so() -> None:
    class Diverges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.head = nn.ReLU(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(x.log()).mean((2, 3)))  # the log of black is -inf, of a negative NaN

    images = np.maximum(tiles(height=8, width=8), 30)
    images[1, 0] = 0
    network = load_network(Diverges(), tile_size=8, mean=(0.1, 0.1, 0.1))

    response = respond(network, stack_of(images), layers=["act"])

    assert response.outputs is not None
    assert np.isnan(response.outputs.confidence[1, 0])
    assert np.isfinite(response.outputs.confidence[[0, 2]]).all()
    assert np.isnan(response.layers["act"].square[1, 0]).all()


# --- views --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "turn"),
    [
        ("rot90", lambda i: np.rot90(i, 1, (2, 3))),
        ("rot180", lambda i: np.rot90(i, 2, (2, 3))),
        ("rot270", lambda i: np.rot90(i, 3, (2, 3))),
        ("flip", lambda i: i[:, :, :, ::-1]),
        ("phase_scrambled", lambda i: phase_scramble(i.reshape(-1, *i.shape[2:]), seed=3).reshape(i.shape)),
        ("pixel_shuffled", lambda i: pixel_shuffle(i.reshape(-1, *i.shape[2:]), seed=3).reshape(i.shape)),
    ],
)
def test_a_view_is_the_response_to_the_tile_seen_so(view: str, turn: Callable[[Any], Any]) -> None:
    network, images = small(), tiles(height=16, width=16)

    with_view = respond(network, stack_of(images), views=(view,), seed=3)
    turned = respond(network, stack_of(np.ascontiguousarray(turn(images))))

    assert_close(with_view.views[view], turned)
    assert not np.allclose(with_view.views[view].layers["2"].mean, with_view.layers["2"].mean, atol=1e-4)


@pytest.mark.parametrize("view", ["rot90", "rot180", "rot270", "flip"])
def test_a_network_without_orientation_agrees_with_itself_in_every_pixel(view: str) -> None:
    pixelwise = load_network(nn.Conv2d(3, 4, 1), tile_size=16)

    response = respond(pixelwise, stack_of(tiles(height=16, width=12)), views=(view, "phase_scrambled"))

    assert response.agreement[view] == pytest.approx(np.ones((3, 2)), abs=1e-5)
    assert "phase_scrambled" not in response.agreement


def test_disagreement_is_the_total_variation_distance() -> None:
    class LeftHalf(nn.Module):
        """Sure of class 0 where the left half is brighter, of class 1 where the right is."""

        def forward(self, x: Tensor) -> Tensor:
            difference = (x[..., :8].mean((1, 2, 3)) - x[..., 8:].mean((1, 2, 3))) * 10
            return torch.stack([difference, -difference], dim=1)

    images = np.zeros((1, 1, 16, 16, 3), np.uint8)
    images[..., :8, :] = 51  # 0.2 of 255 on the left

    agreement = respond(load_network(LeftHalf(), tile_size=16), stack_of(images), views=("flip", "rot90")).agreement

    sure = 1 / (1 + np.exp(-4))
    assert agreement["flip"][0, 0] == pytest.approx(1 - (2 * sure - 1), abs=1e-5)
    assert agreement["rot90"][0, 0] == pytest.approx(1 - (sure - 0.5), abs=1e-5)


def test_a_view_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="rot45"):
        respond(small(), stack_of(tiles()), views=("rot45",))


# --- running ------------------------------------------------------------------------------------------------------------


class Hungry(nn.Module):
    """Runs out of memory above `limit` tiles."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.sizes = limit, list[int]()
        self.layers = nets.small_classifier()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.layers(x)


@pytest.mark.parametrize(("limit", "settles_at"), [(2, 2), (3, 2), (9, 8)])
def test_out_of_memory_halves_the_batch_and_changes_no_answer(limit: int, settles_at: int) -> None:
    network, stack = small(lambda: Hungry(100)), stack_of(tiles(places=7, scales=3))
    whole = respond(network, stack)
    network.module.limit = limit
    network.module.sizes.clear()
    heard: list[tuple[int, int]] = []

    parts = respond(network, stack, batch_size=16, views=("flip",), progress=lambda *done: heard.append(done))

    assert_close(whole, parts)
    assert sum(size for size in network.module.sizes if size > limit) <= 16 + 8 + 4  # it does not try again what failed
    assert max(size for size in network.module.sizes if size <= limit) == settles_at
    assert heard[-1] == (42, 42)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_one_tile_too_large_for_the_memory_is_an_error() -> None:
    network = small(lambda: Hungry(2))
    network.module.limit = 0

    with pytest.raises(ModelError, match="memory"):
        respond(network, stack_of(tiles()))


def test_one_tile_that_only_fits_the_dry_run_is_an_error_too() -> None:
    class Greedy(Hungry):
        def forward(self, x: Tensor) -> Tensor:
            self.limit = 9 if not self.sizes else 0
            return super().forward(x)

    network = small(lambda: Greedy(9))
    network.module.sizes.clear()

    with pytest.raises(ModelError, match="one tile of 16 x 16 px is too much for the memory"):
        respond(network, stack_of(tiles()))


def test_an_error_that_is_not_memory_comes_through() -> None:
    class Breaks(Hungry):
        def forward(self, x: Tensor) -> Tensor:
            if len(self.sizes) > 2:
                raise RuntimeError("something else")
            return super().forward(x)

    with pytest.raises(RuntimeError, match="something else"):
        respond(small(lambda: Breaks(100)), stack_of(tiles(places=6)), batch_size=2)


def test_modes_and_hooks_are_as_before_even_after_an_error() -> None:
    network = small(lambda: Hungry(100))
    network.module.train()
    network.module.layers[1].eval()
    before = [layer.training for layer in network.module.modules()]
    running = network.module.layers[5].running_mean.clone()

    respond(network, stack_of(tiles()))
    network.module.limit = 0
    with pytest.raises(ModelError):
        respond(network, stack_of(tiles()))

    assert [layer.training for layer in network.module.modules()] == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.module.modules())
    assert torch.equal(network.module.layers[5].running_mean, running)


def test_dropout_is_off() -> None:
    network = small(lambda: nn.Sequential(nn.Dropout(0.9), nets.small_classifier()).train())

    assert_close(respond(network, stack_of(tiles())), respond(network, stack_of(tiles())))


def counting(stack: ScaleStack, reads: list[str]) -> ScaleStack:
    def read(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
        reads.append(threading.current_thread().name)
        return block

    images = stack.images.map_blocks(read, dtype=np.uint8, meta=np.empty((0,) * 5, np.uint8))
    return ScaleStack(**{**vars(stack), "images": images})


def test_each_place_is_read_once_away_from_the_main_thread_and_not_far_ahead() -> None:
    reads: list[str] = []
    far: list[int] = []
    stack = counting(stack_of(tiles(places=40, scales=2)), reads)

    respond(small(), stack, batch_size=2, progress=lambda done, total: far.append(len(reads) - done // 2))

    assert len(reads) == 40
    assert all(name.startswith("wsiscale-read") for name in reads)
    assert max(far) <= 10


def test_an_error_while_reading_comes_through_and_stops_the_reading() -> None:
    reads: list[str] = []

    def read(block: NDArray[np.uint8], block_info: Any = None) -> NDArray[np.uint8]:
        reads.append("")
        if block_info[0]["chunk-location"][0] == 1:
            raise OSError("the disk is gone")
        return block

    stack = stack_of(tiles(places=60))
    images = stack.images.map_blocks(read, dtype=np.uint8, meta=np.empty((0,) * 5, np.uint8))

    with pytest.raises(OSError, match="the disk is gone"):
        respond(small(), ScaleStack(**{**vars(stack), "images": images}))
    assert len(reads) < 20


def test_images_of_another_size_at_each_scale_are_answered_too() -> None:
    network = small()
    images = [tiles(places=3, scales=1, height=h, width=w, seed=h)[:, 0] for h, w in [(32, 24), (16, 12), (8, 10)]]

    response = respond(network, images, scales=[1, 2, 4], batch_size=2, views=("rot90",))

    assert response.slide_mpp is None
    for scale, image in enumerate(images):
        alone = respond(network, [image], scales=[1.0])
        assert response.features is not None
        assert response.features[:, scale] == pytest.approx(alone.features[:, 0], abs=1e-5)  # type: ignore[index]
        assert response.layers["5"].square[:, scale] == pytest.approx(alone.layers["5"].square[:, 0], rel=1e-4)


def test_arrays_need_scales_and_the_right_shape() -> None:
    image = tiles()[:, 0]

    with pytest.raises(OptionError, match="scales="):
        respond(small(), [image, image])
    with pytest.raises(OptionError, match="uint8"):
        respond(small(), [image / 255], scales=[1])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="empty"):
        respond(small(), [image[:0]], scales=[1])


def test_the_size_of_a_response_is_known_beforehand(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    network, stack = small(), stack_of(tiles(places=5, scales=3))
    monkeypatch.setattr("wsiscale.analyzer._LARGE", 10_000)

    with caplog.at_level(logging.WARNING):
        response = respond(network, stack, views=("flip",))

    size = sum(array.nbytes for r in (response, response.views["flip"]) for array in arrays_of(r))
    assert response_bytes(network, places=5, scales=3, views=1) == size
    assert "the response will take" in caplog.text


def arrays_of(response: ScaleResponse) -> Iterator[NDArray[np.float32]]:
    assert response.outputs is not None
    assert response.features is not None
    yield from vars(response.outputs).values()
    yield response.features
    for moments in response.layers.values():
        yield from (moments.mean, moments.square)


def test_bfloat16_is_near_float32() -> None:
    network, stack = small(), stack_of(tiles())

    exact, rough = (respond(network, stack, precision=p) for p in ("float32", "bfloat16"))

    assert_close(exact, rough, tolerance=0.1)
    assert not np.array_equal(exact.outputs.logits, rough.outputs.logits)  # type: ignore[union-attr]
    with pytest.raises(OptionError, match="precision"):
        respond(network, stack, precision="int8")  # type: ignore[arg-type]


def test_cores_with_bfloat16_use_it_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    network, stack = small(), stack_of(tiles())
    in_half = respond(network, stack, precision="bfloat16")

    monkeypatch.setattr("wsiscale.analyzer.has_bfloat16", lambda: True)
    assert_close(respond(network, stack), in_half, tolerance=0)
    monkeypatch.setattr("wsiscale.analyzer.has_bfloat16", lambda: False)
    assert_close(respond(network, stack), respond(network, stack, precision="float32"), tolerance=0)


def test_a_network_in_double_precision_works() -> None:
    assert_close(
        respond(small(), stack_of(tiles())), respond(small(lambda: nets.small_classifier().double()), stack_of(tiles()))
    )


def test_devices_that_are_not_there_are_named() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(OptionError, match="cuda:99"):
        choose_device("cuda:99")
    with pytest.raises(OptionError, match="abacus"):
        choose_device("abacus")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_cpus_answers() -> None:
    stack = stack_of(tiles(places=9, height=64, width=64))

    cpu = respond(small(), stack, device="cpu", views=("rot90",))
    gpu = respond(small(), stack, device="cuda", precision="float32", views=("rot90",))
    mixed = respond(small(), stack, device="cuda", views=("rot90",))

    assert_close(cpu, gpu, tolerance=2e-3)  # TF32 convolutions
    assert_close(cpu, mixed, tolerance=0.1)


# --- real networks ------------------------------------------------------------------------------------------------------


def test_nuclei32_finds_nuclei_at_its_own_scale(real_data: Path) -> None:
    network = load_network(f"{NETS}:nuclei32")
    image = np.asarray(Image.open(next(iter(sorted((real_data / "patches/monuseg/images").glob("*.png"))))).convert("RGB"))
    mask = np.asarray(Image.open(next(iter(sorted((real_data / "patches/monuseg/masks").glob("*.png"))))).convert("L")) > 0
    centers = np.random.default_rng(0).integers(16, 1000 - 16, (400, 2))
    windows = np.stack([image[y - 16 : y + 16, x - 16 : x + 16] for y, x in centers])

    response = respond(network, [windows], scales=[1.0], layers="stages")

    assert response.outputs is not None
    nucleus = response.outputs.logits[:, 0, 1] - response.outputs.logits[:, 0, 0]
    truth = mask[centers[:, 0], centers[:, 1]]
    auc = (nucleus[truth][:, None] > nucleus[~truth]).mean()
    assert auc > 0.8
    assert response.head_weight is not None
    assert response.head_weight.shape == (2, 64)
    assert len(response.stages) == 3


def test_crc9_tells_tissues_apart(real_data: Path) -> None:
    network = load_network(f"{NETS}:crc9")
    files = sorted((real_data / "patches/crc_val_he_7k").glob("*.png"))[::2]
    classes = ["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"]
    truth = [classes.index(file.name.partition("-")[0]) for file in files]
    images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])

    response = respond(network, [images], scales=[1.0], layers="none")

    assert response.outputs is not None
    assert (response.outputs.logits[:, 0].argmax(-1) == truth).mean() > 0.85


def test_deeplab_is_averaged_like_any_segmenter() -> None:
    network = load_network("torchvision:deeplabv3_resnet50", tile_size=64)
    images = tiles(places=1, scales=2, height=64, width=64)

    response = respond(network, stack_of(images), layers="batchnorm")

    assert network.output == "segmentation"
    assert response.outputs is not None
    assert response.outputs.logits.shape == (1, 2, 21)
    assert response.head_weight is not None
    assert response.head_weight.shape == (21, 256)
    assert len(response.batchnorm) == 20  # every third of them
    assert response.features @ response.head_weight.T + response.head_bias == pytest.approx(response.outputs.logits, abs=1e-4)  # type: ignore[operator]


def test_a_network_built_from_a_name_is_in_evaluation_mode_and_the_callers_own_stays_as_it_is() -> None:
    own = nets.small_classifier().train()

    # A factory's fresh module in training mode answered by the batch's statistics, and changed its own at every call.
    assert not load_network(f"{NETS}:small_classifier", tile_size=16).module.training
    assert load_network(own, tile_size=16).module.training
    assert load_network(load_network(own, tile_size=16)).module.training
