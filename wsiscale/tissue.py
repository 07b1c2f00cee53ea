"""Thumbnail -> tissue mask. Pure, for brightfield slides of any stain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

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

    A slide without tissue gives an empty mask, not an error. What is damaged and cannot be seen counts as tissue, so that it is
    missed where it is looked for; more than a tenth of the slide is a SlideError.
    """
    if detector is None:
        detect: TissueDetector = stained
    else:
        detect = load_object(detector) if isinstance(detector, str) else detector
    height, width = slide.pyramid.shape
    step = max(max(height, width) / _LONGEST, min(_STEP, max(1.0, min(height, width) / _SHORTEST)))
    image, unread = thumbnail(slide, step=step)
    mask = np.asarray(detect(image))
    if mask.shape != image.shape[:2]:
        raise OptionError(f"the tissue detector gave {mask.shape} for a thumbnail of {image.shape[:2]}; give one bool a pixel")
    mask = mask.astype(bool) | unread
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
    chroma, usable = _stain(cv2.split(image))
    low, high, _, _ = cv2.minMaxLoc(chroma, usable.view(np.uint8))
    if high - low < 1e-6:
        return np.asarray(usable & (chroma > _STRONGEST_CUT))
    steps = cv2.convertScaleAbs(chroma, alpha=255 / (high - low), beta=-255 * low / (high - low))[usable]
    otsu, _ = cv2.threshold(steps[None], 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    cut = min(max(low + otsu / 255 * (high - low), _FAINTEST), _STRONGEST_CUT)
    mask = np.empty_like(usable)
    for inner, outer, within in _bands(len(mask)):
        # Nuclei and the gaps between them belong together: the neighbourhood decides, at half the cut.
        # Held to twice the cut, the strongest stain spreads no further than the faintest.
        near = _blurred(np.minimum(chroma[outer], np.float32(2 * cut)) * usable[outer], 2)
        mask[inner] = (usable[outer] & (chroma[outer] > cut / 2) & (near > cut))[within]
    return _tidy(mask)


def _stain(planes: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """How coloured each pixel is, in optical density, and whether it may be stain at all: (h, w) each."""
    chroma, usable = np.empty(planes[0].shape, np.float32), np.zeros(planes[0].shape, bool)
    if _quantile(_largest(planes), 0.75) < 100:
        chroma[:] = 0
        return chroma, usable  # no glass, no light: fluorescence, or a lid left closed
    tables = _densities(planes)
    for inner, outer, within in _bands(len(chroma)):
        red, green, blue = (_blurred(cv2.LUT(plane[outer], table), 1) for plane, table in zip(planes, tables, strict=True))
        difference = _largest((red, green, blue)) - cv2.min(cv2.min(red, green), blue)
        total = (red + green + blue) / 3
        # Dust and shadows are grey; black ink dries with a tint.
        coloured = difference >= np.where(total > 0.7, np.float32(0.3), np.float32(0.08)) * total
        chroma[inner], usable[inner] = difference[within], (coloured & ~_pen(red, green, blue))[within]
    return chroma, usable


_BAND = 256  # rows that are worked on at a time, which stay near the cache
_REACH = 8  # rows by which a pixel's neighbourhood goes beyond it


def _bands(height: int) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of a band, the rows that it is made of, and the band within those."""
    for start in range(0, height, _BAND):
        end, first = min(start + _BAND, height), max(0, start - _REACH)
        yield slice(start, end), slice(first, min(end + _REACH, height)), slice(start - first, end - first)


def _densities(planes: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """Optical density, at least 0, of every grey level of red, green and blue against the slide's own glass: (256,) each."""
    bright = cv2.min(cv2.min(planes[0], planes[1]), planes[2]) > 200
    # Where there is no glass in view, white has to do.
    known = np.count_nonzero(bright) > 0.01 * bright.size
    glass = [_quantile(plane, 0.5, where=bright) if known else 255 for plane in planes]
    return [np.clip(np.log10((level + 1) / (np.arange(256) + 1)), 0, None).astype(np.float32) for level in glass]


def _pen(red: NDArray[np.float32], green: NDArray[np.float32], blue: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Felt-tip marks: colours that no histological stain has."""
    # Haematoxylin, the bluest stain, absorbs green at least about as much as red (Ruifrok & Johnston 2001: 0.65, 0.70, 0.29).
    cold = (red > 1.25 * green) & (red > 0.15)  # blue, green, cyan
    # Red ink lets all red through and stops blue as much as green; eosin and blood let blue through, DAB stops red.
    hot = (red < 0.15 * green) & (blue > 0.85 * green) & (green > 0.5)
    # What a cross of 3 x 3 does not fit into is a speck; the rest grows by two pixels.
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    outside = {"borderType": cv2.BORDER_CONSTANT, "borderValue": 0}
    marks = cv2.erode((cold | hot).view(np.uint8), cross, **outside)
    return np.asarray(cv2.dilate(marks, cross, iterations=3, **outside), np.bool_)


def _largest(planes: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.asarray(cv2.max(cv2.max(planes[0], planes[1]), planes[2]))


def _quantile(plane: NDArray[np.uint8], share: float, *, where: NDArray[np.bool_] | None = None) -> int:
    """The grey level that `share` of the pixels do not exceed."""
    counts = cv2.calcHist([plane], [0], None if where is None else where.view(np.uint8), [256], [0, 256]).ravel().cumsum()
    return int(np.searchsorted(counts, share * counts[-1]))


def _blurred(plane: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    size = 2 * round(4 * sigma) + 1
    return np.asarray(cv2.GaussianBlur(plane, (size, size), sigma, borderType=cv2.BORDER_REFLECT), np.float32)


def _tidy(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without specks and pinholes of less than 25 px."""
    for value in (True, False):
        count, labels = cv2.connectedComponents((mask == value).view(np.uint8), connectivity=4)
        # By bands, since bincount makes a copy of eight bytes a pixel.
        sizes = np.zeros(count, np.int64)
        for band, _, _ in _bands(len(mask)):
            sizes += np.bincount(labels[band].ravel(), minlength=count)
        small = sizes < 25
        small[0] = False
        if small.any():
            mask = mask ^ small[labels]
        del labels  # before there are others
    return mask
