"""Exports, each read back by what reads it: on a slide that is wider than high, so that swapped axes show."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import pytest
import shapely.geometry
import tifffile
import tiffslide
import webdataset
from numpy.typing import NDArray
from stores import SCALE, scan, tissue, written

from wsiscale.calibration import read_mpp_table
from wsiscale.cli import main
from wsiscale.cohort.plan import read_cohort
from wsiscale.cohort.records import write_results
from wsiscale.errors import OptionError, SlideError, StoreError
from wsiscale.export import FORMATS, export_store
from wsiscale.export import webdataset as sharded
from wsiscale.readers import open_slide
from wsiscale.readers.array import ArrayReader
from wsiscale.store import Store, open_store, write_store
from wsiscale.types import Pyramid


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("exported") / "s.ome.zarr")


@pytest.fixture(scope="module")
def store(path: Path) -> Store:
    return open_store(path)


def whole(store: Store, level: int = 0) -> NDArray[np.uint8]:
    _, height, width = store.levels[level].shape
    return store.read(level=level, y=0, x=0, height=height, width=width)


def damaged(path: Path) -> Store:
    """Two tiles of the first row cannot be read."""

    class Damaged(ArrayReader):
        def read(self, *, level: int, y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
            if y <= 30 < y + height and x <= 30 < x + width:
                raise SlideError("broken", code="READ_FAILED")
            return super().read(level=level, y=y, x=x, height=height, width=width)

    slide = Damaged(scan(900, 1500), mpp=0.5)
    everywhere = tissue(900, 1500, (0, 0, 900, 1500))
    write_store(path, slide, mpp=0.5, tissue=everywhere, tile_size=256, max_failed_tiles=1)
    return open_store(path)


# HDF5


def test_trident_finds_its_attributes_and_reads_at_the_right_scale(store: Store, tmp_path: Path) -> None:
    summary = export_store(store, tmp_path / "slide_7_patches.h5", to="trident-h5")

    with h5py.File(tmp_path / "slide_7_patches.h5") as file:
        coords, attributes = file["coords"][:], dict(file["coords"].attrs)
    assert coords.dtype == np.int64
    np.testing.assert_array_equal(coords, np.stack([store.tile_table["x"], store.tile_table["y"]], axis=1))
    assert coords[:, 0].max() > 900 > coords[:, 1].max()  # x first: the slide is 900 px high
    named = {
        *("patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap"),
        *("level0_width", "level0_height", "name"),
    }
    assert named <= set(attributes)
    assert (attributes["level0_width"], attributes["level0_height"], attributes["name"]) == (1500, 900, "slide_7")
    assert (attributes["patch_size"], attributes["overlap"], attributes["level0_magnification"]) == (128, 0, 20)
    assert attributes["patch_size_level0"] == round(128 * SCALE)
    # What TRIDENT makes of them.
    assert attributes["level0_magnification"] / attributes["target_magnification"] == pytest.approx(SCALE)
    assert attributes["achieved_mpp"] == 0.73
    assert attributes["level0_mpp"] == 0.5
    assert "13.7x" in summary.notes[0]


def test_a_whole_magnification_is_a_whole_number_and_needs_no_note(tmp_path: Path) -> None:
    # TRIDENT calls a slide of 0.46 µm/px 20x, and so its half 10x, not the 10.9x of 0.92 µm/px.
    slide, there = ArrayReader(scan(900, 1500), mpp=0.46), tissue(900, 1500, (100, 900, 500, 500), mpp=0.46)
    write_store(tmp_path / "s.zarr", slide, mpp=0.92, tissue=there)

    summary = export_store(tmp_path / "s.zarr", tmp_path / "p.h5", to="trident-h5")

    with h5py.File(tmp_path / "p.h5") as file:
        target = file["coords"].attrs["target_magnification"]
    assert (target, type(target)) == (10, np.int64)
    assert summary.notes == ()


def test_without_a_known_mpp_there_is_no_magnification(tmp_path: Path) -> None:
    slide = ArrayReader(scan(900, 1500))
    write_store(tmp_path / "s.zarr", slide, scale=2, tissue=tissue(900, 1500, (0, 0, 300, 300), mpp=None))

    with pytest.raises(StoreError, match="TRIDENT's format has magnifications") as caught:
        export_store(tmp_path / "s.zarr", tmp_path / "p.h5", to="trident-h5")

    assert caught.value.code == "NO_MPP"
    assert not (tmp_path / "p.h5").exists()
    for name in ("clam-h5", "qupath-geojson", "ome-tiff", "webdataset", "hs2p-csv"):
        export_store(tmp_path / "s.zarr", tmp_path / name, to=name)
    with tifffile.TiffFile(tmp_path / "ome-tiff") as file:
        assert "PhysicalSize" not in str(file.ome_metadata)


def test_clam_reads_what_covers_each_tile_from_a_level_that_there_is(tmp_path: Path) -> None:
    image = scan(900, 1500)
    slide = ArrayReader((image, image[::2, ::2].copy()), mpp=0.25, name="s.svs")
    write_store(tmp_path / "s.zarr", slide, mpp=0.6, tissue=tissue(900, 1500, (0, 0, 900, 1500), mpp=0.25), tile_size=100)

    summary = export_store(tmp_path / "s.zarr", tmp_path / "s.h5", to="clam-h5")

    with h5py.File(tmp_path / "s.h5") as file:
        coords, attributes = file["coords"][:], dict(file["coords"].attrs)
    assert {"patch_size", "patch_level", "downsample", "downsampled_level_dim", "level_dim", "name", "save_path"} <= set(
        attributes
    )
    assert (attributes["patch_level"], attributes["patch_size"]) == (1, 120)
    assert attributes["downsample"].tolist() == [2, 2]
    assert attributes["level_dim"].tolist() == attributes["downsampled_level_dim"].tolist() == [750, 450]
    x, y = coords[5]
    tile = open_store(tmp_path / "s.zarr").tile_table
    assert (x, y) == (tile["x"][5], tile["y"][5])
    assert "120 px of level 1; resize them to 100 px" in summary.notes[0]


def test_tiles_over_damage_are_left_out_and_counted(tmp_path: Path) -> None:
    store = damaged(tmp_path / "s.zarr")
    bad = int((store.tile_table["status"] == 1).sum())
    assert 0 < bad < len(store.tile_table["id"])

    for name in ("trident-h5", "clam-h5"):
        assert f"left out: {bad} tiles" in export_store(store, tmp_path / name, to=name).notes[-1]
        with h5py.File(tmp_path / name) as file:
            assert len(file["coords"]) == len(store.tile_table["id"]) - bad
    assert f"left out: {bad} tiles" in export_store(store, tmp_path / "w", to="webdataset").notes[-1]
    export_store(store, tmp_path / "q.json", to="qupath-geojson")
    kinds = [f["properties"]["classification"]["name"] for f in json.loads((tmp_path / "q.json").read_text())["features"]]
    assert kinds.count("damaged") == bad


# GeoJSON


def test_qupath_gets_tiles_where_they_are_on_the_slide(store: Store, tmp_path: Path) -> None:
    export_store(store, tmp_path / "tiles.geojson", to="qupath-geojson")

    found = json.loads((tmp_path / "tiles.geojson").read_text())
    assert found["type"] == "FeatureCollection"
    assert len(found["features"]) == len(store.tile_table["id"])
    for n, feature in enumerate(found["features"]):
        shape = shapely.geometry.shape(feature["geometry"])
        x, y, w, h = (int(store.tile_table[name][n]) for name in "xywh")
        assert shape.is_valid
        assert shape.bounds == (x, y, x + w, y + h)
        assert feature["properties"]["objectType"] == "tile"
        assert feature["properties"]["measurements"]["tissue"] == pytest.approx(store.tile_table["tissue"][n])


def test_the_corner_of_a_scan_on_a_larger_canvas_is_taken_off(tmp_path: Path) -> None:
    class Bounded(ArrayReader):
        @property
        def pyramid(self) -> Pyramid:
            full = super().pyramid
            return Pyramid(full.shapes, full.downsamples, full.mpp, bounds=(100, 300, 700, 1000))

    there = tissue(900, 1500, (200, 400, 300, 300))
    write_store(tmp_path / "s.zarr", Bounded(scan(900, 1500), mpp=0.5), mpp=0.5, tissue=there, tile_size=100)

    export_store(tmp_path / "s.zarr", tmp_path / "q.json", to="qupath-geojson")

    feature = json.loads((tmp_path / "q.json").read_text())["features"][0]
    table = open_store(tmp_path / "s.zarr").tile_table
    assert (table["x"][0], table["y"][0]) == (400, 200)
    assert feature["geometry"]["coordinates"][0][0] == [100, 100]


# Pixels


@pytest.fixture(scope="module")
def ome_tiff(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Levels begin where both sides fit 512 px.
    path = tmp_path_factory.mktemp("tiff") / "slide.ome.tif"
    assert len(store.levels) > 1
    export_store(store, path, to="ome-tiff")
    return path


def test_tifffile_finds_an_ome_tiff_with_all_levels(store: Store, ome_tiff: Path) -> None:
    with tifffile.TiffFile(ome_tiff) as file:
        (series,) = file.series
        assert file.is_ome
        assert len(series.levels) == len(store.levels)
        for k, level in enumerate(series.levels):
            np.testing.assert_array_equal(level.asarray(), whole(store, k))
        assert 'PhysicalSizeX="0.73" PhysicalSizeXUnit="µm" PhysicalSizeY="0.73"' in file.ome_metadata
        assert "Creator" in file.ome_metadata


def test_openslide_finds_the_pixels_and_their_size(store: Store, ome_tiff: Path) -> None:
    with openslide.OpenSlide(ome_tiff) as slide:
        pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.73, rel=1e-4)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.73, rel=1e-4)

    np.testing.assert_array_equal(pixels, whole(store))


def test_tiffslide_and_wsiscale_find_the_levels_too(store: Store, ome_tiff: Path) -> None:
    sizes = [level.shape[1:] for level in store.levels]
    with tiffslide.TiffSlide(ome_tiff) as slide:
        assert [(h, w) for w, h in slide.level_dimensions] == sizes
        assert slide.properties["tiffslide.mpp-x"] == pytest.approx(0.73)
        pixels = np.asarray(slide.read_region((200, 120), 1, (200, 90)))[..., :3]
    np.testing.assert_array_equal(pixels, store.read(level=1, y=60, x=100, height=90, width=200))
    with open_slide(ome_tiff) as again:
        assert again.pyramid.shapes == tuple(sizes)
        assert again.calibration.mpp == pytest.approx(0.73)


def test_the_same_store_gives_the_same_files(store: Store, tmp_path: Path) -> None:
    for name in ("ome-tiff", "webdataset", "qupath-geojson"):
        for copy in "ab":
            export_store(store, tmp_path / f"{name}.{copy}", to=name)
        first, second = (
            [f.read_bytes() for f in sorted([path, *path.rglob("*")]) if f.is_file()]
            for path in (tmp_path / f"{name}.a", tmp_path / f"{name}.b")
        )
        assert first == second, name


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the collector
def test_webdataset_streams_tiles_and_where_they_are(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "_SHARD", 100_000)

    export_store(store, tmp_path / "w", to="webdataset")

    shards = sorted(str(path) for path in (tmp_path / "w").glob("*.tar"))
    assert len(shards) > 1
    assert json.loads((tmp_path / "w" / "manifest.json").read_text())["samples"] == len(store.grid())
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert len(samples) == len(store.grid())
    for sample, (pixels, tile) in zip(samples, store.tiles(), strict=True):
        assert sample["__key__"] == f"slide_7_{tile.index:07d}"
        np.testing.assert_array_equal(sample["png"], pixels)
        assert (sample["json"]["row"], sample["json"]["col"]) == (tile.row, tile.col)
        assert (sample["json"]["y"], sample["json"]["x"], sample["json"]["mpp"]) == (tile.y, tile.x, 0.73)


def test_a_name_with_dots_makes_one_key(tmp_path: Path) -> None:
    export_store(written(tmp_path / "s.zarr", name="a.b c.svs"), tmp_path / "w", to="webdataset")

    with (tmp_path / "w" / "tiles-000000.tar").open("rb") as file:
        names = [block.decode() for block in (file.read(100).rstrip(b"\0"),)]
    assert names == ["a_b_c_0000000.png"]


# Tables


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def record(id_: str, slide: str, slide_mpp: float | None, mpp: float | None, status: str = "ok") -> dict[str, Any]:
    counts = dict.fromkeys(("tiles", "reads", "seconds", "bytes"), 1)
    return {"id": id_, "slide": slide, "status": status, "slide_mpp": slide_mpp, "mpp": mpp, "mpp_source": "metadata", **counts}


def test_a_table_of_one_store_or_of_a_cohort(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    records = [
        record("x%2Fa", "a.svs", 0.25, 0.7),
        record("x%2Fb.v2", "b.v2.svs", 0.5, None, "abstained"),
        record("own-id", "c.svs", 0.26, 0.8),
        record("d", "d.svs", None, None, "bad_input"),
    ]
    write_results(out, records, done=4, resumed=0, seconds=1)

    one = export_store(store, tmp_path / "one.csv", to="wsi-mpp-csv")
    many = export_store(out, tmp_path / "many.csv", to="wsi-mpp-csv")
    hs2p = export_store(out, tmp_path / "hs2p.csv", to="hs2p-csv", slides=tmp_path)

    assert rows(tmp_path / "one.csv") == [{"wsi": "slide_7.svs", "mpp": "0.5", "target_mpp": "0.73"}]
    assert one.notes == ()
    assert [(row["wsi"], row["mpp"], row["target_mpp"]) for row in rows(tmp_path / "many.csv")] == [
        ("x/a.svs", "0.25", "0.7"),
        ("x/b.v2.svs", "0.5", ""),
        ("c.svs", "0.26", "0.8"),
    ]
    assert many.notes == ("left out, of unknown µm/px: d.svs",)
    found = rows(tmp_path / "hs2p.csv")
    assert list(found[0]) == ["sample_id", "image_path", "mask_path", "spacing_at_level_0", "target_mpp"]
    assert [(row["sample_id"], row["image_path"], row["spacing_at_level_0"]) for row in found] == [
        ("x%2Fa", str(tmp_path / "x/a.svs"), "0.25"),
        ("x%2Fb.v2", str(tmp_path / "x/b.v2.svs"), "0.5"),
        ("own-id", str(tmp_path / "c.svs"), "0.26"),
        ("d", str(tmp_path / "d.svs"), ""),
    ]
    assert len(hs2p.notes) == 1
    # wsiscale's own two readers of tables
    assert read_mpp_table(tmp_path / "many.csv")["a.svs"] == 0.25
    assert {spec.id: spec.mpp for spec in read_cohort(tmp_path / "hs2p.csv")}["own-id"] == 0.26


def test_a_table_without_any_mpp_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_results(tmp_path / "out", [record("d", "d.svs", None, None, "bad_input")], done=1, resumed=0, seconds=1)

    with pytest.raises(StoreError, match="no slide of known µm/px"):
        export_store(tmp_path / "out", tmp_path / "t.csv", to="wsi-mpp-csv")


# Whole or not at all


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"spatialdata"}))
def test_an_export_replaces_nothing_unless_asked_to(store: Store, tmp_path: Path, name: str) -> None:
    export_store(store, tmp_path / "e", to=name)
    with pytest.raises(StoreError) as caught:
        export_store(store, tmp_path / "e", to=name)
    assert caught.value.code == "EXISTS"

    export_store(store, tmp_path / "e", to=name, overwrite=True)

    assert os.listdir(tmp_path) == ["e"]


@pytest.mark.parametrize("name", ["ome-tiff", "webdataset"])
def test_an_export_of_a_damaged_store_leaves_nothing(tmp_path: Path, name: str) -> None:
    source = written(tmp_path / "s.zarr")
    shard = next(f for f in sorted((source / "0").rglob("*")) if f.is_file() and f.stat().st_size > 5000)
    content = bytearray(shard.read_bytes())
    for at in range(100, len(content), 1000):
        content[at] ^= 255
    shard.write_bytes(content)

    with pytest.raises(StoreError, match="damaged"):
        export_store(source, tmp_path / "e", to=name)

    assert os.listdir(tmp_path) == ["s.zarr"]


def test_what_a_killed_export_leaves_is_collected_by_the_next(store: Store, tmp_path: Path) -> None:
    (tmp_path / ".e.csv.99-deadbeef.partial").write_text("half")

    export_store(store, tmp_path / "e.csv", to="wsi-mpp-csv")

    assert os.listdir(tmp_path) == ["e.csv"]


def test_pixels_need_a_store_with_pixels_and_coordinates_do_not(tmp_path: Path) -> None:
    source = written(tmp_path / "s.zarr", pixels="none")

    for name in ("ome-tiff", "webdataset"):
        with pytest.raises(StoreError) as caught:
            export_store(source, tmp_path / name, to=name)
        assert caught.value.code == "NO_PIXELS"
    for name in ("trident-h5", "clam-h5", "qupath-geojson", "wsi-mpp-csv"):
        assert export_store(source, tmp_path / name, to=name).bytes > 0


def test_an_export_that_there_is_not_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="choose one of trident-h5"):
        export_store(store, tmp_path / "e", to="czi")


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("trident-h5", "h5py", "exports"), ("spatialdata", "spatialdata", "spatialdata")]
)
def test_a_missing_extra_says_how_to_install_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(StoreError, match=rf"pip install 'wsiscale\[{extra}\]'") as caught:
        export_store(store, tmp_path / "e", to=name)

    assert caught.value.code == "MISSING_EXTRA"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak of memory")
@pytest.mark.parametrize("name", ["ome-tiff", "webdataset"])
def test_a_vast_store_is_exported_in_little_memory(tmp_path: Path, name: str) -> None:
    code = f"""
