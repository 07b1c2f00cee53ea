"""Margin and confidence above what the same colours and the same texture without structure give.

    score(s) = mean over places of [q(tile at s) - q(phase-scrambled tile at s)]

q is the largest logit minus the runner-up (`margin`) or the largest class probability (`confidence`). The scrambled tile has
the same colours and the same power spectrum (`scramble.phase_scrambled`); what a network is sure of there it has not seen in
the arrangement of the tissue. Our own, against the second mode of every maximum rule: at the fine end of the range tiles are
smooth, and surely classified by their colour alone.

Fails where a network reads texture by its wavelength alone: the scrambled tile keeps it, and the optimum is subtracted too.
And where the network is at a loss on scrambled tiles in its own way: a null that falls over scale is a score that rises. It
costs as many forward passes again. The margin is in logits, whose length may have a trend over scale; the
confidence saturates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.needs import outputs_of, view_of
from wsiscale.types import ScaleResponse

SOURCE = "ours; maximum softmax: Hendrycks & Gimpel, ICLR 2017; phase scrambling: Theiler et al., Physica D 58, 1992"
VIEW = "phase_scrambled"


def margin_score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) mean over places of the margin above that of the scrambled tile, in logits."""
    plain = outputs_of(response, "margin_over_null").margin
    null = outputs_of(view_of(response, VIEW, "margin_over_null"), "margin_over_null").margin
    return _mean_above(plain, null)


def confidence_score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) mean over places of the confidence above that of the scrambled tile, -1..1."""
    plain = outputs_of(response, "confidence_over_null").confidence
    null = outputs_of(view_of(response, VIEW, "confidence_over_null"), "confidence_over_null").confidence
    return _mean_above(plain, null)


def _mean_above(plain: NDArray[np.float32], null: NDArray[np.float32]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # infinity minus infinity comes out as NaN, which is told on
        mean: NDArray[np.float64] = (plain.astype(np.float64) - null).mean(axis=0)
    return mean
