"""What each place adds to a score that is no mean over places: a bootstrap and a test over places need rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def jackknife(whole: NDArray[np.float64], without: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, S) rows whose mean is the score of all places, `whole` (S,), from the score without each of them, `without` (N, S).

    Tukey's pseudo-values, centred: of a mean they are exactly the places' own scores, of a smooth statistic its linear part.
    Resampling the rows is cheaper than resampling the places, and safer: places drawn twice lower a rank.
    """
    rows: NDArray[np.float64] = whole + (len(without) - 1) * (without.mean(axis=0) - without)
    return rows


def with_gaps(rows: NDArray[np.float64], finite: ArrayLike) -> NDArray[np.float64]:
    """(N, S): `rows` (n, S) at the n finite places of `finite` (N,), NaN at the others."""
    used = np.asarray(finite, np.bool_)
    full = np.full((len(used), rows.shape[1]), np.nan)
    full[used] = rows
    return full


def leave_one_out(count: int) -> NDArray[np.intp]:
    """(N, N - 1) indices of all places but one; for one place the place itself, which then is all there is."""
    if count == 1:
        return np.zeros((1, 1), np.intp)
    return np.array([np.delete(np.arange(count), i) for i in range(count)], dtype=np.intp)


def singular_values(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of finite tables (S, N, K), for each scale: (S, min(N, K)), ascending.

    Roots of the eigenvalues of the smaller of X'X and XX', twenty times faster than taking X apart, and exact enough for sums.
    """
    return _roots(_gram(tables))


def singular_values_without(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same without each of the places: (N, S, min(N, K)), where one of N values is zero. For one place, with it."""
    count = tables.shape[1]
    gram = _gram(tables)
    if count == 1:
        return _roots(gram)[None]
    without = np.empty((count, *gram.shape[:2]))
    for i in range(count):
        rest = gram.copy()
        if count <= tables.shape[2]:
            rest[:, i] = rest[:, :, i] = 0
        else:
            rest -= tables[:, i, :, None] * tables[:, i, None, :]
        without[i] = _roots(rest)
    return without


def _gram(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    turned = tables.transpose(0, 2, 1)
    return tables @ turned if tables.shape[1] <= tables.shape[2] else turned @ tables


def _roots(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    return values
