"""The store: what is in it, that readers accept it, that it is there whole or not at all, that damage is found."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import ome_zarr_models
import pytest
import yaozarrs
import zarr
from numpy.typing import NDArray
from skimage.registration import phase_cross_correlation

from wsiscale import publishing, store
from wsiscale.errors import MppError, NoTissueError, OptionError, ScaleError, SlideError, StoreError, WsiscaleError
from wsiscale.readers import open_slide
from wsiscale.readers.array import ArrayReader
from wsiscale.store import Ngff, check_destination, open_store, plan_store, verify_store, write_stack, write_store
from wsiscale.types import ScaleStack, Tissue

NGFF: tuple[Ngff, ...] = ("0.5", "0.4")


def scan(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """A texture without symmetry: no two places, axes or channels look alike, and nothing of it is white."""
    y, x = np.ogrid[:height, :width]
    rng = np.random.default_rng(seed)
    planes = [y * 200 // height + 0 * x, x * 200 // width + 0 * y, (y // 7 + x // 3) % 5 * 40]
    grain = rng.integers(0, 40, (height, width, 1), np.uint8)
    return np.stack(planes, axis=-1).astype(np.uint8) + grain


def tissue_at(slide: ArrayReader, *boxes: tuple[int, int, int, int], step: int = 10) -> Tissue:
    """Tissue in boxes of level-0 (y, x, height, width); the whole slide where there are none."""
    height, width = slide.pyramid.shape
    mask = np.zeros((-(-height // step), -(-width // step)), bool)
    for y, x, h, w in boxes or ((0, 0, height, width),):
        mask[y // step : -(-(y + h) // step), x // step : -(-(x + w) // step)] = True
    return Tissue(mask=mask, step=step, shape=(height, width), mpp=slide.pyramid.mpp)


def area_average(image: NDArray[np.uint8], scale: float) -> NDArray[np.float64]:
    """The mean of the rectangle that each pixel covers, from an integral image; independent of what the package does."""
    height, width, _ = image.shape
    rows, columns = int(np.ceil(height / scale - 1e-6)), int(np.ceil(width / scale - 1e-6))
    padded = np.full((int(np.ceil(rows * scale)) + 1, int(np.ceil(columns * scale)) + 1, 3), 255.0)
    padded[:height, :width] = image
    integral = np.pad(padded.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0), (0, 0)))

    def at(edges: NDArray[np.float64], table: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        low = np.floor(edges).astype(int)
        share = (edges - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        return np.take(table, low, axis) * (1 - share) + np.take(table, low + 1, axis) * share

    table = at(np.arange(columns + 1) * scale, at(np.arange(rows + 1) * scale, integral, 0), 1)
    return (table[1:, 1:] - table[:-1, 1:] - table[1:, :-1] + table[:-1, :-1]) / scale**2


def whole(path: Path, level: int = 0) -> NDArray[np.uint8]:
    opened = open_store(path)
    _, height, width = opened.levels[level].shape
    return opened.read(level=level, y=0, x=0, height=height, width=width)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def slide() -> ArrayReader:
    return ArrayReader(scan(1500, 2310), mpp=0.5)


@pytest.fixture(scope="module")
def written(slide: ArrayReader, tmp_path_factory: pytest.TempPathFactory) -> dict[Ngff, Path]:
    """One store of each kind, read by several tests and changed by none."""
    folder = tmp_path_factory.mktemp("written")
    paths = {ngff: folder / f"{ngff}.ome.zarr" for ngff in NGFF}
    for ngff, path in paths.items():
        write_store(path, slide, mpp=0.73, tissue=tissue_at(slide), ngff=ngff, tile_size=256)
    return paths


# What other people's software says


@pytest.mark.parametrize("ngff", NGFF)
def test_both_validators_accept_a_store(written: dict[Ngff, Path], ngff: Ngff) -> None:
    group = zarr.open_group(written[ngff], mode="r")

    assert type(ome_zarr_models.open_ome_zarr(group)).__name__ == "Image"
    yaozarrs.validate_zarr_store(str(written[ngff]))
    yaozarrs.validate_zarr_store(str(written[ngff] / "labels" / "tissue"))
    for tool in ("ome-zarr-models", "yaozarrs"):
        command = [str(Path(sys.executable).with_name(tool)), "validate", str(written[ngff])]
        assert subprocess.run(command, capture_output=True, check=True).returncode == 0


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("ngff", NGFF)
def test_ome_zarr_py_finds_the_image_its_levels_and_the_label(written: dict[Ngff, Path], ngff: Ngff) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    nodes = list(Reader(parse_url(written[ngff]))())

    image = next(node for node in nodes if node.data and node.data[0].ndim == 3)
    label = next(node for node in nodes if node.data and node.data[0].ndim == 2)
    assert [level.shape for level in image.data] == [(3, 1028, 1583), (3, 514, 792), (3, 257, 396)]
    assert len(label.data) == len(image.data)
    assert image.metadata["coordinateTransformations"][0][0]["scale"] == [1.0, 0.73, 0.73]
    np.testing.assert_array_equal(np.moveaxis(np.asarray(image.data[0]), 0, -1), whole(written[ngff]))


def test_ngff_0_4_has_what_older_readers_insist_on(written: dict[Ngff, Path]) -> None:
    attributes = json.loads((written["0.4"] / ".zattrs").read_text())
    array = json.loads((written["0.4"] / "0" / ".zarray").read_text())
    folders = [path.name for path in written["0.4"].iterdir() if (path / ".zarray").exists()]

    assert attributes["multiscales"][0]["version"] == "0.4"
    assert attributes["omero"]["rdefs"]["model"] == "color"
    # TIAToolbox builds a dataclass from each channel: a key that it does not know is a TypeError.
    known = {"active", "coefficient", "color", "family", "inverted", "label", "window"}
    assert all(set(channel) <= known for channel in attributes["omero"]["channels"])
    assert sorted(folders) == ["0", "1", "2"]  # it takes int(name) of every array beside the levels
    assert array["compressor"]["id"] == "blosc"  # QuPath's reader knows no plain zstd
    assert array["dimension_separator"] == "/"
    assert array["chunks"] == [3, 1024, 1024]


def test_ngff_0_5_is_sharded_and_checksummed(written: dict[Ngff, Path]) -> None:
    array = json.loads((written["0.5"] / "0" / "zarr.json").read_text())

    sharding = array["codecs"][0]
    assert array["chunk_grid"]["configuration"]["chunk_shape"] == [3, 2048, 2048]
    assert sharding["configuration"]["chunk_shape"] == [3, 512, 512]
    assert sharding["configuration"]["codecs"][-1] == {"name": "zstd", "configuration": {"level": 3, "checksum": True}}
    assert array["dimension_names"] == ["c", "y", "x"]
    assert array["fill_value"] == 255


# Pixels


@pytest.mark.parametrize("ngff", NGFF)
@pytest.mark.parametrize("mpp", [0.73, 1.0, 2.9])
def test_pixels_are_the_area_average_of_level_0_in_their_place(
    slide: ArrayReader, tmp_path: Path, ngff: Ngff, mpp: float
) -> None:
    write_store(tmp_path / "s.ome.zarr", slide, mpp=mpp, tissue=tissue_at(slide), ngff=ngff)

    expected = area_average(scan(1500, 2310), mpp / 0.5)
    pixels = whole(tmp_path / "s.ome.zarr")
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() < 0.51


@pytest.mark.parametrize("ngff", NGFF)
@pytest.mark.parametrize("mpp", [1.0, 0.73])
def test_a_real_slide_keeps_its_grey_levels_and_its_place(real_data: Path, tmp_path: Path, ngff: Ngff, mpp: float) -> None:
    with open_slide(real_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        height, width = slide.pyramid.shape
        level0 = slide.read(level=0, y=0, x=0, height=height, width=width)
        write_store(tmp_path / "s.ome.zarr", slide, mpp=mpp, ngff=ngff, halo_um=2000)

    expected = area_average(level0, mpp / 0.499)
    pixels = whole(tmp_path / "s.ome.zarr")
    shift, _, _ = phase_cross_correlation(expected.mean(axis=2), pixels.mean(axis=2), upsample_factor=100)
    assert verify_store(tmp_path / "s.ome.zarr").ok
    assert np.abs(pixels - expected).mean() < 1.5
    assert np.abs(shift).max() < 0.05


@pytest.mark.parametrize("ngff", NGFF)
def test_the_canvas_is_the_whole_slide_however_little_tissue_there_is(tmp_path: Path, ngff: Ngff) -> None:
    image = scan(3003, 5001)
    slide = ArrayReader(image, mpp=0.25)
    tissue = tissue_at(slide, (2200, 4000, 60, 90))

    summary = write_store(tmp_path / "s.ome.zarr", slide, mpp=0.5, tissue=tissue, ngff=ngff, halo_um=0, tile_size=64)

    opened = open_store(tmp_path / "s.ome.zarr")
    assert summary.canvas == (1502, 2501)
    assert [level.shape[1:] for level in opened.levels] == [(1502, 2501), (751, 1251), (376, 626), (188, 313)]
    there = opened.read(level=0, y=1105, x=2005, height=20, width=30)
    np.testing.assert_allclose(there, area_average(image[2210:2250, 4010:4070], 2)[:20, :30], atol=0.51)


@pytest.mark.parametrize(("ngff", "side"), [("0.5", 512), ("0.4", 1024)])
def test_only_chunks_near_tissue_are_written_and_the_rest_is_white(tmp_path: Path, ngff: Ngff, side: int) -> None:
    slide = ArrayReader(scan(3000, 5000), mpp=0.5)
    tissue = tissue_at(slide, (1100, 3200, 50, 60))  # within chunk (2, 6) of 512, or (1, 3) of 1024

    summary = write_store(tmp_path / "s.ome.zarr", slide, mpp=0.5, tissue=tissue, ngff=ngff, halo_um=0, tile_size=10)

    pixels = whole(tmp_path / "s.ome.zarr")
    y, x = 1100 // side * side, 3200 // side * side
    chunk = np.s_[y : y + side, x : x + side]
    np.testing.assert_array_equal(pixels[chunk], scan(3000, 5000)[chunk])
    pixels[chunk] = 255
    assert (pixels == 255).all()
    assert summary.chunks == summary.levels


def test_a_halo_reaches_over_a_chunk_s_border_and_no_further(tmp_path: Path) -> None:
    slide = ArrayReader(scan(2000, 3000), mpp=0.5)
    before = tissue_at(slide, (600, 1030, 10, 10))  # 6 px from the border at x = 1024, 88 from that at y = 512
    after = tissue_at(slide, (1000, 490, 10, 10))  # 12 px from the border at x = 512, 14 from that at y = 1024

    def chunks(tissue: Tissue, halo_um: float) -> list[tuple[int, int]]:
        plan = plan_store(tmp_path / "s", slide, mpp=0.5, tissue=tissue, halo_um=halo_um, tile_size=10)
        return [(int(y), int(x)) for y, x in np.argwhere(plan.touched[0])]

    assert chunks(before, 0) == [(1, 2)]
    assert chunks(before, 2.5) == [(1, 2)]  # 5 px
    assert chunks(before, 3.5) == [(1, 1), (1, 2)]  # 7 px
    assert chunks(before, 44.5) == [(0, 1), (0, 2), (1, 1), (1, 2)]  # 89 px
    assert chunks(after, 5.5) == [(1, 0)]
    assert chunks(after, 6.5) == [(1, 0), (1, 1)]
    assert chunks(after, 7.5) == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_no_tile_of_the_table_holds_white_that_is_not_the_slide_s(tmp_path: Path) -> None:
    image = scan(2000, 3100)
    slide = ArrayReader(image, mpp=0.5)
    tissue = tissue_at(slide, (500, 1480, 10, 40))  # the tile that holds it reaches over two borders

    write_store(tmp_path / "s.ome.zarr", slide, mpp=0.5, tissue=tissue, halo_um=0, tile_size=300, min_tissue=0)

    opened = open_store(tmp_path / "s.ome.zarr")
    table = opened.tile_table
    assert len(table["id"]) > 0
    for row, column, y, x, height, width in zip(*(table[name] for name in ("row", "col", "y", "x", "h", "w")), strict=True):
        tile = opened.read(level=0, y=row, x=column, height=300, width=300)
        np.testing.assert_array_equal(tile, image[y : y + height, x : x + width])


@pytest.mark.parametrize("ngff", NGFF)
def test_every_coarser_level_is_the_2_by_2_mean_of_the_one_before(written: dict[Ngff, Path], ngff: Ngff) -> None:
    for level in (1, 2):
        finer = whole(written[ngff], level - 1).astype(float)
        finer = np.pad(finer, [(0, finer.shape[0] % 2), (0, finer.shape[1] % 2), (0, 0)], mode="edge")
        means = (finer[::2, ::2] + finer[1::2, ::2] + finer[::2, 1::2] + finer[1::2, 1::2]) / 4

        np.testing.assert_allclose(whole(written[ngff], level), means, atol=0.5)


def test_a_level_within_the_tolerance_is_taken_as_it_is(tmp_path: Path) -> None:
    fine = scan(1200, 1900)
    coarse = scan(600, 950, seed=1)  # not what level 0 averages to, so that the source shows
    slide = ArrayReader([fine, coarse], mpp=0.2498)
    tissue = tissue_at(slide)

    for asked, name in ((0.5, "near"), (0.52, "far")):
        write_store(tmp_path / name, slide, mpp=asked, tissue=tissue)

    near, far = open_store(tmp_path / "near"), open_store(tmp_path / "far")
    np.testing.assert_array_equal(whole(tmp_path / "near"), coarse)
    assert near.mpp == pytest.approx(0.4996, abs=1e-12)
    assert near.attributes["requested_mpp"] == 0.5
    assert (near.attributes["read_level"], near.attributes["resample"], near.attributes["resampled"]) == (1, "none", False)
    assert far.mpp == 0.52
    assert (far.attributes["read_level"], far.attributes["resample"], far.attributes["resampled"]) == (1, "area", True)


def test_finer_than_the_slide_is_refused_unless_allowed_and_then_marked(slide: ArrayReader, tmp_path: Path) -> None:
    with pytest.raises(ScaleError, match="finer than the slide's finest level"):
        write_store(tmp_path / "s", slide, mpp=0.4, tissue=tissue_at(slide))
    assert names(tmp_path) == []

    write_store(tmp_path / "s", slide, mpp=0.4, tissue=tissue_at(slide), max_upsample=1.25)

    attributes = open_store(tmp_path / "s").attributes
    assert (attributes["upsampled"], attributes["resample"], attributes["achieved_mpp"]) == (True, "linear", 0.4)


def test_a_slide_without_mpp_gives_a_relative_store_and_says_so(tmp_path: Path) -> None:
    slide = ArrayReader(scan(900, 1400))

    with pytest.raises(MppError, match="--slide-mpp"):
        write_store(tmp_path / "s", slide, mpp=0.5, tissue=tissue_at(slide))
    write_store(tmp_path / "s", slide, scale=1.7, tissue=tissue_at(slide))

    opened = open_store(tmp_path / "s")
    multiscales = zarr.open_group(tmp_path / "s", mode="r").attrs.asdict()["ome"]["multiscales"][0]
    assert multiscales["axes"] == [
        {"name": "c", "type": "channel"},
        {"name": "y", "type": "space"},
        {"name": "x", "type": "space"},
    ]
    assert multiscales["datasets"][0]["coordinateTransformations"] == [{"type": "scale", "scale": [1.0, 1.7, 1.7]}]
    assert (opened.mpp, opened.scale) == (None, 1.7)
    assert (opened.attributes["unit"], opened.attributes["halo"]) == ("level-0 pixel", 256)
    yaozarrs.validate_zarr_store(str(tmp_path / "s"))


def test_the_same_bytes_come_from_any_number_of_threads(tmp_path: Path) -> None:
    slide = ArrayReader(scan(2600, 4700), mpp=0.5)
    for threads in (1, 4):
        write_store(tmp_path / str(threads), slide, mpp=0.61, tissue=tissue_at(slide), threads=threads)

    assert (tmp_path / "1" / "manifest.json").read_bytes() == (tmp_path / "4" / "manifest.json").read_bytes()


# Attributes and tables


def test_levels_say_their_pixel_size_and_where_their_first_pixel_lies(written: dict[Ngff, Path]) -> None:
    attributes = zarr.open_group(written["0.5"], mode="r").attrs.asdict()["ome"]

    image = attributes["multiscales"][0]
    assert attributes["version"] == "0.5"
    assert image["axes"][1:] == [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    assert [dataset["path"] for dataset in image["datasets"]] == ["0", "1", "2"]
    transforms = [dataset["coordinateTransformations"] for dataset in image["datasets"]]
    assert [t[0]["scale"][1] for t in transforms] == [0.73, 1.46, 2.92]
    assert len(transforms[0]) == 1
    assert [t[1]["translation"] for t in transforms[1:]] == [[0, 0.365, 0.365], [0, 1.095, 1.095]]


def test_attributes_tell_where_the_pixels_and_the_scale_come_from(slide: ArrayReader, written: dict[Ngff, Path]) -> None:
    attributes = open_store(written["0.5"]).attributes

    assert attributes["complete"] is True
    assert attributes["slide"]["name"] == "array"
    assert attributes["slide"]["shape"] == [1500, 2310]
    assert (attributes["slide_mpp"], attributes["mpp_source"], attributes["mpp_verdict"]) == (
        0.5,
        slide.calibration.source,
        slide.calibration.verdict,
    )
    assert (attributes["requested_mpp"], attributes["achieved_mpp"], attributes["achieved_scale"]) == (0.73, 0.73, 1.46)
    assert set(attributes["versions"]) == {"wsiscale", "zarr", "numpy", "python"}
    # Level-0 pixel centres (100, 200), from edges: (100.5 / 1.46 - 0.5, 200.5 / 1.46 - 0.5).
    canvas = np.array(attributes["level0_to_canvas"]["matrix"]) @ [100, 200, 1]
    np.testing.assert_allclose(canvas, [100.5 / 1.46 - 0.5, 200.5 / 1.46 - 0.5])


def test_an_estimate_is_kept_as_it_is_and_must_be_json(slide: ArrayReader, tmp_path: Path) -> None:
    estimate = {"mpp": 0.73, "ci90": (0.6, 0.8), "model": None}
    write_store(tmp_path / "s", slide, mpp=1.0, tissue=tissue_at(slide), estimate=estimate)

    assert open_store(tmp_path / "s").attributes["estimate"] == {"mpp": 0.73, "ci90": [0.6, 0.8], "model": None}
    with pytest.raises(OptionError, match="JSON"):
        write_store(tmp_path / "t", slide, mpp=1.0, tissue=tissue_at(slide), estimate={"mpp": float("nan")})
    assert names(tmp_path) == ["s"]


def test_no_folder_name_of_the_slide_gets_into_a_store(tmp_path: Path) -> None:
    slide = ArrayReader(scan(300, 500), mpp=0.5, name="slide-7.svs")
    object.__setattr__(slide.source, "path", "/archive/Doe^Jane/slide-7.svs")

    write_store(tmp_path / "s", slide, mpp=0.5, tissue=tissue_at(slide))

    assert not any(b"Doe^Jane" in file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file())


@pytest.mark.parametrize("ngff", NGFF)
def test_the_tile_table_says_where_each_tile_is_on_the_slide_and_on_the_canvas(tmp_path: Path, ngff: Ngff) -> None:
    slide = ArrayReader(scan(1500, 2300), mpp=0.5)
    tissue = tissue_at(slide, (500, 1400, 200, 400))

    summary = write_store(tmp_path / "s", slide, mpp=1.25, tissue=tissue, ngff=ngff, tile_size=100, overlap=20, min_tissue=0.3)

    table = open_store(tmp_path / "s").tile_table
    assert list(table) == sorted(["id", "x", "y", "w", "h", "row", "col", "tissue", "status"])
    assert [table[name].dtype for name in ("id", "x", "row", "tissue", "status")] == ["i8", "i8", "i8", "f4", "u1"]
    np.testing.assert_array_equal(table["id"], np.arange(summary.tiles))
    np.testing.assert_array_equal(table["row"] % 80, 0)  # a stride of 100 - 20 px of the canvas
    np.testing.assert_array_equal(table["col"] % 80, 0)
    np.testing.assert_array_equal(table["y"], table["row"] * 2.5)
    np.testing.assert_array_equal(table["x"], table["col"] * 2.5)
    assert set(table["w"]) == set(table["h"]) == {250}
    assert set(table["status"]) == {0}
    for y, x, share in zip(table["y"], table["x"], table["tissue"], strict=True):
        covered = max(0, min(y + 250, 700) - max(y, 500)) * max(0, min(x + 250, 1800) - max(x, 1400)) / 250**2
        assert share == pytest.approx(covered, abs=0.01)
        assert share >= 0.3


@pytest.mark.parametrize("ngff", NGFF)
def test_the_tissue_label_lies_on_the_tissue_at_every_level(tmp_path: Path, ngff: Ngff) -> None:
    slide = ArrayReader(scan(1500, 2300), mpp=0.5)
    write_store(tmp_path / "s", slide, mpp=0.625, tissue=tissue_at(slide, (500, 1400, 200, 400)), ngff=ngff)

    labels = open_store(tmp_path / "s").tissue
    for level, label in enumerate(labels):
        scale = 1.25 * 2**level
        rows, columns = np.nonzero(np.asarray(label[:]))
        box = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) * scale
        np.testing.assert_allclose(box, [500, 1400, 700, 1800], atol=scale / 2 + 1e-9)
    assert len(labels) == 3


def test_without_pixels_there_is_a_table_and_an_estimate(slide: ArrayReader, tmp_path: Path) -> None:
    summary = write_store(tmp_path / "s", slide, mpp=0.73, tissue=tissue_at(slide), pixels="none", estimate={"mpp": 0.73})

    opened = open_store(tmp_path / "s")
    assert names(tmp_path / "s") == ["manifest.json", "tiles", "zarr.json"]
    assert (summary.levels, summary.chunks, summary.shards, summary.canvas) == (0, 0, 0, (1028, 1583))
    assert len(opened.tile_table["id"]) == summary.tiles > 0
    assert set(opened.tile_table["status"]) == {store.STATUS["no_pixels"]}
    assert opened.attributes["estimate"] == {"mpp": 0.73}
    assert "ome" not in zarr.open_group(tmp_path / "s", mode="r").attrs
    assert verify_store(tmp_path / "s").ok
    with pytest.raises(OptionError, match="0 levels"):
        opened.read(level=0, y=0, x=0, height=1, width=1)


def test_a_store_opens_white_beyond_its_edges(written: dict[Ngff, Path]) -> None:
    opened = open_store(written["0.5"])

    corner = opened.read(level=1, y=-4, x=-6, height=10, width=20)
    beyond = opened.read(level=1, y=5000, x=0, height=3, width=2)

    np.testing.assert_array_equal(corner[4:, 6:], whole(written["0.5"], 1)[:6, :14])
    assert (corner[:4] == 255).all()
    assert (corner[:, :6] == 255).all()
    assert (beyond == 255).all()


def test_tissue_is_looked_for_where_none_is_given(tmp_path: Path) -> None:
    image = np.full((1200, 2000, 3), 245, np.uint8)
    image[300:900, 500:1100] = scan(600, 600) // 2 + [90, 20, 90]

    write_store(tmp_path / "s", ArrayReader(image, mpp=1.0), mpp=1.0, tile_size=100)

    table = open_store(tmp_path / "s").tile_table
    assert table["y"].min() >= 200
    assert table["y"].max() <= 900
    assert len(table["id"]) >= 25


# Plans and refusals


def test_a_plan_foretells_what_is_written(slide: ArrayReader, tmp_path: Path) -> None:
    tissue = tissue_at(slide, (500, 1400, 200, 400))
    plan = plan_store(tmp_path / "s", slide, mpp=0.73, tissue=tissue)
    assert names(tmp_path) == []

    steps: list[tuple[int, int]] = []
    summary = write_store(
        tmp_path / "s", slide, mpp=0.73, tissue=tissue, progress=lambda done, total: steps.append((done, total))
    )

    assert (plan.tiles, plan.chunks, plan.shards, plan.canvas, plan.mpp) == (
        summary.tiles,
        summary.chunks,
        summary.shards,
        summary.canvas,
        summary.mpp,
    )
    assert steps == [(n, plan.shards) for n in range(1, plan.shards + 1)]
    assert summary.bytes <= plan.bytes <= 4 * summary.bytes
    assert plan.bytes < plan.free
    assert plan.sentence().startswith(f"s: {plan.tiles} tile of 512 px at 0.73 µm/px, a canvas of 1583 x 1028 px")
    assert f"{plan.tiles} tile at 0.73 µm/px" in summary.sentence()
    assert json.loads(json.dumps(summary.as_record()))["canvas"] == [1028, 1583]


def test_a_summary_counts_the_files_that_are_there(written: dict[Ngff, Path], tmp_path: Path, slide: ArrayReader) -> None:
    summary = write_store(tmp_path / "s", slide, mpp=1.0, tissue=tissue_at(slide))

    files = [file for file in (tmp_path / "s").rglob("*") if file.is_file()]
    assert (summary.files, summary.bytes) == (len(files), sum(file.stat().st_size for file in files))


class Untouchable(ArrayReader):
    """Fails the test where it is read."""

    def read(self, **_: Any) -> NDArray[np.uint8]:
        raise AssertionError("the slide was read before what could be known without it was checked")


def test_what_can_be_known_before_the_slide_is_read_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = Untouchable(scan(1500, 2310), mpp=0.5)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "folder")

    def code(path: Path, **options: Any) -> str:
        with pytest.raises(StoreError) as caught:
            write_store(path, slide, mpp=1.0, **options)
        assert "\n" not in str(caught.value)
        if "tissue" not in options:
            with pytest.raises(StoreError, match=re.escape(str(caught.value))):
                check_destination(path, **options)
        return caught.value.code

    assert code(tmp_path / "file") == "EXISTS"
    assert code(tmp_path / "file", overwrite=True) == "EXISTS"
    assert code(tmp_path / "link", overwrite=True) == "EXISTS"
    assert code(tmp_path / "folder") == "EXISTS"
    assert code(tmp_path / "folder", overwrite=True) == "EXISTS"  # not a store: somebody's thesis
    assert code(tmp_path / "nowhere" / "s") == "NOT_FOUND"
    assert code(Path("/proc") / "s") in {"NOT_WRITABLE", "NOT_FOUND"}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    assert code(tmp_path / "s", tissue=tissue_at(slide)) == "NO_SPACE"
    assert names(tmp_path) == ["file", "folder", "link"]
    assert names(tmp_path / "folder") == ["thesis.txt"]


def test_senseless_arguments_are_refused_in_words(slide: ArrayReader, tmp_path: Path) -> None:
    tissue = tissue_at(slide)
    for options in (
        {},
        {"mpp": 1.0, "scale": 2.0},
        {"scale": -1.0},
        {"scale": float("nan")},
        {"mpp": 1.0, "ngff": "0.3"},
        {"mpp": 1.0, "halo_um": -1.0},
        {"mpp": 1.0, "pixels": "all"},
        {"mpp": 1.0, "threads": 0},
        {"mpp": 1.0, "tile_size": 8, "overlap": 8},
        {"mpp": 1.0, "tissue": tissue_at(ArrayReader(scan(10, 10), mpp=0.5))},
    ):
        with pytest.raises(OptionError):
            write_store(tmp_path / "s", slide, **{"tissue": tissue, **options})  # type: ignore[arg-type]
    assert names(tmp_path) == []


def test_a_slide_without_tissue_gives_no_store(slide: ArrayReader, tmp_path: Path) -> None:
    nothing = Tissue(mask=np.zeros((15, 24), bool), step=100, shape=(1500, 2310), mpp=0.5)

    with pytest.raises(NoTissueError):
        write_store(tmp_path / "s", slide, mpp=1.0, tissue=nothing)
    assert names(tmp_path) == []


# There whole, or not at all


class FailsLate(ArrayReader):
    """A slide of which some part cannot be read."""

    def read(self, *, level: int, y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
        if x > 3000:
            raise SlideError("a tile is damaged", code="READ_FAILED")
        return super().read(level=level, y=y, x=x, height=height, width=width)


def test_a_slide_that_cannot_be_read_to_its_end_leaves_nothing(tmp_path: Path) -> None:
    slide = FailsLate(scan(3000, 5000), mpp=0.5)

    with pytest.raises(SlideError, match="damaged"):
        write_store(tmp_path / "s", slide, mpp=0.5, tissue=tissue_at(slide), threads=2)
    assert names(tmp_path) == []


class Slow(ArrayReader):
    """A slide that takes a while, so that threads are in the midst of it when others fail."""

    def read(self, **window: int) -> NDArray[np.uint8]:
        time.sleep(0.002 * (window["x"] // 100))
        return super().read(**window)


def test_an_interrupt_leaves_nothing_and_nobody_working(tmp_path: Path) -> None:
    slide = Slow(scan(3000, 5000), mpp=0.5)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "s", slide, mpp=0.5, tissue=tissue_at(slide), threads=3, progress=interrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wsiscale-store")]
    assert names(tmp_path) == []


def test_what_appears_under_the_name_meanwhile_is_not_replaced(slide: ArrayReader, tmp_path: Path) -> None:
    def appear(done: int, total: int) -> None:
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / "thesis.txt").write_text("mine")

    with pytest.raises(StoreError):
        write_store(tmp_path / "s", slide, mpp=0.5, tissue=tissue_at(slide), progress=appear)
    assert names(tmp_path) == ["s"]
    assert names(tmp_path / "s") == ["thesis.txt"]


# Starting python and importing takes several times as long as writing a small store, and so one process imports, and forks the
# writers. A line that it reads is a list of writers, who work at the same time; it answers with what became of each of them.
# The slide is not white anywhere, so that every shard has a file, and long and thin, so that there are many.
WRITERS = """
import glob, json, os, resource, select, signal, sys, time, traceback
import numpy as np
from wsiscale.errors import StoreError
from wsiscale.readers.array import ArrayReader
from wsiscale.store import write_store
from wsiscale.types import Tissue

