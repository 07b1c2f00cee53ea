"""How large the objects of a mask are, so that a segmenter's map need not be kept. Pure numpy and scipy.ndimage."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

# Specks of fewer pixels are the map's noise, and their shape is the pixel's.
SMALLEST = 5


def objects_of(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """The typical diameter in px of the objects of `mask` (h, w), NaN where none lies whole in it, and their share of it.

    Objects are 4-connected. Typical is the object in which half of the objects' area is reached, ascending by size, as a
    circle of the same area: specks, however many, hardly count. An object that touches the border is cut off and left out,
    which large ones are more often; so each of the others counts one over the chance that its bounding box would have lain
    whole in the mask (Miles, 1974; Lantuéjoul, 1980).
    """
    share = float(mask.mean())
    labels, count = ndimage.label(mask)
    if count == 0:
        return math.nan, share
    height, width = mask.shape
    areas = np.bincount(labels.ravel())[1:]
    kept, weights = [], []
    for area, (rows, columns) in zip(areas.tolist(), ndimage.find_objects(labels), strict=True):
        whole = rows.start > 0 and columns.start > 0 and rows.stop < height and columns.stop < width
        if whole and area >= SMALLEST:
            tall, wide = rows.stop - rows.start, columns.stop - columns.start
            kept.append(area)
            weights.append(area / ((height - 1 - tall) * (width - 1 - wide)))
    if not kept:
        return math.nan, share
    order = np.argsort(kept, kind="stable")
    total = np.cumsum(np.array(weights)[order])
    middle = order[int(np.searchsorted(total, total[-1] / 2))]
    return 2 * math.sqrt(kept[middle] / math.pi), share
