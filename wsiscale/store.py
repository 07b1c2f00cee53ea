"""OME-Zarr: a slide's tissue at one magnification, written whole or not at all, read back and verified.

A store is the whole slide's canvas at the asked scale. Only chunks near tissue are written; what is missing is white, and a
manifest with a digest of every file tells background from loss. It grows under a temporary name beside the final one, and one
rename publishes it: whoever finds the final name finds a complete store. docs/output-format.md describes the layout.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import zarr
import zarr.core.sync
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from wsiscale.errors import NoTissueError, OptionError, SlideError, StoreError
from wsiscale.geometry import (
    TOLERANCE,
    View,
    blocks,
    canvas_shape,
    check_upsampling,
    level_for,
    scale_for_mpp,
    snapped_scale,
)
from wsiscale.places import tile_grid, tissue_share
from wsiscale.publishing import MANIFEST, in_bytes, published, reserved
from wsiscale.resample import KERNEL, halve
from wsiscale.responses import SavedResponse
from wsiscale.tissue import find_tissue
from wsiscale.types import (
    BatchNormStatistics,
    LayerMoments,
    Outputs,
    Reader,
    ScaleResponse,
    ScaleStack,
    SlideSource,
    TileGrid,
    Tissue,
)
from wsiscale.versions import versions
from wsiscale.views import cores, read_view

SCHEMA = 1  # of the `wsiscale` attributes, the tile table and the manifest
STATUS = {"ok": 0, "failed": 1, "no_pixels": 2}  # of a tile

Ngff = Literal["0.5", "0.4"]
Pixels = Literal["tissue", "none"]
Progress = Callable[[int, int], None]  # (done, total) units of work

_WHITE = 255
# Without the checksum 199 of 200 flipped bits come back as pixels.
_ZSTD = ZstdCodec(level=3, checksum=True)
# For NGFF 0.4: QuPath's reader knows blosc and zlib, not plain zstd.
_BLOSC: dict[str, Any] = {"id": "blosc", "cname": "zstd", "clevel": 3, "shuffle": 0}
_SMALLEST = 512  # px: the pyramid ends with the first level of which both sides are within this
_HALO = 256.0  # level-0 px, where the slide's µm/px is unknown
_WINDOW = 2048 * 2048  # px of the slide read at once by one thread: 12 MB
_STRIP = 512  # rows of a coarser level made at once, of twice as many of the finer one


@dataclass(frozen=True)
class Profile:
    """How one NGFF version lies on disk."""

    ngff: Ngff
    zarr_format: Literal[2, 3]
    chunk: int  # px a side; what is written or left white
    shard: int  # px a side; one file, and so one writer


PROFILES = {"0.5": Profile("0.5", 3, 512, 2048), "0.4": Profile("0.4", 2, 1024, 1024)}


@dataclass(frozen=True)
class StorePlan:
    """What `write_store` would write, before any of its pixels are read."""

    path: Path
    ngff: Ngff
    requested_scale: float  # level-0 px per px
    requested_mpp: float | None  # µm/px; None where the slide's is unknown
    scale: float  # of the store; a level's own where the request is within the tolerance of it
    mpp: float | None
    tolerance: float
    upsampled: bool  # finer than level 0
    read_level: int
    factor: float  # px of `read_level` per px of the store; 1: they are taken as they are
    halo: float  # level-0 px
    min_tissue: float
    shapes: tuple[tuple[int, int], ...]  # (height, width) of each level of the store, finest first; none without pixels
    touched: tuple[NDArray[np.bool_], ...]  # of each level: the chunks (rows, columns) that are written
    canvas: tuple[int, int]  # (height, width) of the whole slide at `scale`
    tissue: Tissue
    grid: TileGrid
    shards: int  # of the image, all levels
    bytes: int  # an upper estimate: lossless compression of tissue gains little
    free: int  # bytes, where the store is to be

    @property
    def tiles(self) -> int:
        return len(self.grid)

    @property
    def chunks(self) -> int:
        return sum(int(touched.sum()) for touched in self.touched)

    @property
    def megapixels(self) -> float:
        """Of the finest level."""
        area = int(self.touched[0].sum()) * PROFILES[self.ngff].chunk ** 2 if self.touched else 0
        return min(area, self.canvas[0] * self.canvas[1]) / 1e6

    def sentence(self) -> str:
        """What to say before it starts."""
        pixels = (
            f"a canvas of {self.canvas[1]} x {self.canvas[0]} px in {_counted(self.shards, 'file')}"
            if self.shapes
            else "no pixels"
        )
        return (
            f"{self.path.name}: {_counted(self.tiles, 'tile')} of {self.grid.size} px {_at(self.scale, self.mpp)}, {pixels}; "
            f"up to {in_bytes(self.bytes)}, {in_bytes(self.free)} free"
        )


@dataclass(frozen=True)
class StoreSummary:
    """What `write_store` wrote."""

    path: Path
    ngff: Ngff
    scale: float  # level-0 px per px
    mpp: float | None
    canvas: tuple[int, int]  # (height, width)
    levels: int
    tiles: int
    failed: int  # of the tiles: the slide is damaged there, and they are white
    failed_chunks: int  # of the finest level, those beside the tiles included
    megapixels: float  # of the finest level, what was looked at
    chunks: int  # of the image, all levels
    shards: int
    files: int
    bytes: int
    seconds: float

    def sentence(self) -> str:
        damaged = f", {self.failed} of them damaged and left white" if self.failed else ""
        return (
            f"{self.path}: {_counted(self.tiles, 'tile')} {_at(self.scale, self.mpp)}{damaged}, "
            f"{_counted(self.levels, 'level')}, {self.files} files, {in_bytes(self.bytes)}, {self.seconds:.1f} s"
        )

    def as_record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "path": str(self.path), "canvas": list(self.canvas)}


@dataclass(frozen=True)
class StackSummary:
    """What `write_stack` wrote."""

    path: Path
    shape: tuple[int, ...]  # (N, S, H, W, 3)
    files: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a store."""

    path: str  # within the store
    kind: Literal["missing", "zero_length", "truncated", "too_long", "altered", "unexpected", "incomplete"]
    what: str  # is wrong, in words


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_store` found; a store is whole where it found nothing."""

    path: Path
    files: int  # named by the manifest
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class StoreTile:
    """Where one tile of a store lies: its core, the halo around it not counted."""

    index: int
    row: int  # of the top left corner, px of `level`
    col: int
    y: float  # the same corner on the slide, level-0 px
    x: float
    size: int  # px of `level`
    halo: int  # px of `level`, on every side
    level: int
    tissue: float  # share of the core, 0..1
    failed: bool  # the slide is damaged under the tile or its halo: some of its white is not the slide's


@dataclass(frozen=True)
class StoreTiles:
    """The tiles of a store, in reading order, as columns; `tiles[n]` is one of them."""

    rows: NDArray[np.int64]  # (T,) of the top left corners, px of `level`
    cols: NDArray[np.int64]  # (T,)
    tissue: NDArray[np.float32]  # (T,) share, 0..1
    failed: NDArray[np.bool_]  # (T,)
    size: int  # px of `level`
    overlap: int  # px of `level` that neighbours share
    halo: int  # px of `level` that are read around each
    level: int
    scale: float  # level-0 px of the slide per px of `level`
    mpp: float | None  # µm/px of `level`

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> StoreTile:
        row, col = int(self.rows[index]), int(self.cols[index])
        return StoreTile(
            index=range(len(self))[index],
            row=row,
            col=col,
            y=row * self.scale,
            x=col * self.scale,
            size=self.size,
            halo=self.halo,
            level=self.level,
            tissue=float(self.tissue[index]),
            failed=bool(self.failed[index]),
        )

    def __iter__(self) -> Iterator[StoreTile]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Store:
    """A written store, open for reading."""

    path: Path
    levels: tuple[zarr.Array[Any], ...]  # each (3, height, width) uint8, finest first; none in a store without pixels
    tissue: tuple[zarr.Array[Any], ...]  # each (height, width) uint8, 1 on tissue
    labels: tuple[str, ...]  # names of all labels, "tissue" among them
    tile_table: Mapping[str, NDArray[Any]]  # columns (T,): id, x, y, w, h, row, col, tissue, status
    tile_settings: Mapping[str, Any]  # of the table: size, overlap, scale, mpp, min_tissue, ...
    attributes: Mapping[str, Any]  # `wsiscale`
    scale: float  # level-0 px per px of the finest level
    mpp: float | None  # µm/px of the finest level

    def read(self, *, level: int = 0, y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
        """Pixels of `level`, counted in that level's own pixels, white outside: (height, width, 3). Raises StoreError."""
        if not 0 <= level < len(self.levels):
            raise OptionError(f"{self.path} has {len(self.levels)} levels; there is no level {level}")
        array = self.levels[level]
        y0, y1 = (min(max(edge, 0), array.shape[1]) for edge in (y, y + height))
        x0, x1 = (min(max(edge, 0), array.shape[2]) for edge in (x, x + width))
        pixels = np.full((height, width, 3), _WHITE, np.uint8)
        try:
            inside = np.asarray(array[:, y0:y1, x0:x1])
        # What zarr's codecs raise for a chunk or a shard index that fails its checksum.
        except (RuntimeError, ValueError, OSError) as error:
            raise StoreError(f"{self.path} is damaged at level {level}; `wsiscale verify` says where: {error}") from error
        pixels[y0 - y : y1 - y, x0 - x : x1 - x] = np.moveaxis(inside, 0, -1)
        return pixels

    def tiles(
        self,
        size: int | None = None,
        *,
        overlap: int = 0,
        halo: int = 0,
        level: int = 0,
        min_tissue: float | None = None,
        tissue_only: bool = True,
    ) -> Iterator[tuple[NDArray[np.uint8], StoreTile]]:
        """The tiles of `grid`, which takes the same arguments, one after another, each with where it lies.

        A tile is (size + 2 halo, size + 2 halo, 3), white beyond the canvas. Raises StoreError where a chunk is damaged.
        """
        grid = self.grid(size, overlap=overlap, halo=halo, level=level, min_tissue=min_tissue, tissue_only=tissue_only)
        return ((self.read_tile(tile), tile) for tile in grid)

    def read_tile(self, tile: StoreTile) -> NDArray[np.uint8]:
        """The pixels of `tile` with its halo: (size + 2 halo, size + 2 halo, 3)."""
        side = tile.size + 2 * tile.halo
        return self.read(level=tile.level, y=tile.row - tile.halo, x=tile.col - tile.halo, height=side, width=side)

    def grid(
        self,
        size: int | None = None,
        *,
        overlap: int = 0,
        halo: int = 0,
        level: int = 0,
        min_tissue: float | None = None,
        tissue_only: bool = True,
    ) -> StoreTiles:
        """Where the store's tiles lie: those of its table, or, with a `size`, those of another grid, in px of `level`.

        A tile of another grid holds at least `min_tissue` (0..1; None: as much as those of the table) tissue, unless
        `tissue_only` is off. Neighbours share `overlap` px; `halo` px more are read on every side, for networks that need
        to see what is around. The halo of a tile at the end of what was written may be white where the slide is not.
        """
        if not self.levels:
            raise StoreError(f"{self.path} has a tile table alone, no pixels; write it with --pixels tissue", code="NO_PIXELS")
        if not 0 <= level < len(self.levels):
            raise OptionError(f"{self.path} has {len(self.levels)} levels; there is no level {level}")
        if halo < 0:
            raise OptionError(f"a halo of {halo} px makes no sense; give 0 or more")
        if size is None:
            if level or overlap or min_tissue is not None or not tissue_only:
                raise OptionError("the tiles of the table are what they are; give a size for others")
            size, overlap = (int(self.tile_settings[name]) for name in ("size", "overlap"))
            rows, cols, tissue = (self.tile_table[name] for name in ("row", "col", "tissue"))
        else:
            if size < 1 or not 0 <= overlap < size:
                raise OptionError(f"an overlap of {overlap} px does not fit tiles of {size} px; give 0 to {size - 1}")
            least = float(self.tile_settings["min_tissue"]) if min_tissue is None else min_tissue
            if not 0 <= least <= 1:
                raise OptionError(f"min_tissue is a share from 0 to 1, not {least:g}")
            tops, lefts = (np.arange(0, side, size - overlap) for side in self.levels[level].shape[1:])
            share = tissue_share(self._tissue_of(level, size), tops, lefts, size)  # (len(tops), len(lefts))
            kept = np.nonzero((share >= least) & (share > 0) if tissue_only else np.ones(share.shape, bool))
            rows, cols, tissue = tops[kept[0]], lefts[kept[1]], share[kept]
        failed = np.zeros(len(rows), bool)
        chunk = self.levels[0].chunks[-1] / 2**level
        for row, column in self.attributes["failed_chunks"]:
            below = (rows + size + halo > row * chunk) & (rows - halo < (row + 1) * chunk)
            failed |= below & (cols + size + halo > column * chunk) & (cols - halo < (column + 1) * chunk)
        return StoreTiles(
            rows=rows.astype(np.int64),
            cols=cols.astype(np.int64),
            tissue=tissue.astype(np.float32),
            failed=failed,
            size=size,
            overlap=overlap,
            halo=halo,
            level=level,
            scale=self.scale * 2**level,
            mpp=None if self.mpp is None else self.mpp * 2**level,
        )

    def label(self, name: str) -> tuple[zarr.Array[Any], ...]:
        """The levels of a label, each (height, width), finest first. Raises StoreError where there is none of that name."""
        if name not in self.labels:
            raise StoreError(f"{self.path} has no label {name}; it has {', '.join(self.labels) or 'none'}", code="NOT_FOUND")
        root = zarr.open_group(self.path, mode="r", use_consolidated=False)
        return tuple(_array(root, f"labels/{name}/{k}") for k in range(len(self.levels)))

    def _tissue_of(self, level: int, size: int) -> Tissue:
        """The tissue label in px of `level`, as coarse as tiles of `size` px allow."""
        coarse = min(len(self.tissue) - 1, level + max(0, (size // 16).bit_length() - 1))
        mask = np.asarray(self.tissue[coarse][:]) > 0
        height, width = self.levels[level].shape[1:]
        return Tissue(mask=mask, step=2.0 ** (coarse - level), shape=(height, width), mpp=self.mpp)


def write_store(
    path: str | os.PathLike[str],
    slide: Reader,
    *,
    mpp: float | None = None,
    scale: float | None = None,
    tissue: Tissue | None = None,
    tile_size: int = 512,
    overlap: int = 0,
    min_tissue: float = 0.1,
    ngff: Ngff = "0.5",
    pixels: Pixels = "tissue",
    tolerance: float = TOLERANCE,
    max_upsample: float = 1.0,
    halo_um: float = 64.0,
    max_failed_tiles: float = 0.01,
    estimate: Mapping[str, Any] | None = None,
    made_of: Mapping[str, Any] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    durable: bool = False,
) -> StoreSummary:
    """The tissue of `slide` at `mpp` µm/px (or at `scale`, level-0 px per px) as an OME-Zarr at `path`, whole or not at all.

    Chunks within `halo_um` of tissue (256 level-0 px where the slide's µm/px is unknown) or of a tile are written, the rest
    is white; the canvas is the whole slide. `tile_size` and `overlap`, px of the store, are those of the tile table.
    With `pixels` "none" there is a tile table alone. `estimate` and `made_of` (by which a cohort knows its own) are kept as
    they are, as JSON. One thread works at one shard and needs about 150 MB. `overwrite` replaces a store at `path` once the new
    one is whole. With `durable` it outlives a power cut from the moment on that it has its name, and takes longer.

    Chunks of which the slide's own tiles are damaged are left out, white, and the tiles under them are `failed` in the table.
    Where that is a larger share of the tiles than `max_failed_tiles` there is no store, but a SlideError (DAMAGED).

    Raises StoreError (EXISTS, LOCKED, NOT_WRITABLE, NO_SPACE, ...), NoTissueError, ScaleError where it is finer than level 0
    by more than `max_upsample`, MppError where `mpp` is asked of a slide without, and SlideError.
    """
    if not 0 <= max_failed_tiles <= 1:
        raise OptionError(f"max_failed_tiles is a share of the tiles, from 0 to 1, not {max_failed_tiles:g}")
    started = time.perf_counter()
    final = Path(os.path.abspath(path))
    kept = {
        name: None if value is None else _plain_json(value) for name, value in (("estimate", estimate), ("made_of", made_of))
    }
    workers = _workers(threads)
    with growing(final, overwrite=overwrite, durable=durable) as temporary:
        plan = plan_store(
            final,
            slide,
            mpp=mpp,
            scale=scale,
            tissue=tissue,
            tile_size=tile_size,
            overlap=overlap,
            min_tissue=min_tissue,
            ngff=ngff,
            pixels=pixels,
            tolerance=tolerance,
            max_upsample=max_upsample,
            halo_um=halo_um,
        )
        if plan.free < plan.bytes:
            raise StoreError(
                f"{final} needs up to {in_bytes(plan.bytes)} and {in_bytes(plan.free)} are free; make room, choose a coarser "
                "magnification, or write the tile table alone (--pixels none)",
                code="NO_SPACE",
            )
        root = zarr.open_group(temporary, mode="w-", zarr_format=PROFILES[ngff].zarr_format)
        damage = _Damage(plan, max_failed_tiles, slide.source.name)
        expected = _write_image(root, plan, slide, workers, progress, damage) if plan.shapes else set()
        _write_tiles(root, plan, damage)
        root.attrs.update(_root_attributes(plan, slide, damage, kept))
        failed = int(damage.tiles.sum())
        tiles = {"total": plan.tiles, "ok": plan.tiles - failed if plan.shapes else 0, "failed": failed}
        files, size = _write_manifest(temporary, {"tiles": tiles, "chunks": plan.chunks, "shards": plan.shards}, expected)
    return StoreSummary(
        path=final,
        ngff=ngff,
        scale=plan.scale,
        mpp=plan.mpp,
        canvas=plan.canvas,
        levels=len(plan.shapes),
        tiles=plan.tiles,
        failed=failed,
        failed_chunks=len(damage.chunks),
        megapixels=plan.megapixels,
        chunks=plan.chunks,
        shards=plan.shards,
        files=files,
        bytes=size,
        seconds=time.perf_counter() - started,
    )


def check_destination(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raises StoreError where nothing could be written at `path` now: for callers with long work to do before."""
    with reserved(Path(os.path.abspath(path)), overwrite=overwrite):
        pass


def plan_store(
    path: str | os.PathLike[str],
    slide: Reader,
    *,
    mpp: float | None = None,
    scale: float | None = None,
    tissue: Tissue | None = None,
    tile_size: int = 512,
    overlap: int = 0,
    min_tissue: float = 0.1,
    ngff: Ngff = "0.5",
    pixels: Pixels = "tissue",
    tolerance: float = TOLERANCE,
    max_upsample: float = 1.0,
    halo_um: float = 64.0,
) -> StorePlan:
    """What `write_store` would write with the same arguments: how much, and at which scale exactly. Writes nothing.

    Give its `tissue` to `write_store`, which then need not look for it again. Raises what `write_store` raises, but for
    what has to do with the place where the store is to be.
    """
    final = Path(os.path.abspath(path))
    if ngff not in get_args(Ngff):
        raise OptionError(f"NGFF {ngff} cannot be written; choose one of {', '.join(get_args(Ngff))}")
    if pixels not in get_args(Pixels):
        raise OptionError(f"there are no pixels {pixels!r} to write; choose one of {', '.join(get_args(Pixels))}")
    if not (math.isfinite(halo_um) and halo_um >= 0):
        raise OptionError(f"a halo of {halo_um:g} µm makes no sense; give 0 or more")
    if not final.parent.is_dir():
        raise StoreError(f"there is no folder {final.parent}; make it first", code="NOT_FOUND")
    pyramid = slide.pyramid
    requested = _requested_scale(slide, mpp, scale)
    upsampled = check_upsampling(pyramid, requested, max_upsample=max_upsample, tolerance=tolerance)
    achieved = snapped_scale(pyramid, requested, tolerance=tolerance)
    requested_mpp = mpp if mpp is not None else None if pyramid.mpp is None else requested * pyramid.mpp
    level = level_for(pyramid, achieved, tolerance=0)

    if tissue is None:
        tissue = find_tissue(slide)
    if tissue.shape != pyramid.shape:
        raise OptionError(f"the tissue is that of a slide of {tissue.shape} px; this one has {pyramid.shape}")
    if not tissue.mask.any():
        raise NoTissueError(
            f"no tissue was found on {slide.source.name}; give another detector (--tissue) or a mask of your own"
        )
    grid = tile_grid(tissue, scale=achieved, size=tile_size, overlap=overlap, min_tissue=min_tissue)

    canvas = canvas_shape(pyramid, achieved)
    halo = _HALO if pyramid.mpp is None else halo_um / pyramid.mpp
    profile = PROFILES[ngff]
    shapes = _level_shapes(canvas) if pixels == "tissue" else ()
    touched = _touched_chunks(shapes, tissue, grid, halo=halo, chunk=profile.chunk) if shapes else ()
    shards = sum(len(_shard_indices(level_touched, profile)) for level_touched in touched)
    area = int(touched[0].sum()) * profile.chunk**2 if touched else 0
    return StorePlan(
        path=final,
        ngff=ngff,
        requested_scale=requested,
        requested_mpp=requested_mpp,
        scale=achieved,
        mpp=requested_mpp if achieved == requested or pyramid.mpp is None else achieved * pyramid.mpp,
        tolerance=tolerance,
        upsampled=upsampled and achieved < 1,
        read_level=level,
        factor=achieved / pyramid.downsamples[level],
        halo=halo,
        min_tissue=min_tissue,
        shapes=shapes,
        touched=touched,
        canvas=canvas,
        tissue=tissue,
        grid=grid,
        shards=shards,
        # Pixels, a third on top for the pyramid; the table; a block of the file system and a manifest line for each file.
        bytes=math.ceil(min(area, canvas[0] * canvas[1]) * 3 * 4 / 3) + 64 * len(grid) + 8192 * (2 * shards + 64),
        free=shutil.disk_usage(final.parent).free,
    )


def open_store(path: str | os.PathLike[str]) -> Store:
    """The store at `path`, for reading. Raises StoreError where there is none, or one of another schema."""
    folder = Path(path)
    attributes = _our_attributes(folder)
    if attributes.get("kind") != "slide":
        raise StoreError(f"{folder} holds a scale stack, not a slide; read it with zarr.open_group", code="NOT_A_STORE")
    root = zarr.open_group(folder, mode="r", use_consolidated=False)
    count = int(attributes["levels"])
    tiles = _group(root, "tiles")
    return Store(
        path=folder,
        levels=tuple(_array(root, str(k)) for k in range(count)),
        tissue=tuple(_array(root, f"labels/tissue/{k}") for k in range(count)),
        labels=_label_names(root) if count else (),
        tile_table={name: np.asarray(array[:]) for name, array in sorted(tiles.arrays())},
        tile_settings=dict(tiles.attrs),
        attributes=attributes,
        scale=float(attributes["achieved_scale"]),
        mpp=attributes["achieved_mpp"],
    )


def verify_store(path: str | os.PathLike[str]) -> VerifyReport:
    """Everything that is wrong with a store, file by file: what `write_store` or `write_stack` wrote and is no longer so.

    Raises StoreError where there is no such folder, or its schema is not one that this version knows.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise StoreError(f"there is no store at {folder}", code="NOT_FOUND")
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        problem = Problem(MANIFEST, "missing", "without it background cannot be told from loss; write the store again")
        return VerifyReport(folder, 0, 0, (problem,))
    except ValueError:
        problem = Problem(MANIFEST, "altered", "it does not match its own digest, and so vouches for nothing")
        return VerifyReport(folder, 0, 0, (problem,))
    _check_schema(folder, manifest.get("schema"))

    problems = []
    present = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
    for name, entry in manifest["files"].items():
        problem_or_none = _compare(name, present.get(name), entry)
        if problem_or_none is not None:
            problems.append(problem_or_none)
    for name in sorted(present.keys() - manifest["files"].keys() - {MANIFEST}):
        problems.append(Problem(name, "unexpected", "the manifest does not name it"))
    if not problems and not _our_attributes(folder).get("complete"):
        problems.append(Problem(".", "incomplete", "the attributes do not say that it was finished"))
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    return VerifyReport(folder, len(manifest["files"]), size, tuple(problems))


def write_stack(
    path: str | os.PathLike[str],
    stack: ScaleStack,
    *,
    source: SlideSource | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> StackSummary:
    """`stack` as zarr v3 with named dimensions, one file a place, whole or not at all.

    Arrays: images (place, scale, y, x, rgb), scales and mpp (scale), centers (place, yx), upsampled (scale). `threads` places
    are in memory at a time. `source` says which slide it is. Raises StoreError.
    """
    started = time.perf_counter()
    final = Path(os.path.abspath(path))
    workers = _workers(threads)
    count, scales, height, width, channels = (int(n) for n in stack.images.shape)
    with growing(final, overwrite=overwrite) as temporary:
        root = zarr.open_group(temporary, mode="w-", zarr_format=3)
        images = root.create_array(
            "images",
            shape=(count, scales, height, width, channels),
            dtype="uint8",
            chunks=(1, 1, height, width, channels),
            shards=(1, scales, height, width, channels),
            compressors=_ZSTD,
            fill_value=_WHITE,
            dimension_names=["place", "scale", "y", "x", "rgb"],
        )
        expected = set()
        for first in range(0, count, workers):
            some = stack.images.blocks[first : first + workers].compute(scheduler="threads", num_workers=workers)
            images[first : first + len(some)] = some
            expected |= {_file(images, (first + i, 0, 0, 0, 0)) for i, place in enumerate(some) if (place != _WHITE).any()}
            if progress is not None:
                progress(first + len(some), count)
        _write_column(root, "scales", stack.scales, ["scale"])
        if stack.mpp is not None:
            _write_column(root, "mpp", stack.mpp, ["scale"])
        _write_column(root, "centers", stack.centers, ["place", "yx"])
        _write_column(root, "upsampled", stack.upsampled, ["scale"])
        ours: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "stack",
            "complete": True,
            "slide": None if source is None else _slide_attributes(source),
            "slide_mpp": stack.slide_mpp,
            "source_level": stack.source_level,
            "resample": KERNEL,
            "frame": "centers are level-0 (y, x); scales are level-0 px per px; mpp is µm/px",
            "versions": versions("zarr", "numpy"),
        }
        root.attrs.update({"wsiscale": ours})
        files, size = _write_manifest(temporary, {"places": count}, expected)
    return StackSummary(
        path=final,
        shape=(count, scales, height, width, channels),
        files=files,
        bytes=size,
        seconds=time.perf_counter() - started,
    )


def write_response(path: str | os.PathLike[str], saved: SavedResponse, *, overwrite: bool = False) -> Path:
    """What a network answered, as zarr v3, whole or not at all; `read_response` gives it back. Raises StoreError."""
    final = Path(os.path.abspath(path))
    with growing(final, overwrite=overwrite) as temporary:
        root = zarr.open_group(temporary, mode="w-", zarr_format=3)
        _write_column(root, "centers", saved.centers, ["place", "yx"])
        _write_answers(root.create_group("response"), saved.response)
        if saved.guard is not None:
            _write_answers(root.create_group("guard"), saved.guard)
        ours: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "response",
            "complete": True,
            "about": saved.about,
            "versions": versions("zarr", "numpy"),
        }
        root.attrs.update({"wsiscale": ours})
        _write_manifest(temporary, {"places": saved.response.places}, set())
    return final


def read_response(path: str | os.PathLike[str]) -> SavedResponse:
    """What `write_response` wrote. Raises StoreError where it is not that, or is damaged."""
    folder = Path(path)
    attributes = _our_attributes(folder)
    if attributes.get("kind") != "response":
        raise StoreError(f"{folder} holds a {attributes.get('kind')}, not a network's answers", code="NOT_A_STORE")
    if problems := verify_store(folder).problems:
        raise StoreError(f"{folder} is damaged: {problems[0].path}: {problems[0].what}; ask the network again", code="DAMAGED")
    root = zarr.open_group(folder, mode="r", use_consolidated=False)
    return SavedResponse(
        response=_read_answers(_group(root, "response")),
        centers=np.asarray(_array(root, "centers")[:]),
        guard=_read_answers(_group(root, "guard")) if "guard" in root else None,
        about=dict(attributes["about"]),
    )


# Planning


def _requested_scale(slide: Reader, mpp: float | None, scale: float | None) -> float:
    if (mpp is None) == (scale is None):
        raise OptionError("a store needs either mpp or scale")
    if scale is None:
        assert mpp is not None
        return scale_for_mpp(mpp, slide.pyramid.mpp, slide.calibration)
    if not (math.isfinite(scale) and scale > 0):
        raise OptionError(f"{scale:g} is not a scale; give level-0 px per px, above 0")
    return scale


def _level_shapes(canvas: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(height, width) of each level: halved, odd sides rounded up, until both fit `_SMALLEST`."""
    shapes = [canvas]
    while max(shapes[-1]) > _SMALLEST:
        height, width = shapes[-1]
        shapes.append((math.ceil(height / 2), math.ceil(width / 2)))
    return tuple(shapes)


def _touched_chunks(
    shapes: tuple[tuple[int, int], ...], tissue: Tissue, grid: TileGrid, *, halo: float, chunk: int
) -> tuple[NDArray[np.bool_], ...]:
    """The chunks of each level that tissue, within `halo` level-0 px, or a tile reaches; a coarser one if a finer one is."""
    counts = tuple(math.ceil(side / chunk) for side in shapes[0])
    area = np.zeros((tissue.mask.shape[0] + 1, tissue.mask.shape[1] + 1), np.int32)
    inside = area[1:, 1:]
    np.cumsum(tissue.mask, axis=0, out=inside).cumsum(axis=1, out=inside)
    bounds = []
    for count, cells in zip(counts, tissue.mask.shape, strict=True):
        edges = np.arange(count + 1) * chunk * grid.scale  # level-0 px
        first = np.floor((edges[:-1] - halo) / tissue.step).astype(np.int64).clip(0, cells)
        last = np.ceil((edges[1:] + halo) / tissue.step).astype(np.int64).clip(0, cells)
        bounds.append((first, last))
    (top, bottom), (left, right) = bounds
    touched = (
        area[np.ix_(bottom, right)] - area[np.ix_(top, right)] - area[np.ix_(bottom, left)] + area[np.ix_(top, left)]
    ) > 0
    # Tiles reach over the tissue that earned them, and a tile of the table must not hold white that is not the slide's.
    begin = _canvas_origins(grid) // chunk  # (T, 2)
    end = (_canvas_origins(grid) + grid.size - 1) // chunk + 1
    for (row, column), (row_end, column_end) in zip(begin, end, strict=True):
        touched[row:row_end, column:column_end] = True
    levels = [touched]
    for _ in shapes[1:]:
        levels.append(_pooled(levels[-1], 2))
    return tuple(levels)


def _canvas_origins(grid: TileGrid) -> NDArray[np.int64]:
    """(T, 2) canvas (row, col) of each tile's top left pixel."""
    origins: NDArray[np.int64] = np.rint(grid.origins / grid.scale).astype(np.int64)
    return origins


def _pooled(mask: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    """Whether any of `size` x `size` cells is set, ragged edges included."""
    height, width = (math.ceil(n / size) for n in mask.shape)
    padded = np.zeros((height * size, width * size), bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return np.asarray(padded.reshape(height, size, width, size).any(axis=(1, 3)))


def _shard_indices(touched: NDArray[np.bool_], profile: Profile) -> list[tuple[int, int]]:
    """(row, column) of the shards that hold a touched chunk, in reading order."""
    shards = _pooled(touched, profile.shard // profile.chunk)
    return [(int(row), int(column)) for row, column in np.argwhere(shards)]


# Pixels


@dataclass(frozen=True)
class _Shard:
    """One file of one level, and so the work of one thread."""

    level: int
    row: int
    column: int
    y: int  # px of the level
    x: int
    height: int
    width: int


class _Damage:
    """What of a slide could not be read, and so is missing from its store."""

    def __init__(self, plan: StorePlan, most: float, name: str) -> None:
        self.chunks: list[tuple[int, int]] = []  # (row, column) of the finest level
        self.tiles = np.zeros(len(plan.grid), bool)
        self._begin = _canvas_origins(plan.grid) // PROFILES[plan.ngff].chunk  # (T, 2)
        self._end = (_canvas_origins(plan.grid) + plan.grid.size - 1) // PROFILES[plan.ngff].chunk
        self._touched = int(plan.touched[0].sum()) if plan.touched else 0
        self._most = most
        self._name = name

    def add(self, chunks: Iterable[tuple[int, int]], why: SlideError | None) -> None:
        """Raises SlideError where it is too much by now."""
        for chunk in chunks:
            self.chunks.append(chunk)
            self.tiles |= ((self._begin <= chunk) & (chunk <= self._end)).all(axis=1)
        # On a slide with less tissue than a tile's share of it there are chunks and no tiles.
        missing, of, what = (
            (self.tiles.sum(), len(self.tiles), "tiles") if len(self.tiles) else (len(self.chunks), self._touched, "chunks")
        )
        if missing > self._most * of:
            raise SlideError(
                f"{self._name} is damaged under {missing} or more of its {of} {what}, above a share of {self._most:.3g}; copy "
                f"the file again, or allow more (--max-failed-tiles): {why}",
                code="DAMAGED",
            )


@dataclass(frozen=True)
class _Written:
    """What came of one shard."""

    files: list[str]
    failed: list[tuple[int, int]]  # chunks that could not be read
    why: SlideError | None


def _write_image(
    root: zarr.Group, plan: StorePlan, slide: Reader, threads: int, progress: Progress | None, damage: _Damage
) -> set[str]:
    """Writes the pyramid and the tissue label; returns the files that must be there now."""
    profile = PROFILES[plan.ngff]
    images = [create_level(root, str(k), (3, *shape), profile) for k, shape in enumerate(plan.shapes)]
    labels = root.create_group("labels")
    label = labels.create_group("tissue")
    masks = [create_level(label, str(k), shape, profile) for k, shape in enumerate(plan.shapes)]
    labels.attrs.update(ngff_attributes(plan.ngff, {"labels": ["tissue"]}))
    green = {"colors": [{"label-value": 1, "rgba": [0, 160, 80, 96]}]}
    label.attrs.update(
        label_attributes(plan.ngff, "tissue", levels=len(plan.shapes), scale=plan.scale, mpp=plan.mpp, shown=green)
    )

    def write(shard: _Shard) -> _Written:
        failed: list[tuple[int, int]] = []
        why = None
        if shard.level == 0:
            pixels, failed, why = _read_shard(slide, plan, shard, profile.chunk)
        else:
            pixels = _halved_shard(images[shard.level - 1], shard)
        mask = _tissue_shard(plan, shard)
        rows, columns = slice(shard.y, shard.y + shard.height), slice(shard.x, shard.x + shard.width)
        expected = []
        if (pixels != _WHITE).any():
            images[shard.level][:, rows, columns] = np.moveaxis(pixels, -1, 0)
            expected.append(_file(images[shard.level], (0, shard.row, shard.column)))
        if mask.any():
            masks[shard.level][rows, columns] = mask
            expected.append(_file(masks[shard.level], (shard.row, shard.column)))
        return _Written(expected, failed, why)

    files: set[str] = set()
    done = 0

    def finished(written: _Written) -> None:
        nonlocal done
        files.update(written.files)
        damage.add(written.failed, written.why)
        done += 1
        if progress is not None:
            progress(done, plan.shards)

    for k, shape in enumerate(plan.shapes):  # a level is made from the one before, which has to be there
        shards = [_shard(k, index, shape, profile.shard) for index in _shard_indices(plan.touched[k], profile)]
        _in_threads(write, shards, threads, finished)
    return files


def create_level(
    group: zarr.Group, name: str, shape: tuple[int, ...], profile: Profile, *, dtype: str = "uint8"
) -> zarr.Array[Any]:
    """An empty level: (3, height, width) white, or a label's (height, width) of zeros."""
    channels = shape[:-2]
    chunks = (*channels, profile.chunk, profile.chunk)
    fill = _WHITE if channels else 0
    if profile.zarr_format == 2:
        return group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            compressors=_BLOSC,
            fill_value=fill,
            chunk_key_encoding={"name": "v2", "separator": "/"},
        )
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=(*channels, profile.shard, profile.shard),
        compressors=_ZSTD,
        fill_value=fill,
        dimension_names=["c", "y", "x"] if channels else ["y", "x"],
    )


def _shard(level: int, index: tuple[int, int], shape: tuple[int, int], size: int) -> _Shard:
    y, x = index[0] * size, index[1] * size
    return _Shard(level, *index, y=y, x=x, height=min(size, shape[0] - y), width=min(size, shape[1] - x))


def _read_shard(
    slide: Reader, plan: StorePlan, shard: _Shard, chunk: int
) -> tuple[NDArray[np.uint8], list[tuple[int, int]], SlideError | None]:
    """A shard of level 0 from the slide, white where no chunk is touched or one cannot be read: (height, width, 3).

    Also which chunks (row, column) of the level could not be, and why.
    """
    pixels = np.full((shard.height, shard.width, 3), _WHITE, np.uint8)
    first_row, first_column = shard.y // chunk, shard.x // chunk
    rows, columns = math.ceil(shard.height / chunk), math.ceil(shard.width / chunk)
    touched = plan.touched[0][first_row : first_row + rows, first_column : first_column + columns]
    size = max(1, math.floor(math.sqrt(_WINDOW) / max(plan.factor, 1)))

    def read(top: int, left: int, bottom: int, right: int) -> None:
        height, width = min(bottom * chunk, shard.height) - top * chunk, min(right * chunk, shard.width) - left * chunk
        for dy, dx, h, w in blocks(height, width, size):
            y, x = top * chunk + dy, left * chunk + dx
            view = View(y=(shard.y + y) * plan.scale, x=(shard.x + x) * plan.scale, height=h, width=w, scale=plan.scale)
            pixels[y : y + h, x : x + w] = read_view(slide, view, level=plan.read_level)

    failed: list[tuple[int, int]] = []
    why = None
    for top, left, bottom, right in _rectangles(touched):
        try:
            read(top, left, bottom, right)
            continue
        except SlideError as error:
            if error.code != "READ_FAILED":
                raise
        # Somewhere in it the slide is damaged: the chunks that are not are read one by one.
        for row, column in itertools.product(range(top, bottom), range(left, right)):
            try:
                read(row, column, row + 1, column + 1)
            except SlideError as error:
                if error.code != "READ_FAILED":
                    raise
                why = error
                failed.append((first_row + row, first_column + column))
                pixels[row * chunk : (row + 1) * chunk, column * chunk : (column + 1) * chunk] = _WHITE
    return pixels, failed, why


def _rectangles(mask: NDArray[np.bool_]) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of rectangles that cover what is set, once: runs of a row, joined to equal runs above.

    One read of a rectangle decodes the slide's own tiles once, where chunk by chunk those on the borders come twice.
    """
    finished = []
    growing: dict[tuple[int, int], int] = {}  # (left, right) of a run -> its first row
    for row, cells in enumerate([*mask, np.zeros(mask.shape[1], bool)]):
        edges = np.flatnonzero(np.diff(cells.astype(np.int8), prepend=0, append=0))
        runs = {(int(left), int(right)) for left, right in edges.reshape(-1, 2)}
        finished += [(growing[run], run[0], row, run[1]) for run in growing if run not in runs]
        growing = {run: growing.get(run, row) for run in sorted(runs)}
    return finished


def _halved_shard(finer: zarr.Array[Any], shard: _Shard) -> NDArray[np.uint8]:
    """A shard of a coarser level as 2 x 2 means of what was written of the finer one: (height, width, 3)."""
    pixels = np.empty((shard.height, shard.width, 3), np.uint8)
    columns = slice(2 * shard.x, 2 * (shard.x + shard.width))
    for y in range(0, shard.height, _STRIP):
        rows = slice(2 * (shard.y + y), 2 * (shard.y + min(y + _STRIP, shard.height)))
        pixels[y : y + _STRIP] = halve(np.moveaxis(np.asarray(finer[:, rows, columns]), 0, -1))
    return pixels


def _tissue_shard(plan: StorePlan, shard: _Shard) -> NDArray[np.uint8]:
    """1 where a pixel's centre lies on tissue: (height, width)."""
    step = plan.scale * 2**shard.level / plan.tissue.step  # mask px per px of the level
    rows = ((shard.y + np.arange(shard.height) + 0.5) * step).astype(np.int64).clip(max=plan.tissue.mask.shape[0] - 1)
    columns = ((shard.x + np.arange(shard.width) + 0.5) * step).astype(np.int64).clip(max=plan.tissue.mask.shape[1] - 1)
    return plan.tissue.mask[np.ix_(rows, columns)].astype(np.uint8)


def _in_threads(
    work: Callable[[_Shard], _Written], shards: Iterable[_Shard], threads: int, finished: Callable[[_Written], None]
) -> None:
    """Calls `finished`, in the calling thread, with each result. After an exception nothing runs any more."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="wsiscale-store")
    try:
        for future in as_completed([pool.submit(work, shard) for shard in shards]):
            finished(future.result())
    finally:
        # Waiting, because a thread that still writes would bring a removed folder back.
        pool.shutdown(wait=True, cancel_futures=True)


def _file(array: zarr.Array[Any], index: tuple[int, ...]) -> str:
    """The file, within the store, of a chunk or shard."""
    return f"{array.path}/{array.metadata.encode_chunk_key(index)}"


# Tables and attributes


def _write_tiles(root: zarr.Group, plan: StorePlan, damage: _Damage) -> None:
    grid = plan.grid
    count = len(grid)
    side = round(grid.size * grid.scale)
    canvas = _canvas_origins(grid)
    status = STATUS["ok"] if plan.shapes else STATUS["no_pixels"]
    columns: dict[str, NDArray[Any]] = {
        "id": np.arange(count, dtype=np.int64),
        "x": grid.origins[:, 1],
        "y": grid.origins[:, 0],
        "w": np.full(count, side, np.int64),
        "h": np.full(count, side, np.int64),
        "row": canvas[:, 0],
        "col": canvas[:, 1],
        "tissue": grid.tissue.astype(np.float32),
        "status": np.where(damage.tiles, STATUS["failed"], status).astype(np.uint8),
    }
    group = root.create_group("tiles")
    for name, column in columns.items():
        _write_column(group, name, column, ["tile"])
    group.attrs.update(
        {
            "size": grid.size,
            "overlap": grid.overlap,
            "scale": grid.scale,
            "mpp": plan.mpp,
            "min_tissue": plan.min_tissue,
            "frame": "x, y, w, h: level-0 px of the slide; row, col, size, overlap: px of level 0 of the store",
            "status_codes": STATUS,
        }
    )


def _write_column(group: zarr.Group, name: str, values: NDArray[Any], dimensions: list[str]) -> None:
    settings: dict[str, Any] = {"shape": values.shape, "dtype": values.dtype, "chunks": tuple(max(1, n) for n in values.shape)}
    if group.metadata.zarr_format == 3:
        settings |= {"compressors": _ZSTD, "dimension_names": dimensions}
    else:
        settings |= {
            "compressors": _BLOSC,
            "chunk_key_encoding": {"name": "v2", "separator": "/"},
        }
    group.create_array(name, **settings)[...] = values


def _root_attributes(plan: StorePlan, slide: Reader, damage: _Damage, kept: Mapping[str, Any]) -> dict[str, Any]:
    calibration = slide.calibration
    half_pixel = 0.5 / plan.scale - 0.5
    claimed = calibration.claimed
    ours = {
        "schema": SCHEMA,
        "kind": "slide",
        "complete": True,
        "slide": {
            **_slide_attributes(slide.source),
            "shape": list(slide.pyramid.shape),
            "downsamples": list(slide.pyramid.downsamples),
            "bounds": None if slide.pyramid.bounds is None else list(slide.pyramid.bounds),
        },
        "slide_mpp": slide.pyramid.mpp,
        "mpp_source": calibration.source,
        "mpp_tag": calibration.tag,
        "mpp_claimed": claimed if claimed is not None and math.isfinite(claimed) else None,
        "mpp_verdict": calibration.verdict,
        "mpp_reasons": list(calibration.reasons),
        "requested_mpp": plan.requested_mpp,
        "requested_scale": plan.requested_scale,
        "achieved_mpp": plan.mpp,
        "achieved_scale": plan.scale,
        "unit": "level-0 pixel" if plan.mpp is None else "micrometer",
        "tolerance": plan.tolerance,
        "read_level": plan.read_level,
        "resampled": plan.factor != 1,
        "resample": "none" if plan.factor == 1 else "linear" if plan.upsampled else KERNEL,
        "upsampled": plan.upsampled,
        "level0_to_canvas": {
            "matrix": [[1 / plan.scale, 0, half_pixel], [0, 1 / plan.scale, half_pixel]],
            "frame": "(row, col) = matrix @ (y, x, 1), where whole numbers are pixel centres",
        },
        "canvas": list(plan.canvas),
        "levels": len(plan.shapes),
        "ngff": plan.ngff if plan.shapes else None,
        "halo": plan.halo,
        "failed_chunks": sorted(list(chunk) for chunk in damage.chunks),
        **kept,
        "versions": versions("zarr", "numpy"),
    }
    if not plan.shapes:
        return {"wsiscale": ours}
    name = slide.source.name
    scales = _multiscales(plan.ngff, ["c", "y", "x"], name, levels=len(plan.shapes), scale=plan.scale, mpp=plan.mpp)
    image = {"multiscales": [scales], "omero": _omero(plan.ngff, name)}
    return {**ngff_attributes(plan.ngff, image), "wsiscale": ours}


def _slide_attributes(source: SlideSource) -> dict[str, Any]:
    """A whitelist. Not the path: folders are named by people, and after people."""
    return {name: getattr(source, name) for name in ("name", "size", "mtime_ns", "vendor", "reader")}


def label_attributes(
    ngff: Ngff, name: str, *, levels: int, scale: float, mpp: float | None, shown: Mapping[str, Any]
) -> dict[str, Any]:
    """Of a label beside the image; `shown` is what `image-label` says of its values: colors, properties."""
    label: dict[str, Any] = {"source": {"image": "../../"}, **shown}
    if ngff == "0.4":
        label["version"] = "0.4"
    multiscales = [_multiscales(ngff, ["y", "x"], name, levels=levels, scale=scale, mpp=mpp)]
    return ngff_attributes(ngff, {"multiscales": multiscales, "image-label": label})


def ngff_attributes(ngff: Ngff, content: dict[str, Any]) -> dict[str, Any]:
    """0.4 keeps its attributes at the root, 0.5 under `ome`."""
    return content if ngff == "0.4" else {"ome": {"version": "0.5", **content}}


def _multiscales(ngff: Ngff, axes: list[str], name: str, *, levels: int, scale: float, mpp: float | None) -> dict[str, Any]:
    """The pixel size is exactly what it is, not the slide's side over the canvas's; level k starts (2^k - 1)/2 px in."""
    pixel = scale if mpp is None else mpp
    space = {"type": "space"} if mpp is None else {"type": "space", "unit": "micrometer"}
    datasets = []
    for k in range(levels):
        size, start = pixel * 2**k, pixel * (2**k - 1) / 2
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": [1.0 if axis == "c" else size for axis in axes]}]
        if k:
            transforms.append({"type": "translation", "translation": [0.0 if axis == "c" else start for axis in axes]})
        datasets.append({"path": str(k), "coordinateTransformations": transforms})
    multiscales: dict[str, Any] = {
        "name": name,
        "axes": [{"name": "c", "type": "channel"} if axis == "c" else {"name": axis, **space} for axis in axes],
        "datasets": datasets,
        "type": "mean" if "c" in axes else "nearest",
    }
    if ngff == "0.4":
        multiscales["version"] = "0.4"
    return multiscales


def _omero(ngff: Ngff, name: str) -> dict[str, Any]:
    """How to show the channels. TIAToolbox insists on `rdefs`, and on no key that it does not know."""
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    colors = {"Red": "FF0000", "Green": "00FF00", "Blue": "0000FF"}
    omero: dict[str, Any] = {
        "id": 1,
        "name": name,
        "channels": [{"label": label, "color": color, "active": True, "window": window} for label, color in colors.items()],
        "rdefs": {"model": "color", "defaultT": 0, "defaultZ": 0},
    }
    if ngff == "0.4":
        omero["version"] = "0.4"
    return omero


def _plain_json(estimate: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(estimate), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise OptionError(f"the estimate cannot be kept as JSON: {error}") from error
    return plain


# Responses

# Names of layers and views are attributes, in their order; what they hold lies under their number. Names may hold anything.


def _write_answers(group: zarr.Group, response: ScaleResponse) -> None:
    def write(into: zarr.Group, arrays: Mapping[str, NDArray[Any] | None]) -> None:
        for name, values in arrays.items():
            if values is not None:
                _write_column(into, name, values, [f"{name}{axis}" for axis in range(values.ndim)])

    write(group, {name: getattr(response, name) for name in _ANSWERS})
    if response.outputs is not None:
        write(group.create_group("outputs"), vars(response.outputs))
    for kind in ("layers", "batchnorm", "views", "agreement"):
        named = getattr(response, kind)
        folder = group.create_group(kind)
        folder.attrs["names"] = list(named)
        for number, value in enumerate(named.values()):
            if kind == "views":
                _write_answers(folder.create_group(str(number)), value)
            elif kind == "agreement":
                write(folder, {str(number): value})
            else:
                inside = folder.create_group(str(number))
                write(inside, {name: array for name, array in vars(value).items() if isinstance(array, np.ndarray)})
                inside.attrs.update({name: number for name, number in vars(value).items() if isinstance(number, float)})
    group.attrs.update({"slide_mpp": response.slide_mpp, "stages": list(response.stages)})


def _read_answers(group: zarr.Group) -> ScaleResponse:
    def arrays(inside: zarr.Group) -> dict[str, Any]:
        return {name: np.asarray(array[...]) for name, array in inside.arrays()}

    def named(kind: str) -> list[tuple[str, str]]:
        names: Any = _group(group, kind).attrs["names"]
        return [(str(name), f"{kind}/{number}") for number, name in enumerate(names)]

    def numbers(inside: zarr.Group) -> dict[str, Any]:
        return dict(inside.attrs)

    about: dict[str, Any] = dict(group.attrs)
    layers = {name: _group(group, where) for name, where in named("layers")}
    batchnorm = {name: _group(group, where) for name, where in named("batchnorm")}
    return ScaleResponse(
        **{name: None for name in _ANSWERS if name != "scales"} | arrays(group),
        slide_mpp=about["slide_mpp"],
        outputs=Outputs(**arrays(_group(group, "outputs"))) if "outputs" in group else None,
        layers={name: LayerMoments(**arrays(inside)) for name, inside in layers.items()},
        stages=tuple(about["stages"]),
        batchnorm={name: BatchNormStatistics(**arrays(inside), **numbers(inside)) for name, inside in batchnorm.items()},
        views={name: _read_answers(_group(group, where)) for name, where in named("views")},
        agreement={name: np.asarray(_array(group, where)[...]) for name, where in named("agreement")},
    )


_ANSWERS = ("scales", "features", "head_weight", "head_bias")


# The manifest, and reading back


def _write_manifest(folder: Path, counts: Mapping[str, Any], expected: set[str]) -> tuple[int, int]:
    """Digests every file of a finished store; (files, bytes), the manifest's own included."""
    files = {file.relative_to(folder).as_posix(): digest(file) for file in _files(folder)}
    lost = [name for name in sorted(expected) if name not in files or not files[name]["bytes"]]
    if lost:
        raise StoreError(
            f"{len(lost)} files are gone again after they were written, the first is {lost[0]}; is the disk sound?"
        )
    content = {"wsiscale": "manifest", "schema": SCHEMA, **counts, "files": files}
    text = manifest_text(content)
    (folder / MANIFEST).write_bytes(text)
    return len(files) + 1, sum(entry["bytes"] for entry in files.values()) + len(text)


def manifest_text(content: dict[str, Any]) -> bytes:
    """The manifest's bytes, its own digest last: they have one form only, so that no byte can change unseen."""
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError where it is not as it was written."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except IsADirectoryError:
        raise FileNotFoundError(MANIFEST) from None
    content = json.loads(raw)
    if not isinstance(content, dict):
        raise ValueError("not an object")
    own = content.pop("sha256", None)
    if own is None or manifest_text(content) != raw:
        raise ValueError("not its digest")
    return content


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir())


def digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}


def _compare(name: str, file: Path | None, entry: Mapping[str, Any]) -> Problem | None:
    if file is None:
        return Problem(name, "missing", "it reads as white or not at all")
    try:
        size = file.stat().st_size
        if size == entry["bytes"]:
            found = digest(file)["sha256"]
            return (
                None if found == entry["sha256"] else Problem(name, "altered", f"its SHA-256 is {found}, not {entry['sha256']}")
            )
    except OSError as error:
        return Problem(name, "missing", f"it cannot be read: {error.strerror}")
    kind: Literal["zero_length", "truncated", "too_long"] = (
        "zero_length" if size == 0 else "truncated" if size < entry["bytes"] else "too_long"
    )
    return Problem(name, kind, f"{size} bytes, not {entry['bytes']}")


def _our_attributes(folder: Path) -> dict[str, Any]:
    """The `wsiscale` attributes of the store at `folder`. Raises StoreError."""
    v3, v2 = folder / "zarr.json", folder / ".zattrs"
    try:
        root = json.loads(v3.read_bytes()).get("attributes", {}) if v3.is_file() else json.loads(v2.read_bytes())
        ours = root["wsiscale"]
        schema = ours["schema"]
    except FileNotFoundError as error:
        raise StoreError(f"there is no store at {folder}", code="NOT_FOUND") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{folder} is not a store that wsiscale wrote", code="NOT_A_STORE") from error
    _check_schema(folder, schema)
    return dict(ours)


def _label_names(root: zarr.Group) -> tuple[str, ...]:
    attributes: dict[str, Any] = dict(_group(root, "labels").attrs)
    return tuple(attributes.get("ome", attributes)["labels"])


def _check_schema(folder: Path, schema: object) -> None:
    if schema != SCHEMA:
        raise StoreError(
            f"{folder} has schema {schema}; this version of wsiscale knows {SCHEMA}; use the version that wrote it",
            code="SCHEMA",
        )


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group.get(name)
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{group.store} has lost {name}; `wsiscale verify` says what else", code="DAMAGED")
    return array


def _group(group: zarr.Group, name: str) -> zarr.Group:
    found = group.get(name)
    if not isinstance(found, zarr.Group):
        raise StoreError(f"{group.store} has lost {name}; `wsiscale verify` says what else", code="DAMAGED")
    return found


@contextmanager
def growing(path: Path, *, overwrite: bool, durable: bool = False) -> Iterator[Path]:
    """The folder to write to, which becomes `path` at the end; after an error it goes once nothing is written any more."""
    with published(path, overwrite=overwrite, durable=durable) as temporary:
        try:
            yield temporary
        except BaseException:
            _let_zarr_finish()
            raise


def _let_zarr_finish() -> None:
    """Waits until zarr writes nothing any more: it raises the first error while other files are still on their way.

    These would bring a folder that is removed meanwhile back.
    """
    own = "wsiscale waits"  # of which several may wait at once, and not for each other

    async def others_done() -> None:
        current = asyncio.current_task()
        assert current is not None
        current.set_name(own)
        others = [task for task in asyncio.all_tasks() if task.get_name() != own]
        if others:
            await asyncio.wait(others, timeout=60)

    zarr.core.sync.sync(others_done())


def _workers(threads: int | None) -> int:
    if threads is None:
        return cores()
    if threads < 1:
        raise OptionError(f"{threads} threads cannot work; give 1 or more")
    return threads


def _at(scale: float, mpp: float | None) -> str:
    return f"at scale {scale:.4g}" if mpp is None else f"at {mpp:.4g} µm/px"


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
