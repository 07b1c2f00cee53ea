"""Tiles out of a store, and a segmentation back into it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ome_zarr_models
import pytest
import yaozarrs
import zarr
from numpy.typing import NDArray
from stores import SCALE, scan, tissue, written

from wsiscale import labels, publishing, store
from wsiscale.errors import OptionError, SlideError, StoreError
from wsiscale.labels import write_labels
from wsiscale.readers.array import ArrayReader
from wsiscale.store import Ngff, Store, open_store, verify_store, write_store

NGFF: tuple[Ngff, ...] = ("0.5", "0.4")


@pytest.fixture(autouse=True, scope="module")
def small_shards() -> Iterator[None]:
    """So that a small slide has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(store.PROFILES, "0.5", replace(store.PROFILES["0.5"], chunk=128, shard=256))
        patch.setitem(store.PROFILES, "0.4", replace(store.PROFILES["0.4"], chunk=256, shard=256))
        yield


@pytest.fixture(scope="module")
def masters(small_shards: None, tmp_path_factory: pytest.TempPathFactory) -> dict[Ngff, Path]:
    folder = tmp_path_factory.mktemp("masters")
    return {ngff: written(folder / f"{ngff}.ome.zarr", ngff=ngff) for ngff in NGFF}


@pytest.fixture
def opened(request: pytest.FixtureRequest, masters: dict[Ngff, Path], tmp_path: Path) -> Store:
    shutil.copytree(masters[getattr(request, "param", "0.5")], tmp_path / "s.ome.zarr")
    return open_store(tmp_path / "s.ome.zarr")


of_both_versions = pytest.mark.parametrize("opened", NGFF, indirect=True)


def whole(opened: Store, level: int = 0) -> NDArray[np.uint8]:
    _, height, width = opened.levels[level].shape
    return opened.read(level=level, y=0, x=0, height=height, width=width)


# Tiles


@of_both_versions
def test_without_a_size_the_tiles_are_those_of_the_table(opened: Store) -> None:
    tiles = list(opened.tiles())

    table = opened.tile_table
    assert len(tiles) == len(table["id"]) > 5
    for n, (pixels, tile) in enumerate(tiles):
        assert (tile.index, tile.row, tile.col) == (n, table["row"][n], table["col"][n])
        assert abs(tile.y - table["y"][n]) <= SCALE
        assert abs(tile.x - table["x"][n]) <= SCALE
        np.testing.assert_array_equal(pixels, opened.read(y=tile.row, x=tile.col, height=128, width=128))


@pytest.mark.parametrize(("size", "overlap", "halo", "level"), [(100, 0, 0, 0), (96, 32, 20, 0), (50, 0, 10, 1)])
def test_tiles_of_any_size_lie_where_they_say_with_what_is_around_them(
    opened: Store, size: int, overlap: int, halo: int, level: int
) -> None:
    canvas = np.pad(whole(opened, level), ((500, 500), (500, 500), (0, 0)), constant_values=255)
    tiles = list(opened.tiles(size, overlap=overlap, halo=halo, level=level))

    assert len(tiles) > 10
    assert len({(tile.row, tile.col) for _, tile in tiles}) == len(tiles)
    for pixels, tile in tiles:
        y, x, side = tile.row - halo + 500, tile.col - halo + 500, size + 2 * halo
        np.testing.assert_array_equal(pixels, canvas[y : y + side, x : x + side])
        assert tile.row % (size - overlap) == tile.col % (size - overlap) == 0
        assert (tile.y, tile.x) == (tile.row * SCALE * 2**level, tile.col * SCALE * 2**level)


def test_a_tile_s_level_0_corner_is_where_its_pixels_come_from(opened: Store) -> None:
    image = scan(900, 1500).astype(float)

    for pixels, tile in opened.tiles(100):
        if tile.y + 150 < 900 and tile.x + 150 < 1500 and tile.tissue == 1:
            there = image[round(tile.y) : round(tile.y + 146), round(tile.x) : round(tile.x + 146)]
            assert np.abs(there.mean(axis=(0, 1)) - pixels.mean(axis=(0, 1))).max() < 2


