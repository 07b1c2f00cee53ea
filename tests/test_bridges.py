"""Stores in MONAI, LazySlide and napari. Those that are not installed are stood in for by what they document, or skipped."""

from __future__ import annotations

import importlib
import pickle
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from stores import scan, tissue, written

from wsiscale.bridges import napari as bridge
from wsiscale.errors import OptionError, StoreError
from wsiscale.labels import write_labels
from wsiscale.readers.array import ArrayReader
from wsiscale.store import Store, open_store, write_store
from wsiscale.testing import write_svs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = written(tmp_path_factory.mktemp("bridged") / "s.ome.zarr")
    write_labels(path, "nuclei", [(np.full((30, 60), 7, np.uint16), (10, 20))])
    return path


@pytest.fixture(scope="module")
def store(path: Path) -> Store:
    return open_store(path)


def whole(store: Store, level: int = 0) -> NDArray[np.uint8]:
    _, height, width = store.levels[level].shape
    return store.read(level=level, y=0, x=0, height=height, width=width)


# napari


def test_napari_gets_the_image_in_colour_and_the_labels_in_um(store: Store, path: Path) -> None:
    read = bridge.get_reader(str(path))

    assert read is not None
    (image, shown, kind), *labels = read([str(path)])
    assert (kind, shown["rgb"], shown["scale"], shown["name"]) == ("image", True, (0.73, 0.73), "slide_7.svs")
    assert [level.shape for level in image] == [(*level.shape[1:], 3) for level in store.levels]
    for k, level in enumerate(image):
        np.testing.assert_array_equal(level.compute(), whole(store, k))
    assert [(layer[1]["name"], layer[2], layer[1]["scale"]) for layer in labels] == [
        ("tissue", "labels", (0.73, 0.73)),
        ("nuclei", "labels", (0.73, 0.73)),
    ]
    np.testing.assert_array_equal(labels[1][0][0].compute(), store.label("nuclei")[0][:])


