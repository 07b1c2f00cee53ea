"""Slide files as pixels: every reader keeps the contract, and what is no slide is refused by name."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiscale.errors import OptionError, SlideError
from wsiscale.geometry import View
from wsiscale.readers import ArrayReader, compatible, open_slide
from wsiscale.readers.files import FileReader
from wsiscale.readers.jpegtiff import JpegTiffFastReader, JpegTiffReader
from wsiscale.readers.openslide import OpenSlideReader
from wsiscale.readers.tiffslide import TiffSlideReader
from wsiscale.readers.tiffslide import _location as location
from wsiscale.testing import ReaderContract, where_am_i, whereabouts
from wsiscale.testing.procedural import tissue
from wsiscale.testing.slides import area_mean, write_svs
from wsiscale.types import Reader
from wsiscale.views import read_view

# Odd sides: the levels' sizes are rounded down, and OpenSlide takes their downsamples for 2.0024 and 4.0076.
HEIGHT, WIDTH = 701, 1003


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return where_am_i(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def svs(image: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "where am I, µ.svs"
    write_aperio(path, [area_mean(image, factor) for factor in (1, 2, 4)])
    return path


class TestArrayReader(ReaderContract):
    @pytest.fixture
    def reader(self, image: np.ndarray) -> Reader:
        return ArrayReader([area_mean(image, factor) for factor in (1, 2, 4)], mpp=0.25)

    @pytest.fixture
    def truth(self, image: np.ndarray) -> np.ndarray:
        return image


class TestOpenSlideReader(ReaderContract):
    # OpenSlide answers between pixels, rounded; undoing that gives each pixel to within some grey levels.
    rounding = 5
    tolerance = 4.0

    @pytest.fixture
    def reader(self, svs: Path) -> Reader:
        return OpenSlideReader(svs)

    @pytest.fixture
    def truth(self, image: np.ndarray) -> np.ndarray:
        return image


class TestTiffSlideReader(ReaderContract):
    @pytest.fixture
    def reader(self, svs: Path) -> Reader:
        return TiffSlideReader(svs)

    @pytest.fixture
    def truth(self, image: np.ndarray) -> np.ndarray:
        return image


class TestJpegTiffReader(ReaderContract):
    @pytest.fixture
    def reader(self, svs: Path) -> Reader:
        return JpegTiffReader(svs)

    @pytest.fixture
    def truth(self, image: np.ndarray) -> np.ndarray:
        return image


class TestDicomReader(ReaderContract):
    """The same tiles as in the SVS, so that OpenSlide's pixels are the truth."""

    @pytest.fixture
    def reader(self, real_data: Path) -> Reader:
        pytest.importorskip("wsidicom")
        return open_slide(real_data / "slides" / "dicom_CMU-1-Small-Region")

    @pytest.fixture
    def truth(self, real_data: Path) -> np.ndarray:
        with openslide.OpenSlide(real_data / "slides" / "CMU-1-Small-Region.svs") as slide:
            return np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]


