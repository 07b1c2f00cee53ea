"""A segmentation, tile by tile, into the store that the tiles came from: an NGFF label, there whole or not at all."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import ArrayLike, DTypeLike, NDArray

from wsiscale.errors import OptionError, StoreError
from wsiscale.publishing import MANIFEST
from wsiscale.store import (
    PROFILES,
    Profile,
    Store,
    StoreTile,
    create_level,
    digest,
    growing,
    label_attributes,
    manifest_text,
    ngff_attributes,
    open_store,
    read_manifest,
)

DTYPES = ("uint8", "uint16", "uint32")

_ROOM = 256_000_000  # bytes of level 0 that wait in memory for more tiles
_METADATA = (MANIFEST, "zarr.json", ".zattrs", ".zgroup", ".zarray")


@dataclass(frozen=True)
class LabelSummary:
    """What `write_labels` wrote."""

    path: Path  # of the store
    name: str
    dtype: str
    levels: int
    tiles: int
    largest: int  # of all values
    files: int
    bytes: int
    seconds: float


def write_labels(
    store: Store | str | os.PathLike[str],
    name: str,
    tiles: Iterable[tuple[ArrayLike, StoreTile | tuple[int, int]]],
    *,
    dtype: DTypeLike | None = None,
    values: Mapping[int, str] | None = None,
    overwrite: bool = False,
) -> LabelSummary:
    """Writes `tiles`, each a mask and where it lies, as the label `name` of `store`, as deep a pyramid as the image's.

    A mask is (height, width) of whole numbers from 0, background. Where it lies is the tile that `Store.tiles` gave with the
    pixels, or (row, col) of its top left pixel on level 0 of the store. Masks of tiles with a halo may be as large as those
    tiles, and are cropped, or as the core alone; masks of a coarser level are enlarged. What lies beyond the canvas is
    left out; where tiles overlap the later one counts. A whole mask is `[(mask, (0, 0))]`.

    Numbers are written as they come. Instances that are numbered anew in each tile, or cut by a border, are yours to bring
    together before: this function joins nothing.

    `dtype` is uint8, uint16 or uint32 (None: the first mask's; uint32 for signed ones, as argmax gives them). `values`
    names them: {1: "nucleus"}. Coarser levels take every second pixel. Any order of tiles does; reading order is quickest.

    The store with its new label takes the place of the store without it in one step, at the end: readers find the one or the
    other, and `verify_store` vouches for both. Raises StoreError (EXISTS unless `overwrite`, LOCKED, NOT_FOUND, ...).
    """
    started = time.perf_counter()
    opened = store if isinstance(store, Store) else open_store(store)
    final = Path(os.path.abspath(opened.path))
    _check_name(name)
    if not opened.levels:
        raise StoreError(f"{final} has a tile table alone; there is no image to label", code="NO_PIXELS")
    with growing(final, overwrite=True) as temporary:
        opened = open_store(final)  # once more: nobody changes it from here on
        if name in opened.labels and not overwrite:
            raise StoreError(f"{final} has a label {name}; choose another name, or replace it with overwrite", code="EXISTS")
        manifest = _manifest(final)
        own = Path("labels") / name
        _link(final, temporary, but=own)
        ngff = opened.attributes["ngff"]
        profile = PROFILES[ngff]
        labels = zarr.open_group(temporary / "labels", mode="r+", zarr_format=profile.zarr_format, use_consolidated=False)
        label = labels.create_group(name)
        shapes = [(int(level.shape[1]), int(level.shape[2])) for level in opened.levels]
        placed = (_placed(np.asarray(mask), where) for mask, where in tiles)
        first = next(placed, None)
        finest = create_level(label, "0", shapes[0], profile, dtype=_dtype(dtype, None if first is None else first[0]))
        canvas = _Canvas(finest, profile.shard)
        for mask, row, col in itertools.chain([] if first is None else [first], placed):
            canvas.add(mask, row=row, col=col)
        canvas.finish()
        _write_pyramid(label, finest, shapes[1:], canvas.shards, profile)
        named = [{"label-value": value, "name": text} for value, text in sorted((values or {}).items())]
        label.attrs.update(
            label_attributes(
                ngff,
                name,
                levels=len(shapes),
                scale=opened.scale,
                mpp=opened.mpp,
                shown={"properties": named} if named else {},
            )
        )
        labels.attrs.update(ngff_attributes(ngff, {"labels": [*(other for other in opened.labels if other != name), name]}))
        files, size = _write_manifest(temporary, manifest, own)
    return LabelSummary(
        path=opened.path,
        name=name,
        dtype=str(finest.dtype),
        levels=len(shapes),
        tiles=canvas.tiles,
        largest=canvas.largest,
        files=files,
        bytes=size,
        seconds=time.perf_counter() - started,
    )


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name.endswith(".json"):
        raise OptionError(f"a label cannot be called {name!r}; letters, digits, '.', '_' and '-' make a name")
    if name == "tissue":
        raise OptionError("the label tissue is the store's own; choose another name")


def _dtype(asked: DTypeLike | None, first: NDArray[Any] | None) -> str:
    if asked is not None:
        if np.dtype(asked).name not in DTYPES:
            raise OptionError(f"labels cannot be {np.dtype(asked).name}; choose one of {', '.join(DTYPES)}")
        return np.dtype(asked).name
    if first is None or first.dtype == bool:
        return "uint8"
    return first.dtype.name if first.dtype.name in DTYPES else "uint32"


def _link(store: Path, copy: Path, *, but: Path) -> None:
    """`store` once more, in the same files where the system allows it, without the folder `but`."""

    def leave_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder, name) == store / but]

    def once_more(source: str, target: str) -> str:
        # Metadata is about to change, and must not change in the store that readers have meanwhile.
        if Path(source).name not in _METADATA:
            try:
                os.link(source, target)
                return target
            except OSError:
                pass  # a file system without links
        return shutil.copy2(source, target)

    shutil.copytree(store, copy, ignore=leave_out, copy_function=once_more)


def _placed(mask: NDArray[Any], where: StoreTile | tuple[int, int]) -> tuple[NDArray[Any], int, int]:
    """The mask in px of level 0 without its halo, and the (row, col) of its top left pixel."""
    if mask.ndim != 2:
        raise OptionError(f"a mask is {mask.shape}; give (height, width)")
    if not isinstance(where, StoreTile):
        row, col = (int(edge) for edge in where)
        return mask, row, col
    outer = where.size + 2 * where.halo
    if mask.shape == (outer, outer):
        mask = mask[where.halo : outer - where.halo, where.halo : outer - where.halo]
    elif mask.shape != (where.size, where.size):
        raise OptionError(
            f"the mask of a tile of {where.size} px with a halo of {where.halo} is {mask.shape}; "
            f"give {outer} px a side, or {where.size}"
        )
    factor = 2**where.level
    return mask.repeat(factor, axis=0).repeat(factor, axis=1), where.row * factor, where.col * factor


class _Canvas:
    """Level 0 of a label while tiles come in. A shard is one file, and is written when others need its room in memory."""

    def __init__(self, array: zarr.Array[Any], side: int) -> None:
        self._array, self._side = array, side
        self._waiting: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()
        self._room = max(1, _ROOM // (side**2 * array.dtype.itemsize))  # shards
        self.shards: set[tuple[int, int]] = set()  # (row, column) of those that hold anything but 0
        self.tiles = 0
        self.largest = 0

    def add(self, mask: NDArray[Any], *, row: int, col: int) -> None:
        """Puts `mask` where it lies, px of the canvas; what lies beyond is left out."""
        self.tiles += 1
        top, left = max(row, 0), max(col, 0)
        bottom, right = min(row + mask.shape[0], self._array.shape[0]), min(col + mask.shape[1], self._array.shape[1])
        inside = mask[top - row : max(bottom - row, 0), left - col : max(right - col, 0)]
        self._check(inside)
        side = self._side
        for shard in itertools.product(range(top // side, -(-bottom // side)), range(left // side, -(-right // side))):
            y, x = shard[0] * side, shard[1] * side
            y0, y1, x0, x1 = max(top, y), min(bottom, y + side), max(left, x), min(right, x + side)
            part = inside[y0 - top : y1 - top, x0 - left : x1 - left]
            # Background on a shard that holds nothing else is there already.
            if shard in self.shards or part.any():
                self._pixels(shard)[y0 - y : y1 - y, x0 - x : x1 - x] = part

    def finish(self) -> None:
        while self._waiting:
            self._write_oldest()

    def _check(self, mask: NDArray[Any]) -> None:
        if mask.dtype != bool and not np.issubdtype(mask.dtype, np.integer):
            raise OptionError(f"a mask is {mask.dtype}; labels are whole numbers")
        least, largest = (int(mask.min()), int(mask.max())) if mask.size else (0, 0)
        if least < 0 or largest > np.iinfo(self._array.dtype).max:
            raise OptionError(f"a mask holds {least} to {largest}, and the label is {self._array.dtype}; give another dtype")
        self.largest = max(self.largest, largest)

    def _pixels(self, shard: tuple[int, int]) -> NDArray[Any]:
        """A shard's, from memory, or from the disk where they have been written before."""
        if shard not in self._waiting:
            if len(self._waiting) >= self._room:
                self._write_oldest()
            rows, columns = self._slices(shard)
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            seen = shard in self.shards
            # zarr's own array is read-only where a shard is one chunk.
            self._waiting[shard] = np.array(self._array[rows, columns]) if seen else np.zeros(shape, self._array.dtype)
            self.shards.add(shard)
        self._waiting.move_to_end(shard)
        return self._waiting[shard]

    def _write_oldest(self) -> None:
        shard, pixels = self._waiting.popitem(last=False)
        self._array[self._slices(shard)] = pixels

    def _slices(self, shard: tuple[int, int]) -> tuple[slice, slice]:
        (row, col), side, (height, width) = shard, self._side, self._array.shape
        return slice(row * side, min((row + 1) * side, height)), slice(col * side, min((col + 1) * side, width))


def _write_pyramid(
    label: zarr.Group, finest: zarr.Array[Any], shapes: list[tuple[int, int]], shards: set[tuple[int, int]], profile: Profile
) -> None:
    finer, side = finest, profile.shard
    for k, shape in enumerate(shapes, start=1):
        array = create_level(label, str(k), shape, profile, dtype=str(finest.dtype))
        shards = {(row // 2, col // 2) for row, col in shards}
        for row, col in sorted(shards):
            top, left = row * side, col * side
            bottom, right = min(top + side, shape[0]), min(left + side, shape[1])
            array[top:bottom, left:right] = np.asarray(finer[2 * top : 2 * bottom, 2 * left : 2 * right])[::2, ::2]
        finer = array


def _manifest(store: Path) -> dict[str, Any]:
    try:
        return read_manifest(store)
    except (FileNotFoundError, ValueError) as error:
        raise StoreError(f"the manifest of {store} is lost or damaged; write the store again", code="DAMAGED") from error


def _write_manifest(copy: Path, manifest: dict[str, Any], label: Path) -> tuple[int, int]:
    """`manifest` with the files of the new label; (files, bytes) of these.

    All other entries stay as they are: to digest the files anew would vouch for damage that they may have taken since.
    """
    own = {file.relative_to(copy).as_posix(): digest(file) for file in (copy / label).rglob("*") if file.is_file()}
    names = {f"labels/{name}" for name in _METADATA if (copy / "labels" / name).is_file()}
    kept = {name: entry for name, entry in manifest["files"].items() if not Path(name).is_relative_to(label)}
    files = kept | {name: digest(copy / name) for name in names} | own
    (copy / MANIFEST).write_bytes(manifest_text({**manifest, "files": dict(sorted(files.items()))}))
    return len(own), sum(entry["bytes"] for entry in own.values())
