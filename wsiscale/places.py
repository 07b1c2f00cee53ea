"""Tissue mask -> a grid of tiles, or N places to look. Pure."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import NoTissueError, OptionError
from wsiscale.geometry import scale_for_mpp
from wsiscale.types import TileGrid, Tissue


def tile_grid(
    tissue: Tissue,
    *,
    mpp: float | None = None,
    scale: float | None = None,
    size: int = 256,
    overlap: int = 0,
    min_tissue: float = 0.1,
) -> TileGrid:
    """Every tile of a regular grid that holds at least `min_tissue` (0..1) tissue, in reading order.

    `size` and `overlap` are pixels at `mpp` (or at `scale`, level-0 px per px). The grid starts at the slide's corner; tiles
    that hang over its far edges are white there.
    """
    if (mpp is None) == (scale is None):
        raise OptionError("a tile grid needs either mpp or scale")
    if not 0 <= overlap < size:
        raise OptionError(f"an overlap of {overlap} px does not fit tiles of {size} px; give 0 to {size - 1}")
    if not 0 <= min_tissue <= 1:
        raise OptionError(f"min_tissue is a share from 0 to 1, not {min_tissue:g}")
    step = scale if scale is not None else scale_for_mpp(mpp, tissue.mpp) if mpp is not None else 1.0
    stride, side = (size - overlap) * step, size * step
    tops = _starts(tissue.shape[0], stride)
    lefts = _starts(tissue.shape[1], stride)
    share = tissue_share(tissue, tops, lefts, side)  # (len(tops), len(lefts))
    rows, columns = np.nonzero((share >= min_tissue) & (share > 0))
    origins = np.stack([tops[rows], lefts[columns]], axis=1)
    return TileGrid(
        origins=origins,
        tissue=share[rows, columns].astype(np.float32),
        scale=step,
        size=size,
        overlap=overlap,
        mpp=None if tissue.mpp is None else step * tissue.mpp,
    )


def _starts(length: int, stride: float) -> NDArray[np.int64]:
    count = max(1, math.ceil(length / stride - 1e-9))
    return np.round(np.arange(count) * stride).astype(np.int64)


def tissue_share(tissue: Tissue, tops: NDArray[np.int64], lefts: NDArray[np.int64], side: float) -> NDArray[np.float64]:
    """Share of tissue in each square, by a summed-area table read between mask pixels."""
    table = np.zeros((tissue.mask.shape[0] + 1, tissue.mask.shape[1] + 1), np.int32)
    inside = table[1:, 1:]
    np.cumsum(tissue.mask, axis=0, out=inside).cumsum(axis=1, out=inside)
    y, x = tops.astype(float), lefts.astype(float)
    rows = _between(table, (y + side) / tissue.step, axis=0) - _between(table, y / tissue.step, axis=0)
    area = _between(rows, (x + side) / tissue.step, axis=1) - _between(rows, x / tissue.step, axis=1)
    share: NDArray[np.float64] = area / (side / tissue.step) ** 2
    return share


def _between(table: NDArray[np.float64] | NDArray[np.int32], at: NDArray[np.float64], *, axis: int) -> NDArray[np.float64]:
    """`table` at fractional positions along `axis`, held constant beyond its ends."""
    at = np.clip(at, 0, table.shape[axis] - 1)
    below = np.minimum(np.floor(at).astype(np.intp), table.shape[axis] - 2)
    weight = np.expand_dims(at - below, 1 - axis)
    found: NDArray[np.float64] = np.take(table, below, axis) * (1 - weight) + np.take(table, below + 1, axis) * weight
    return found


MANY_PLACES = 256


def default_places(tile_size: int) -> int:
    """How many places a network is asked about unless told: 64 where tiles have 128 px or more.

    Smaller tiles show less each and cost less, and take more in proportion to their side, up to `MANY_PLACES`.
    """
    return min(MANY_PLACES, max(64, 64 * 128 // tile_size))


# Random candidates that compete for each place (Mitchell 1991, "best candidate"): enough to spread, few enough to stay random.
_CANDIDATES = 16


def sample_places(tissue: Tissue, count: int = 64, *, seed: int = 0, field: float = 0) -> NDArray[np.float64]:
    """Up to `count` places on tissue, spread out and drawn without replacement: (N, 2) level-0 (y, x) centres.

    Where it can, a place keeps a square of `field` level-0 px around it inside the slide. Raises NoTissueError.
    """
    if count < 1:
        raise OptionError(f"at least one place is needed, not {count}")
    pixels = np.argwhere(tissue.mask)
    if len(pixels) == 0:
        raise NoTissueError("nothing on the slide looks like tissue; give a detector of your own with --tissue file.py:name")
    rng = np.random.default_rng(seed)
    middle = (pixels + 0.5) * tissue.step
    inside = np.all((middle >= field / 2) & (middle <= np.array(tissue.shape) - field / 2), axis=1)
    # Places near the edge are better than looking at the same spot many times.
    preferred = pixels[inside] if inside.sum() >= count else pixels
    left = rng.permutation(preferred)
    chosen = left[:1]
    left = left[1:]
    while len(chosen) < count and len(left):
        tried = rng.integers(len(left), size=_CANDIDATES)
        distance = np.linalg.norm(left[tried][:, None] - chosen[None], axis=2).min(axis=1)
        winner = tried[distance.argmax()]
        chosen = np.concatenate([chosen, left[winner : winner + 1]])
        left = np.delete(left, winner, axis=0) if len(left) < 4 * count else _swap_out(left, int(winner))
    # Whole pixels, so that all places share the weights that resample them. The last mask pixel may reach beyond the slide.
    places: NDArray[np.float64] = np.floor((chosen + rng.random(chosen.shape)) * tissue.step)
    return np.asarray(np.minimum(places, tissue.shape), np.float64)


def _swap_out(rows: NDArray[np.int64], index: int) -> NDArray[np.int64]:
    """`rows` without row `index`, in constant time; their order is random anyway."""
    rows[index] = rows[-1]
    return rows[:-1]
