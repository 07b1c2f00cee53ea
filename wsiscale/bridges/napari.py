"""Stores in napari, in colour, with tissue and segmentations as labels. napari itself is not needed here."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np

from wsiscale.errors import StoreError
from wsiscale.store import Store, open_store

LayerData = tuple[Any, dict[str, Any], str]  # what is shown, how, and as which kind of layer


def get_reader(path: str | list[str]) -> Callable[[str | list[str]], list[LayerData]] | None:
    """What napari calls to ask whether `path` is for us: a store of a slide, with pixels."""
    try:
        return read if open_store(_one(path)).levels else None
    except (StoreError, OSError):
        return None


def read(path: str | list[str]) -> list[LayerData]:
    return layers(open_store(_one(path)))


def layers(store: Store) -> list[LayerData]:
    """The image as one layer in colour, each label as one of labels; all lazy, in µm where the slide's µm/px is known."""
    pixel = store.scale if store.mpp is None else store.mpp
    common: dict[str, Any] = {"scale": (pixel, pixel), "metadata": {"wsiscale": dict(store.attributes)}}
    if store.mpp is not None:
        common["units"] = ("micrometer", "micrometer")
    image = [da.moveaxis(_lazy(level), 0, -1) for level in store.levels]
    name = str(store.attributes["slide"]["name"])
    shown: list[LayerData] = [(image, {"name": name, "rgb": True, "multiscale": True, **common}, "image")]
    for label in store.labels:
        masks = [_lazy(level) for level in store.label(label)]
        shown.append((masks, {"name": label, "multiscale": True, "opacity": 0.4, **common}, "labels"))
    return shown


def _lazy(level: Any) -> da.Array:
    # Told what it will get, dask does not read a piece to find out.
    return da.from_array(level, chunks=level.chunks, meta=np.empty((0,) * level.ndim, level.dtype))


def _one(path: str | list[str]) -> str:
    """napari gives a list where several files are opened as one stack, which stores are not."""
    paths = [path] if isinstance(path, str | os.PathLike) else path
    if len(paths) != 1:
        raise StoreError("several stores make no stack; open them one by one", code="NOT_A_STORE")
    return os.fspath(paths[0])