def test_napari_reads_no_pixels_before_they_are_shown(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zarr.Array.__getitem__", lambda *_: pytest.fail("read"))

    shown = bridge.layers(store)

    assert shown[0][0][0][:10, :10].shape == (10, 10, 3)


def test_what_is_no_store_is_left_to_other_readers(tmp_path: Path, path: Path) -> None:
    (tmp_path / "other.zarr").mkdir()

    assert bridge.get_reader(str(tmp_path / "other.zarr")) is None
    assert bridge.get_reader(str(tmp_path / "missing.zarr")) is None
    assert bridge.get_reader([str(path), str(path)]) is None
    assert bridge.get_reader(str(written(tmp_path / "table.zarr", pixels="none"))) is None


def test_a_slide_of_unknown_mpp_is_shown_in_its_own_pixels(tmp_path: Path) -> None:
    slide = ArrayReader(scan(900, 1500))
    write_store(tmp_path / "s.zarr", slide, scale=2, tissue=tissue(900, 1500, (0, 0, 300, 300), mpp=None))

    shown = bridge.read(str(tmp_path / "s.zarr"))[0][1]

    assert shown["scale"] == (2, 2)
    assert "units" not in shown


def test_the_manifest_is_shipped_and_names_what_there_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    manifest = yaml.safe_load((ROOT / "wsiscale" / "bridges" / "napari.yaml").read_text())

    assert project["project"]["entry-points"]["napari.manifest"] == {"wsiscale": "wsiscale.bridges:napari.yaml"}
    assert "bridges/napari.yaml" in project["tool"]["setuptools"]["package-data"]["wsiscale"]
    assert manifest["name"] == project["project"]["name"]
    (command,) = manifest["contributions"]["commands"]
    module, _, name = command["python_name"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert manifest["contributions"]["readers"][0]["command"] == command["id"]


@pytest.mark.filterwarnings("ignore")  # its own
def test_npe2_accepts_the_manifest() -> None:
    npe2 = pytest.importorskip("npe2", reason="npe2 is not installed: its pytest plugin warns; pip install npe2")

    manifest = npe2.PluginManifest.from_file(ROOT / "wsiscale" / "bridges" / "napari.yaml")

    manifest.validate_imports()
    assert manifest.contributions.readers[0].accepts_directories


@pytest.mark.filterwarnings("ignore")  # its own
def test_napari_shows_it(store: Store, path: Path) -> None:
    pytest.importorskip("napari", reason="napari is not installed; pip install napari")
    from napari.components import ViewerModel
    from napari.layers import Layer

    viewer = ViewerModel()
    for layer in bridge.read(str(path)):
        viewer.add_layer(Layer.create(*layer))

    image, found, nuclei = viewer.layers
    assert image.rgb
    assert image.multiscale
    np.testing.assert_allclose(image.scale, 0.73)
    np.testing.assert_allclose(found.extent.world, image.extent.world)
    np.testing.assert_allclose(found.extent.world[1], np.array(store.levels[0].shape[1:]) * 0.73, atol=0.74)
    assert nuclei.get_value((12 * 0.73, 22 * 0.73), world=True)[1] == 7
    assert [str(unit) for unit in image.units] == ["micrometer", "micrometer"]


# MONAI


def test_a_missing_library_says_how_to_install_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("monai", "monai.config", "wsidata"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "wsiscale.bridges.monai", raising=False)
    from wsiscale.bridges.lazyslide import to_wsidata

    with pytest.raises(StoreError, match=r"wsiscale\[monai\]"):
        importlib.import_module("wsiscale.bridges.monai")
    with pytest.raises(StoreError, match="pip install lazyslide"):
        to_wsidata(store)


@pytest.mark.filterwarnings("ignore")  # its own
def test_monai_loads_tiles_with_their_place(store: Store, path: Path) -> None:
    monai = pytest.importorskip("monai", reason="MONAI is not installed; pip install 'wsiscale[monai]'")
    from monai.data import DataLoader, Dataset
    from monai.transforms import Compose, ScaleIntensityRanged

    from wsiscale.bridges.monai import LoadWsiscaleTiled, tile_items

    items = tile_items(path, 100, halo=10)
    steps = Compose([LoadWsiscaleTiled("image"), ScaleIntensityRanged("image", 0, 255, 0, 1)])
    dataset = Dataset(items, steps)

    expected = list(store.tiles(100, halo=10))
    assert len(dataset) == len(expected)
    for sample, (pixels, tile) in zip(dataset, expected, strict=True):
        assert isinstance(sample["image"], monai.data.MetaTensor)
        assert sample["tile"] == tile
        torch.testing.assert_close(
            sample["image"].as_tensor(), torch.from_numpy(pixels).permute(2, 0, 1) / 255, check_dtype=False
        )
        assert sample["image"].meta["location"] == (tile.row - 10, tile.col - 10)
        np.testing.assert_allclose(sample["image"].affine[:2, 3], [(tile.row - 9.5) * 0.73, (tile.col - 9.5) * 0.73])
        np.testing.assert_allclose(sample["image"].pixdim[:2], 0.73)
    batch = next(
        iter(
            DataLoader(
                Dataset(
                    [{"image": i["image"], "tile": i["tile"]} for i in items],
                    [LoadWsiscaleTiled("image", dtype=np.uint8), lambda d: {"image": d["image"]}],
                ),
                batch_size=3,
            )
        )
    )
    assert batch["image"].shape == (3, 3, 120, 120)
    with pytest.raises(KeyError):
        LoadWsiscaleTiled("other")(items[0])
    assert LoadWsiscaleTiled("other", allow_missing_keys=True)(items[0]) == items[0]
    pickle.dumps(steps)


# LazySlide


@pytest.mark.filterwarnings("ignore")  # its own, and its dependencies'
def test_lazyslide_iterates_the_store_s_own_tiles(store: Store) -> None:
    pytest.importorskip("wsidata", reason="LazySlide is not installed; pip install lazyslide")
    from wsiscale.bridges.lazyslide import to_wsidata

    wsi = to_wsidata(store)

    found = list(wsi.iter.tile_images("tiles"))
    expected = [(pixels, tile) for pixels, tile in store.tiles()]
    assert wsi.properties.mpp == 0.73
    assert wsi.tile_spec("tiles").mpp == 0.73
    assert len(found) == len(expected)
    inside = 0
    for image, (pixels, tile) in zip(found, expected, strict=True):
        assert (image.x, image.y) == (tile.col, tile.row)
        if tile.row + 128 <= store.levels[0].shape[1] and tile.col + 128 <= store.levels[0].shape[2]:
            np.testing.assert_array_equal(image.image, pixels)
            inside += 1
    assert inside > 5


@pytest.mark.filterwarnings("ignore")  # its own, and its dependencies'
def test_lazyslide_reads_the_slide_at_the_store_s_scale(tmp_path: Path) -> None:
    pytest.importorskip("wsidata", reason="LazySlide is not installed; pip install lazyslide")
    from wsiscale.bridges.lazyslide import to_wsidata
    from wsiscale.readers import open_slide

    write_svs(tmp_path / "s.svs", scan(1024, 1600), mpp=0.25, power=40, levels=(1, 4), quality=95)
    there = tissue(1024, 1600, (0, 0, 1024, 1600), mpp=0.25)
    with open_slide(tmp_path / "s.svs") as slide:
        write_store(tmp_path / "s.zarr", slide, mpp=0.5, tissue=there, tile_size=128)
    store = open_store(tmp_path / "s.zarr")

    wsi = to_wsidata(store, tmp_path / "s.svs")

    spec = wsi.tile_spec("tiles")
    assert (spec.mpp, spec.base_width, spec.ops_level) == (0.5, 256, 0)
    for image, (pixels, tile) in zip(wsi.iter.tile_images("tiles"), store.tiles(), strict=True):
        assert (image.x, image.y) == (tile.x, tile.y)
        if tile.row + 128 <= store.levels[0].shape[1] and tile.col + 128 <= store.levels[0].shape[2]:
            assert np.abs(image.image.astype(float) - pixels).mean() < 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.svs", "s.zarr"]
    with pytest.raises(OptionError, match="is of a slide of"):
        to_wsidata(written(tmp_path / "other.zarr"), tmp_path / "s.svs")
