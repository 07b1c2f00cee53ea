"""Projections on the head's class directions: Penkin, Khvostikov & Krylov 2023, the same group's successor to penkin2022.

    rho_c(s) = f(s) . W[c] / ||W[c]||_2          f: the pooled input of the head, W: its weights; no bias

Each place votes for argmax_s max_c rho_c(s). The paper stops at the histogram of the votes; that the slide's scale is the
histogram's mode is our reading. As published: no bias, no refinement between the scales of the grid, and every place votes,
background too. Unlike a probability rho does not saturate; but it grows with the length of f, which has a trend over scale
of its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.needs import head_of
from wsiscale.types import ScaleResponse

SOURCE = "Penkin, Khvostikov, Krylov, Programming and Computer Software 49(3), 2023, doi:10.1134/S0361768823030039"


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) mean over places of max_c rho_c."""
    mean: NDArray[np.float64] = best_projection(response).mean(axis=0)
    return mean


def decide(response: ScaleResponse) -> float | None:
    """The scale of the grid that most places vote for, level-0 px per px."""
    projection = best_projection(response)
    return combine(response.scales[projection.argmax(axis=1)]) if np.isfinite(projection).all() else None


def combine(votes: NDArray[np.float64]) -> float | None:
    """The mode of votes (N,), NaN for none; of equals the one nearest to the median vote.

    On a fine grid few places may all differ, and the first of equals would then be the finest of all.
    """
    votes = votes[np.isfinite(votes)]
    if not len(votes):
        return None
    values, counts = np.unique(votes, return_counts=True)
    modes = values[counts == counts.max()]
    return float(modes[np.argmin(np.abs(np.log2(modes / np.median(votes))))])


def best_projection(response: ScaleResponse) -> NDArray[np.float64]:
    """max_c rho_c of each place at each scale: (N, S)."""
    features, weight = head_of(response, "penkin2023")
    norm = np.linalg.norm(weight, axis=1)
    # A class whose weights are all zero, pruned or never trained, has no direction.
    directions = weight[norm > 0] / norm[norm > 0, None]
    with np.errstate(invalid="ignore"):  # an infinite feature comes out as infinite or NaN, either of which is told on
        best: NDArray[np.float64] = np.max(features @ directions.T, axis=2, initial=-np.inf)
    return best