import sys
from pathlib import Path
from wsiscale.export import export_store
export_store({str(tmp_path / "s.zarr")!r}, {str(tmp_path / "e")!r}, to={name!r})
print(next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")))
"""
    image = np.broadcast_to(scan(500, 700).repeat(20, axis=0).repeat(20, axis=1), (10_000, 14_000, 3))
    slide = ArrayReader(np.ascontiguousarray(image), mpp=0.5)
    write_store(tmp_path / "s.zarr", slide, mpp=0.5, tissue=tissue(10_000, 14_000, (0, 0, 10_000, 14_000), step=100))

    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    assert peak < 420_000  # kB, of 420 MB of pixels


# The command


def test_the_command_says_what_it_wrote_and_what_it_could_not(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["export", str(path), "--to", "trident-h5", "-o", str(tmp_path / "p.h5"), "--json"])

    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert code == 0
    assert summary["format"] == "trident-h5"
    assert summary["path"] == str(tmp_path / "p.h5")
    assert summary["bytes"] == (tmp_path / "p.h5").stat().st_size
    assert err == f"note: {summary['notes'][0]}\n"
    assert main(["export", str(path), "--to", "trident-h5", "-o", str(tmp_path / "p.h5")]) == 1
    assert main(["export", str(path), "--to", "czi", "-o", str(tmp_path / "c")]) == 2
    assert main(["export", str(path), "--to", "clam-h5", "-o", str(tmp_path / "c.h5"), "--overwrite"]) == 0


# SpatialData


@pytest.mark.filterwarnings("ignore")  # its own, and its dependencies'
def test_spatialdata_opens_what_is_written_for_it(store: Store, tmp_path: Path) -> None:
    spatialdata = pytest.importorskip(
        "spatialdata", reason="spatialdata brings 34 packages; pip install 'wsiscale[spatialdata]'"
    )

    export_store(store, tmp_path / "s.zarr", to="spatialdata")

    found = spatialdata.read_zarr(tmp_path / "s.zarr")
    image, tiles = found.images["image"], found.shapes["tiles"]
    assert len(image) == len(store.levels)
    np.testing.assert_array_equal(np.moveaxis(image["scale0"]["image"].values, 0, -1), whole(store))
    np.testing.assert_array_equal(np.moveaxis(image["scale1"]["image"].values, 0, -1), whole(store, 1))
    np.testing.assert_array_equal(found.labels["tissue"]["scale0"]["image"].values, store.tissue[0][:])
    assert tiles.geometry.iloc[3].bounds == (
        *(float(store.tile_table[name][3]) for name in ("col", "row")),
        *(float(store.tile_table[name][3] + 128) for name in ("col", "row")),
    )
    assert found.attrs["tile_spec"]["tiles"]["mpp"] == 0.73
    transformed = spatialdata.transform(tiles, to_coordinate_system="slide").geometry.iloc[3].bounds
    np.testing.assert_allclose(transformed[:2], [store.tile_table[name][3] for name in "xy"], atol=SCALE)


def test_the_openslide_in_use_reads_no_more_than_the_note_says(ome_tiff: Path) -> None:
    with openslide.OpenSlide(ome_tiff) as slide:
        assert slide.level_count == 1
