"""Magnification by the size of nuclei, as Graziani et al. (MAKE 2021, section 3) have it: their mean area, and classes by it.

For comparison with what they report. Areas are in px² of the tile, so that errors at high magnifications outweigh all others;
`wsiscale.probe` regresses log2 µm/px instead, where every octave counts the same.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsiscale.errors import OptionError

SMALLEST = 3  # px², as published
# Mean areas of the seven magnification classes, 5, 8, 10, 15, 20, 30 and 40x, in the published experiment.
PUBLISHED_AREAS = (21.369, 43.154, 67.302, 142.390, 225.696, 489.980, 913.819)


def mean_nuclear_area(mask: NDArray[np.generic]) -> float:
    """Mean area in px² of the nuclei in a mask (H, W), boolean or grey; NaN where there is none whole.

    As published: Otsu's threshold, closing by a square of 2 px, nuclei that touch the border left out, connected regions of 3
    px² or more.
    """
    from skimage.filters import threshold_otsu
    from skimage.measure import label
    from skimage.morphology import closing
    from skimage.segmentation import clear_border

    values = np.asarray(mask, float)
    if values.ndim != 2:
        raise OptionError(f"a mask is (height, width), not {values.shape}")
    if values.min() == values.max():
        return math.nan
    there = closing(values > threshold_otsu(values), np.ones((2, 2), bool))
    # Two neighbours by their corners are one nucleus: skimage's default, and so the publication's.
    areas = np.bincount(label(clear_border(there)).ravel())[1:]
    areas = areas[areas >= SMALLEST]
    return float(areas.mean()) if len(areas) else math.nan


def nearest_class(area: ArrayLike, class_areas: ArrayLike) -> NDArray[np.intp]:
    """(n,) index of the class whose mean area (C,) is nearest, for areas (n,)."""
    apart = np.abs(np.atleast_1d(np.asarray(area, float))[:, None] - np.asarray(class_areas, float))
    return np.asarray(apart.argmin(axis=1), np.intp)


def cohen_kappa(truth: ArrayLike, found: ArrayLike) -> float:
    """Unweighted agreement of two labellings (n,), 1 is perfect and 0 chance (Cohen, 1960); NaN where chance leaves no room."""
    rows, columns = np.asarray(truth), np.asarray(found)
    if rows.shape != columns.shape or rows.ndim != 1 or not len(rows):
        raise OptionError(f"kappa is of two lists of labels of one length, not of {rows.shape} and {columns.shape}")
    names = np.unique(np.concatenate([rows, columns]))
    seen = (rows[:, None] == names).astype(float), (columns[:, None] == names).astype(float)
    agreed, chance = float((rows == columns).mean()), float(seen[0].mean(axis=0) @ seen[1].mean(axis=0))
    return math.nan if chance == 1 else (agreed - chance) / (1 - chance)


def magnification_kappa(predicted_area: ArrayLike, magnification: ArrayLike, true_area: ArrayLike) -> float:
    """Kappa of the published task: predicted areas (n,) to the class of the nearest mean area, against the magnifications (n,).

    The classes' mean areas are those of `true_area` (n,), tiles without nuclei (NaN) left out.
    """
    truth, areas, found = (np.asarray(values, float) for values in (magnification, true_area, predicted_area))
    known = np.isfinite(areas) & np.isfinite(found)
    names = np.unique(truth[known])
    means = [areas[known & (truth == name)].mean() for name in names]
    return cohen_kappa(truth[known], names[nearest_class(found[known], means)])
