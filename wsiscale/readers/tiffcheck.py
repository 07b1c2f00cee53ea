"""TIFF files looked through before any library parses them, since slides are hostile input.

Only the directories are read, with bounds on everything: what passes here makes neither OpenSlide abort for want of a terabyte
nor tifffile walk in a circle, and holds no XML that explodes. What is merely broken is left to the readers to say.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import SlideError

# The largest scans, two by three inches at 0.25 µm/px, are below 70; a common one of 100,000 x 100,000 px is 10.
MAX_GIGAPIXELS = 100
# OpenSlide allocates whole tiles, and GLib aborts the process where that fails: a header can ask for a terabyte.
MAX_TILE = 16_384
MAX_DECODED = 4 * MAX_TILE**2  # bytes of a tile or strip: RGBA of the largest tile
# The TIFF specification wants multiples of 16. Tiles of a pixel each would take hours to look up.
_MIN_TILE = 16
# Levels of all focal planes, a label and a macro image: a few hundred where there are very many.
MAX_PAGES = 1000
_MAX_TAGS = 4096  # a page; libtiff and tifffile refuse more

# Compressions that slides have: none, LZW, deflate, PackBits, LZMA, Zstandard, WebP, and those that `check_frame` knows.
# tifffile has two dozen more, each a decoder that a hostile file could reach.
_JPEG, _JPEG_2000, _JPEG_XL = {6, 7, 33007, 34892}, {33003, 33004, 33005, 34712}, {50002, 52546}
CODECS = {1, 5, 8, 32773, 32946, 34925, 34926, 34927, 50000, 50001} | _JPEG | _JPEG_2000 | _JPEG_XL

MAX_XML = 1_000_000  # bytes of an image description
# Philips keeps its label and macro image in the description, as base64; Ventana keeps where every tile lies in its XMP.
_MAX_LONG_XML = 16_000_000
_PHILIPS = b'ObjectType="DPUfsImport"'

_MAGIC = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # by type
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _DESCRIPTION, _SAMPLES, _ROWS = 256, 257, 258, 259, 270, 277, 278
_STRIP_BYTES, _TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_BYTES, _SUB_IFDS, _XMP = 279, 322, 323, 324, 325, 330, 700
_DEPTH, _TILE_DEPTH, _NDPI = 32997, 32998, 65420
_NUMBERS = (_WIDTH, _LENGTH, _BITS, _COMPRESSION, _SAMPLES, _ROWS, _STRIP_BYTES, _TILE_WIDTH, _TILE_LENGTH)
_CHECKED = {*_NUMBERS, _TILE_OFFSETS, _TILE_BYTES, _SUB_IFDS, _DEPTH, _TILE_DEPTH, _DESCRIPTION, _XMP, _NDPI}


def check_tiff(file: Path) -> bool:
    """Whether `file` is a TIFF at all. Raises OSError, or SlideError for a hostile one: TOO_LARGE, HOSTILE_XML, NOT_A_SLIDE."""
    with file.open("rb") as stream:
        magic = _MAGIC.get(stream.read(4))
        if magic is None:
            return False
        for page in _pages(stream, file, *magic):
            _check_pixels(file, page)
            for code in (_DESCRIPTION, _XMP):
                for tag in page.tags.get(code, ()):
                    _check_xml(file.name, tag.count, page.content(tag), code=code)
    return True


def check_size(name: str, height: int, width: int) -> None:
    """Raises SlideError for a level or a page that no slide is as large as."""
    if height * width > MAX_GIGAPIXELS * 1e9:
        raise SlideError(
            f"{name} declares {height} x {width} px, {height * width / 1e9:.4g} gigapixels, above the limit of "
            f"{MAX_GIGAPIXELS}; its header is damaged or hostile: copy it again, or export the part you need",
            code="TOO_LARGE",
        )


def check_frame(data: bytes, height: int, width: int, *, compression: int) -> None:
    """Raises ValueError where a compressed tile's own header wants far more than the (height, width) of its tile.

    Decoders allocate what it says: 64 px made into 65,000 take 12 GB. The other codecs are told how much to decode, and
    WebP ends at 16,383 px a side.
    """
    if compression in _JPEG:
        own = _jpeg_frame(data)
    elif compression in _JPEG_2000:
        own = _jpeg_2000_frame(data, _boxed(data) or 0)
    elif compression in _JPEG_XL:
        own = _jpeg_xl_frame(data, _boxed(data) or 0)
    else:
        return
    if own is not None and own[0] * own[1] * own[2] > 4 * height * width:  # RGBA
        raise ValueError(
            f"it is {own[0]} x {own[1]} px of {own[2]} samples by its own header, where the tile has {height} x {width}"
        )


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """(height, width, samples), found as libjpeg finds it, which skips what lies between segments."""
    at = 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 9:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the start of the frame
            return int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9]), data[at + 9]
        if marker in (0xD9, 0xDA):
            return None
        at += 1 if marker in (0, 1, 0xFF) or 0xD0 <= marker <= 0xD8 else 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def _jpeg_2000_frame(data: bytes, at: int) -> tuple[int, int, int] | None:
    """(height, width, samples) by the SIZ segment, which comes first."""
    if data[at : at + 4] != b"\xff\x4f\xff\x51" or len(data) < at + 42:
        return None
    x1, y1, x0, y0, samples = struct.unpack_from(">8xIIII16xH", data, at)
    return y1 - y0, x1 - x0, samples


# How many bits follow the two that choose, and width over height where it is one of the usual.
_JPEG_XL_BITS = (9, 13, 18, 30)
_JPEG_XL_RATIOS = (1, 1, 6 / 5, 4 / 3, 3 / 2, 16 / 9, 5 / 4, 2)


def _jpeg_xl_frame(data: bytes, at: int) -> tuple[int, int, int] | None:
    """(height, width, samples) by the bits that come first (ISO/IEC 18181-1, SizeHeader)."""
    if data[at : at + 2] != b"\xff\x0a":
        return None
    bits = int.from_bytes(data[at + 2 : at + 14], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits % (1 << count), bits >> count
        return value

    def side() -> int:
        return 8 + 8 * take(5) if is_small else 1 + take(_JPEG_XL_BITS[take(2)])

    is_small = take(1)
    height = side()
    ratio = take(3)
    return height, round(height * _JPEG_XL_RATIOS[ratio]) if ratio else side(), 3


def _boxed(data: bytes) -> int | None:
    """Where the codestream starts within a JP2 or JPEG XL container; None where there is none."""
    at = 0
    while at + 16 <= len(data):
        length, kind, head = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], 8
        if length == 1:
            length, head = int.from_bytes(data[at + 8 : at + 16]), 16
        if kind in (b"jp2c", b"jxlc", b"jxlp"):
            return at + head + (4 if kind == b"jxlp" else 0)
        if length < head:
            return None
        at += length
    return None


@dataclass(frozen=True)
class _Tag:
    kind: int
    count: int
    at: int  # of the value in the file


@dataclass(frozen=True)
class _Page:
    """A directory's tags. A code may be there twice, and readers differ in which they take, so that both count."""

    stream: BinaryIO
    name: str
    order: str
    tags: dict[int, list[_Tag]]

    def content(self, tag: _Tag) -> bytes:
        self.stream.seek(tag.at)
        return self.stream.read(tag.count * _BYTES[tag.kind])

    def numbers(self, code: int) -> NDArray[np.generic]:
        """All values under `code`."""
        values = []
        for tag in self.tags.get(code, ()):
            if tag.kind not in _INTEGERS:
                raise _broken(self.name, f"tag {code} is of type {tag.kind}, not an integer")
            values.append(np.frombuffer(self.content(tag), self.order + _INTEGERS[tag.kind]))
        return np.concatenate(values) if values else np.empty(0, np.uint8)

    def most(self, code: int, default: int) -> int:
        values = self.numbers(code)
        return int(values.max()) if values.size else default


