"""What the arrangement of the tissue adds, and whether it stays when the tile is turned: the candidate for a default.

    score(s) = z[margin_over_null](s) + z[agreement under rot90](s),   z: minus mean, over standard deviation, over scale

The two fail at different places: the margin over its null rises where a network is oddly lost on scrambled tiles, the
agreement where it answers the same to everything. In first measurements on other networks and slides its score, pooled over
slides, chose about as well as knowing the training µm/px; on single slides it chose worse.

Fails where both are blind: a network that reads texture by its wavelength and agrees with itself on anything. See `over_null`,
`agreement` and `combining` for the rest. Two more forward passes a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria import agreement, combining, over_null
from wsiscale.types import ScaleResponse

SOURCE = "ours: margin_over_null and agreement, z-scored over scale"
VIEWS = (over_null.VIEW, "rot90")


@dataclass(frozen=True)
class _Part:
    score: combining.Score
    shares: combining.Score | None = None


_PARTS = (_Part(over_null.margin_score), _Part(agreement.score))


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) sum of the two z-scores."""
    return combining.score(response, parts=_PARTS)


def shares(response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S) what each place adds."""
    return combining.shares(response, parts=_PARTS)