class Slide(ArrayReader):
    # `fill`: (a file, bytes); while the slide is read somebody else writes that file, until so many bytes are left on the disk
    fill = None

    def read(self, **window):
        if self.fill is not None and not os.path.exists(self.fill[0]):
            with open(self.fill[0], "wb") as file:
                disk = os.fstatvfs(file.fileno())
                os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - self.fill[1])
        return super().read(**window)

slide = Slide(np.random.default_rng(0).integers(0, 200, (128, 4200, 3), np.uint8), mpp=0.5)
tissue = Tissue(np.ones((2, 42), bool), 100, (128, 4200), 0.5)

def write(job, tell):
    time.sleep(job.get("after", 0))
    slide.fill = job.get("fill")
    if "limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"],) * 2)
    options = {"ngff": job["ngff"], "overwrite": job.get("overwrite", False), "threads": 2}
    try:
        write_store(job["path"], slide, mpp=0.5, tissue=tissue, progress=lambda *_: os.write(tell, b"."), **options)
    except StoreError as error:
        return f"{error.code}: {error}"
    except BaseException:
        return traceback.format_exc()
    return "written"

print("ready", flush=True)
for line in sys.stdin:
    jobs, running = json.loads(line), []
    for job in jobs:
        hear, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(120)
            os.write(tell, write(job, tell).encode())
            os._exit(0)
        os.close(tell)
        running.append((job, pid, hear))
    outcomes = []
    for job, pid, hear in running:
        said = b""
        if "kill" in job:
            steps, manifest, delay = job["kill"]
            while len(said) < steps and (more := os.read(hear, 1)):
                said += more
            # With all steps done it says no more until the end; between manifest and end there is less than a millisecond.
            seen = os.path.join(os.path.dirname(job["path"]), f".*.{pid}-*", "manifest.json")
            while manifest and not glob.glob(seen) and not select.select([hear], [], [], 0)[0]:
                pass
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        said += b"".join(iter(lambda: os.read(hear, 4096), b""))
        os.close(hear)
        outcomes.append(said.decode().lstrip(".") or "killed")
    print(json.dumps(outcomes), flush=True)