def _pages(stream: BinaryIO, file: Path, order: str, big: bool) -> Iterator[_Page]:
    """Every page of the chain, and the pages below them."""
    size = file.stat().st_size
    pointer = "Q" if big else "I"
    try:
        stream.seek(8 if big else 4)
        chain = [int(_unpacked(stream, order + pointer)[0])]
        first, below, seen = chain[0], list[int](), set[int]()
        is_wide = False
        while chain or below:
            on_chain = bool(chain)
            at = (chain or below).pop()
            if at in seen and on_chain:
                raise _broken(file.name, "its chain of pages runs in a circle")
            if at in seen or not 0 < at < size:
                if at == first and not seen:
                    raise _broken(file.name, f"its first page is at byte {at} of {size}")
                continue  # the end of the chain; where it is cut off, readers stop here too
            if len(seen) == MAX_PAGES:
                raise SlideError(
                    f"{file.name} has more than {MAX_PAGES} pages, and no slide has; its header is damaged or hostile",
                    code="TOO_LARGE",
                )
            seen.add(at)
            stream.seek(at)
            (count,) = _unpacked(stream, order + ("Q" if big else "H"))
            if count > _MAX_TAGS:
                raise _broken(file.name, f"a page of {count} tags")
            entry = struct.Struct(f"{order}HH{pointer}{8 if big else 4}s")
            start = stream.tell()
            entries = [entry.unpack(part) for part in _parts(stream.read(count * entry.size), entry.size)]
            # Hamamatsu's 32-bit files go beyond 4 GB: eight bytes for the next page, and the values' upper halves after it.
            is_wide = is_wide or (not big and size > 2**32 and any(code == _NDPI for code, *_ in entries))
            (following,) = _unpacked(stream, order + ("Q" if is_wide else pointer), short=True)
            upper = stream.read(4 * len(entries)) if is_wide else b""
            tags: dict[int, list[_Tag]] = {}
            for number, (code, kind, values, content) in enumerate(entries):
                if code not in _CHECKED:
                    continue
                value_at = start + number * entry.size + entry.size - len(content)
                length = values * _BYTES.get(kind, 1)
                if length > len(content):
                    value_at = struct.unpack(order + pointer, content)[0]
                    if is_wide:
                        value_at += struct.unpack_from("<I", upper, 4 * number)[0] << 32
                if kind not in _BYTES or value_at + length > size:
                    raise _broken(file.name, f"tag {code}, {values} values of type {kind}, lies beyond the end of the file")
                tags.setdefault(code, []).append(_Tag(kind, values, value_at))
            page = _Page(stream, file.name, order, tags)
            if on_chain:
                chain.append(int(following))
            subs = page.numbers(_SUB_IFDS)
            if len(subs) > MAX_PAGES:
                raise _broken(file.name, f"{len(subs)} pages below one page")
            below.extend(int(sub) for sub in subs)
            yield page
    except struct.error as error:
        raise _broken(file.name, "it ends within a page") from error


