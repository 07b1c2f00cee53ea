"""Slides are hostile input: whatever bytes they hold, there is an answer or a typed error, in bounded time and memory.

What may die runs in processes made for it, by this file as a script: `python test_hostile_slides.py fuzz SEED COUNT FIRST`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile

from wsiscale.errors import SlideError, WsiscaleError
from wsiscale.readers import open_slide
from wsiscale.readers.files import MAX_LEVELS, FileReader, Scan
from wsiscale.readers.tiffcheck import MAX_DECODED, MAX_GIGAPIXELS, MAX_PAGES, MAX_TILE, MAX_XML
from wsiscale.testing.procedural import tissue
from wsiscale.testing.slides import area_mean, write_svs
from wsiscale.types import ScaleTags

SEED = 20_260
LIMIT = 60  # seconds of wall clock that a case may take, on a machine that others use too
MEMORY = 4_000_000_000  # bytes of address space that a disposable process may have
BATCH = 250  # cases a process, so that what libraries leak stays small

READERS = ("auto", "auto", "auto", "auto", "jpegtiff", "jpegtiff-fast", "openslide", "tiffslide")


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_any_bytes_give_a_slide_or_a_typed_error_in_time(count: int) -> None:
    ends = run("fuzz", SEED, count, limit=600 + count)

    # No death is tolerated: each that was found is closed by a check of the header, and a new one is a new check.
    assert ends["bad"] == [], f"seed {SEED}"
    assert sum(ends["counts"].values()) == count
    assert ends["counts"]["ok"] > 0.1 * count  # else nothing but headers was tried


# Bombs


@pytest.mark.parametrize("reader", ["auto", "jpegtiff", "openslide", "tiffslide"])
def test_nineteen_kilobytes_that_declare_40_gigapixels_are_read_in_windows(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.tif"
    write_tiff(path, claim(200_000, 200_000))

    ends = run("look_at", path, reader, 0, limit=120, memory=2_000_000_000)

    assert path.stat().st_size < 20_000
    assert ends["opened"] == [[200_000, 200_000]]
    assert ends["white"]
    assert ends["megabytes"] < 600


@pytest.mark.parametrize(
    ("side", "limit"), [(20_000, 120), pytest.param(200_000, 1800, marks=pytest.mark.slow)], ids=["fast", "19 kB"]
)
def test_a_bomb_without_levels_has_no_tissue_and_says_so(side: int, limit: float, tmp_path: Path) -> None:
    path = tmp_path / "bomb.tif"
    write_tiff(path, claim(side, side))

    ends = run("look_at", path, "auto", 1, limit=limit, memory=2_000_000_000)

    assert ends["tissue"] == 0
    assert ends["store"] == "NO_TISSUE"
    assert "\n" not in ends["said"]
    assert not ends["torch"]
    assert ends["megabytes"] < 1000


@pytest.mark.parametrize("side", [16_384, pytest.param(32_768, marks=pytest.mark.slow)])
def test_a_flat_gigapixel_slide_is_written_in_two_gigabytes(side: int, tmp_path: Path) -> None:
    # One tile of tissue, which 3 x 3 places of the slide share; the others were not scanned.
    path = tmp_path / "flat.tif"
    image, _ = tissue(512, 512, mpp=0.5, seed=3)
    tifffile.imwrite(path, image, tile=(512, 512), photometric="rgb", compression="jpeg", compressionargs={"level": 90})
    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        content = path.read_bytes()[page.dataoffsets[0] :][: page.databytecounts[0]]
    across = side // 512
    scanned = np.zeros((across, across), int)
    scanned[4:7, 9:12] = len(content)
    write_tiff(path, claim(side, side, tile=512) | {325: (4, scanned.ravel().tolist())}, content=content)

    ends = run("look_at", path, "auto", 1, limit=600, memory=2_000_000_000)

    assert path.stat().st_size < 200_000
    assert ends["tissue"] == pytest.approx(9 / across**2, rel=0.5)
    assert ends["store"] == "OK"
    assert ends["tiles"] == 4  # of 512 px at twice the scale
    assert not ends["torch"]
    assert ends["megabytes"] < 1000


LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY a0 "ha">'
    + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    + ']><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">&a11;</Image></OME>'
)


@pytest.mark.parametrize("reader", ["auto", "jpegtiff", "openslide", "tiffslide"])
@pytest.mark.parametrize(
    ("description", "tag", "said"),
    [
        (LAUGHS, 270, "XML entities"),
        ("Aperio Image Library v1\r\n256x256 (128x128)|MPP = 0.5|" + LAUGHS, 270, "XML entities"),
        (LAUGHS, 700, "XML entities"),  # XMP, where Ventana's description is
        ("<OME>" + "<a/>" * 500_000 + "</OME>", 270, r"2 MB, above the limit of 1"),
    ],
    ids=["ome", "aperio", "xmp", "2 MB"],
)
def test_an_xml_bomb_is_refused_before_anything_parses_it(
    description: str, tag: int, said: str, reader: str, tmp_path: Path
) -> None:
    path = tmp_path / "bomb.tif"
    write_tiff(path, described(description, tag=tag))

    started = time.monotonic()
    with pytest.raises(SlideError, match=said) as caught:
        open_slide(path, reader=reader)

    assert time.monotonic() - started < 5  # 0.01, and what importing a reader takes
    assert caught.value.code == "HOSTILE_XML"
    assert "\n" not in str(caught.value)


def test_an_xml_bomb_takes_neither_time_nor_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tif"
    write_tiff(path, described(LAUGHS))

    ends = run("look_at", path, "auto", 0, limit=60, memory=2_000_000_000)

    assert ends["refused"] == "HOSTILE_XML"
    assert ends["seconds"] < 1
    assert ends["megabytes"] < 500


def test_the_label_in_a_philips_description_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "philips.tif"
    xml = '<?xml version="1.0"?><DataObject ObjectType="DPUfsImport">' + "A" * (2 * MAX_XML) + "</DataObject>"
    write_tiff(path, described(xml))

    with open_slide(path) as slide:
        assert slide.pyramid.shape == (256, 256)


@pytest.mark.parametrize("reader", ["jpegtiff", "jpegtiff-fast", "openslide", "tiffslide"])
@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "jpegxl"])
def test_a_tile_that_says_it_is_far_larger_than_a_tile_is_not_decoded(compression: str, reader: str, tmp_path: Path) -> None:
    if (reader, compression) in (("openslide", "jpeg2000"), ("openslide", "jpegxl"), ("jpegtiff-fast", "jpeg2000")):
        pytest.skip("refuses the codec")
    if (reader, compression) == ("jpegtiff-fast", "jpegxl"):
        pytest.skip("refuses the codec")
    path = tmp_path / "bomb.tif"
    small, large = (np.zeros((side, side, 3), np.uint8) for side in (128, 1000))
    tifffile.imwrite(path, small, tile=(128, 128), photometric="rgb", compression=compression)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        at, size, number = page.dataoffsets[0], page.databytecounts[0], int(page.compression)
    content = bytearray(path.read_bytes()[at : at + size])
    if compression == "jpeg":  # which is decoded however little of it is there
        frame = content.index(b"\xff\xc0")
        content[frame + 5 : frame + 9] = (65_000).to_bytes(2, "big") * 2
    else:
        codec = {"jpeg2000": "jpeg2k", "jpegxl": "jpegxl"}[compression]
        content = bytearray(getattr(imagecodecs, f"{codec}_encode")(large))
    write_tiff(path, claim(256, 256, tile=128, size=len(content), compression=number), content=bytes(content))

    ends = run("look_at", path, reader, 0, limit=60, memory=2_000_000_000)

    assert ends["refused"] == "READ_FAILED"
    assert reader == "openslide" or "by its own header" in ends["said"]  # OpenSlide asks for itself
    assert ends["megabytes"] < 500


def test_pixels_that_look_like_a_header_are_pixels(tmp_path: Path) -> None:
    path = tmp_path / "bare.tif"
    image = np.zeros((128, 128, 3), np.uint8)
    image.reshape(-1)[:60] = [*b"\xff\x4f\xff\x51", *b"\xff\xd8\xff\xc0", *[0xFF, 0x0A] * 26]
    tifffile.imwrite(path, image, tile=(128, 128), photometric="rgb")

    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(level=0, y=0, x=0, height=128, width=128), image)


# Limits


def huge(path: Path) -> None:
    write_tiff(path, claim(400_000, 400_000))


def huge_second_page(path: Path) -> None:
    write_tiff(path, claim(256, 256, tile=128), claim(400_000, 400_000))


def huge_page_below(path: Path) -> None:
    content, start = directory(list(claim(400_000, 400_000).items()), at=8)
    write_tiff(path, claim(256, 256, tile=128) | {330: (4, [start])}, content=content)


def long_tile(path: Path) -> None:
    write_tiff(path, claim(256, 256, tile=MAX_TILE + 16))


def many_samples(path: Path) -> None:
    write_tiff(path, claim(256, 256, tile=MAX_TILE) | {277: (3, [9])})


def two_tile_widths(path: Path) -> None:
    # Readers differ in which of two tags they take.
    write_tiff(path, claim(256, 256, tile=128), again={322: (4, [2_100_000_000])})


def long_strip(path: Path) -> None:
    strip = {key: value for key, value in claim(40_000, 40_000, compression=5).items() if key < 322}
    write_tiff(path, strip | {273: (4, [8]), 278: (4, [2**32 - 1]), 279: (4, [100])}, content=bytes(100))


def many_pages(path: Path) -> None:
    write_tiff(path, *[claim(256, 256, tile=128)] * (MAX_PAGES + 1))


def thin_tiles(path: Path) -> None:
    write_tiff(path, claim(256, 256, tile=128) | {323: (4, [1])})


def long_tile_bytes(path: Path) -> None:
    write_tiff(path, claim(256, 256, tile=128) | {325: (4, [0, 0, 0, 2**31])})


def missing_tiles(path: Path) -> None:
    write_tiff(path, claim(256, 256, tile=128) | {257: (4, [60_000])})


def circle(path: Path) -> None:
    write_tiff(path, claim(256, 256, tile=128), claim(128, 128, tile=128), then=0)


def beyond_the_end(path: Path) -> None:
    write_tiff(path, described("description"))
    path.write_bytes(path.read_bytes().replace(struct.pack("<HHI", 270, 2, 12), struct.pack("<HHI", 270, 2, 900_000)))


@pytest.mark.parametrize("reader", ["auto", "jpegtiff", "openslide", "tiffslide"])
@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (huge, "TOO_LARGE", f"160 gigapixels, above the limit of {MAX_GIGAPIXELS}; "),
        (huge_second_page, "TOO_LARGE", "400000 x 400000 px"),
        (huge_page_below, "TOO_LARGE", "400000 x 400000 px"),
        (long_tile, "TOO_LARGE", f"{MAX_TILE + 16} px long, above the limit of {MAX_TILE}"),
        (many_samples, "TOO_LARGE", f"tile of 2.42 GB, above the limit of {MAX_DECODED / 1e9:.3g}"),
        (two_tile_widths, "TOO_LARGE", "2100000000 px long"),
        (long_strip, "TOO_LARGE", "strip of 4.8 GB"),
        (many_pages, "TOO_LARGE", f"more than {MAX_PAGES} pages"),
        (thin_tiles, "NOT_A_SLIDE", "tiles of 1 x 128 px"),
        (long_tile_bytes, "NOT_A_SLIDE", "2147483648 bytes of one tile"),
        (missing_tiles, "NOT_A_SLIDE", "938 tiles, and only 4"),
        (circle, "NOT_A_SLIDE", "circle"),
        (beyond_the_end, "NOT_A_SLIDE", "tag 270, 900000 values"),
    ],
)
def test_what_a_header_may_ask_for_has_a_limit(
    make: Callable[[Path], None], code: str, said: str, reader: str, tmp_path: Path
) -> None:
    path = tmp_path / "slide.tif"
    make(path)

    with pytest.raises(SlideError, match=said) as caught:
        open_slide(path, reader=reader)

    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    assert "slide.tif" in str(caught.value)


def test_bare_pixels_in_one_strip_are_as_large_as_the_file() -> None:
    # What tifffile and ImageJ write where nobody asks for tiles.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "strip.tif"
        tifffile.imwrite(path, np.full((600, 700, 3), 200, np.uint8), photometric="rgb")

        with open_slide(path) as slide:
            assert (slide.read(level=0, y=500, x=600, height=100, width=100) == 200).all()


class Claiming(FileReader[object]):
    """A reader of a format that is no TIFF."""

    name = "claiming"
    shapes: Sequence[tuple[int, int]] = ()

    def _open(self, path: str) -> object:
        return path

    def _describe(self, handle: object) -> Scan:
        return Scan(shapes=self.shapes, tags=ScaleTags(), vendor="none")

    def _read_into(self, pixels: np.ndarray, *, level: int, y: int, x: int) -> None:
        pixels[:] = 0


@pytest.mark.parametrize(
    ("shapes", "code", "said"),
    [
        ([(400_000, 400_000)], "TOO_LARGE", "160 gigapixels"),
        ([(4000, 4000), (400_000, 400_000)], "TOO_LARGE", "160 gigapixels"),
        ([(4000, 4000)] * (MAX_LEVELS + 1), "TOO_LARGE", f"{MAX_LEVELS + 1} levels"),
        ([], "NOT_A_SLIDE", "0 levels"),
        ([(4000, 4000), (0, 1000)], "NOT_A_SLIDE", "level 1 of 0 x 1000 px"),
    ],
)
def test_every_reader_has_the_same_limits(
    shapes: Sequence[tuple[int, int]], code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "slide.xyz"
    path.write_bytes(b"anything")
    monkeypatch.setattr(Claiming, "shapes", shapes)

    with pytest.raises(SlideError, match=said) as caught:
        Claiming(path)

    assert caught.value.code == code


Tags = dict[int, tuple[int, Sequence[int]]]  # {code: (type, values)}


def claim(height: int, width: int, *, tile: int = 4096, size: int = 0, compression: int = 7) -> Tags:
    """The tags of a page of RGB tiles, each of which is the `size` bytes at byte 8; 0 for a tile that was not scanned."""
    tiles = -(-height // tile) * -(-width // tile)
    return {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [8, 8, 8]),
        259: (3, [compression]),
        262: (3, [6 if compression == 7 else 2]),
        277: (3, [3]),
        284: (3, [1]),
        322: (4, [tile]),
        323: (4, [tile]),
        324: (4, [8] * tiles),
        325: (4, [size] * tiles),
    }


def described(text: str, *, tag: int = 270) -> Tags:
    return claim(256, 256, tile=128) | {tag: (2, [*text.encode(), 0])}


def write_tiff(path: Path, *pages: Tags, content: bytes = b"", again: Tags | None = None, then: int | None = None) -> None:
    """A TIFF of these tags, right or wrong, with `content` at byte 8.

    The last page also has the tags of `again`, and after it comes page number `then`.
    """
    file = bytearray(b"II*\0" + bytes(4) + content + bytes(len(content) % 2))
    starts, pointer = [], 4
    for page in pages:
        more = again.items() if again is not None and page is pages[-1] else ()
        written, start = directory([*page.items(), *more], at=len(file))
        file[pointer : pointer + 4] = struct.pack("<I", start)
        file += written
        starts.append(start)
        pointer = len(file) - 4
    if then is not None:
        file[pointer:] = struct.pack("<I", starts[then])
    path.write_bytes(file)


def directory(tags: Sequence[tuple[int, tuple[int, Sequence[int]]]], *, at: int) -> tuple[bytes, int]:
    """A page as it is written at byte `at`, and where its directory starts in the file: after the values that are long."""
    values, entries = bytearray(), []
    for code, (kind, numbers) in tags:
        packed = struct.pack(f"<{len(numbers)}{ {2: 'B', 3: 'H', 4: 'I'}[kind] }", *numbers)
        place = packed.ljust(4, b"\0")
        if len(packed) > 4:
            place = struct.pack("<I", at + len(values))
            values += packed + bytes(len(packed) % 2)
        entries.append(struct.pack("<HHI", code, kind, len(numbers)) + place)
    return bytes(values) + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4), at + len(values)


# The script: cases in forked processes


def run(*command: object, limit: float, memory: int | None = None) -> Any:
    """What the script answers to a command, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=limit,
        preexec_fn=None if memory is None else lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory)),
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def fuzz(seed: int, count: int, first: int = 0) -> dict[str, Any]:
    """How `count` mutated slides end, each kind counted, with all that is not a plain end."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    bad = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        bases = {path.name: path.read_bytes() for path in make_bases(Path(folder))}
        places = {name: spots(Path(folder) / name) for name in bases}
        case = first
        while case < first + count:
            for number, status, detail, seconds in disposable(seed, case, min(case + BATCH, first + count), bases, places):
                counts[status if status != "error" else detail] += 1
                slowest = max(slowest, seconds)
                if status in ("killed", "hang", "untyped"):
                    bad.append({"seed": seed, "case": number, "status": status, "detail": detail})
                case = number + 1
    return {"counts": dict(counts), "bad": bad, "slowest": slowest}


def disposable(
    seed: int, first: int, end: int, bases: Mapping[str, bytes], places: Mapping[str, list[tuple[int, int]]]
) -> Iterator[tuple[int, str, str, float]]:
    """(case, status, detail, seconds) of cases in a forked process, until one of them kills it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with tempfile.TemporaryDirectory() as folder:
            for number in range(first, end):
                status, detail = outcome(seed, number, bases, places, Path(folder))
                os.write(writing, (json.dumps([number, status, detail[:1500]]) + "\n").encode())
        os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading) as lines:
            for number in range(first, end):
                started = time.monotonic()
                ready, _, _ = select.select([lines], [], [], LIMIT)
                line = lines.readline() if ready else ""
                seconds = time.monotonic() - started
                if line:
                    yield *json.loads(line), seconds
                    continue
                if not ready:
                    os.kill(pid, signal.SIGKILL)
                _, how = os.waitpid(pid, 0)
                pid = 0
                yield number, "killed" if ready else "hang", f"signal or exit code {os.waitstatus_to_exitcode(how)}", seconds
                return
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def outcome(
    seed: int, number: int, bases: Mapping[str, bytes], places: Mapping[str, list[tuple[int, int]]], folder: Path
) -> tuple[str, str]:
    """How one case ends: ("ok", ""), ("error", its code) or ("untyped", its traceback)."""
    rng = np.random.default_rng([seed, number])
    name = str(rng.choice(sorted(bases)))
    path = folder / name
    path.write_bytes(mutated(bases[name], places[name], list(bases.values()), rng))
    reader = str(rng.choice(READERS))
    try:
        look(path, reader, rng)
    except WsiscaleError as error:
        return ("untyped", f"two lines: {error}") if "\n" in str(error) else ("error", error.code)
    except Exception:  # noqa: BLE001 - it is what is looked for
        return "untyped", f"{name} {reader}: " + traceback.format_exc()[-1300:]
    return "ok", ""