"""

Write = Callable[..., list[str]]


@pytest.fixture(scope="module")
def write_in_processes() -> Iterator[Write]:
    """Calls with writers, who work at the same time each in its process; answers "written", "killed" or the error of each."""
    with subprocess.Popen([sys.executable, "-c", WRITERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        assert stdout.readline() == "ready\n"

        def write(*jobs: dict[str, Any]) -> list[str]:
            print(json.dumps(jobs, default=str), file=stdin, flush=True)
            return json.loads(stdout.readline())

        yield write


def sizes(path: Path) -> list[int]:
    return [file.stat().st_size for file in path.rglob("*") if file.is_file()]


def phase(path: Path, published: int | None, left: set[Path]) -> str:
    """How far the writer of `path` came; when it began `published` was the inode there, and `left` what was left beside it."""
    if path.exists() and path.stat().st_ino != published:
        return "published"
    partials = set(path.parent.glob(".*.partial")) - left
    if not partials:
        return "nothing yet"
    return "all but published" if (partials.pop() / store.MANIFEST).exists() else "growing"


# Half of them where there is a store already: 2 x 100 = 200.
@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment_there_is_a_whole_store_or_none_and_the_next_run_cleans_up(
    write_in_processes: Write, tmp_path: Path, overwrite: bool, count: int
) -> None:
    path = tmp_path / "s.ome.zarr"
    chance = random.Random(count)
    started = time.monotonic()
    assert write_in_processes({"path": path, "ngff": "0.5"}) == ["written"]
    duration = time.monotonic() - started
    phases: Counter[str] = Counter()

    for number in range(count):
        if not overwrite and path.exists():
            shutil.rmtree(path)
        published, left = path.stat().st_ino if path.exists() else None, set(tmp_path.glob(".*.partial"))
        ngff = chance.choice(NGFF)
        shards = 8 if ngff == "0.5" else 12
        # So many steps done, and a manifest there or not; then up to so many seconds more.
        at_the_start, in_between = (0, False, duration / 4), (chance.randint(1, shards), False, duration / 8)
        at_the_end, at_the_rename = (shards, False, duration / 4), (shards, True, 0.002)
        steps, manifest, longest = chance.choice([at_the_start, in_between, at_the_end, at_the_rename])
        kill = (steps, manifest, chance.uniform(0, longest))

        (outcome,) = write_in_processes({"path": path, "ngff": ngff, "overwrite": overwrite, "kill": kill})

        said = f"seed {count}, kill {number}, {kill} into NGFF {ngff}: {outcome}"
        assert outcome in ("killed", "written"), said
        assert path.exists() or not (overwrite or outcome == "written"), said
        assert not path.exists() or verify_store(path).ok, said
        assert len(list(tmp_path.glob(".*.partial"))) <= 1, said  # this run's, or else the one before it left it
        phases[phase(path, published, left)] += 1

    assert count < 100 or len(phases) > 2, f"seed {count}: {phases}"
    assert write_in_processes({"path": path, "ngff": "0.5", "overwrite": True}) == ["written"]
    assert names(tmp_path) == ["s.ome.zarr"]
    assert verify_store(path).ok


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_of_two_processes_one_writes_and_the_other_is_told(write_in_processes: Write, tmp_path: Path, count: int) -> None:
    chance = random.Random(count)
    started = time.monotonic()
    assert write_in_processes({"path": tmp_path / "alone.ome.zarr", "ngff": "0.5"}) == ["written"]
    duration = time.monotonic() - started
    told: Counter[str] = Counter()

    for race in range(count):
        path = tmp_path / f"{race}.ome.zarr"
        late = chance.choice([0, 0.01, 1.5 * duration]) * chance.random()  # to the start, to the writing, to the end

        outcomes = write_in_processes({"path": path, "ngff": "0.5"}, {"path": path, "ngff": "0.5", "after": late})

        said = f"seed {count}, race {race}, the second {late:.4f} s late: {outcomes}"
        other, written = sorted(outcome.partition(":")[0] for outcome in outcomes)
        assert other in ("LOCKED", "EXISTS"), said
        assert written == "written", said
        assert verify_store(path).ok, said
        told[other] += 1

    assert names(tmp_path) == sorted(["alone.ome.zarr", *(f"{race}.ome.zarr" for race in range(count))])
    assert count < 50 or len(told) == 2, f"seed {count}: {told}"


def test_of_many_threads_one_writes_and_the_others_are_told(tmp_path: Path) -> None:
    slide = ArrayReader(scan(600, 900), mpp=0.5)
    outcomes: list[str] = []

    def attempt() -> None:
        try:
            write_store(tmp_path / "s", slide, mpp=0.5, tissue=tissue_at(slide), threads=1)
            outcomes.append("written")
        except StoreError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert outcomes.count("written") == 1
    assert set(outcomes) <= {"written", "LOCKED", "EXISTS"}
    assert names(tmp_path) == ["s"]
    assert verify_store(tmp_path / "s").ok


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MB, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root, on Linux, makes a disk of its own")
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no disk can be made here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("count", [5, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ngff", NGFF)
def test_a_disk_that_fills_up_is_one_error_and_leaves_nothing(
    write_in_processes: Write, small_disk: Path, ngff: Ngff, count: int
) -> None:
    path, filler = small_disk / "out" / "s", small_disk / "filler"
    path.parent.mkdir()
    assert write_in_processes({"path": path, "ngff": ngff}) == ["written"]
    needed = sum(-(-size // 4096) * 4096 for size in sizes(path))  # whole pages
    shutil.rmtree(path)

    # The check of what is free, before the first pixel is read, finds 32 MB. A tenth of the store is more than what was written
    # until then; a tenth on top is for files that are written anew before the old ones are removed.
    for left in [*np.linspace(0, 0.9 * needed, count, dtype=int).tolist(), int(1.1 * needed)]:
        (outcome,) = write_in_processes({"path": path, "ngff": ngff, "fill": (filler, left)})

        said = f"{left} of {needed} bytes left: {outcome}"
        assert filler.exists(), said  # so it came to the pixels
        if left < needed:
            assert outcome.startswith("NO_SPACE:"), said
            assert names(path.parent) == [], said
        else:
            assert outcome == "written", said
            assert verify_store(path).ok, said
        filler.unlink()


@pytest.mark.parametrize("count", [5, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ngff", NGFF)
def test_a_file_that_may_not_grow_is_the_same_error_and_leaves_nothing(
    write_in_processes: Write, tmp_path: Path, ngff: Ngff, count: int
) -> None:
    path = tmp_path / "s"
    assert write_in_processes({"path": path, "ngff": ngff}) == ["written"]
    largest = max(sizes(path))
    shutil.rmtree(path)

    # From the first attributes, of some hundred bytes, to the last byte of the largest shard.
    for limit in np.geomspace(1, largest - 1, count).round().astype(int).tolist():
        (outcome,) = write_in_processes({"path": path, "ngff": ngff, "limit": limit})

        assert outcome.startswith("NO_SPACE:"), f"{limit} of {largest} bytes a file: {outcome}"
        assert names(tmp_path) == [], f"{limit} of {largest} bytes a file"

    assert write_in_processes({"path": path, "ngff": ngff, "limit": largest}) == ["written"]
    assert verify_store(path).ok


def test_an_existing_store_stays_until_a_new_one_is_whole(slide: ArrayReader, tmp_path: Path) -> None:
    path = tmp_path / "s.ome.zarr"
    tissue = tissue_at(slide)
    write_store(path, slide, mpp=1.0, tissue=tissue)
    before = (path / "manifest.json").read_bytes()

    def stop(done: int, total: int) -> None:
        assert (path / "manifest.json").read_bytes() == before
        raise KeyboardInterrupt

    with pytest.raises(StoreError, match="--overwrite"):
        write_store(path, slide, mpp=2.0, tissue=tissue)
    with pytest.raises(KeyboardInterrupt):
        write_store(path, slide, mpp=2.0, tissue=tissue, overwrite=True, progress=stop)
    assert (path / "manifest.json").read_bytes() == before
    assert verify_store(path).ok

    write_store(path, slide, mpp=2.0, tissue=tissue, overwrite=True)

    assert open_store(path).mpp == 2.0
    assert verify_store(path).ok
    assert names(tmp_path) == ["s.ome.zarr"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux swaps two folders in one step")
def test_at_no_moment_of_an_overwrite_is_there_no_store(slide: ArrayReader, tmp_path: Path) -> None:
    path = tmp_path / "s.ome.zarr"
    tissue = tissue_at(slide)
    write_store(path, slide, mpp=1.0, tissue=tissue)
    finished, missed = threading.Event(), []

    def watch() -> None:
        while not finished.is_set():
            if not (path / "manifest.json").exists():
                missed.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for mpp in (2.0, 1.0, 3.0):
        write_store(path, slide, mpp=mpp, tissue=tissue, overwrite=True)
    finished.set()
    watcher.join()

    assert not missed


def test_overwriting_works_where_the_system_cannot_swap_folders(
    slide: ArrayReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing.ctypes, "CDLL", lambda _: object())
    path = tmp_path / "s.ome.zarr"
    for mpp in (1.0, 2.0):
        write_store(path, slide, mpp=mpp, tissue=tissue_at(slide), overwrite=True)

    assert open_store(path).mpp == 2.0
    assert names(tmp_path) == ["s.ome.zarr"]


def test_a_store_set_aside_by_a_process_that_died_comes_back(slide: ArrayReader, tmp_path: Path) -> None:
    path = tmp_path / "s.ome.zarr"
    write_store(path, slide, mpp=1.0, tissue=tissue_at(slide))
    path.rename(tmp_path / ".s.ome.zarr.123-0a1b2c3d.aside")

    with pytest.raises(StoreError, match="exists"):
        write_store(path, slide, mpp=2.0, tissue=tissue_at(slide))

    assert open_store(path).mpp == 1.0
    assert names(tmp_path) == ["s.ome.zarr"]


# Damage


def flip(file: Path, chance: random.Random, folder: Path) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, chance: random.Random, folder: Path) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def empty(file: Path, chance: random.Random, folder: Path) -> None:
    os.truncate(file, 0)


def delete(file: Path, chance: random.Random, folder: Path) -> None:
    file.unlink()


def lengthen(file: Path, chance: random.Random, folder: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def swap(file: Path, chance: random.Random, folder: Path) -> None:
    content = file.read_bytes()
    others = sorted(other for other in folder.rglob("*") if other.is_file() and other.read_bytes() != content)
    # A chunk with another of its array, where there is one: both are what a reader expects there.
    row = [other for other in others if file.name.isdecimal() and other.parent == file.parent]
    other = chance.choice(row or others)
    theirs = other.read_bytes()
    other.write_bytes(content)
    file.write_bytes(theirs)


def add(file: Path, chance: random.Random, folder: Path) -> None:
    file.with_name(f"{file.name}-copy").write_bytes(b"x")


# Of the five kinds that are promised, flip to swap: 5 x 2 versions of NGFF x 100 = 1,000; and 400 of the two others.
@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", [flip, truncate, empty, delete, swap, lengthen, add])
@pytest.mark.parametrize("ngff", NGFF)
def test_every_injected_fault_is_found(
    tmp_path: Path, ngff: Ngff, damage: Callable[[Path, random.Random, Path], None], count: int
) -> None:
    slide = ArrayReader(scan(80, 6100), mpp=0.5)  # 4,178 px: several chunks in a row
    path = tmp_path / "s.ome.zarr"
    write_store(path, slide, mpp=0.73, tissue=tissue_at(slide), ngff=ngff, tile_size=128)
    sound = {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    seed = f"{ngff} {damage.__name__} {count}"
    chance = random.Random(seed)
    assert verify_store(path).ok

    for number in range(count):
        file = chance.choice(list(sound))
        damage(file, chance, path)

        report = verify_store(path)

        name = file.relative_to(path).as_posix()
        assert not report.ok, f"seed {seed!r}, fault {number}: {damage.__name__} of {name} passed"
        blamed = {problem.path for problem in report.problems}
        if store.MANIFEST not in blamed:
            assert name in blamed or f"{name}-copy" in blamed, f"seed {seed!r}, fault {number}: {blamed} for {name}"
        for other in path.rglob("*-copy"):
            other.unlink()
        for other, content in sound.items():
            if not other.exists() or other.read_bytes() != content:
                other.write_bytes(content)
    assert verify_store(path).ok


def test_each_kind_of_damage_has_its_name(slide: ArrayReader, tmp_path: Path) -> None:
    path = tmp_path / "s.ome.zarr"
    write_store(path, slide, mpp=1.0, tissue=tissue_at(slide))
    os.truncate(path / "0/c/0/0/0", 1000)
    os.truncate(path / "1/c/0/0/0", 0)
    (path / "labels/tissue/0/c/0/0").unlink()
    (path / "tiles/x/zarr.json").write_bytes((path / "tiles/x/zarr.json").read_bytes().replace(b"int64", b"int32"))
    (path / "notes.txt").write_text("mine")

    problems = {problem.path: problem.kind for problem in verify_store(path).problems}

    assert problems == {
        "0/c/0/0/0": "truncated",
        "1/c/0/0/0": "zero_length",
        "labels/tissue/0/c/0/0": "missing",
        "tiles/x/zarr.json": "altered",
        "notes.txt": "unexpected",
    }


def test_a_store_without_its_manifest_is_not_whole(slide: ArrayReader, tmp_path: Path) -> None:
    write_store(tmp_path / "s", slide, mpp=1.0, tissue=tissue_at(slide))
    (tmp_path / "s" / "manifest.json").unlink()

    (problem,) = verify_store(tmp_path / "s").problems

    assert (problem.path, problem.kind) == ("manifest.json", "missing")


def test_a_store_of_another_schema_is_an_error_that_says_so(
    slide: ArrayReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr(store, "SCHEMA", 2)
        write_store(tmp_path / "s", slide, mpp=1.0, tissue=tissue_at(slide))

    for look in (open_store, verify_store):
        with pytest.raises(StoreError, match="schema 2") as caught:
            look(tmp_path / "s")
        assert caught.value.code == "SCHEMA"


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    zarr.open_group(tmp_path / "other.zarr", mode="w")

    def code(look: Callable[[Path], object], path: Path) -> str:
        with pytest.raises(WsiscaleError) as caught:
            look(path)
        return caught.value.code

    assert code(open_store, tmp_path / "nowhere") == "NOT_FOUND"
    assert code(open_store, tmp_path / "folder") == "NOT_FOUND"
    assert code(open_store, tmp_path / "other.zarr") == "NOT_A_STORE"
    assert code(verify_store, tmp_path / "nowhere") == "NOT_FOUND"


def test_reading_damaged_pixels_is_an_error_not_other_pixels(slide: ArrayReader, tmp_path: Path) -> None:
    path = tmp_path / "s.ome.zarr"
    write_store(path, slide, mpp=1.0, tissue=tissue_at(slide))
    shard = path / "0/c/0/0/0"
    sound = shard.read_bytes()
    chance = random.Random(0)
    for _ in range(20):
        flip(shard, chance, path)

        with pytest.raises(StoreError, match="verify"):
            whole(path)
        shard.write_bytes(sound)


# Documentation


def test_the_documented_way_to_read_a_store_works(slide: ArrayReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "output-format.md").read_text()
    example = re.search(r"## Reading it\n```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    write_store("slide.ome.zarr", slide, mpp=0.73, tissue=tissue_at(slide))

    exec(example[1], {})


def test_the_documentation_names_every_attribute_and_column(written: dict[Ngff, Path]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "output-format.md").read_text()
    opened = open_store(written["0.5"])

    assert not [name for name in [*opened.attributes, *opened.tile_table] if f"`{name}`" not in page]


# Memory


MEMORY = """
import re, sys
import numpy as np
from wsiscale.readers.array import ArrayReader
from wsiscale.store import write_store
from wsiscale.types import Pyramid, Tissue

