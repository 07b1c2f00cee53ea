"""Stores for LazySlide: a WSIData with the tiles at the magnification that was found."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from wsiscale.errors import OptionError, StoreError
from wsiscale.export.spatialdata import to_spatialdata
from wsiscale.store import Store, open_store

if TYPE_CHECKING:
    from wsidata import WSIData


def to_wsidata(store: Store | str | os.PathLike[str], slide: str | os.PathLike[str] | None = None) -> WSIData:
    """What LazySlide works on, with tiles under "tiles" and their `tile_spec`.

    Without a `slide` its pixels are the store's, and it stands for a slide of the store's µm/px. With one they are read from
    the slide itself: tiles of the same place, size and µm/px, resampled by LazySlide. Nothing is written beside either.
    Raises StoreError (MISSING_EXTRA), OptionError where it is another slide, or one that LazySlide would have to enlarge.
    """
    try:
        from wsidata import TileSpec, open_wsi
        from wsidata.io import add_tiles
    except ImportError as error:
        raise StoreError("this needs wsidata; install it with pip install lazyslide", code="MISSING_EXTRA") from error
    opened = store if isinstance(store, Store) else open_store(store)
    if slide is None:
        wsi = open_wsi(to_spatialdata(opened), image_key="image")
        wsi.set_mpp(opened.mpp)
        return wsi
    wsi = open_wsi(os.fspath(slide), store=None)
    shape = tuple(opened.attributes["slide"]["shape"])
    if tuple(wsi.properties.shape) != shape:
        raise OptionError(f"the store is of a slide of {shape} px; {slide} has {tuple(wsi.properties.shape)}")
    if opened.scale < 1:
        raise OptionError("the store is finer than the slide, and LazySlide does not enlarge; leave the slide out")
    if opened.attributes["slide_mpp"] is not None:
        wsi.set_mpp(opened.attributes["slide_mpp"])
    size, stride = (int(opened.tile_settings["size"]) - n for n in (0, opened.tile_settings["overlap"]))
    downsamples = np.asarray(wsi.properties.level_downsample)
    level = int(np.flatnonzero(downsamples <= opened.scale * (1 + 1e-6))[-1])
    spec = TileSpec(
        height=size,
        width=size,
        stride_height=stride,
        stride_width=stride,
        mpp=opened.mpp,
        ops_level=level,
        ops_downsample=opened.scale / float(downsamples[level]),
        base_downsample=opened.scale,
    )
    places = np.stack([opened.tile_table["x"], opened.tile_table["y"]], axis=1)
    add_tiles(wsi, "tiles", places, spec, np.zeros(len(places), int))
    return wsi