def _check_pixels(file: Path, page: _Page) -> None:
    height, width = page.most(_LENGTH, 0), page.most(_WIDTH, 0)
    check_size(file.name, height, width)
    sides = [page.most(code, 0) for code in (_TILE_LENGTH, _TILE_WIDTH)]
    if max(sides) > MAX_TILE:
        raise SlideError(
            f"{file.name} declares tiles {max(sides)} px long, above the limit of {MAX_TILE}; its header is damaged or hostile",
            code="TOO_LARGE",
        )
    is_tiled = max(sides) > 0
    size = file.stat().st_size
    if is_tiled:
        if min(sides) < _MIN_TILE:
            raise _broken(file.name, f"tiles of {sides[0]} x {sides[1]} px")
        tiles = -(-height // sides[0]) * -(-width // sides[1])
        offsets = sum(tag.count for tag in page.tags.get(_TILE_OFFSETS, ()))
        if offsets < tiles:
            raise _broken(file.name, f"{tiles} tiles, and only {offsets} of them say where they are")
    depth = page.most(_TILE_DEPTH if is_tiled else _DEPTH, 1)
    pixels = sides[0] * sides[1] if is_tiled else min(height, page.most(_ROWS, height)) * width
    decoded = pixels * depth * page.most(_SAMPLES, 1) * -(-page.most(_BITS, 8) // 8)
    compression = page.most(_COMPRESSION, 1)
    # Hamamatsu's strips are whole levels, of which OpenSlide decodes parts; bare pixels are no more than the file holds.
    is_in_parts = not is_tiled and ((_NDPI in page.tags and compression == 7) or (compression == 1 and decoded <= size))
    if decoded > MAX_DECODED and not is_in_parts:
        raise SlideError(
            f"{file.name} declares a {'tile' if is_tiled else 'strip'} of {decoded / 1e9:.3g} GB, above the limit of "
            f"{MAX_DECODED / 1e9:.3g}; store it as a tiled TIFF, or copy it again where its header may be damaged",
            code="TOO_LARGE",
        )
    for code in (_STRIP_BYTES, _TILE_BYTES):
        if page.most(code, 0) > size:
            raise _broken(file.name, f"{page.most(code, 0)} bytes of one tile or strip in a file of {size} bytes")


def _check_xml(name: str, length: int, content: bytes, *, code: int) -> None:
    limit = _MAX_LONG_XML if code == _XMP or _PHILIPS in content[:1000] else MAX_XML
    if length > limit:
        raise SlideError(
            f"{name} has an image description of {length / 1e6:.3g} MB, above the limit of {limit / 1e6:g}; "
            f"rewrite it without its annotations",
            code="HOSTILE_XML",
        )
    # No scanner writes a document type; it is what entities that expand to gigabytes, or name other files, are declared in.
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise SlideError(
            f"{name} declares XML entities in its image description, which no scanner does; it may be hostile, do not open it",
            code="HOSTILE_XML",
        )


def _unpacked(stream: BinaryIO, form: str, *, short: bool = False) -> tuple[int, ...]:
    """Integers at the stream's place, or where the file may end here, zeros for what it lacks."""
    content = stream.read(struct.calcsize(form))
    return struct.unpack(form, content.ljust(struct.calcsize(form), b"\0") if short else content)


def _parts(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


def _broken(name: str, what: str) -> SlideError:
    return SlideError(f"{name} has a broken TIFF header ({what}); copy it again")