class Vast(ArrayReader):
    pyramid = Pyramid(((100_000, 100_000),), (1.0,), 0.25)

    def read(self, *, level, y, x, height, width):
        return np.broadcast_to(np.uint8(y // 1000), (height, width, 3)).copy()

slide = Vast(np.zeros((1, 1, 3), np.uint8), mpp=0.25)
mask = np.zeros((1000, 1000), bool)
mask[600:700, 200:350] = True
write_store(sys.argv[1], slide, mpp=float(sys.argv[2]), tissue=Tissue(mask, 100, (100_000, 100_000), 0.25), threads=2)
# Not ru_maxrss, in which a forked child begins with its parent's peak.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.parametrize("mpp", [0.61, 4.0])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak of memory")
def test_a_vast_slide_of_one_level_needs_a_few_hundred_megabytes(tmp_path: Path, mpp: float) -> None:
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "s"), str(mpp)]

    megabytes = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert megabytes < 700  # 150 to 200 of them are Python's, numpy's and zarr's own


# Stacks


def scale_stack_of(places: int, *, slide_mpp: float | None = 0.25) -> ScaleStack:
    rng = np.random.default_rng(3)
    images = rng.integers(0, 255, (places, 3, 16, 16, 3), np.uint8)
    return ScaleStack(
        images=da.from_array(images, chunks=(1, 3, 16, 16, 3)),
        scales=np.array([1.0, 2.0, 3.5]),
        centers=rng.uniform(0, 1000, (places, 2)),
        slide_mpp=slide_mpp,
        source_level=0,
        upsampled=np.array([False, False, False]),
    )


