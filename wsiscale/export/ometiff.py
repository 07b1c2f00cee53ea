"""A store's pixels as a pyramidal OME-TIFF, without loss."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from wsiscale.errors import StoreError
from wsiscale.publishing import MANIFEST
from wsiscale.store import Store

_CLASSIC = 2**31  # bytes of pixels up to which a file cannot outgrow a classic TIFF's 4 GB


def write_ome_tiff(store: Store, path: Path) -> list[str]:
    """Tiled, deflate, coarser levels as sub-images; µm/px in the OME-XML and in the resolution tags. One tile at a time."""
    if not store.levels:
        raise StoreError(f"{store.path} has a tile table alone, no pixels; write it with --pixels tissue", code="NO_PIXELS")
    side = int(store.levels[0].chunks[-1])
    name = str(store.attributes["slide"]["name"])
    # Of its own accord tifffile takes the machine's address and the time for it.
    own = uuid.uuid5(uuid.NAMESPACE_OID, (store.path / MANIFEST).read_text())
    metadata: dict[str, Any] = {"axes": "YXS", "Name": name, "UUID": str(own)}
    if store.mpp is not None:
        metadata |= {"PhysicalSizeX": store.mpp, "PhysicalSizeXUnit": "µm"}
        metadata |= {"PhysicalSizeY": store.mpp, "PhysicalSizeYUnit": "µm"}
    large = sum(int(np.prod(level.shape)) for level in store.levels) > _CLASSIC
    with tifffile.TiffWriter(path, ome=True, bigtiff=large) as file:
        for k, level in enumerate(store.levels):
            _, height, width = level.shape
            file.write(
                _tiles(store, k, side),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(side, side),
                photometric="rgb",
                compression="adobe_deflate",
                predictor=True,
                resolution=None if store.mpp is None else (1e4 / (store.mpp * 2**k),) * 2,
                resolutionunit=None if store.mpp is None else "CENTIMETER",
                software="wsiscale",
                **({"subifds": len(store.levels) - 1, "metadata": metadata} if k == 0 else {"subfiletype": 1}),
            )
    notes = ["OpenSlide reads the first level alone, as all OME-TIFF"] if len(store.levels) > 1 else []
    if store.mpp is None:
        notes.append("the slide's µm/px is unknown, and so the file has none")
    return notes


def _tiles(store: Store, level: int, side: int) -> Iterator[NDArray[np.uint8]]:
    _, height, width = store.levels[level].shape
    for y in range(0, height, side):
        for x in range(0, width, side):
            yield store.read(level=level, y=y, x=x, height=side, width=side)
