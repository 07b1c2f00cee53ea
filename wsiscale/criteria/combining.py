"""Several criteria in one: the sum of their scores over scale, each in units of its own mean and spread.

    score(s) = sum over parts of [q(s) - mean over s of q] / [standard deviation over s of q]

Criteria fail at different scales, so that where they agree is more likely right. Votes of each part's argmax would throw
away how marked their curves are.

Fails where parts fail together: two that favour the fine end favour it twice. Units over the *range* mean that the range
matters: a part's deep hole at one end flattens the rest of its curve. A part that is noise has the same spread as one that
knows; its noise is not told from a signal here, but by the tests over places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import OptionError
from wsiscale.types import ScaleResponse

Score = Callable[[ScaleResponse], NDArray[np.float64]]


class Part(Protocol):
    """As much of a Criterion as a sum needs."""

    @property
    def score(self) -> Score: ...

    @property
    def shares(self) -> Score | None: ...


def score(response: ScaleResponse, *, parts: Sequence[Part], optional: Sequence[Part] = ()) -> NDArray[np.float64]:
    """(S,) sum of the parts' z-scores over scale; NaN where no part says anything."""
    curves = [part.score(response) for part in _given(response, parts, optional)]
    return _total([_standardised(curve, curve) for curve in curves], (len(response.scales),))


def shares(response: ScaleResponse, *, parts: Sequence[Part], optional: Sequence[Part] = ()) -> NDArray[np.float64]:
    """(N, S) what each place adds, in the units that all places give."""
    found = [_rows(response, part) for part in _given(response, parts, optional)]
    # A place counts where every part that says anything has a number for it.
    said = [rows for rows in found if np.isfinite(rows).all(axis=1).any()]
    used = np.all([np.isfinite(rows).all(axis=1) for rows in said], axis=0) if said else np.zeros(response.places, bool)
    full = np.full((response.places, len(response.scales)), np.nan)
    if used.any():
        if not used.all():
            found = [_rows(response.take(np.flatnonzero(used)), part) for part in _given(response, parts, optional)]
            said = [rows for rows in found if np.isfinite(rows).all()]
        full[used] = _total([_standardised(rows, rows.mean(axis=0)) for rows in said], (int(used.sum()), len(response.scales)))
    return full


def _given(response: ScaleResponse, parts: Sequence[Part], optional: Sequence[Part]) -> list[Part]:
    """The parts that the network can give."""
    given = list(parts)
    for part in optional:
        try:
            part.score(response)
        except OptionError:
            continue
        given.append(part)
    return given


def _rows(response: ScaleResponse, part: Part) -> NDArray[np.float64]:
    """(N, S)"""
    if part.shares is not None:
        return part.shares(response)
    if response.places == 0:
        return np.empty((0, len(response.scales)))
    return np.stack([part.score(response.take(np.array([i]))) for i in range(response.places)])


def _standardised(curve: NDArray[np.float64], pooled: NDArray[np.float64]) -> NDArray[np.float64]:
    """`curve` (..., S) in units of `pooled` (S,): zero where that is flat, rounding aside, and NaN where it is not finite."""
    if not np.isfinite(pooled).all():
        return np.where(np.isfinite(pooled), 0.0, np.nan) + np.zeros_like(curve)
    spread = pooled.std()
    if spread <= 1e-12 * np.abs(pooled).max(initial=0):
        return np.zeros_like(curve)
    units: NDArray[np.float64] = (curve - pooled.mean()) / spread
    return units


def _total(curves: list[NDArray[np.float64]], shape: tuple[int, ...]) -> NDArray[np.float64]:
    said = [curve for curve in curves if not np.isnan(curve).all()]
    return np.sum(said, axis=0) if said else np.full(shape, np.nan)
