"""Thumbnail -> tissue mask. Pure, for brightfield slides of any stain."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import filters, measure

from wsiscale.errors import OptionError
from wsiscale.plugins import load_object
from wsiscale.types import Reader, Tissue
from wsiscale.views import thumbnail

# (h, w, 3) uint8 -> (h, w) bool
TissueDetector: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[np.bool_]]

# About 4-8 µm per mask pixel on scans of 0.25-0.5 µm/px: finer than any gap that matters, coarse enough to be quick.
_STEP = 16
_LONGEST = 2048  # mask px; larger slides get larger steps
_SHORTEST = 64  # mask px; small ones get smaller steps


def find_tissue(slide: Reader, detector: TissueDetector | str | None = None) -> Tissue:
    """Where the tissue of `slide` is. `detector` is a function or `file.py:name`; the default is `stained`.

    A slide without tissue gives an empty mask, not an error.
    """
    if detector is None:
        detect: TissueDetector = stained
    else:
        detect = load_object(detector) if isinstance(detector, str) else detector
    height, width = slide.pyramid.shape
    step = max(max(height, width) / _LONGEST, min(_STEP, max(1.0, min(height, width) / _SHORTEST)))
    image = thumbnail(slide, step=step)
    mask = np.asarray(detect(image))
    if mask.shape != image.shape[:2]:
        raise OptionError(f"the tissue detector gave {mask.shape} for a thumbnail of {image.shape[:2]}; give one bool a pixel")
    mask = mask.astype(bool)
    y, x, h, w = slide.pyramid.scanned
    scanned = np.zeros_like(mask)
    scanned[int(y / step) : int(np.ceil((y + h) / step)), int(x / step) : int(np.ceil((x + w) / step))] = True
    return Tissue(mask=mask & scanned, step=step, shape=(height, width), mpp=slide.pyramid.mpp)


# Optical densities (log10). Pale eosin absorbs about 0.05 in green; scanner noise on a thumbnail stays below 0.01.
_FAINTEST = 0.015
_STRONGEST_CUT = 0.04  # Otsu on a slide full of tissue lies between nuclei and stroma, and would lose the stroma


def stained(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """What absorbs light with colour, as stained tissue does and glass, dust, black ink and pen marks do not.

    Works in optical density against the slide's own glass, so that pale H&E and immunostains pass; the cut is Otsu's between
    fixed bounds, so that an all-white slide stays empty and a slide full of tissue stays full.
    """
    if np.percentile(image.max(axis=2), 75) < 100:
        return np.zeros(image.shape[:2], bool)  # no glass, no light: fluorescence, or a lid left closed
    density = ndimage.gaussian_filter(_density(image), (1, 1, 0))  # (h, w, 3)
    chroma = density.max(axis=2) - density.min(axis=2)
    total = density.mean(axis=2)
    grey = chroma < np.where(total > 0.7, 0.3, 0.08) * total  # dust and shadows; black ink, which dries with a tint
    usable = ~grey & ~_pen(density)
    if not usable.any() or np.ptp(chroma[usable]) < 1e-6:
        return np.asarray(usable & (chroma > _STRONGEST_CUT))
    cut = float(np.clip(filters.threshold_otsu(chroma[usable]), _FAINTEST, _STRONGEST_CUT))
    # Nuclei and the gaps between them belong together: the neighbourhood decides, at half the cut.
    # Held to twice the cut, the strongest stain spreads no further than the faintest.
    near = ndimage.gaussian_filter(np.where(usable, np.minimum(chroma, 2 * cut), 0), 2)
    return _tidy(usable & (chroma > cut / 2) & (near > cut))


def _density(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Optical density of every channel against the slide's glass, at least 0."""
    bright = image.reshape(-1, 3)[image.reshape(-1, 3).min(axis=1) > 200]
    # Where there is no glass in view, white has to do.
    glass = np.median(bright, axis=0) if len(bright) > 0.01 * image.shape[0] * image.shape[1] else np.full(3, 255.0)
    return np.asarray(np.clip(np.log10((glass + 1) / (image + 1.0)), 0, None))


def _pen(density: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Felt-tip marks: colours that no histological stain has."""
    red, green, blue = np.moveaxis(density, 2, 0)
    # Haematoxylin, the bluest stain, absorbs green at least about as much as red (Ruifrok & Johnston 2001: 0.65, 0.70, 0.29).
    cold = (red > 1.25 * green) & (red > 0.15)  # blue, green, cyan
    # Red ink lets all red through and stops blue as much as green; eosin and blood let blue through, DAB stops red.
    hot = (red < 0.15 * green) & (blue > 0.85 * green) & (green > 0.5)
    marks: NDArray[np.bool_] = ndimage.binary_dilation(ndimage.binary_opening(cold | hot), iterations=2)
    return marks


def _tidy(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without specks and pinholes of less than 25 px."""
    for value in (True, False):
        labels = measure.label(mask == value, connectivity=1)
        small = np.bincount(labels.ravel()) < 25
        small[0] = False
        mask = np.where(small[labels], not value, mask)
    return mask
