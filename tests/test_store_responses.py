"""Answers that were kept are answers again, bit for bit, for what gave them and for nothing else."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import small_classifier

import wsiscale as ws
from wsiscale.analyzer import respond
from wsiscale.cli import main
from wsiscale.errors import OptionError, StoreError
from wsiscale.estimation import as_record
from wsiscale.networks import load_network, network_digest
from wsiscale.responses import SavedResponse
from wsiscale.store import read_response, verify_store, write_response
from wsiscale.testing import planted_network, planted_slide, write_svs

RANGE: dict[str, Any] = {"scale_range": (1, 8), "places": 16, "tile_size": 96, "criterion": "confidence"}


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blobs that the planted network likes at scale 2, as a slide in a file."""
    path = tmp_path_factory.mktemp("slides") / "blobs.svs"
    pixels = planted_slide(12, seed=0, size=900).read(level=0, y=0, x=0, height=900, width=900)
    write_svs(path, pixels, mpp=0.25, power=40)
    return path


@pytest.fixture(scope="module")
def kept(slide_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ws.ScaleEstimate]:
    """The answers of a search, and what it found."""
    path = tmp_path_factory.mktemp("kept") / "answers.zarr"
    with ws.open_slide(slide_file) as slide:
        found = ws.estimate(slide, planted_network(6.0), keep=path, **RANGE)
    return path, found


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, types included, all the way down."""
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and bool(a == b)


def test_a_response_with_everything_in_it_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tiles = [np.random.default_rng(s).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8) for s in range(2)]
    network = load_network(small_classifier(), tile_size=32)
    response = respond(network, tiles, scales=[1.0, 2.5], views=("rot90", "phase_scrambled"))
    assert response.batchnorm
    assert response.agreement
    assert response.outputs is not None
    response.outputs.logits[0, 0, 0] = np.nan
    odd = replace(response, layers={"a/b.c": response.layers[response.stages[0]], **response.layers})
    saved = SavedResponse(
        odd, np.arange(6.0).reshape(3, 2), guard=response, about={"options": {"places": 3, "precision": None}}
    )

    write_response(tmp_path / "r.zarr", saved)

    assert same(read_response(tmp_path / "r.zarr"), saved)
    assert not verify_store(tmp_path / "r.zarr").problems


def test_a_response_of_features_alone_comes_back_too(tmp_path: Path) -> None:
    tiles = [np.full((2, 32, 32, 3), 90, np.uint8)]
    response = respond(load_network(torch.nn.Conv2d(3, 4, 3), tile_size=32, output="features"), tiles, scales=[1.0])

    write_response(tmp_path / "r.zarr", SavedResponse(response, np.zeros((2, 2))))

    back = read_response(tmp_path / "r.zarr")
    assert back.response.outputs is None
    assert back.guard is None
    assert same(back.response, response)


def test_kept_answers_give_the_same_estimate_and_the_network_is_not_asked(
    slide_file: Path, kept: tuple[Path, ws.ScaleEstimate]
) -> None:
    path, first = kept
    with ws.open_slide(slide_file) as slide:
        again = ws.estimate(slide, planted_network(6.0), reuse=path, progress=lambda *_: pytest.fail("asked"), **RANGE)

    assert first.scale is not None
    assert (again.forwards, first.forwards > 0) == (0, True)
    ours, theirs = as_record(again), as_record(first)
    assert {name for name in ours if ours[name] != theirs[name]} <= {"forwards", "seconds"}
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 200_000


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"network": planted_network(6.5)}, "network sha256"),
        ({"seed": 1}, "options seed"),
        ({"places": 12}, "options places"),
        ({"scale_range": (1, 6)}, "options scales"),
        ({"tile_size": 64}, "network tile_size"),
        ({"precision": 0.05}, "options precision"),
        ({"criterion": "energy"}, "options criterion"),
        ({"detector": lambda image: image[..., 0] > 170}, "the places, and so the tissue"),
    ],
)
def test_answers_to_another_question_are_refused_by_name(
    slide_file: Path, kept: tuple[Path, ws.ScaleEstimate], changed: dict[str, Any], named: str
) -> None:
    arguments = {"network": planted_network(6.0), **RANGE, **changed}
    with ws.open_slide(slide_file) as slide, pytest.raises(StoreError, match=named) as caught:
        ws.estimate(slide, reuse=kept[0], **arguments)

    assert caught.value.code == "MISMATCH"


def test_another_slide_of_the_same_name_is_refused(slide_file: Path, kept: tuple[Path, Any], tmp_path: Path) -> None:
    pixels = planted_slide(12, seed=1, size=900).read(level=0, y=0, x=0, height=900, width=900)
    write_svs(tmp_path / slide_file.name, pixels, mpp=0.25, power=40)
    everywhere = np.ones_like

    with ws.open_slide(tmp_path / slide_file.name) as slide, pytest.raises(StoreError, match="slide mtime_ns"):
        ws.estimate(slide, planted_network(6.0), reuse=kept[0], **RANGE)
    # In memory there is no file to tell slides by, but their pixels.
    memory = [ws.ArrayReader(image, name="one") for image in (pixels, pixels[::-1].copy())]
    options = {**RANGE, "detector": lambda image: everywhere(image[..., 0], dtype=bool)}
    ws.estimate(memory[0], planted_network(6.0), keep=tmp_path / "memory.zarr", **options)
    with pytest.raises(StoreError, match="slide pixels"):
        ws.estimate(memory[1], planted_network(6.0), reuse=tmp_path / "memory.zarr", **options)


def test_a_full_grid_serves_every_criterion_that_needs_no_more(slide_file: Path, tmp_path: Path) -> None:
    network = planted_network(6.0)
    with ws.open_slide(slide_file) as slide:
        first = ws.estimate(slide, network, precision=None, keep=tmp_path / "full.zarr", **RANGE)
        other = ws.estimate(slide, network, precision=None, **(RANGE | {"criterion": "energy"}))
        reused = ws.estimate(slide, network, reuse=tmp_path / "full.zarr", **(RANGE | {"criterion": "energy"}))
        with pytest.raises(StoreError, match="options layers"):
            ws.estimate(slide, network, reuse=tmp_path / "full.zarr", **(RANGE | {"criterion": "penkin2022"}))

    assert first.forwards == other.forwards > 0
    assert reused.forwards == 0
    assert (reused.scale, reused.ci90, reused.abstained) == (other.scale, other.ci90, other.abstained)


def test_a_wrong_tag_changes_the_units_of_kept_answers_and_nothing_else(slide_file: Path, kept: tuple[Path, Any]) -> None:
    with ws.open_slide(slide_file, mpp=0.4) as slide:
        again = ws.estimate(slide, planted_network(6.0), reuse=kept[0], **RANGE)

    assert again.scale == kept[1].scale
    assert again.scale is not None
    assert again.mpp == pytest.approx(again.scale * 0.4)


def test_the_digest_of_a_network_is_that_of_its_weights_and_preparation() -> None:
    one = load_network(small_classifier(), tile_size=32)
    same_again = load_network(copy.deepcopy(one.module), tile_size=48)
    nudged = load_network(copy.deepcopy(one.module), tile_size=32)
    with torch.no_grad():
        next(iter(nudged.module.parameters()))[0, 0, 0, 0] += 1e-4
    wider = copy.deepcopy(one.module)
    assert isinstance(wider, torch.nn.Sequential)
    wider[3] = torch.nn.MaxPool2d(3)  # the same weights, another network

    digests = [network_digest(n) for n in (one, nudged, replace(one, channels="bgr"), load_network(wider, tile_size=32))]

    assert network_digest(one) == network_digest(same_again)
    assert len(set(digests)) == 4


def test_damaged_or_foreign_folders_are_no_answers(kept: tuple[Path, Any], tmp_path: Path) -> None:
    damaged = tmp_path / "copy.zarr"
    shutil.copytree(kept[0], damaged)
    chunk = max((p for p in (damaged / "response").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:-1])

    with pytest.raises(StoreError, match="damaged"):
        read_response(damaged)
    with pytest.raises(StoreError, match="no store"):
        read_response(tmp_path / "nowhere.zarr")


def test_what_stands_there_is_not_overwritten_unless_asked(slide_file: Path, kept: tuple[Path, Any], tmp_path: Path) -> None:
    network = planted_network(6.0)
    with ws.open_slide(slide_file) as slide:
        with pytest.raises(StoreError, match="exists"):
            ws.estimate(slide, network, keep=kept[0], progress=lambda *_: pytest.fail("asked"), **RANGE)
        with pytest.raises(OptionError, match="either keep or reuse"):
            ws.estimate(slide, network, keep=tmp_path / "x.zarr", reuse=kept[0], **RANGE)
        for places in (8, 10):
            ws.estimate(slide, network, keep=tmp_path / "r.zarr", overwrite=True, **{**RANGE, "places": places})

    assert read_response(tmp_path / "r.zarr").about["options"]["places"] == 10


def test_the_command_line_keeps_and_reuses(
    slide_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets.py").write_text(
        "from wsiscale.testing import planted_network\ndef net():\n    return planted_network(6)\n"
    )
    common = ["--model", f"{tmp_path}/nets.py:net", "--scale-range", "1:8", "--places", "16", "--tile-size", "64", "--json"]
    common += ["--criterion", "confidence"]
    command = ["estimate", str(slide_file), *common]

    def record(*more: str) -> dict[str, Any]:
        assert main([*command, *more]) in (0, 3)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    first = record("--keep", str(tmp_path / "k.zarr"))
    again = record("--reuse", str(tmp_path / "k.zarr"))
    full = record("--precision", "0")
    code = main([*command, "--seed", "3", "--reuse", str(tmp_path / "k.zarr")])
    error = capsys.readouterr().err

    assert (again["mpp"], again["ci90"], again["forwards"]) == (first["mpp"], first["ci90"], 0)
    assert first["forwards"] < full["forwards"] == 16 * 25 * 2
    assert code == 1
    assert "seed" in error
    assert error.count("\n") == 1
