"""How good a map of nuclei is: pixels (AUC, Dice) and objects (F1, panoptic quality)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.recovery.real import _auc

SMALLEST = 4.0  # µm²: a nucleus of 2.3 µm across; smaller pieces are not counted as objects


@dataclass(frozen=True)
class Quality:
    """0..1, higher is better. Objects are connected pieces: the masks do not tell nuclei that touch."""

    auc: float
    dice: float
    f1: float  # of objects that overlap by more than half (IoU)
    pq: float  # panoptic quality (Kirillov et al. 2019): F1 times the mean IoU of what was found


def quality(nucleus: NDArray[np.float32], truth: NDArray[np.bool_], *, threshold: float, mpp: float) -> Quality:
    """Of a map (H, W) of probabilities against a mask (H, W) whose pixels are `mpp` wide."""
    found = nucleus > threshold
    return Quality(area_under_curve(nucleus, truth), dice(found, truth), *objects(found, truth, mpp=mpp))


def dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return 2 * int((found & truth).sum()) / max(int(found.sum()) + int(truth.sum()), 1)


def area_under_curve(nucleus: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """How often a pixel of a nucleus has the higher value than one of none, equals counting half."""
    return float(_auc(nucleus.reshape(-1, 1), truth.ravel())[0])


def objects(found: NDArray[np.bool_], truth: NDArray[np.bool_], *, mpp: float) -> tuple[float, float]:
    """F1 and panoptic quality of connected pieces. At an IoU above 1/2 a match is the only one that there can be."""
    ours, theirs = (_pieces(mask, mpp=mpp) for mask in (found, truth))
    counts = (int(ours.max()), int(theirs.max()))
    if 0 in counts:
        return 0.0, 0.0
    both = np.zeros((counts[0] + 1, counts[1] + 1), np.int64)
    np.add.at(both, (ours.ravel(), theirs.ravel()), 1)
    union = both.sum(axis=1, keepdims=True) + both.sum(axis=0, keepdims=True) - both
    overlap = (both / union)[1:, 1:]
    matched = overlap[overlap > 0.5]
    f1 = 2 * len(matched) / sum(counts)
    return f1, f1 * float(matched.mean()) if len(matched) else 0.0


def _pieces(mask: NDArray[np.bool_], *, mpp: float) -> NDArray[np.int32]:
    labels, count = ndimage.label(mask)
    large = np.bincount(labels.ravel(), minlength=count + 1) * mpp**2 >= SMALLEST
    large[0] = False
    numbers = np.where(large, np.cumsum(large), 0)
    return np.asarray(numbers[labels], np.int32)
