"""Several criteria in one, by the ranks that each place gives the scales.

    r_kn(s) = share of the range that part k finds worse at place n than s, minus the share that it finds better: -1..1
    score(s) = sum over parts k of the mean over places n of r_kn(s)

Shares are of octaves, so that a grid that is finer somewhere weighs no more there. Criteria fail at different scales, so that
where they agree is more likely right. Ranks, as in Friedman's test (JASA 32, 1937), need no units, and a part weighs as much as
its places agree: one whose places rank the scales at random adds nothing, and neither do a few places with large values.

Fails where parts fail together: two that favour the fine end favour it twice. A rank does not say by how much: a part with a
clear peak at a few places and noise at the others counts as noise.
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
    """(S,) sum of the parts; NaN where no part says anything, or one of them not of every place."""
    found = rows(response, parts=parts, optional=optional)
    if found.shape[1] == 0:
        return np.full(len(response.scales), np.nan)
    total: NDArray[np.float64] = found.mean(axis=1).sum(axis=0)
    return total


def rows(response: ScaleResponse, *, parts: Sequence[Part], optional: Sequence[Part] = ()) -> NDArray[np.float64]:
    """(K, N, S) how each part that says anything ranks the scales at each place; NaN where it does not, K >= 1."""
    found = [ranks(_of_places(response, part), response.scales) for part in _given(response, parts, optional)]
    said = [part for part in found if np.isfinite(part).all(axis=1).any()]
    places = found[0].shape[0] if found else 0
    return np.stack(said) if said else np.full((1, places, len(response.scales)), np.nan)


def ranks(rows: NDArray[np.float64], scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, S) of rows (N, S): the share of octaves where one is lower, minus where it is higher. NaN rows for those with NaN."""
    octaves = np.gradient(np.log2(scales)) if len(scales) > 1 else np.ones(1)
    above = np.sign(rows[:, :, None] - rows[:, None, :])  # (N, S, S)
    ranked: NDArray[np.float64] = above @ (octaves / octaves.sum())
    ranked[~np.isfinite(rows).all(axis=1)] = np.nan
    return ranked


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


def _of_places(response: ScaleResponse, part: Part) -> NDArray[np.float64]:
    """(N, S)"""
    if part.shares is not None:
        return part.shares(response)
    if response.places == 0:
        return np.empty((0, len(response.scales)))
    return np.stack([part.score(response.take(np.array([i]))) for i in range(response.places)])