def through(place: Callable[..., NDArray[np.uint8]], stack: ScaleStack) -> ScaleStack:
    """The stack with `place` called for each block when it is computed."""
    return replace(stack, images=stack.images.map_blocks(place, dtype=np.uint8, meta=np.empty((0,) * 5, np.uint8)))


def test_a_stack_comes_back_with_its_names_and_coordinates(tmp_path: Path) -> None:
    stack = scale_stack_of(5)

    summary = write_stack(tmp_path / "stack.zarr", stack, source=ArrayReader(scan(9, 9), name="a.svs").source, threads=2)

    group = zarr.open_group(tmp_path / "stack.zarr", mode="r")
    assert summary.shape == (5, 3, 16, 16, 3)
    assert group["images"].metadata.dimension_names == ("place", "scale", "y", "x", "rgb")
    assert group["centers"].metadata.dimension_names == ("place", "yx")
    np.testing.assert_array_equal(group["images"][:], stack.images.compute())
    np.testing.assert_array_equal(group["scales"][:], stack.scales)
    np.testing.assert_array_equal(group["mpp"][:], stack.mpp)
    np.testing.assert_array_equal(group["centers"][:], stack.centers)
    assert group.attrs.asdict()["wsiscale"]["slide"]["name"] == "a.svs"
    assert verify_store(tmp_path / "stack.zarr").ok
    with pytest.raises(StoreError, match="scale stack"):
        open_store(tmp_path / "stack.zarr")