class Swapped(ArrayReader):
    def read(self, *, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        return super().read(level=level, y=x, x=y, height=width, width=height).swapaxes(0, 1)


class Misplaced(ArrayReader):
    def read(self, *, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        return super().read(level=level, y=y, x=x + (level == 1), height=height, width=width)


class Interpolated(ArrayReader):
    """Level 1 lies a quarter of a pixel off, as OpenSlide's does where its downsample is not whole."""

    def read(self, *, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        here = super().read(level=level, y=y, x=x, height=height, width=width)
        there = super().read(level=level, y=y, x=x + 1, height=height, width=width)
        return here if level != 1 else (0.75 * here + 0.25 * there).astype(np.uint8)


class BlackOutside(ArrayReader):
    def read(self, *, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        pixels = super().read(level=level, y=y, x=x, height=height, width=width)
        shape = self.pyramid.shapes[level]
        rows, columns = np.arange(y, y + height)[:, None], np.arange(x, x + width)
        pixels[(rows < 0) | (rows >= shape[0]) | (columns < 0) | (columns >= shape[1])] = 0
        return pixels


class BlackEdge(ArrayReader):
    """Only the last column of the coarsest level is black."""

    def __init__(self, levels: Sequence[np.ndarray]) -> None:
        *finer, coarsest = levels
        coarsest = coarsest.copy()
        coarsest[:, -1] = 0
        super().__init__([*finer, coarsest])


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (Swapped, "test_level_0_is_exact_and_white_outside"),
        (Swapped, "test_every_level_shows_the_same_places"),
        (Misplaced, "test_every_level_shows_the_same_places"),
        (Interpolated, "test_every_level_shows_the_same_places"),
        (BlackOutside, "test_level_0_is_exact_and_white_outside"),
        (BlackOutside, "test_every_level_is_white_outside"),
        (BlackEdge, "test_every_level_shows_the_same_places"),
    ],
)
def test_the_contract_catches_a_broken_reader(broken: type[ArrayReader], promise: str, image: np.ndarray) -> None:
    levels = [area_mean(image, factor) for factor in (1, 2, 4)]
    check = getattr(ReaderContract(), promise)
    given = {"reader": broken(levels)} | ({} if promise.endswith("level_is_white_outside") else {"truth": image})

    check(**given | {"reader": ArrayReader(levels)})
    with pytest.raises(AssertionError):
        check(**given)


def test_every_pixel_says_where_it_is() -> None:
    image = where_am_i(300, 4096)
    places = whereabouts(image)

    assert (places[..., 0] == np.arange(300)[:, None]).all()
    assert (places[..., 1] == np.arange(4096)).all()
    with pytest.raises(OptionError, match="4096"):
        where_am_i(4097, 1)


# Opening


def test_auto_reads_the_tiles_itself_and_takes_openslides_words_on_scale(svs: Path) -> None:
    with open_slide(svs) as slide:
        assert slide.source.reader == "jpegtiff"
        assert slide.source.vendor == "aperio"
        assert slide.source.name == svs.name
        assert slide.source.size == svs.stat().st_size
        assert slide.pyramid.downsamples == (1.0, 2.0, 4.0)
        assert (slide.calibration.mpp, slide.calibration.tag) == (0.25, "aperio.MPP")


def test_the_users_mpp_reaches_the_pyramid(svs: Path) -> None:
    for reader in ("jpegtiff", "openslide", "tiffslide"):
        with open_slide(svs, mpp=0.5, reader=reader) as slide:
            assert slide.pyramid.mpp == slide.calibration.mpp == 0.5
            assert slide.calibration.source == "override"
            assert slide.calibration.claimed == 0.25


def test_arrays_and_open_slides_are_taken_as_they_are(image: np.ndarray) -> None:
    slide = open_slide(image, mpp=0.5)

    assert isinstance(slide, ArrayReader)
    assert slide.pyramid.mpp == 0.5
    assert open_slide(slide) is slide
    with pytest.raises(OptionError, match="open already"):
        open_slide(slide, mpp=0.25)


def test_an_ome_tiff_goes_to_tiffslide_because_openslide_loses_its_levels_and_its_scale(
    image: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        physical = {"PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.0005, "PhysicalSizeYUnit": "mm"}
        options = {"tile": (128, 128), "photometric": "rgb", "compression": "lzw"}
        file.write(image, subifds=2, metadata={"axes": "YXS", **physical}, **options)
        for factor in (2, 4):
            file.write(area_mean(image, factor), subfiletype=1, **options)

    with open_slide(path) as slide, open_slide(path, reader="openslide") as poorer:
        assert slide.source.reader == "jpegtiff"
        assert slide.pyramid.downsamples == (1.0, 2.0, 4.0)
        assert slide.pyramid.mpp == pytest.approx(0.5)
        assert slide.calibration.tag == "ome.PhysicalSizeX"
        np.testing.assert_array_equal(
            slide.read(level=2, y=3, x=5, height=90, width=70), area_mean(image, 4)[3 : 3 + 90, 5 : 5 + 70]
        )
        assert len(poorer.pyramid.shapes) == 1


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
@pytest.mark.parametrize(
    ("resolution", "unit", "mpp", "verdict"),
    [
        ((20_000, 20_000), "CENTIMETER", 0.5, "trusted"),
        ((50_800, 50_800), "INCH", 0.5, "trusted"),
        ((72, 72), "INCH", None, "refused"),
        ((20_000, 10_000), "CENTIMETER", None, "refused"),
        ((20_000, 20_000), "NONE", None, "missing"),
    ],
)
def test_the_resolution_tag_gives_the_scale_where_nothing_else_does(
    reader: str, resolution: tuple[int, int], unit: str, mpp: float | None, verdict: str, image: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "plain.tif"
    tifffile.imwrite(path, image, tile=(128, 128), photometric="rgb", resolution=resolution, resolutionunit=unit)

    with open_slide(path, reader=reader) as slide:
        assert slide.calibration.mpp == mpp
        assert slide.calibration.verdict == verdict
        if verdict != "missing":
            assert slide.calibration.tag == "tiff.XResolution"
        if resolution[0] == 72:
            assert slide.calibration.reasons == ("dpi_default",)


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
def test_the_canvas_of_a_scan_with_bounds_is_kept_and_white_around_it(reader: str, tmp_path: Path) -> None:
    scan = where_am_i(320, 480)
    path = tmp_path / "leica.scn"
    write_leica(path, scan, top=161, left=67, canvas=(640, 960))

    with open_slide(path, reader=reader) as slide:
        assert slide.pyramid.shape == (640, 960)
        assert slide.pyramid.bounds == slide.pyramid.scanned == (161, 67, 320, 480)
        assert slide.calibration.mpp == pytest.approx(0.25)
        canvas = slide.read(level=0, y=0, x=0, height=640, width=960)
        coarse = slide.read(level=1, y=0, x=0, height=160, width=240)

    np.testing.assert_array_equal(canvas[161 : 161 + 320, 67 : 67 + 480], scan)
    canvas[161 : 161 + 320, 67 : 67 + 480] = 255
    assert (canvas == 255).all()
    assert (coarse[:40] == 255).all()
    assert (coarse[122:] == 255).all()
    assert (coarse[41:120, 17:136] != 255).any(axis=2).all()


def test_nothing_of_the_patient_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "leica.scn"
    write_leica(path, where_am_i(320, 480), top=160, left=64, canvas=(640, 960))

    with open_slide(path) as slide:
        known = pickle.dumps(slide) + repr(vars(slide)).encode()

    assert b"Doe" in path.read_bytes()
    assert b"Doe" not in known


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
def test_transparent_pixels_are_composed_on_white(reader: str, tmp_path: Path) -> None:
    straight = np.zeros((256, 256, 4), np.uint8)
    straight[..., 0] = 200
    straight[..., 3] = np.arange(256)  # from transparent on the left to opaque on the right
    path = tmp_path / "alpha.tif"
    tifffile.imwrite(path, straight, tile=(128, 128), photometric="rgb", extrasamples=["unassalpha"])

    with open_slide(path, reader=reader) as slide:
        pixels = slide.read(level=0, y=0, x=0, height=256, width=256)

    alpha = np.arange(256)[:, None] / 255
    expected = alpha * [200, 0, 0] + (1 - alpha) * 255
    assert np.abs(pixels[7] - expected).max() <= 3  # OpenSlide multiplies and divides by alpha in 8 bits


@pytest.mark.parametrize("reader", ["jpegtiff", "openslide", "tiffslide"])
def test_a_tile_that_was_not_scanned_is_white(reader: str, image: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "sparse.svs"
    write_aperio(path, [image])
    patch_tags(path, {325: lambda counts: (0, *counts[1:])})  # TileByteCounts

    with open_slide(path, reader=reader) as slide:
        pixels = slide.read(level=0, y=0, x=0, height=256, width=512)

    assert (pixels[:, :256] == 255).all()
    np.testing.assert_array_equal(pixels[:, 256:], image[:256, 256:512])


@pytest.mark.parametrize(
    ("photometric", "compression", "more"),
    [
        ("rgb", None, {}),
        ("rgb", "lzw", {"predictor": 2}),
        ("rgb", "adobe_deflate", {}),
        ("rgb", "jpeg", {"compressionargs": {"level": 90}}),  # YCbCr inside, 4:2:0
        ("rgb", "jpeg", {"compressionargs": {"level": 90, "outcolorspace": "rgb"}, "subsampling": (1, 1)}),
        ("ycbcr", "jpeg", {"compressionargs": {"level": 90}, "subsampling": (2, 1)}),
        ("rgb", "jpeg2000", {}),
    ],
)
def test_tiles_of_every_codec_are_what_the_compatibility_reader_shows(
    photometric: str, compression: str | None, more: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "slide.tif"
    image = area_mean(where_am_i(900, 1100), 2)  # ragged at both edges
    tifffile.imwrite(path, image, tile=(128, 256), photometric=photometric, compression=compression, **more)

    with JpegTiffReader(path) as ours, compatible(path) as theirs:
        window = {"level": 0, "y": -5, "x": 3, "height": image.shape[0] + 9, "width": image.shape[1]}
        np.testing.assert_array_equal(ours.read(**window), theirs.read(**window))


@pytest.mark.parametrize(
    ("photometric", "more", "most"),
    [
        ("rgb", {"compressionargs": {"level": 90}}, 0.8),  # YCbCr inside, 4:2:0
        ("rgb", {"compressionargs": {"level": 90, "outcolorspace": "rgb"}, "subsampling": (1, 1)}, 0.8),
        ("ycbcr", {"compressionargs": {"level": 90}, "subsampling": (2, 1)}, 3.5),
    ],
)
def test_fast_has_levels_in_between_that_are_nearly_the_mean(
    photometric: str, more: dict[str, Any], most: float, tmp_path: Path
) -> None:
    path = tmp_path / "slide.tif"
    image, _ = tissue(1001, 1203, mpp=0.25, seed=3)
    tifffile.imwrite(path, image, tile=(256, 240), photometric=photometric, compression="jpeg", **more)

    with JpegTiffFastReader(path) as fast, JpegTiffReader(path) as exact:
        assert fast.source.reader == "jpegtiff-fast"
        assert fast.pyramid.downsamples == (1, 2, 4, 8)
        assert fast.pyramid.shapes == ((1001, 1203), (501, 602), (251, 301), (126, 151))
        full = exact.read(level=0, y=0, x=0, height=1001, width=1203)
        np.testing.assert_array_equal(fast.read(level=0, y=0, x=0, height=1001, width=1203), full)
        for level, factor in ((1, 2), (2, 4), (3, 8)):
            truth = area_mean(full, factor).astype(int)
            off = fast.read(level=level, y=0, x=0, height=len(truth), width=truth.shape[1]) - truth

            assert np.abs(off).mean() < most  # half a pixel aside makes 4 and more, 13 at an eighth
            assert np.abs(off.mean(axis=(0, 1))).max() < most


def test_fast_fills_the_gaps_between_a_slides_own_levels(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    write_svs(path, tissue(1100, 900, mpp=0.25, seed=1)[0], mpp=0.25, power=40, levels=(1, 4, 16))

    with JpegTiffReader(path) as exact, JpegTiffFastReader(path) as fast:
        assert fast.pyramid.downsamples == (1, 2, 4, 8, 16, 32, 64, 128)
        own = [fast.pyramid.shapes[k] for k in (0, 2, 4)]
        assert own == list(exact.pyramid.shapes)
        np.testing.assert_array_equal(*(r.read(level=k, y=9, x=30, height=60, width=50) for r, k in ((exact, 1), (fast, 2))))


def test_fast_refuses_what_it_cannot_make_faster(svs: Path) -> None:
    with pytest.raises(SlideError, match="no level is stored as JPEG tiles"):
        open_slide(svs, reader="jpegtiff-fast")


def test_fast_notices_a_jpeg_tile_that_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, tissue(512, 512, mpp=0.25, seed=1)[0], tile=(256, 256), photometric="rgb", compression="jpeg")
    patch_tags(path, {325: lambda counts: (counts[0] // 2, *counts[1:])})  # TileByteCounts

    with JpegTiffFastReader(path) as slide:
        with pytest.raises(SlideError, match="level 1") as caught:
            slide.read(level=1, y=0, x=0, height=10, width=10)
        slide.read(level=1, y=0, x=128, height=10, width=10)

    assert caught.value.code == "READ_FAILED"


def write_strips(path: Path) -> None:
    tifffile.imwrite(path, where_am_i(300, 400), photometric="rgb", rowsperstrip=64)


def write_alpha(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((256, 256, 4), np.uint8), tile=(128, 128), photometric="rgb", extrasamples=["unassalpha"])


def write_sparse_level(path: Path) -> None:
    write_aperio(path, [where_am_i(1024, 1024), area_mean(where_am_i(1024, 1024), 2)])
    patch_tags(path, {325: lambda counts: (0, *counts[1:])}, tiled=1)  # OpenSlide makes such a tile of the finer level


@pytest.mark.parametrize("make", [write_strips, write_alpha, write_sparse_level])
def test_what_is_no_plain_grid_of_tiles_stays_with_the_compatibility_readers(make, tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    make(path)

    with pytest.raises(SlideError):
        open_slide(path, reader="jpegtiff")
    with open_slide(path) as slide:
        assert slide.source.reader in ("openslide", "tiffslide")


def test_a_tile_is_decoded_once_while_it_is_remembered(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: (read.append(offset), pread(file, size, offset))[1])
    with JpegTiffReader(svs) as slide:
        for y in range(0, 500, 50):
            slide.read(level=0, y=y, x=0, height=60, width=500)

    assert len(read) == len(set(read)) > 2


# Refusals


def junk(path: Path) -> None:
    path.write_bytes(b"not a slide " * 1000)


def truncated_header(path: Path) -> None:
    path.write_bytes(b"II*\0" + struct.pack("<I", 1 << 30))


def gray_16(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((256, 256), np.uint16), tile=(128, 128), photometric="minisblack")


def gray_8(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((256, 256), np.uint8), tile=(128, 128), photometric="minisblack")


def rgb_16(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((256, 256, 3), np.uint16), tile=(128, 128), photometric="rgb")


def five_channels(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((5, 256, 256), np.uint8), tile=(128, 128), photometric="minisblack", ome=True)


def huge_tile(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((256, 256, 3), np.uint8), tile=(128, 128), photometric="rgb")
    patch_tags(path, {323: lambda _: (2_100_000_000,)})  # TileLength: this one aborts the process inside OpenSlide


def unknown_compression(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((256, 256, 3), np.uint8), tile=(128, 128), photometric="rgb", compression="lzw")
    patch_tags(path, {259: lambda _: (65_123,)})


@pytest.mark.parametrize("reader", ["auto", "jpegtiff", "openslide", "tiffslide"])
@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (lambda path: None, "NOT_FOUND", "does not exist"),
        (lambda path: path.mkdir(), "IS_DIRECTORY", "folder"),
        (lambda path: path.touch(), "EMPTY", "0 bytes"),
        (junk, "NOT_A_SLIDE", "(?i)openslide|tiff"),
        (truncated_header, "NOT_A_SLIDE", "broken TIFF header"),
        (gray_16, "NOT_RGB8", "uint16 MINISBLACK"),
        (gray_8, "NOT_RGB8", "uint8 MINISBLACK"),
        (rgb_16, "NOT_RGB8", "uint16 RGB"),
        (five_channels, "NOT_RGB8", "MINISBLACK"),
        (huge_tile, "TOO_LARGE", "2100000000.*16384"),
        (unknown_compression, "UNSUPPORTED_COMPRESSION", "65123"),
    ],
)
def test_what_is_no_slide_is_refused_by_name_in_one_line(reader: str, make, code: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    make(path)

    with pytest.raises(SlideError, match=said) as caught:
        open_slide(path, reader=reader)

    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    assert "slide.tif" in str(caught.value)


def test_an_unknown_reader_is_a_usage_error(svs: Path) -> None:
    with pytest.raises(OptionError, match="openslide, tiffslide, dicom") as caught:
        open_slide(svs, reader="bioformats")

    assert caught.value.code == "BAD_OPTION"


def test_a_codec_that_openslide_lacks_is_named_and_auto_finds_the_reader_that_has_it(image: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    options = {"compression": "jpeg2000", "compressionargs": {"reversible": True, "level": 0}}
    tifffile.imwrite(path, image, tile=(128, 128), photometric="rgb", **options)

    with pytest.raises(SlideError, match=r"34712.*tiffslide") as caught:
        open_slide(path, reader="openslide")
    with open_slide(path) as slide:
        assert slide.source.reader == "jpegtiff"
        np.testing.assert_array_equal(slide.read(level=0, y=0, x=0, height=HEIGHT, width=WIDTH), image)
    assert caught.value.code == "UNSUPPORTED_COMPRESSION"


def test_a_missing_extra_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "slide.dcm").write_bytes(bytes(128) + b"DICM")
    code = (
        "import sys; sys.modules['wsidicom'] = None\n"
        "from wsiscale.readers import open_slide\n"
        "from wsiscale.errors import SlideError\n"
        "try: open_slide(sys.argv[1])\n"
        "except SlideError as error: print(error.code, error)\n"
    )

    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout

    assert said.startswith("MISSING_EXTRA")
    assert "pip install 'wsiscale[dicom]'" in said


def test_finding_a_reader_needs_no_native_library_until_a_slide_is_opened() -> None:
    code = "import sys, wsiscale.readers; print({'openslide', 'tiffslide', 'tifffile', 'wsidicom', 'torch'} & set(sys.modules))"

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert said.strip() == "set()"


# Damage


@pytest.fixture(scope="module")
def damaged(image: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide whose tile of rows and columns 256 to 512 is broken; deflate notices, where JPEG and LZW seldom do."""
    path = tmp_path_factory.mktemp("damaged") / "damaged.svs"
    write_aperio(path, [image], compression="adobe_deflate")
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        tile = page.dataoffsets[-(-WIDTH // 256) + 1]
    with path.open("r+b") as file:
        file.seek(tile)
        file.write(b"\xff" * 64)
    return path


@pytest.mark.parametrize("reader", ["jpegtiff", "openslide", "tiffslide"])
def test_a_broken_tile_is_an_error_and_the_rest_stays_readable(
    reader: str, damaged: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_openings(monkeypatch, OpenSlideReader)
    # jpegtiff knows which tile it was.
    place = "256 x 256 px at (y, x) = (256, 256)" if reader == "jpegtiff" else "64 x 32 px at (y, x) = (300, 310)"
    with open_slide(damaged, reader=reader) as slide:
        opened.clear()
        for _ in range(2):
            with pytest.raises(SlideError, match=re.escape(f"level 0, {place}")) as caught:
                slide.read(level=0, y=300, x=310, height=64, width=32)
            for _ in range(3):
                after = slide.read(level=0, y=0, x=0, height=256, width=WIDTH)

            assert caught.value.code == "READ_FAILED"
            np.testing.assert_array_equal(after, image[:256])

    # OpenSlide's handle fails for ever after an error: one more to make sure of it, and one for all that follows.
    assert len(opened) == (4 if reader == "openslide" else 0)


@pytest.mark.parametrize("reader", ["jpegtiff", "openslide"])
def test_a_broken_tile_fails_no_other_thread(reader: str, damaged: Path, image: np.ndarray) -> None:
    def read(number: int) -> str:
        if number % 4 == 0:
            with pytest.raises(SlideError):
                slide.read(level=0, y=300, x=310, height=64, width=32)
            return "broken"
        pixels = slide.read(level=0, y=10 * (number % 16), x=500, height=64, width=300)
        return "sound" if (pixels == image[10 * (number % 16) :][:64, 500:800]).all() else "wrong"

    with open_slide(damaged, reader=reader) as slide, ThreadPoolExecutor(4) as threads:
        ends = list(threads.map(read, range(80)))

    assert ends.count("broken") == 20
    assert ends.count("sound") == 60


@pytest.mark.parametrize("reader", ["jpegtiff", "openslide", "tiffslide"])
def test_a_tile_beyond_the_end_of_a_truncated_slide_is_an_error_never_black(
    reader: str, image: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "cut.svs"
    write_aperio(path, [image, area_mean(image, 4)])
    size = path.stat().st_size
    patch_tags(path, {324: lambda offsets: (*offsets[:-1], size - 10)})  # TileOffsets

    with open_slide(path, reader=reader) as slide:
        with pytest.raises(SlideError) as caught:
            slide.read(level=0, y=HEIGHT - 20, x=WIDTH - 20, height=20, width=20)
        np.testing.assert_array_equal(slide.read(level=0, y=0, x=0, height=256, width=256), image[:256, :256])

    assert caught.value.code == "READ_FAILED"


# Pickles and processes


@pytest.mark.parametrize("kind", [JpegTiffReader, OpenSlideReader, TiffSlideReader])
def test_unpickling_opens_nothing_and_a_process_has_one_reader_of_a_slide(
    kind: type[FileReader[Any]], svs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_openings(monkeypatch, kind)
    with kind(svs) as reader, kind(svs, mpp=0.5) as other:
        pickled, pickled_other = pickle.dumps(reader), pickle.dumps(other)
    opened.clear()

    first, second, different = pickle.loads(pickled), pickle.loads(pickled), pickle.loads(pickled_other)

    assert first is second
    assert different is not first
    assert different.pyramid.mpp == 0.5
    assert opened == []
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda y: first.read(level=0, y=y, x=0, height=8, width=8), range(64)))
    assert opened == [str(svs)]
    first.close()
    first.read(level=0, y=0, x=0, height=8, width=8)
    assert opened == [str(svs)] * 2
    first.close()


def test_levels_in_between_are_there_when_a_slide_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    write_svs(path, tissue(600, 600, mpp=0.25, seed=1)[0], mpp=0.25, power=40, levels=(1,))
    with JpegTiffFastReader(path) as slide:
        before = slide.read(level=2, y=5, x=5, height=90, width=80)
    again = pickle.loads(pickle.dumps(slide))

    np.testing.assert_array_equal(again.read(level=2, y=5, x=5, height=90, width=80), before)
    again.close()


def test_a_pickle_holds_no_pixels(svs: Path) -> None:
    with open_slide(svs) as slide:
        slide.read(level=0, y=0, x=0, height=512, width=512)

        assert len(pickle.dumps(slide)) < 2000


def test_another_process_sees_the_same_pixels(svs: Path) -> None:
    window = {"level": 1, "y": -3, "x": 200, "height": 50, "width": 60}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        for reader in ("jpegtiff", "openslide", "tiffslide"):
            with open_slide(svs, reader=reader) as slide:
                there = processes.submit(slide.read, **window).result()

                np.testing.assert_array_equal(there, slide.read(**window))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("reader", ["jpegtiff", "openslide", "tiffslide"])
def test_a_forked_process_opens_the_slide_for_itself(reader: str, svs: Path, image: np.ndarray) -> None:
    # Parent and child share the position of an open file; reading through one handle mixes up their tiles.
    with open_slide(svs, reader=reader) as slide:
        slide.read(level=0, y=0, x=0, height=8, width=8)
        with slide._lock:  # as another thread of the parent may hold it at that moment
            child = os.fork()
            if child == 0:
                same = [(slide.read(level=0, y=y, x=0, height=9, width=500) == image[y : y + 9, :500]).all() for y in range(60)]
                os._exit(0 if all(same) else 1)
        mine = [(slide.read(level=0, y=y, x=0, height=9, width=500) == image[y : y + 9, :500]).all() for y in range(60)]
        _, status = os.waitpid(child, 0)

    assert all(mine)
    assert os.waitstatus_to_exitcode(status) == 0


# Displacement


@pytest.mark.parametrize("level", [1, 2])
def test_openslides_interpolation_between_levels_is_undone(level: int, svs: Path, image: np.ndarray) -> None:
    # OpenSlide takes 2.0024 for the downsample and divides integers by it: at the far end it answers a quarter pixel off.
    truth = area_mean(image, 2**level)
    height, width = truth.shape[:2]
    with OpenSlideReader(svs) as slide:
        ours = slide.read(level=level, y=0, x=0, height=height, width=width)
        parts = [
            slide.read(level=level, y=y, x=x, height=40, width=40).astype(int) - truth[y : y + 40, x : x + 40]
            for y in range(0, height - 40, 13)
            for x in range(0, width - 40, 17)
        ]
    with openslide.OpenSlide(svs) as raw:
        downsample = raw.level_downsamples[level]
        theirs = [
            np.asarray(raw.read_region((round(x * downsample), 0), level, (40, 40)))[..., :3].astype(int)
            - truth[:40, x : x + 40]
            for x in range(0, width - 40, 17)
        ]

    np.testing.assert_array_equal(ours, truth)
    assert np.abs(parts).max() <= 4
    assert np.abs(parts).mean() < 0.5
    assert np.abs(theirs).max() > 20  # what there is to undo


# Real slides

REAL = [
    ("CMU-1-Small-Region.svs", "jpegtiff", 0.499, "trusted", ()),
    ("CMU-1-Small-Region.jpeg.tiff", "jpegtiff", None, "refused", ("out_of_range",)),
    ("CMU-1-Small-Region.webp.tiff", "jpegtiff", None, "refused", ("out_of_range",)),
    ("CMU-1-Small-Region.jp2.tiff", "jpegtiff", None, "refused", ("out_of_range",)),
    ("OS-1-detail.ome.tif", "jpegtiff", 0.2271, "trusted", ()),
    ("TCGA-CR-7395-01A-01-TS1.svs", "jpegtiff", None, "missing", ()),
    ("test3-DAPI-2-(387).ndpi", "openslide", 0.22818, "trusted", ()),
    ("kidney-48-5.tif", "tiffslide", None, "missing", ()),
    ("dicom_CMU-1-Small-Region", "dicom", 0.499, "trusted", ()),
]


@pytest.mark.parametrize(("name", "reader", "mpp", "verdict", "reasons"), REAL, ids=[row[0] for row in REAL])
def test_a_real_slide_opens_and_its_scale_is_judged(
    name: str, reader: str, mpp: float | None, verdict: str, reasons: tuple[str, ...], real_data: Path
) -> None:
    with open_slide(real_data / "slides" / name) as slide:
        corner = slide.read(level=len(slide.pyramid.shapes) - 1, y=-10, x=-10, height=50, width=40)

        assert slide.source.reader == reader
        assert slide.calibration.mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-4))
        assert (slide.calibration.verdict, slide.calibration.reasons) == (verdict, reasons)
        assert (corner[:10] == 255).all()
        assert (corner[:, :10] == 255).all()


@pytest.mark.parametrize("name", [row[0] for row in REAL if row[1] == "jpegtiff"])
def test_a_real_slides_own_tiles_are_what_the_compatibility_reader_shows(name: str, real_data: Path) -> None:
    with open_slide(real_data / "slides" / name) as ours, compatible(real_data / "slides" / name) as theirs:
        assert (ours.pyramid, ours.calibration) == (theirs.pyramid, theirs.calibration)

        @settings(max_examples=300, deadline=None, derandomize=True, database=None)
        @given(st.data())
        def same_pixels(data: st.DataObject) -> None:
            level = data.draw(st.integers(0, len(ours.pyramid.shapes) - 1), "level")
            y, x = (data.draw(st.integers(-100, side)) for side in ours.pyramid.shapes[level])
            height, width = data.draw(st.integers(1, 500), "height"), data.draw(st.integers(1, 500), "width")
            window = {"level": level, "y": y, "x": x, "height": height, "width": width}
            difference = np.abs(ours.read(**window).astype(int) - theirs.read(**window))
            # Level 0 is the same decoder's work; OpenSlide's coarser ones are interpolated, which is undone to some levels.
            assert difference.max() <= (0 if level == 0 else 5)

        same_pixels()


def test_a_dicom_file_that_is_no_slide_is_one_line(real_data: Path) -> None:
    with pytest.raises(SlideError, match=r"small_dicom\.dcm cannot be opened as a slide") as caught:
        open_slide(real_data / "slides" / "small_dicom.dcm")

    assert caught.value.code == "NOT_A_SLIDE"
    assert "\n" not in str(caught.value)


def test_two_readers_of_a_real_slide_agree(real_data: Path) -> None:
    path = real_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    with open_slide(path, reader="openslide") as one, open_slide(path, reader="tiffslide") as two:
        for level, y, x in [(0, 1800, 2100), (1, 900, 1100), (1, 1700, 2150)]:
            ours = read(one, level, y, x)
            theirs = read(two, level, y, x)

            # JPEG 2000 decoders round differently; the levels' positions must not differ.
            assert np.abs(ours.astype(int) - theirs).mean() < 1.5


def read(slide: Reader, level: int, y: int, x: int) -> np.ndarray:
    return slide.read(level=level, y=y, x=x, height=100, width=120)


def test_a_real_level_lies_where_level_0_says(real_data: Path) -> None:
    from skimage.registration import phase_cross_correlation

    with open_slide(real_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs") as slide:
        for y, x in [(100, 100), (1200, 900), (1500, 1900)]:
            level_1 = slide.read(level=1, y=y, x=x, height=256, width=256)
            level_0 = read_view(slide, View(y=2 * y, x=2 * x, height=256, width=256, scale=2.0), level=0)

            shift, _, _ = phase_cross_correlation(level_0.mean(axis=2), level_1.mean(axis=2), upsample_factor=100)
            assert np.abs(shift).max() <= 0.05


@pytest.mark.parametrize("downsample", [1.0, 1.1, 4 / 3, 2.0024265754205874, 2.2, 7 / 3, 4.000325, 16.04941176470588])
def test_tiffslide_is_asked_for_the_pixel_that_is_meant(downsample: float) -> None:
    # It cuts off the quotient: 33 / 1.1 is 29.999999999999996, so that asking for 33 would give pixel 29 for 30.
    assert all(int(location(pixel, downsample) / downsample) == pixel for pixel in range(20_000))


# Fixtures


def count_openings(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[str]:
    """The paths that readers of this kind open from now on."""
    opened: list[str] = []
    really_open = kind._open
    monkeypatch.setattr(kind, "_open", lambda self, path: opened.append(path) or really_open(self, path))
    return opened


def write_aperio(path: Path, levels: Sequence[np.ndarray], *, compression: str = "lzw") -> None:
    """A lossless Aperio-style TIFF, 0.25 µm/px, of the levels given."""
    height, width = levels[0].shape[:2]
    head, claims = "Aperio Image Library v12.0.15 \r\n", "|AppMag = 40|MPP = 0.2500"
    with tifffile.TiffWriter(path) as file:
        options = {"photometric": "rgb", "compression": compression, "software": False, "metadata": None}
        for number, level in enumerate(levels):
            size = (
                f"{width}x{height} [0,0 {width}x{height}] (256x256) LZW"
                if number == 0
                else f"{width}x{height} -> level {number}"
            )
            file.write(level, tile=(256, 256), description=head + size + claims, **options)
            if number == 0:  # the second page is the thumbnail, in strips
                file.write(
                    level[:16, :16].copy(), rowsperstrip=16, description=f"{head}{width}x{height} -> 16x16 - ", **options
                )


def write_leica(path: Path, scan: np.ndarray, *, top: int, left: int, canvas: tuple[int, int]) -> None:
    """A Leica-SCN-style TIFF at 0.25 µm/px: the scan lies somewhere on the slide, which is the canvas. Macro image, barcode."""
    nm = 250
    height, width = canvas
    macro = np.full((height // 16, width // 16, 3), 200, np.uint8)
    levels = [scan, area_mean(scan, 4)]

    def described(pages: Sequence[np.ndarray], first: int, place: tuple[int, int, int, int], objective: float) -> str:
        sizes = [f'sizeX="{page.shape[1]}" sizeY="{page.shape[0]}"' for page in pages]
        dimensions = "".join(f'<dimension {size} r="{r}" ifd="{first + r}"/>' for r, size in enumerate(sizes))
        y, x, h, w = (nm * value for value in place)
        return (
            f'<image name="i" uuid="u"><creationDate>2020-01-01T00:00:00Z</creationDate>'
            f'<device model="SCN400" version="1"/><pixels {sizes[0]}>{dimensions}</pixels>'
            f'<view sizeX="{w}" sizeY="{h}" offsetX="{x}" offsetY="{y}" spacingZ="0"/><scanSettings>'
            f"<objectiveSettings><objective>{objective}</objective></objectiveSettings><illuminationSettings>"
            f"<numericalAperture>0.65</numericalAperture><illuminationSource>brightfield</illuminationSource>"
            f"</illuminationSettings></scanSettings></image>"
        )

    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="x">'
        f'<collection name="Doe" uuid="y" sizeX="{width * nm}" sizeY="{height * nm}"><barcode>RG9l</barcode>'
        + described([macro], 0, (0, 0, height, width), 0.6)
        + described(levels, 1, (top, left, *scan.shape[:2]), 40)
        + "</collection></scn>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for page, factor in zip([macro, *levels], (16, 1, 4), strict=True):
            file.write(
                page,
                tile=(64, 64),
                photometric="rgb",
                compression="lzw",
                description=xml if page is macro else None,
                resolution=(40_000 / factor, 40_000 / factor),
                resolutionunit="CENTIMETER",
                software=False,
                metadata=None,
            )


def patch_tags(path: Path, changes, *, tiled: int = 0) -> None:
    """Overwrites values of a tiled page's tags in place: {code: values -> values}."""
    with tifffile.TiffFile(path) as file:
        page = [page for page in file.pages if page.is_tiled][tiled]
        patches = []
        for code, change in changes.items():
            tag = page.tags[code]
            values = tag.value if isinstance(tag.value, tuple) else (int(tag.value),)
            form = {3: "H", 4: "I", 16: "Q"}[int(tag.dtype)]
            if form == "H" and max(change(values)) > 65_535:
                form = "I"  # a single short has room for a long, once its type says so
                patches.append((tag.offset + 2, struct.pack("<H", 4)))
            patches.append((tag.valueoffset, struct.pack(f"<{len(values)}{form}", *change(values))))
    with path.open("r+b") as file:
        for offset, content in patches:
            file.seek(offset)
            file.write(content)
