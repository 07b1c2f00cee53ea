"""A segmenter's objects shrink as the scale coarsens, as long as it follows them: half as wide an octave on, on as much area.

    y(s) = mean over places of log2 of the typical object's diameter in px;  a(s) = log2 of the mean share of objects
    q(s) = local variance of [y + log2 s] + local variance of a,   score(s) = - q(s)

Local: within 3/4 octave on either side, weighted by a triangle. y + log2 s and a are constant where the network sees the same
objects at each scale, a slope of -1 of y and of 0 of a; where it invents objects of its favourite size y is flat, and where it
loses or merges them a changes. Where the card knows the size of objects in training tiles (`object_px`, px; `wsiscale
calibrate` measures it), 0.4 [y(s) - log2 object_px]^2 is added to q: Cellpose's second step (Stringer et al., Nature Methods
18, 2021), here without its iteration, since all scales are there. Diameters: `wsiscale.objects`.

Fails where the network works about as well over more than an octave, as segmenters do: without `object_px` the answer is
anywhere in that stretch, rather at its coarse side. Where objects touch, y is the clumps' size. Where one size of object is
that of another slide's other tissue, `object_px` misleads by as much: nuclei differ by a factor of two between organs. Objects
are what is not class 0; a network without a background class has none. At scales where nothing is found it is as bad as at the
worst of the others.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.needs import outputs_of
from wsiscale.criteria.shares import jackknife, with_gaps
from wsiscale.errors import OptionError
from wsiscale.types import ScaleResponse

SOURCE = "ours; Stringer et al. (Cellpose), Nature Methods 18, 2021, for the size in training"

# Measured on seven MoNuSeg images and four procedural slides with the embedded network: off by 0.34 octave on average with
# 3/4 octave, 0.52 with half and 0.48 with one. With the size known the weight hardly matters from 0.1 to 1.
NEAR = 0.75
KNOWN_WEIGHT = 0.4
LEAST_SHARE = 1e-3  # of a tile; below, a few specks more would be octaves


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) minus the local variance, in octaves squared; NaN where no object is found at any scale."""
    sizes, areas = _measured(response)
    return -_misfit(_mean(sizes), areas.mean(axis=0), response)


def shares(response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S) what each place adds."""
    sizes, areas = _measured(response)
    finite = np.asarray(np.isfinite(areas).all(axis=1))
    sizes, areas = sizes[finite], areas[finite]
    count = len(areas)
    if count == 0:
        return np.full((len(finite), len(response.scales)), np.nan)
    whole = -_misfit(_mean(sizes), areas.mean(axis=0), response)
    if count == 1:
        return with_gaps(whole[None], finite)
    without = [
        _misfit(_mean(np.delete(sizes, i, axis=0)), np.delete(areas, i, axis=0).mean(axis=0), response) for i in range(count)
    ]
    return with_gaps(jackknife(whole, -np.array(without)), finite)


def _measured(response: ScaleResponse) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """log2 diameters, NaN where there is no whole object, and shares, (N, S) each."""
    outputs = outputs_of(response, "object_size")
    if not np.isfinite(outputs.object_share).any():
        raise OptionError("object_size needs a segmenter's objects, and this network has none; choose another criterion")
    return np.log2(outputs.object_px.astype(np.float64)), outputs.object_share.astype(np.float64)


def _mean(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(S,) over the places that have a size; NaN where none has."""
    there = np.isfinite(sizes)
    count = there.sum(axis=0)
    total = np.where(there, sizes, 0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _misfit(size: NDArray[np.float64], area: NDArray[np.float64], response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) from log2 diameters (S,) and shares (S,)."""
    octaves = np.log2(response.scales)
    found = np.isfinite(size)
    if not found.any():
        return np.full(len(octaves), np.nan)
    seen = octaves[found]
    weight = np.maximum(1 - np.abs(seen - seen[:, None]) / (NEAR + 0.01), 0) * _width(seen)
    weight /= weight.sum(axis=1, keepdims=True)
    curves = (size[found] + seen, np.log2(np.maximum(area[found], LEAST_SHARE)))
    misfit = sum((weight * (curve - (weight @ curve)[:, None]) ** 2).sum(axis=1) for curve in curves)
    if response.object_px is not None:
        misfit = misfit + KNOWN_WEIGHT * (size[found] - math.log2(response.object_px)) ** 2
    result = np.full(len(octaves), np.max(misfit))
    result[found] = misfit
    return result


def _width(octaves: NDArray[np.float64]) -> NDArray[np.float64]:
    """(S,) the octaves that each scale stands for."""
    return np.gradient(octaves) if len(octaves) > 1 else np.ones(1)
