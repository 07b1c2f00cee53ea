"""Ridge regression whose penalty is chosen by leaving out groups, in closed form. Pure numpy.

With the penalty fixed, what a group would miss had it been left out follows from the fit to all: e = (1 - H_gg)^-1 r_g, where H
is the matrix that takes targets to fitted values (exact for any penalised least squares; Hastie, Tibshirani & Friedman, 7.10).
So one eigendecomposition serves all penalties, all groups and all targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PENALTIES: Floats = np.logspace(-6, 2, 9)  # per row, features in units of their spread
# Of the largest eigenvalue: below, a direction is rounding.
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Ridge:
    """target = intercept + ((x - center) / unit) @ weights"""

    center: Floats  # (K,)
    unit: Floats  # (K,)
    weights: Floats  # (K,)
    intercept: float
    penalty: float
    left_out: float  # mean square of what groups miss that were left out

    def predict(self, values: NDArray[np.floating]) -> Floats:
        """(...,) of (..., K)"""
        predicted: Floats = ((values - self.center) / self.unit) @ self.weights + self.intercept
        return predicted


def fit_ridges(
    values: NDArray[np.floating], targets: Floats, group: NDArray[np.intp], *, penalties: Floats = PENALTIES
) -> list[Ridge]:
    """A ridge for each column of `targets` (n, T) from `values` (n, K); its penalty is the best for left-out groups (n,)."""
    rows = values.astype(np.float64)
    center, unit = rows.mean(axis=0), rows.std(axis=0)
    # A channel that is constant but for rounding would be noise, blown up.
    unit[unit <= 1e-6 * np.abs(center)] = np.inf
    rows = (rows - center) / unit
    mean = targets.mean(axis=0)
    apart = targets - mean
    along, sizes, back = _principal(rows)
    answers = along.T @ apart  # (P, T)
    groups = [np.flatnonzero(group == g) for g in np.unique(group)]
    missed = np.array([_left_out(along, sizes, apart, answers, groups, penalty) for penalty in penalties])  # (L, T)
    found = []
    for column, best in enumerate(missed.argmin(axis=0)):
        weights = back @ (answers[:, column] / (sizes + penalties[best] * len(rows)))
        found.append(Ridge(center, unit, weights, float(mean[column]), float(penalties[best]), float(missed[best, column])))
    return found


def _principal(rows: Floats) -> tuple[Floats, Floats, Floats]:
    """Rows (n, K) along their principal axes (n, P), the axes' sums of squares (P,), and the axes (K, P)."""
    tall = rows.shape[0] >= rows.shape[1]
    sizes, axes = np.linalg.eigh(rows.T @ rows if tall else rows @ rows.T)
    kept = sizes > _SMALLEST * max(float(sizes[-1]), 1e-300)
    sizes, axes = sizes[kept], axes[:, kept]
    if tall:
        return rows @ axes, sizes, axes
    return axes * np.sqrt(sizes), sizes, rows.T @ (axes / np.sqrt(sizes))


def _left_out(
    along: Floats, sizes: Floats, apart: Floats, answers: Floats, groups: list[NDArray[np.intp]], penalty: float
) -> Floats:
    """(T,) mean square of what each group would miss had it been left out."""
    total = len(along)
    shrunk = 1 / (sizes + penalty * total)  # (P,)
    total_missed = np.zeros(apart.shape[1])
    for rows in groups:
        own = along[rows]
        residual = apart[rows] - (own * shrunk) @ answers
        hat = (own * shrunk) @ own.T + 1 / total
        # A group that is all there is leaves nothing to be told by; it says nothing for any penalty.
        missed = np.linalg.solve(np.eye(len(rows)) - hat, residual) if len(groups) > 1 else residual
        total_missed += np.square(missed).sum(axis=0)
    return total_missed / total
