"""The cards that come with wsiscale: what they say is well-formed, and what they name can be built where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from wsiscale.card import read_card, shipped_cards
from wsiscale.errors import ModelError
from wsiscale.networks import import_torchvision, load_network
from wsiscale.plugins import load_object

CARDS = {name: read_card(path) for name, path in shipped_cards().items()}
FIELDS = {
    "factory", "package", "arguments", "tile_size", "mean", "std", "value_range", "output", "answer", "training_mpp",
    "trained_at", "classes", "licence", "weights_from", "source", "note",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(CARDS) - {"default"}))
def test_a_card_says_what_has_to_be_known_and_where_that_is_from(name: str) -> None:
    card = CARDS[name]

    assert set(card) <= FIELDS
    assert {"factory", "tile_size", "output", "training_mpp", "trained_at", "licence", "weights_from", "source"} <= set(card)
    assert card["weights_from"].startswith("https://")
    assert card["training_mpp"] is None or 0.1 < card["training_mpp"] < 5
    assert card["factory"].split(":")[0] in ("torchvision", "timm") or "package" in card
    with pytest.raises(ModelError, match="weights"):  # or, where it is missing, what to install
        load_network(f"card:{name}")


def arguments(card: dict[str, Any]) -> dict[str, Any]:
    given = card.get("arguments", {})
    return {name: load_object(value) if isinstance(value, str) and ":" in value else value for name, value in given.items()}


@pytest.mark.parametrize("name", sorted(name for name, card in CARDS.items() if card["factory"].startswith("timm:")))
def test_timm_knows_the_architecture_and_its_arguments(name: str) -> None:
    import_torchvision()
    timm = pytest.importorskip("timm", reason="timm is an extra")
    card = CARDS[name]

    with torch.device("meta"):  # a billion parameters, and no memory
        module = timm.create_model(card["factory"].removeprefix("timm:"), pretrained=False, **arguments(card)).eval()
        answer = module(torch.zeros(1, 3, card["tile_size"], card["tile_size"]))

    assert answer.shape[-1] == module.num_features


@pytest.mark.parametrize("name", sorted(name for name, card in CARDS.items() if "package" in card))
def test_a_package_has_what_is_named(name: str) -> None:
    card = CARDS[name]
    if importlib.util.find_spec(card["package"]) is None:
        with pytest.raises(ModelError, match=f"pip install {card['package']}"):
            load_network(f"card:{name}", weights=Path(__file__))
        pytest.skip(f"{card['package']} is not installed")
    import_torchvision()

    with torch.device("meta"):
        load_object(card["factory"])(**arguments(card))


def test_a_card_and_a_file_of_weights_make_a_network(tmp_path: Path) -> None:
    weights = import_torchvision().models.resnet18(weights=None).state_dict()
    save_file(weights, tmp_path / "w.safetensors")

    network = load_network("card:imagenet_resnet18", weights=tmp_path / "w.safetensors")

    assert (network.name, network.tile_size, network.output) == ("imagenet_resnet18", 224, "classification")
    assert network.card["trained_at"] == "photographs"
