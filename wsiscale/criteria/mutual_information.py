"""Confidence times dispersity, in nats: sure of each place, and not of the same thing everywhere.

    score(s) = H(mean_i p_i) - mean_i h_i

p_i are the class probabilities of place i, a segmenter's averaged over its pixels, and h_i is the entropy of its answer, a
segmenter's averaged over its pixels. So it is the mutual information of place (or pixel) and class. Bridle, Heading & MacKay,
NIPS 1991; as a measure of quality without labels: Hu et al., ICML 2017.

Fails on a slide of one tissue, where the right answer is the same everywhere: what is left is confusion, which is worth most
where the network is lost. `gated` says nothing there. It prefers coarse scales, where fields are larger and tiles more unlike
each other, and networks that answer at random but surely.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria.needs import outputs_of
from wsiscale.criteria.shares import with_gaps
from wsiscale.types import ScaleResponse

SOURCE = "Bridle, Heading & MacKay, NIPS 1991; over places"


# Share of ln C, what sure and evenly spread answers would carry. Classifiers that answer rightly on slides of several tissues
# give 0.26 to 1.00 of it at the scale that is found best; on slides of one 0.00 for half of them, and those that answer wrongly
# 0.21 to 0.55 (development half of the benchmark). Segmenters of small objects give 0.05 to 0.36.
DISPERSED = 0.25


def score(response: ScaleResponse) -> NDArray[np.float64]:
    """(S,) mutual information of place and class, 0..ln C, in nats."""
    mean: NDArray[np.float64] = _told(response).mean(axis=0)
    return mean


def shares(response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S) what each place tells, in nats: how far its answer is from the average answer."""
    outputs = outputs_of(response, "mutual_information")
    finite = np.isfinite(outputs.probabilities).all(axis=(1, 2)) & np.isfinite(outputs.entropy).all(axis=1)
    told = _told(response.take(np.flatnonzero(finite))) if finite.any() else np.empty((0, len(response.scales)))
    return with_gaps(told, finite)


def gated(response: ScaleResponse) -> NDArray[np.float64]:
    """`score`, or NaN where the answers are not `dispersed`: then the slide may be of one tissue."""
    told = score(response)
    return told if _carries(told, response) else np.full_like(told, np.nan)


def gated_shares(response: ScaleResponse) -> NDArray[np.float64]:
    """`shares`, NaN where `gated` is."""
    told = shares(response)
    used = told[np.isfinite(told).all(axis=1)]
    return told if len(used) and _carries(used.mean(axis=0), response) else np.full_like(told, np.nan)


def dispersed(response: ScaleResponse, scale: float) -> bool:
    """Whether the answers at the scale of the response that is nearest to `scale` carry `DISPERSED` of what they could."""
    nearest = int(np.abs(np.log2(response.scales / scale)).argmin())
    return _carries(score(response)[[nearest]], response)


def kept(response: ScaleResponse, scale: float) -> float:
    """How far places keep their class a quarter of an octave on, to either side of the scale nearest to `scale`.

    Cohen's kappa (Educational and Psychological Measurement 20, 1960), mean of both sides: 1 where all keep it, 0 where as
    many do as by chance. 1 where there is one class alone, or no other scale.
    """
    octaves = np.log2(response.scales)
    here = int(np.abs(octaves - np.log2(scale)).argmin())
    p = outputs_of(response, "mutual_information").probabilities
    shares = np.eye(p.shape[2])[p.argmax(axis=2)]  # (N, S, C), one-hot
    near = {int(np.abs(octaves - octaves[here] - step).argmin()) for step in (-0.25, 0.25)} - {here}
    kappas = []
    for other in near:
        same = float((shares[:, here] * shares[:, other]).sum(axis=1).mean())
        chance = float(shares[:, here].mean(axis=0) @ shares[:, other].mean(axis=0))
        kappas.append((same - chance) / (1 - chance) if chance < 1 else 1.0)
    return float(np.mean(kappas)) if kappas else 1.0


def of_pixels(response: ScaleResponse) -> bool:
    """Whether the answers are means over pixels that differ: a segmenter's."""
    outputs = outputs_of(response, "mutual_information")
    p = outputs.probabilities.astype(np.float64)
    # The entropy of the mean, which the mean entropy reaches where no pixels differ.
    own = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=2)
    return bool((own - outputs.entropy).mean() > _SAME * np.log(p.shape[2]))


# Rounding, and no more, as a share of ln C.
_SAME = 1e-3


def _carries(told: NDArray[np.float64], response: ScaleResponse) -> bool:
    classes = outputs_of(response, "mutual_information").probabilities.shape[2]
    return bool(np.isfinite(told).all() and told.max() >= DISPERSED * np.log(classes))


def _told(response: ScaleResponse) -> NDArray[np.float64]:
    outputs = outputs_of(response, "mutual_information")
    p = outputs.probabilities.astype(np.float64)  # (N, S, C)
    # Of a class that no place ever gets the logarithm is of 0, and it adds nothing.
    surprise = -np.log(np.where(p > 0, p.mean(axis=0), 1))
    told: NDArray[np.float64] = (p * surprise).sum(axis=2) - outputs.entropy
    return told
