"""The tiles of stores as a torch dataset, for training and inference."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from wsiscale.errors import OptionError
from wsiscale.store import Store, StoreTile, StoreTiles, open_store

_OPEN = 16  # stores that a process holds open


class StoreDataset(Dataset[dict[str, Any]]):
    """The tiles of one store or of several, store by store, each in reading order. Any number of workers may have it.

    `size` and what follows are those of `Store.tiles`. A sample is a dict that DataLoader's own collation takes: `image`, a
    (3, H, W) uint8 tensor or what `transform` makes of it, H and W being size + 2 halo; `store`, its path; `row`, `col` and
    `y`, `x`, where the tile without its halo begins in px of the store's `level` and of the slide's level 0; `tissue` and
    `failed`, as a StoreTile has them; `index`, by which `tile` tells `write_labels` where a mask belongs.
    """

    def __init__(
        self,
        stores: Store | str | os.PathLike[str] | Iterable[Store | str | os.PathLike[str]],
        size: int | None = None,
        *,
        overlap: int = 0,
        halo: int = 0,
        level: int = 0,
        min_tissue: float | None = None,
        tissue_only: bool = True,
        transform: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        several = [stores] if isinstance(stores, Store | str | os.PathLike) else list(stores)
        if not several:
            raise OptionError("a dataset needs at least one store")
        opened = [store if isinstance(store, Store) else open_store(store) for store in several]
        self.paths: tuple[Path, ...] = tuple(Path(os.path.abspath(store.path)) for store in opened)
        self.grids: tuple[StoreTiles, ...] = tuple(
            store.grid(size, overlap=overlap, halo=halo, level=level, min_tissue=min_tissue, tissue_only=tissue_only)
            for store in opened
        )
        self.transform = transform
        self._ends = np.cumsum([len(grid) for grid in self.grids])
        self._opened: dict[tuple[int, int], Store] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        number, tile = self._find(index)
        pixels = self._store(number).read_tile(tile)
        image: Any = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        about = {name: getattr(tile, name) for name in ("row", "col", "level", "y", "x", "tissue", "failed")}
        return {
            "image": image if self.transform is None else self.transform(image),
            "store": str(self.paths[number]),
            **about,
            "index": index,
        }

    def tile(self, index: int) -> StoreTile:
        """Where the sample of that index lies in its store."""
        return self._find(range(len(self))[int(index)])[1]

    def _find(self, index: int) -> tuple[int, StoreTile]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, self.grids[number][index - int(self._ends[number]) + len(self.grids[number])]

    def _store(self, number: int) -> Store:
        """Opened by the process that reads: what zarr has open does not outlive a fork."""
        key = (os.getpid(), number)
        if key not in self._opened:
            if len(self._opened) >= _OPEN:
                del self._opened[next(iter(self._opened))]
            self._opened[key] = open_store(self.paths[number])
        return self._opened[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}
