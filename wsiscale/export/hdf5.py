"""Tile coordinates as HDF5, with the names that TRIDENT and CLAM read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiscale.errors import StoreError
from wsiscale.store import STATUS, Store

if TYPE_CHECKING:
    import h5py

# TRIDENT's magnification of a slide, by the µm/px below which it is that.
_MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))


def write_trident_h5(store: Store, path: Path) -> list[str]:
    """`coords` (N, 2), level-0 (x, y), with TRIDENT's attributes; its name is to be <slide>_patches.h5.

    TRIDENT reads at the ratio of two magnifications. That of level 0 is the one that it gives the slide itself, and the
    target's is that over the store's scale: the ratio is exact, whole or not.
    """
    mpp = store.attributes["slide_mpp"]
    if mpp is None or store.mpp is None:
        raise StoreError(
            f"TRIDENT's format has magnifications, and the µm/px of {_name(store)} is unknown; give it with --slide-mpp when "
            "the store is written",
            code="NO_MPP",
        )
    magnification = next((power for below, power in _MAGNIFICATIONS if mpp < below), 10 / mpp)
    target = magnification / store.scale
    whole = abs(target - round(target)) < 1e-6 * target
    notes = []
    if not whole:
        notes.append(
            f"{store.mpp:.4g} µm/px is {target:.4g}x of a slide of {magnification:.4g}x: TRIDENT reads that, but what takes "
            f"target_magnification for a whole number reads {100 * abs(int(target) / target - 1):.0f} % off; achieved_mpp and "
            "patch_size_level0 are exact"
        )
    if mpp >= _MAGNIFICATIONS[-1][0]:
        notes.append(f"TRIDENT refuses slides of {_MAGNIFICATIONS[-1][0]} µm/px and coarser; this one has {mpp:.4g}")
    if store.scale < 1:
        notes.append("the tiles are finer than the slide; TRIDENT will enlarge its pixels")
    notes += _damaged(store)
    with _file(path) as file:
        height, width = store.attributes["slide"]["shape"]
        coords = _coords(store, file)
        coords.attrs.update(
            {
                "patch_size": int(store.tile_settings["size"]),
                "patch_size_level0": round(store.tile_settings["size"] * store.scale),
                "level0_magnification": magnification,
                "target_magnification": round(target) if whole else target,
                "overlap": int(store.tile_settings["overlap"]),
                "level0_width": int(width),
                "level0_height": int(height),
                "name": _name(store),
                **_truth(store),
            }
        )
    return notes


def write_clam_h5(store: Store, path: Path) -> list[str]:
    """`coords` (N, 2), level-0 (x, y), with CLAM's attributes; its name is to be <slide>.h5.

    CLAM reads whole levels of the slide: the level is the one that the store was made from, and a patch is as many of its
    pixels as cover the tile.
    """
    slide, level = store.attributes["slide"], int(store.attributes["read_level"])
    downsample = float(slide["downsamples"][level])
    size = int(store.tile_settings["size"])
    patch = round(size * store.scale / downsample)
    shape = [round(side / downsample) for side in reversed(slide["shape"])]  # (width, height)
    with _file(path) as file:
        coords = _coords(store, file)
        coords.attrs.update(
            {
                "patch_size": patch,
                "patch_level": level,
                "downsample": np.array([downsample, downsample]),
                "downsampled_level_dim": np.array(shape),
                "level_dim": np.array(shape),
                "name": _name(store),
                "save_path": "",
                **_truth(store),
            }
        )
    if patch == size:
        return _damaged(store)
    at = f"{store.mpp:.4g} µm/px" if store.mpp is not None else f"scale {store.scale:.4g}"
    resize = f"CLAM reads patches of {patch} px of level {level}; resize them to {size} px, so that the network sees {at}"
    return [resize, *_damaged(store)]


def _coords(store: Store, file: h5py.File) -> h5py.Dataset:
    table = store.tile_table
    kept = table["status"] != STATUS["failed"]
    return file.create_dataset("coords", data=np.stack([table["x"], table["y"]], axis=1)[kept].astype(np.int64))


def _damaged(store: Store) -> list[str]:
    count = int((store.tile_table["status"] == STATUS["failed"]).sum())
    return [f"left out: {count} tiles under which the slide is damaged"] if count else []


def _truth(store: Store) -> dict[str, Any]:
    """What the format's own attributes cannot say, under the names that others use for it."""
    known = {
        "level0_mpp": store.attributes["slide_mpp"],
        "achieved_mpp": store.mpp,
        "requested_mpp": store.attributes["requested_mpp"],
        "mpp_source": store.attributes["mpp_source"],
        "scale": store.scale,
        "tile_size": int(store.tile_settings["size"]),
        "units": "level0_px",
    }
    return {name: value for name, value in known.items() if value is not None}


def _name(store: Store) -> str:
    return Path(str(store.attributes["slide"]["name"])).stem


def _file(path: Path) -> h5py.File:
    try:
        import h5py
    except ImportError as error:
        raise StoreError(
            "writing HDF5 needs h5py; install it with pip install 'wsiscale[exports]'", code="MISSING_EXTRA"
        ) from error
    return h5py.File(path, "w")