def test_tissue_alone_unless_all_is_asked_for(opened: Store) -> None:
    everywhere = opened.grid(100, tissue_only=False)
    on_tissue = opened.grid(100, min_tissue=0)
    half = opened.grid(100, min_tissue=0.5)

    _, height, width = opened.levels[0].shape
    assert len(everywhere) == -(-height // 100) * -(-width // 100)
    assert {(t.row, t.col) for t in on_tissue} == {(t.row, t.col) for t in everywhere if t.tissue > 0}
    assert {(t.row, t.col) for t in half} == {(t.row, t.col) for t in everywhere if t.tissue >= 0.5}
    assert 0 < len(half) < len(on_tissue) < len(everywhere)
    label = np.asarray(opened.tissue[0][:])
    for tile in everywhere:
        share = label[tile.row : tile.row + 100, tile.col : tile.col + 100].sum() / 100**2
        assert tile.tissue == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("ngff", ["0.5"])
def test_a_tile_over_damage_says_so_and_so_does_its_halo(tmp_path: Path, ngff: Ngff) -> None:
    class Damaged(ArrayReader):
        def read(self, *, level: int, y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
            if y <= 300 < y + height and x <= 1000 < x + width:
                raise SlideError("broken", code="READ_FAILED")
            return super().read(level=level, y=y, x=x, height=height, width=width)

    slide = Damaged(scan(900, 1500), mpp=0.5)
    there = tissue(900, 1500, (0, 0, 900, 1500))
    write_store(tmp_path / "s.ome.zarr", slide, mpp=0.5, tissue=there, ngff=ngff, tile_size=64, max_failed_tiles=1)
    opened = open_store(tmp_path / "s.ome.zarr")

    chunk = store.PROFILES[ngff].chunk
    ((row, col),) = opened.attributes["failed_chunks"]
    for halo in (0, 9):
        for tile in opened.grid(32, halo=halo):
            over = (
                tile.row - halo < (row + 1) * chunk
                and row * chunk < tile.row + 32 + halo
                and tile.col - halo < (col + 1) * chunk
                and col * chunk < tile.col + 32 + halo
            )
            assert tile.failed == over
    assert sum(tile.failed for tile in opened.grid(32, level=1)) == (chunk // 64) ** 2
    np.testing.assert_array_equal(opened.grid().failed, opened.tile_table["status"] == 1)


def test_senseless_grids_are_refused_in_words(opened: Store, tmp_path: Path) -> None:
    for arguments, words in [
        ({"size": 64, "overlap": 64}, "overlap of 64 px"),
        ({"size": 64, "halo": -1}, "halo of -1"),
        ({"size": 64, "level": 9}, "no level 9"),
        ({"size": 64, "min_tissue": 2}, "a share from 0 to 1"),
        ({"level": 1}, "give a size"),
    ]:
        with pytest.raises(OptionError, match=words):
            opened.tiles(**arguments)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="no pixels"):
        open_store(written(tmp_path / "table.zarr", pixels="none")).tiles(64)


# Labels


def numbered(opened: Store, halo: int = 0, level: int = 0, size: int = 100) -> Iterator[tuple[NDArray[Any], Any]]:
    """Masks that are the pixels' own red and green, so that nothing can be in a wrong place unseen."""
    for pixels, tile in opened.tiles(size, halo=halo, level=level):
        yield pixels[..., 0].astype(np.uint16) * 256 + pixels[..., 1], tile


@of_both_versions
@pytest.mark.parametrize("halo", [0, 24])
def test_a_label_lies_on_the_pixels_that_it_was_made_of(opened: Store, halo: int) -> None:
    summary = write_labels(opened, "nuclei", numbered(opened, halo))

    again = open_store(opened.path)
    found = np.asarray(again.label("nuclei")[0][:])
    pixels = whole(again).astype(np.uint16)
    covered = np.zeros(found.shape, bool)
    for tile in again.grid(100):
        covered[tile.row : tile.row + 100, tile.col : tile.col + 100] = True
    np.testing.assert_array_equal(found, np.where(covered, pixels[..., 0] * 256 + pixels[..., 1], 0))
    assert again.labels == ("tissue", "nuclei")
    assert (summary.dtype, summary.tiles, summary.largest) == ("uint16", len(again.grid(100)), int(found.max()))
    assert summary.files == sum(1 for f in (opened.path / "labels" / "nuclei").rglob("*") if f.is_file())


@of_both_versions
def test_both_validators_accept_a_store_with_a_label_and_it_is_whole(opened: Store) -> None:
    write_labels(opened, "nuclei", numbered(opened), values={1: "nucleus", 2: "else"})

    group = zarr.open_group(opened.path, mode="r")
    assert type(ome_zarr_models.open_ome_zarr(group)).__name__ == "Image"
    yaozarrs.validate_zarr_store(str(opened.path))
    yaozarrs.validate_zarr_store(str(opened.path / "labels" / "nuclei"))
    assert type(ome_zarr_models.open_ome_zarr(zarr.open_group(opened.path / "labels" / "nuclei", mode="r"))).__name__ == (
        "ImageLabel"
    )
    report = verify_store(opened.path)
    assert report.ok
    assert any(name.startswith("labels/nuclei/0") for name in json.loads((opened.path / "manifest.json").read_text())["files"])


@of_both_versions
@pytest.mark.filterwarnings("default")
def test_ome_zarr_py_finds_the_label_beside_the_tissue(opened: Store) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    write_labels(opened, "nuclei", numbered(opened), values={1: "nucleus"})

    found = {
        node.metadata.get("name"): node for node in Reader(parse_url(opened.path))() if node.data and node.data[0].ndim == 2
    }
    assert len(found["nuclei"].data) == len(opened.levels)
    np.testing.assert_array_equal(np.asarray(found["nuclei"].data[0]), open_store(opened.path).label("nuclei")[0][:])
    assert found["nuclei"].metadata["properties"] == {1: {"name": "nucleus"}}


@of_both_versions
def test_the_pyramid_takes_every_second_pixel_and_has_the_image_s_scales(opened: Store) -> None:
    write_labels(opened, "nuclei", numbered(opened))

    levels = open_store(opened.path).label("nuclei")
    assert len(levels) == len(opened.levels)
    for finer, coarser, image in zip(levels, levels[1:], opened.levels[1:], strict=False):
        np.testing.assert_array_equal(coarser[:], np.asarray(finer[:])[::2, ::2])
        assert coarser.shape == image.shape[1:]

    def transforms(folder: Path) -> list[Any]:
        raw = json.loads(next(f for f in (folder / "zarr.json", folder / ".zattrs") if f.exists()).read_text())
        content = raw.get("attributes", {}).get("ome", raw)
        return [
            [t[t["type"]][-2:] for t in dataset["coordinateTransformations"]]
            for dataset in content["multiscales"][0]["datasets"]
        ]

    assert transforms(opened.path / "labels" / "nuclei") == transforms(opened.path)


def test_masks_of_a_coarser_level_are_enlarged(opened: Store) -> None:
    write_labels(opened, "coarse", numbered(opened, halo=8, level=1, size=50))

    found = open_store(opened.path).label("coarse")[0]
    pixels = whole(opened, 1).astype(np.uint16)
    expected = (pixels[..., 0] * 256 + pixels[..., 1]).repeat(2, axis=0).repeat(2, axis=1)[: found.shape[0], : found.shape[1]]
    tile = next(iter(opened.grid(50, level=1)))
    part = slice(2 * tile.row, 2 * tile.row + 100), slice(2 * tile.col, 2 * tile.col + 100)
    np.testing.assert_array_equal(np.asarray(found[:])[part], expected[part])


@pytest.mark.parametrize("room", [1, 3])
def test_any_order_and_little_memory_give_the_same_label(
    opened: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    other = tmp_path / "other.ome.zarr"
    shutil.copytree(opened.path, other)
    masks = list(numbered(opened))
    write_labels(opened, "a", masks)
    shard = store.PROFILES[opened.attributes["ngff"]].shard

    monkeypatch.setattr(labels, "_ROOM", room * shard**2 * 2)
    write_labels(other, "a", [masks[n] for n in np.random.default_rng(0).permutation(len(masks))])

    manifests = [json.loads((path / "manifest.json").read_text()) for path in (opened.path, other)]
    assert manifests[0]["files"] == manifests[1]["files"]


def test_a_whole_mask_and_plain_positions_do_too_and_what_lies_beyond_is_left_out(opened: Store) -> None:
    height, width = opened.levels[0].shape[1:]
    mask = np.arange(height * width, dtype=np.int64).reshape(height, width)

    summary = write_labels(opened, "all", [(mask, (0, 0))])
    write_labels(opened, "beyond", [(np.ones((60, 60), bool), (-20, width - 30))])

    again = open_store(opened.path)
    assert summary.dtype == "uint32"  # argmax gives int64
    np.testing.assert_array_equal(again.label("all")[0][:], mask)
    beyond = np.zeros((height, width), bool)
    beyond[:40, -30:] = True
    assert again.label("beyond")[0].dtype == np.uint8
    np.testing.assert_array_equal(again.label("beyond")[0][:], beyond)


def test_the_later_of_two_tiles_counts_with_its_background_too(opened: Store) -> None:
    first, second = np.full((40, 40), 1, np.uint8), np.eye(40, dtype=np.uint8) * 2

    write_labels(opened, "both", [(first, (0, 0)), (second, (20, 10)), (first[:9, :9] * 0, (0, 0))])

    found = np.asarray(open_store(opened.path).label("both")[0][:60, :60])
    expected = np.zeros((60, 60), np.uint8)
    expected[:40, :40] = first
    expected[20:60, 10:50] = second
    expected[:9, :9] = 0
    np.testing.assert_array_equal(found, expected)


def test_no_tiles_are_a_label_without_anything(opened: Store) -> None:
    assert write_labels(opened, "none", []).tiles == 0

    assert verify_store(opened.path).ok
    assert not np.asarray(open_store(opened.path).label("none")[0][:]).any()


# Whole or not at all


def test_a_half_written_label_is_never_to_be_seen(opened: Store) -> None:
    seen = []

    def watched() -> Iterator[tuple[NDArray[Any], Any]]:
        for mask, tile in numbered(opened):
            report = verify_store(opened.path)
            seen.append((open_store(opened.path).labels, report.ok, (opened.path / "labels" / "nuclei").exists()))
            yield mask, tile

    write_labels(opened, "nuclei", watched())

    assert set(seen) == {(("tissue",), True, False)}
    assert sorted(path.name for path in opened.path.parent.iterdir()) == [opened.path.name]


@of_both_versions
def test_what_fails_half_way_leaves_the_store_as_it_was(opened: Store) -> None:
    before = {f: f.read_bytes() for f in opened.path.rglob("*") if f.is_file()}

    def failing() -> Iterator[tuple[NDArray[Any], Any]]:
        for n, pair in enumerate(numbered(opened)):
            if n == 7:
                raise ZeroDivisionError("the network")
            yield pair

    with pytest.raises(ZeroDivisionError):
        write_labels(opened, "nuclei", failing())

    assert {f: f.read_bytes() for f in opened.path.rglob("*") if f.is_file()} == before
    assert [path.name for path in opened.path.parent.iterdir()] == [opened.path.name]


def test_what_fails_at_the_last_step_does_too(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {f: f.read_bytes() for f in opened.path.rglob("*") if f.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing, "_exchange", full)

    with pytest.raises(StoreError) as caught:
        write_labels(opened, "nuclei", numbered(opened))

    assert caught.value.code == "NO_SPACE"
    assert {f: f.read_bytes() for f in opened.path.rglob("*") if f.is_file()} == before


def test_a_store_open_for_reading_goes_on_to_be_read(opened: Store) -> None:
    before = whole(opened)

    write_labels(opened, "nuclei", numbered(opened))

    np.testing.assert_array_equal(whole(opened), before)
    assert opened.label("tissue")


@of_both_versions
def test_a_label_is_replaced_only_where_that_is_asked_for(opened: Store) -> None:
    write_labels(opened, "nuclei", numbered(opened))
    with pytest.raises(StoreError, match="has a label nuclei") as caught:
        write_labels(opened.path, "nuclei", [])
    assert caught.value.code == "EXISTS"

    write_labels(opened.path, "nuclei", [(np.full((5, 5), 9, np.uint8), (0, 0))], overwrite=True)

    again = open_store(opened.path)
    assert again.labels == ("tissue", "nuclei")
    assert int(np.asarray(again.label("nuclei")[0][:]).sum()) == 225
    assert verify_store(opened.path).ok


@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_store_is_whole_with_the_label_or_without_it(opened: Store, count: int) -> None:
    code = f"""
import numpy as np
from wsiscale.labels import write_labels
from wsiscale.store import open_store
store = open_store({str(opened.path)!r})
print("ready", flush=True)
write_labels(store, "nuclei", [(pixels[..., 0], tile) for pixels, tile in store.tiles(40)] * 3, overwrite=True)
print("done", flush=True)
"""

    def begun() -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    with begun() as undisturbed:
        started = time.perf_counter()
        undisturbed.wait()
        whole_run = time.perf_counter() - started
    chance = random.Random(count)
    for _ in range(count):
        with begun() as process:
            time.sleep(chance.uniform(0, 1.1 * whole_run))
            process.kill()
        assert verify_store(opened.path).ok
        assert open_store(opened.path).labels == ("tissue", "nuclei")

    write_labels(opened, "last", [])

    assert os.listdir(opened.path.parent) == [opened.path.name]


def test_damage_that_was_there_before_is_not_vouched_for_afterwards(opened: Store) -> None:
    victim = next(f for f in sorted((opened.path / "0").rglob("*")) if f.is_file() and f.stat().st_size > 5000)
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    name = victim.relative_to(opened.path).as_posix()
    assert [p.path for p in verify_store(opened.path).problems] == [name]

    write_labels(opened, "nuclei", [(np.ones((5, 5), np.uint8), (0, 0))])

    assert [p.path for p in verify_store(opened.path).problems] == [name]


def test_another_writer_is_told_at_once(opened: Store) -> None:
    def nested() -> Iterator[tuple[NDArray[Any], Any]]:
        with pytest.raises(StoreError) as caught:
            write_labels(opened, "other", [])
        assert caught.value.code == "LOCKED"
        yield np.ones((5, 5), np.uint8), (0, 0)

    write_labels(opened, "nuclei", nested())

    assert open_store(opened.path).labels == ("tissue", "nuclei")


def test_where_the_system_has_no_links_files_are_copied(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def refuse(source: str, target: str) -> None:
        if str(source).startswith(f"{opened.path}/"):
            raise PermissionError(1, "Operation not permitted")
        link(source, target)  # zarr's own, within the new store

    monkeypatch.setattr(os, "link", refuse)

    write_labels(opened, "nuclei", numbered(opened))

    assert verify_store(opened.path).ok


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "zarr.json", "with space", "tissue", "x" * 200])
def test_names_that_make_no_folder_are_refused(opened: Store, name: str) -> None:
    with pytest.raises(OptionError, match=r"cannot be called|store's own"):
        write_labels(opened, name, [])


def test_masks_that_make_no_label_are_refused_in_words(opened: Store, tmp_path: Path) -> None:
    tile = opened.grid(100, halo=10)[0]
    for mask, where, words in [
        (np.zeros((5, 5)), (0, 0), "whole numbers"),
        (np.full((5, 5), -1), (0, 0), "holds -1 to -1"),
        (np.full((5, 5), 2**40), (0, 0), "uint32"),
        (np.zeros((3, 5, 5), int), (0, 0), r"give \(height, width\)"),
        (np.zeros((99, 99), int), tile, "give 120 px a side, or 100"),
    ]:
        with pytest.raises(OptionError, match=words):
            write_labels(opened, "bad", [(mask, where)])
    with pytest.raises(OptionError, match="choose one of uint8"):
        write_labels(opened, "bad", [], dtype="int64")
    with pytest.raises(OptionError, match="give another dtype"):
        write_labels(opened, "bad", [(np.full((5, 5), 256), (0, 0))], dtype=np.uint8)
    with pytest.raises(StoreError, match="no image to label"):
        write_labels(written(tmp_path / "table.zarr", pixels="none"), "bad", [])
    with pytest.raises(StoreError, match="has no label bad; it has tissue"):
        opened.label("bad")
