"""Energy: how much evidence there is for any class at all.

    score(s) = mean over places of logsumexp_c z_c(s), z the logits, a segmenter's per pixel and then averaged

Minus the free energy of Liu, Wang, Owens & Li, NeurIPS 2020 (arXiv:2010.03759), who tell foreign inputs by it; for label-free
evaluation: Peng et al., ICLR 2024. Unlike the softmax it does not saturate.

Fails where the logits' length has a trend over scale of its own, as penkin2023 does, and where it does not hold anything:
adding a constant to all logits changes it and no answer, and a network with one logit or trained with weight decay on the
bias has chosen that constant by chance. High evidence for the wrong class counts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.needs import outputs_of
from wsiscale.types import ScaleResponse

SOURCE = "Liu, Wang, Owens & Li, NeurIPS 2020 (arXiv:2010.03759), eq. 4, averaged over places"


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) mean over places of the logsumexp of the logits."""
    mean: NDArray[np.float64] = outputs_of(response, "energy").energy.mean(axis=0, dtype=np.float64)
    return mean
