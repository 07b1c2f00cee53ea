"""How large a slide's nuclei are, without any network: dark blobs of haematoxylin, and their size.

Nuclei are what haematoxylin stains most, and about round, so that over scale the difference of Gaussians (Lindeberg, "Feature
detection with automatic scale selection", IJCV 30, 1998) answers most where its width is theirs. Fields are read octave by
octave, each looked at for blobs of one octave of sizes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import SlideError
from wsiscale.places import sample_places
from wsiscale.stacks import scale_stack
from wsiscale.types import Reader, Tissue

FIELDS = 10
FIELD = 256  # px
# Standard deviations of the Gaussians, px, four an octave. Those at the ends, which lack a neighbour, are left out.
RATIO = 2**0.25
SMALLEST, LARGEST = 2**0.75, 2**2.25
FINEST_SMALLEST = 1.0  # on level 0 itself, where smaller blobs are on no finer octave
BORDER = 8  # px without blobs, which would be the field's edge
OCTAVES = 5
# A blob counts by the fourth power of its contrast, on its area: chromatin is finer than nuclei and paler, clusters are larger.
CONTRAST_POWER, SIZE_POWER = 4, 2
LEAST_BLOBS = 50
# µm: that size on eight procedural slides (`testing.procedural`, whose nuclei are of published sizes; their spread is 0.13
# octaves), and octaves by which real slides differ from it, tissues differing in their nuclei (benchmarks/mpp.py).
NUCLEUS_UM = 4.1
NUCLEUS_SD = 0.34


def nucleus_px(slide: Reader, tissue: Tissue, *, seed: int = 0) -> float | None:
    """The typical diameter of the nuclei in level-0 px, None where there are too few blobs to tell. Raises NoTissueError.

    The weighted geometric mean of the blobs' diameters, 2 sqrt(2) times the width at which each answers most. It is a size to
    compare with that of other slides, measured in the same way, rather than a pathologist's: chromatin pulls it down.
    """
    _, _, height, width = slide.pyramid.scanned
    side = min(height, width)
    octaves = [2.0**octave for octave in range(OCTAVES) if FIELD / 2 * 2**octave <= side]
    if not octaves:
        return None
    centers = sample_places(tissue, FIELDS, seed=seed, field=min(FIELD * octaves[-1], side))
    widths, weights = [], []
    for number, octave in enumerate(octaves):
        size = int(min(FIELD, side / octave))
        stack = scale_stack(slide, centers, scales=[octave], size=size)
        # Each octave counts by what it covers of the slide, which is more on the coarser ones.
        area = (size - 2 * BORDER) ** 2 * octave**2
        for place in range(len(centers)):
            try:
                field = stack.images[place, 0].compute(scheduler="synchronous")
            except SlideError as error:
                if error.code != "READ_FAILED":
                    raise
                continue
            width_px, contrast = blobs(field, smallest=SMALLEST if number else FINEST_SMALLEST)
            widths.append(np.log2(width_px * octave))
            weights.append(contrast**CONTRAST_POWER * (width_px * octave) ** SIZE_POWER / area)
    if sum(len(w) for w in weights) < LEAST_BLOBS:
        return None
    weight = np.concatenate(weights)
    if not weight.sum() > 0:
        return None
    return float(2 * math.sqrt(2) * 2 ** np.average(np.concatenate(widths), weights=weight))


def blobs(image: NDArray[np.uint8], *, smallest: float = SMALLEST) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Standard deviations in px, and contrasts in optical density, of the haematoxylin blobs of an image (h, w, 3)."""
    from scipy.ndimage import gaussian_filter
    from skimage.color import rgb2hed
    from skimage.feature import peak_local_max

    haematoxylin = rgb2hed(image)[..., 0].astype(np.float32)
    steps = int(np.round(np.log2(LARGEST / smallest) / np.log2(RATIO)))
    widths = smallest * RATIO ** np.arange(steps + 2)
    smooth = np.stack([gaussian_filter(haematoxylin, width) for width in widths], axis=-1)
    answer = smooth[..., :-1] - smooth[..., 1:]  # (h, w, W)
    # skimage's own blob_dog finds the same and then compares all pairs, which took a minute where blobs are many.
    found = peak_local_max(answer, min_distance=1, threshold_abs=0.0, exclude_border=(BORDER, BORDER, 1))  # (B, 3)
    return widths[found[:, 2]], answer[tuple(found.T)].astype(np.float64)
