"""Slide x network x estimate -> what a page shows of them: an overview, the same fields at several scales, sizes of nuclei.

Only the pyramid's own pixels are looked at. Label and macro images, which may hold a patient's name, are never opened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import approximate_polygon, find_contours

from wsiscale.errors import SlideError
from wsiscale.geometry import level_for
from wsiscale.objects import objects_of
from wsiscale.stacks import read_place, scale_stack
from wsiscale.types import Pyramid, Reader, ScaleEstimate, Tissue
from wsiscale.views import thumbnail

if TYPE_CHECKING:
    from wsiscale.networks import Network

TIMES = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # the estimate
_OVERVIEW = 720  # px of the longer side
_SAME = 0.01  # scales that differ by less are one
_NEXT = 2**0.25  # scales that differ by less show the same

# What nuclei in sections measure, in µm: small lymphocytes' areas are below 25 µm² (5.6 µm across; Anal Quant Cytol Histol 10,
# 1988, 285), ductal carcinomas' 44 to 72 (7.5 to 9.6; Tan et al., Modern Pathology 14, 2001, 937). Labels of 14 MoNuSeg images,
# measured as here, give 5.9 to 11.7, the embedded network's masks of the same 5.9 to 12.6.
USUAL_NUCLEI = (5.0, 12.0)
NUCLEI_MPP = 0.5  # what the embedded network was trained at
_COARSEST_NUCLEI = 0.7  # µm/px, from which on its masks do not tell a nucleus from two
_NUCLEI_PLACES, _FEWEST_NUCLEI = 24, 3

# Colours of classes on H&E: none that a stain has.
_CLASS_COLOURS = ((0, 214, 90), (255, 226, 0), (0, 170, 255), (255, 120, 0), (190, 80, 255), (0, 230, 220))


@dataclass(frozen=True)
class Overview:
    """The whole slide, small."""

    pixels: NDArray[np.uint8]  # (h, w, 3)
    step: float  # level-0 px per px
    outlines: tuple[NDArray[np.float64], ...]  # of the tissue: (P, 2) (y, x) in px of `pixels`, closed


@dataclass(frozen=True)
class Column:
    """One scale that fields are shown at, or why they are not."""

    scale: float  # level-0 px per px
    chosen: bool = False
    missing: str | None = None  # in words
    upsampled: bool = False


@dataclass(frozen=True)
class Field:
    """One place at one scale, as the network gets it, and what the network says."""

    pixels: NDArray[np.uint8]  # (size, size, 3)
    marked: NDArray[np.uint8] | None  # the same with what the network segments; None for classifiers
    share: float | None  # of the pixels that are not of class 0, of a segmenter
    object_px: float | None  # diameter of the typical object
    probabilities: NDArray[np.float32] | None  # (C,) mean over pixels; None where the network gives features


@dataclass(frozen=True)
class Row:
    """One place."""

    center: tuple[float, float]  # level-0 (y, x)
    fields: Mapping[int, Field]  # by number of the column; those that the slide can give


@dataclass(frozen=True)
class Nuclei:
    """What nuclei measure by the embedded network's masks and the slide's µm/px."""

    diameters: NDArray[np.float64]  # (N,) µm, the typical one of each place that has some
    mpp: float  # at which they were looked at

    @property
    def median(self) -> float:
        return float(np.median(self.diameters))


def overview(slide: Reader, tissue: Tissue) -> Overview:
    """The slide's own pixels, none of its associated images, with the tissue's outlines. Raises SlideError."""
    height, width = slide.pyramid.shape
    step = max(1.0, max(height, width) / _OVERVIEW)
    pixels, _ = thumbnail(slide, step=step)
    # No finer than the overview shows, with a border, so that outlines close.
    coarse = tissue.mask[:: (by := max(1, int(step / tissue.step / 1.5))), ::by]
    outlines = [
        (approximate_polygon(line, tolerance=0.6) - 0.5) * (by * tissue.step / step)
        for line in find_contours(np.pad(coarse, 1).astype(float), 0.5)
    ]
    return Overview(pixels, step, tuple(np.clip(line, 0, pixels.shape[:2]) for line in outlines if len(line) > 3))


def columns_for(estimate: ScaleEstimate, pyramid: Pyramid, *, size: int) -> tuple[Column, ...]:
    """The scales to show: a quarter to four times the estimate, or, where there is none, five over the range looked at.

    Finer than level 0 only as far as the estimate itself is. Of the finer ones the last that the slide cannot give is its
    finest instead, if that is finer than the next.
    """
    if estimate.scale is not None:
        wanted = [Column(estimate.scale * times, chosen=times == 1) for times in TIMES]
    elif estimate.curve is not None:
        low, high = np.log2(estimate.curve.scales[[0, -1]])
        wanted = [Column(float(scale)) for scale in np.exp2(np.linspace(low, high, len(TIMES)))]
    else:
        return ()
    finest = min(1.0, wanted[0].scale if estimate.scale is None else estimate.scale)
    _, _, height, width = pyramid.scanned
    coarsest = min(height, width) / size

    beyond = [number for number, column in enumerate(wanted) if column.scale < finest * (1 - _SAME)]
    if beyond and beyond[-1] + 1 < len(wanted) and wanted[beyond[-1] + 1].scale > finest * _NEXT:
        wanted[beyond[-1]] = Column(finest)

    def checked(column: Column) -> Column:
        if column.scale < finest * (1 - _SAME):
            return replace(column, missing="finer than the scan")
        if column.scale > coarsest * (1 + _SAME):
            return replace(column, missing="wider than the scan")
        return replace(column, upsampled=column.scale < 1 - _SAME)

    return tuple(checked(column) for column in wanted)


def rows_for(
    slide: Reader,
    network: Network,
    columns: Sequence[Column],
    centers: NDArray[np.float64],
    *,
    finest: float,
    device: str = "auto",
) -> tuple[Row, ...]:
    """Some of the places at every scale of `columns` that the slide can give, as the network sees them.

    `finest` is the finest scale that the network was asked at: all tiles come from the level that it was asked on, if that is
    fine enough. Places that are damaged are passed over.
    """
    from wsiscale.analyzer import class_maps

    given = [number for number, column in enumerate(columns) if column.missing is None]
    if not given:
        return ()
    size = network.tile_size
    scales = np.array([columns[number].scale for number in given])
    centers = _inside(centers, slide.pyramid, size * float(scales[-1]))
    level = level_for(slide.pyramid, min(finest, float(scales[0])))
    stack = scale_stack(slide, centers, scales=scales, size=size, max_upsample=max(1.0, 1 / float(scales[0])), level=level)
    rows: list[Row] = []
    count = 3 if size <= 256 else 2
    for place, (y, x) in enumerate(centers.tolist()):
        if len(rows) == count:
            break
        try:
            tiles = read_place(stack, place)  # (S, size, size, 3)
        except SlideError as error:
            if error.code != "READ_FAILED":
                raise
            continue
        maps = class_maps(network, tiles, device=device)
        segments = network.output == "segmentation"
        answers = [None] * len(tiles) if maps is None else list(maps)
        fields = (_field(tile, answer, segments=segments) for tile, answer in zip(tiles, answers, strict=True))
        rows.append(Row((y, x), dict(zip(given, fields, strict=True))))
    return tuple(rows)


def nuclei_at(slide: Reader, centers: NDArray[np.float64], *, mpp: float | None, device: str = "auto") -> Nuclei | str:
    """How large nuclei are by the embedded network, if level 0 has `mpp` µm/px; or why that cannot be said."""
    from wsiscale.analyzer import class_maps
    from wsiscale.networks import load_network

    if mpp is None:
        return "the slide's µm/px is not known"
    if mpp > _COARSEST_NUCLEI:
        return f"the slide's finest, {mpp:.3g} µm/px, is too coarse to tell nuclei apart"
    if not len(centers):
        return "there is no tissue to look at"
    network = load_network()
    scale = max(1.0, NUCLEI_MPP / mpp)
    stack = scale_stack(slide, centers[:_NUCLEI_PLACES], scales=[scale], size=network.tile_size)
    found = []
    for place in range(len(stack.centers)):
        try:
            tiles = read_place(stack, place)
        except SlideError as error:
            if error.code != "READ_FAILED":
                raise
            continue
        maps = class_maps(network, tiles, device=device)
        assert maps is not None
        found.append(objects_of(maps[0].argmax(0) != 0)[0] * scale * mpp)
    diameters = np.array([diameter for diameter in found if math.isfinite(diameter)])
    if len(diameters) < _FEWEST_NUCLEI:
        return f"the embedded network finds nuclei at {len(diameters)} of {len(found)} places; {_FEWEST_NUCLEI} are needed"
    return Nuclei(diameters, scale * mpp)


def _inside(centers: NDArray[np.float64], pyramid: Pyramid, field: float) -> NDArray[np.float64]:
    """Places in the order of how far their field, so many level-0 px wide, reaches beyond the scan; else as they are."""
    y, x, height, width = pyramid.scanned
    low, high = np.array([y, x]) + field / 2, np.array([y + height, x + width]) - field / 2
    beyond = np.maximum(np.maximum(low - centers, centers - high), 0).sum(axis=1)
    return centers[np.argsort(beyond, kind="stable")]


def _field(pixels: NDArray[np.uint8], answer: NDArray[np.float32] | None, *, segments: bool) -> Field:
    """`answer` is the softmax (C, h, w)."""
    if answer is None:
        return Field(pixels, None, None, None, None)
    mean = answer.mean(axis=(1, 2))
    if not segments:
        return Field(pixels, None, None, None, mean)
    labels = answer.argmax(0)
    diameter, share = objects_of(labels != 0)
    times = pixels.shape[0] / labels.shape[0]
    diameter_px = diameter * times if math.isfinite(diameter) else None
    return Field(pixels, _marked(pixels, labels), share, diameter_px, mean)


def _marked(pixels: NDArray[np.uint8], labels: NDArray[np.intp]) -> NDArray[np.uint8]:
    """Outlines and a tint of every class but 0. `labels` may be smaller than the tile."""
    rows, columns = (np.arange(n) * m // n for n, m in zip(pixels.shape[:2], labels.shape, strict=True))
    labels = labels[rows][:, columns]
    marked = pixels.astype(np.float32)
    for number in np.unique(labels[labels != 0]).tolist():
        mask = labels == number
        colour = np.array(class_colour(number), np.float32)
        marked[mask] += 0.12 * (colour - marked[mask])
        marked[mask & ~ndimage.binary_erosion(mask)] = colour
    return np.asarray(marked, np.uint8)


def class_colour(number: int) -> tuple[int, int, int]:
    """Of class `number`, 1 or more, in overlays."""
    return _CLASS_COLOURS[(number - 1) % len(_CLASS_COLOURS)]
