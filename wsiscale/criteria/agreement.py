"""Agreement with the turned tile: tissue has no up, and a network at its scale does not mind.

    score(s) = mean over places and turned views of 1 - TV(p(tile), p(turned tile))

TV is the total variation distance of the softmaxes, a segmenter's pixel by pixel (`ScaleResponse.agreement`). The views are
those of rot90, rot180, rot270 and flip that were taken. Consistency under transformations as a label-free measure of
quality: Deng, Gould & Zheng, ICML 2021 (arXiv:2106.05961).

Fails where a network collapses: who answers the same to everything agrees with itself perfectly, typically at the ends of the
range. A network that was trained without turned tiles disagrees everywhere, though still least where it is sure. Half-way
sure answers agree better than sure ones that flip, so that the curve is steep only where the margin is small. Best with a
criterion that falls where the network collapses: see `combined`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import OptionError
from wsiscale.types import ScaleResponse

SOURCE = "ours; consistency under transformations: Deng, Gould & Zheng, ICML 2021 (arXiv:2106.05961)"
VIEWS = ("rot90",)


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) mean over places and turned views of their agreement with the plain tile, 0..1."""
    if not response.agreement:
        raise OptionError(
            "agreement compares class outputs with those of turned tiles, and there are none; "
            "respond with views=('rot90',), or choose another criterion for a network that only gives features"
        )
    mean: NDArray[np.float64] = np.mean(list(response.agreement.values()), axis=(0, 1), dtype=np.float64)
    return mean