def look(path: Path, reader: str, rng: np.random.Generator) -> None:
    """Opens a slide, reads windows of it at the edges and anywhere, and finds the tissue of a small one."""
    from wsiscale.tissue import find_tissue

    broken: WsiscaleError | None = None
    with open_slide(path, reader=reader) as slide:
        assert slide.calibration.verdict
        for level, (height, width) in enumerate(slide.pyramid.shapes[:6]):
            for y, x in ((0, 0), (height - 40, width - 40), (rng.integers(height), rng.integers(width))):
                try:
                    pixels = slide.read(level=level, y=int(y), x=int(x), height=64, width=96)
                    assert pixels.shape == (64, 96, 3)
                except WsiscaleError as error:
                    broken = error  # of one tile, and the rest is there
        if slide.pyramid.shape[0] * slide.pyramid.shape[1] < 4_000_000:
            find_tissue(slide)
    if broken is not None:
        raise broken


def make_bases(folder: Path) -> list[Path]:
    """Small sound slides of every kind that is mutated."""
    from test_readers import write_leica

    image, _ = tissue(300, 420, mpp=0.5, seed=5)
    small = [image, area_mean(image, 2), area_mean(image, 4)]
    write_svs(folder / "jpeg.svs", image, mpp=0.5, power=20, levels=(1, 2, 4), tile=128)
    write_leica(folder / "leica.scn", small[0][:192, :192], top=64, left=64, canvas=(512, 512))
    kinds: dict[str, dict[str, Any]] = {
        "lzw.svs": {"compression": "lzw", "predictor": 2},
        "deflate.tif": {"compression": "adobe_deflate"},
        "big.tif": {"compression": "jpeg"},
        "bare.tif": {},
        "jp2.tif": {"compression": "jpeg2000"},
        "webp.tif": {"compression": "webp"},
        "ome.ome.tif": {"compression": "jpeg"},
    }
    for name, options in kinds.items():
        is_ome = name.startswith("ome")
        aperio = "Aperio Image Library v1\r\n420x300 [0,0 420x300] (128x128)|AppMag = 20|MPP = 0.5"
        with tifffile.TiffWriter(
            folder / name, bigtiff=name == "big.tif", byteorder=">" if name == "bare.tif" else "<", ome=is_ome
        ) as file:
            common = {"photometric": "rgb", "tile": (128, 128), "resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
            pages = [level[:256, :256] for level in small] if name == "bare.tif" else small
            for number, level in enumerate(pages):
                more: dict[str, Any] = {"description": aperio if name.endswith("svs") else None, "metadata": None}
                if is_ome:
                    size = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
                    more = {"subifds": 2, "metadata": size} if number == 0 else {"subfiletype": 1}
                file.write(level, **common, **options, **more)
    tifffile.imwrite(folder / "strips.tif", image, photometric="rgb", rowsperstrip=32, compression="zlib")
    return sorted(folder.iterdir())


def spots(path: Path) -> list[tuple[int, int]]:
    """(start, length) of what steers a reader: the header, each tag and its value, each pointer to the next page."""
    places = [(0, 16)]
    with tifffile.TiffFile(path) as file:
        pages = [page for top in file.pages for page in (top.aspage(), *(sub.aspage() for sub in top.aspage().pages or ()))]
        entry, pointer = (20, 8) if file.is_bigtiff else (12, 4)
        for page in pages:
            ends = [tag.offset + entry for tag in page.tags.values()]
            places.append((max(ends), pointer))
            for tag in page.tags.values():
                places += [(tag.offset, entry), (tag.offset + 2, entry - 2), (tag.valueoffset, min(tag.valuebytecount, 400))]
            places.append((page.dataoffsets[0], 64))
    return places


INTERESTING = (
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    17,
    255,
    256,
    4096,
    16_384,
    65_535,
    2**16,
    2**20,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
)


def mutated(content: bytes, places: Sequence[tuple[int, int]], others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """`content` with a wound or a few, most of them where they matter."""
    wounded = bytearray(content)
    for _ in range(min(rng.geometric(0.6), 5)):
        start, length = places[rng.integers(len(places))] if rng.random() < 0.85 else (0, len(content))
        at = min(start + int(rng.integers(max(length, 1))), len(wounded) - 1)
        kind = rng.random()
        if kind < 0.35:
            wounded[at] ^= 1 << int(rng.integers(8))
        elif kind < 0.5:
            wounded[at] = int(rng.integers(256))
        elif kind < 0.8:  # a number that is near a limit, or points somewhere
            size = int(rng.choice([2, 4, 8]))
            value = int(rng.choice(INTERESTING)) if rng.random() < 0.7 else places[rng.integers(len(places))][0]
            order = "big" if wounded[:1] == b"M" else "little"
            at = start + int(rng.choice([0, 2, 4, 8, 12]))
            wounded[at : at + size] = (value % (1 << (8 * size))).to_bytes(size, order)
        elif kind < 0.87:
            span = int(rng.integers(1, 200))
            wounded[at : at + span] = bytes(min(span, len(wounded) - at))
        elif kind < 0.95:  # a piece of this slide, or of another
            other = others[rng.integers(len(others))] if rng.random() < 0.5 else content
            origin, span = int(rng.integers(len(other))), int(rng.integers(1, 200))
            piece = other[origin : origin + span]
            wounded[at : at + len(piece)] = piece
        elif kind < 0.98:
            del wounded[int(rng.integers(16, len(wounded))) :]
        else:
            wounded[at:at] = rng.bytes(int(rng.integers(1, 64)))
    return bytes(wounded)


def look_at(name: str, reader: str, whole: int) -> dict[str, Any]:
    """What becomes of a slide under whatever limits this process has: opened, a window, and if `whole`, tissue and store."""
    import wsiscale.readers.jpegtiff
    import wsiscale.readers.openslide
    import wsiscale.readers.tiffslide  # noqa: F401 - so that importing takes none of the seconds
    from wsiscale.store import write_store
    from wsiscale.tissue import find_tissue

    ends: dict[str, Any] = {}
    started = time.perf_counter()
    try:
        with open_slide(name, mpp=0.5, reader=reader) as slide:
            ends["opened"] = slide.pyramid.shapes
            height, width = slide.pyramid.shape
            corner = slide.read(level=0, y=height - 100, x=width - 100, height=200, width=200)
            ends["white"] = bool((corner == 255).all())
            if whole:
                mask = find_tissue(slide)
                ends["tissue"] = mask.fraction
                try:
                    with tempfile.TemporaryDirectory() as folder:
                        ends["tiles"] = write_store(Path(folder) / "store.ome.zarr", slide, mpp=1.0, tissue=mask).tiles
                    ends["store"] = "OK"
                except WsiscaleError as error:
                    ends |= {"store": error.code, "said": str(error)}
    except WsiscaleError as error:
        ends |= {"refused": error.code, "said": str(error)}
    ends["seconds"] = time.perf_counter() - started
    ends["torch"] = "torch" in sys.modules
    # Not ru_maxrss, which begins with what the process had that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    ends["megabytes"] = int(peak[1]) / 1000
    return ends


if __name__ == "__main__":
    what, *asked = sys.argv[1:]
    ended = fuzz(*map(int, asked)) if what == "fuzz" else look_at(asked[0], asked[1], int(asked[2]))
    sys.stdout.write(json.dumps(ended) + "\n")