def test_a_stack_of_unknown_mpp_has_scales_alone(tmp_path: Path) -> None:
    write_stack(tmp_path / "stack.zarr", scale_stack_of(2, slide_mpp=None))

    arrays = [name for name in names(tmp_path / "stack.zarr") if (tmp_path / "stack.zarr" / name).is_dir()]
    assert arrays == ["centers", "images", "scales", "upsampled"]


def test_a_stack_is_computed_a_few_places_at_a_time(tmp_path: Path) -> None:
    held, most, total = 0, 0, 0
    lock = threading.Lock()

    def place(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
        nonlocal held, most, total
        with lock:
            held, total = held + 1, total + 1
            most = max(most, held)
        time.sleep(0.005)
        return block

    def written(done: int, count: int) -> None:
        nonlocal held
        held = 0

    stack = scale_stack_of(11)
    lazy = ScaleStack(
        **{**vars(stack), "images": stack.images.map_blocks(place, dtype=np.uint8, meta=np.empty((0,) * 5, np.uint8))}
    )

    write_stack(tmp_path / "stack.zarr", lazy, threads=3, progress=written)

    assert most == 3
    assert total == 11


def test_a_stack_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def place(block: NDArray[np.uint8], block_info: Any = None) -> NDArray[np.uint8]:
        if block_info[None]["chunk-location"][0] == 3:
            raise SlideError("a tile is damaged")
        return block

    stack = scale_stack_of(5)
    lazy = ScaleStack(
        **{**vars(stack), "images": stack.images.map_blocks(place, dtype=np.uint8, meta=np.empty((0,) * 5, np.uint8))}
    )

    with pytest.raises(SlideError):
        write_stack(tmp_path / "stack.zarr", lazy, threads=2)
    assert names(tmp_path) == []
