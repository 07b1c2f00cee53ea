"""A damaged tile of a slide costs what lies under it, and is told: nothing becomes white or black in silence."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tifffile

from wsiscale.cohort.one_slide import RunOptions, process_slide
from wsiscale.errors import SlideError
from wsiscale.estimation import estimate
from wsiscale.readers import open_slide
from wsiscale.store import open_store, verify_store, write_store
from wsiscale.testing.procedural import tissue
from wsiscale.testing.slides import write_svs
from wsiscale.tissue import find_tissue
from wsiscale.types import Tissue

SIDE, TILE = 1536, 256
CODECS = ("jpeg", "lzw", "adobe_deflate")
Damage = Literal["byte", "run", "zeros", "cut"]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return tissue(SIDE, SIDE, mpp=0.5, seed=3)[0]


@pytest.fixture(scope="module")
def sound(image: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same slide by each codec."""
    folder = tmp_path_factory.mktemp("sound")
    for codec in CODECS:
        tags = {"photometric": "rgb", "resolution": (20_000, 20_000), "resolutionunit": 3}
        tifffile.imwrite(folder / f"{codec}.tif", image, tile=(TILE, TILE), compression=codec, **tags)
    return {codec: folder / f"{codec}.tif" for codec in CODECS}


def damaged(path: Path, into: Path, how: Damage, chance: random.Random, *, page: int = 0) -> tuple[int, int]:
    """A copy of a slide of which one tile is damaged; that tile's (y, x)."""
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        tiles = file.pages[page]
        number = chance.randrange(len(tiles.dataoffsets))
        start, size = tiles.dataoffsets[number], tiles.databytecounts[number]
        across = -(-tiles.imagewidth // TILE)
    at = start + chance.randrange(size - 64)
    if how == "byte":
        content[at] ^= 1 << chance.randrange(8)
    elif how == "run":
        content[at : at + 64] = chance.randbytes(64)
    elif how == "zeros":
        content[at : start + size] = bytes(start + size - at)
    else:  # as a copy that ended early: all else in the file lies elsewhere
        content[at : start + size] = chance.randbytes(start + size - at)
    into.write_bytes(content)
    return number // across * TILE, number % across * TILE


def all_tissue() -> Tissue:
    return Tissue(np.ones((SIDE // 64, SIDE // 64), bool), 64, (SIDE, SIDE), 0.5)


def blank_blocks(pixels: np.ndarray) -> np.ndarray:
    """Where 16 x 16 px are all white or all black."""
    blocks = pixels.reshape(SIDE // 16, 16, SIDE // 16, 16, 3)
    return np.asarray((blocks == 255).all(axis=(1, 3, 4)) | (blocks == 0).all(axis=(1, 3, 4)))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("count", [12, pytest.param(168, marks=pytest.mark.slow)])  # 504 damaged tiles in all
def test_no_damaged_tile_becomes_white_or_black_unmarked(
    codec: str, count: int, sound: dict[str, Path], image: np.ndarray, tmp_path: Path
) -> None:
    ends: Counter[str] = Counter()
    for seed in range(count):
        chance = random.Random(f"{codec} {seed}")
        how: Damage = chance.choice(("byte", "run", "zeros", "cut"))
        slide, path = tmp_path / f"{seed}.tif", tmp_path / "s.ome.zarr"
        y, x = damaged(sound[codec], slide, how, chance)
        with open_slide(slide, reader=chance.choice(("auto", "openslide"))) as reader:
            summary = write_store(path, reader, mpp=0.5, tissue=all_tissue(), tile_size=256, max_failed_tiles=1, overwrite=True)

        store = open_store(path)
        pixels = store.read(y=0, x=0, height=SIDE, width=SIDE)
        left_out = np.zeros((SIDE // 16, SIDE // 16), bool)
        for row, column in store.attributes["failed_chunks"]:
            left_out[row * 32 : (row + 1) * 32, column * 32 : (column + 1) * 32] = True
        told = f"{codec}, seed {seed}, {how}, {reader.source.reader}, tile at {y}, {x}"
        assert not (blank_blocks(pixels) & ~blank_blocks(image) & ~left_out).any(), told
        assert blank_blocks(pixels)[left_out].all(), told  # nothing half decoded
        # Elsewhere nothing has changed, and only tiles over what is left out are said to be failed.
        table = store.tile_table
        whole = table["status"] == 0
        assert (summary.failed, summary.failed_chunks) == ((~whole).sum(), left_out.sum() / 32**2), told
        for row, column, is_whole in zip(table["row"], table["col"], whole, strict=True):
            block = (slice(row // 16, row // 16 + 16), slice(column // 16, column // 16 + 16))
            assert is_whole != left_out[block].any(), told
        if left_out.any():
            assert left_out[y // 16, x // 16], told
            assert left_out.sum() <= 32**2 * (1 if reader.source.reader == "jpegtiff" else 4), told
        assert verify_store(path).ok
        ends[f"{'told' if left_out.any() else 'not seen'} by {reader.source.reader}"] += 1
        slide.unlink()

    if codec == "adobe_deflate":  # which has a checksum, that OpenSlide does not read to the end
        assert not ends["not seen by jpegtiff"], ends
    assert ends["told by jpegtiff"] > 0, ends


def test_a_damaged_slide_is_partial_and_above_the_limit_failed(sound: dict[str, Path], tmp_path: Path) -> None:
    slide = tmp_path / "damaged.tif"
    y, x = damaged(sound["adobe_deflate"], slide, "zeros", random.Random(1))
    quick = {"places": 16, "precision": None, "mpp_range": (0.5, 1.0), "tiles": 128, "on_abstain": "fixed:0.5"}

    some = process_slide({"id": "some", "path": str(slide)}, RunOptions(**quick, max_failed_tiles=0.9), tmp_path / "out")
    none = process_slide({"id": "none", "path": str(slide)}, RunOptions(**quick), tmp_path / "out")

    assert some["status"] == "partial", some
    assert some["failed_tiles"] >= 1
    assert f"{some['failed_tiles']} of {some['tiles']} tiles" in some["message"]
    assert (none["status"], none["code"]) == ("failed", "DAMAGED")
    assert "(--max-failed-tiles)" in none["message"]
    assert f"({y}, {x})" in none["message"]
    assert not (tmp_path / "out" / "stores" / "none.ome.zarr").exists()
    again = process_slide({"id": "some", "path": str(slide)}, RunOptions(**quick, max_failed_tiles=0.9), tmp_path / "out")
    assert again["resumed"]


def test_places_that_cannot_be_read_are_left_out(sound: dict[str, Path], tmp_path: Path) -> None:
    slide = tmp_path / "damaged.tif"
    damaged(sound["adobe_deflate"], slide, "zeros", random.Random(2))
    quick = {"places": 24, "precision": None, "mpp_range": (0.5, 1.0), "profile": None, "tile_size": 64}
    with open_slide(slide) as reader, open_slide(sound["adobe_deflate"]) as whole:
        found, expected = estimate(reader, **quick), estimate(whole, **quick)
        with pytest.raises(SlideError) as caught:  # tiles as wide as the slide
            estimate(reader, **(quick | {"mpp_range": (6.0, 12.0)}))

    assert 12 <= found.places < 24
    assert f"the slide is damaged at {24 - found.places} of 24 places, which are left out" in found.notes
    assert expected.places == 24
    assert caught.value.code == "READ_FAILED"


def test_tissue_under_a_damaged_level_is_found_on_a_finer_one(image: np.ndarray, tmp_path: Path) -> None:
    sound, slide = tmp_path / "sound.svs", tmp_path / "damaged.svs"
    write_svs(sound, image, mpp=0.5, power=20, levels=(1, 4))
    damaged(sound, slide, "zeros", random.Random(4), page=2)  # after the thumbnail
    with open_slide(slide) as reader, open_slide(sound) as whole:
        with pytest.raises(SlideError, match="damaged, copy it again"):
            reader.read(level=1, y=0, x=0, height=SIDE // 4, width=SIDE // 4)

        found, expected = find_tissue(reader), find_tissue(whole)

    assert (found.mask != expected.mask).mean() < 0.01


def test_what_no_level_shows_counts_as_tissue(tmp_path: Path) -> None:
    glass = np.full((4096, 4096, 3), 240, np.uint8)
    glass[:1024, :1024] = tissue(1024, 1024, mpp=0.5, seed=1)[0]
    path = tmp_path / "one level.svs"
    write_svs(path, glass, mpp=0.5, power=20, levels=(1,))
    with tifffile.TiffFile(path) as file:
        start, size = file.pages[0].dataoffsets[-1], file.pages[0].databytecounts[-1]
    content = bytearray(path.read_bytes())
    content[start : start + size] = bytes(size)
    path.write_bytes(content)

    with open_slide(path) as reader:
        found = find_tissue(reader)
        with pytest.raises(SlideError) as caught:
            write_store(tmp_path / "s", reader, mpp=0.5, tissue=found)
        summary = write_store(tmp_path / "s", reader, mpp=0.5, tissue=found, max_failed_tiles=0.2)

    assert found.mask[-1, -1]
    assert not found.mask[-64, -64]
    assert caught.value.code == "DAMAGED"
    assert summary.failed >= 1
