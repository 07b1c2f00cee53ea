"""Tiles of stores for MONAI: what to load, and the dictionary transform that loads it."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from wsiscale.errors import StoreError
from wsiscale.store import Store, StoreTile, open_store

try:
    from monai.config import KeysCollection
    from monai.data import MetaTensor
    from monai.transforms import MapTransform
except ImportError as error:
    raise StoreError("this needs MONAI; install it with pip install 'wsiscale[monai]'", code="MISSING_EXTRA") from error


def tile_items(store: Store | str | os.PathLike[str], size: int | None = None, **grid: Any) -> list[dict[str, Any]]:
    """A dict for each tile of `store`, as a MONAI Dataset takes them: {"image": path, "tile": StoreTile}.

    `size` and what follows are those of `Store.tiles`.
    """
    opened = store if isinstance(store, Store) else open_store(store)
    path = os.path.abspath(opened.path)
    return [{"image": path, "tile": tile} for tile in opened.grid(size, **grid)]


class LoadWsiscaleTiled(MapTransform):  # type: ignore[misc]
    """Loads data[key], the path of a store, as the pixels of data["tile"]: a (3, H, W) MetaTensor of `dtype`, 0..255.

    Its `meta` has `filename_or_obj`, `location` (row, col; px of the level, halo included), `level`, `mpp`, and its `affine`
    leads from pixels to µm (level-0 px of the slide where its µm/px is unknown), (y, x) first.
    """

    def __init__(
        self, keys: KeysCollection, *, tile_key: Hashable = "tile", dtype: Any = np.float32, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.tile_key = tile_key
        self.dtype = dtype

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        tile: StoreTile = data[self.tile_key]
        for key in self.key_iterator(loaded):
            store = _opened(os.fspath(loaded[key]), os.getpid())
            pixels = np.moveaxis(store.read_tile(tile), -1, 0).astype(self.dtype)
            pixel = (store.scale if store.mpp is None else store.mpp) * 2**tile.level
            corner = (tile.row - tile.halo, tile.col - tile.halo)
            affine = np.diag([pixel, pixel, 1.0, 1.0])
            affine[:2, 3] = [(edge + 0.5) * pixel for edge in corner]  # of the first pixel's centre
            meta = {
                "filename_or_obj": str(loaded[key]),
                "location": corner,
                "level": tile.level,
                "mpp": None if store.mpp is None else pixel,
                "spatial_shape": np.asarray(pixels.shape[1:]),
                "original_channel_dim": 0,
            }
            loaded[key] = MetaTensor(np.ascontiguousarray(pixels), affine=affine, meta=meta)
        return loaded


@lru_cache(maxsize=16)
def _opened(path: str, _process: int) -> Store:
    """Once a process: what zarr has open does not outlive a fork."""
    return open_store(path)
