"""W3: 24 scales of 224 px, eight an octave from level 0 on, around places on tissue."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image
from skimage.registration import phase_cross_correlation

import wsiscale as ws
from benchmarks.performance.tiles import exact
from wsiscale.stacks import read_place
from wsiscale.tissue import find_tissue
from wsiscale.types import Reader

SIZE = 224
SCALES = 2.0 ** (np.arange(24) / 8)
MARGIN = 850  # px between a place and the slide's edge


def places(path: Path, count: int) -> NDArray[np.float64]:
    with ws.open_slide(path) as slide:
        return ws.sample_places(find_tissue(slide), count, seed=1, field=2 * MARGIN)


def ways(path: Path, *, count: int) -> dict[str, Callable[[], int]]:
    centres = places(path, count)
    return {
        "decode alone: the JPEG tiles under the widest view": lambda: _decoded(path, centres),
        "OpenSlide, best level, PIL BICUBIC": lambda: _each(path, centres, by_openslide),
        "OpenSlide, one read of level 0, cv2 INTER_AREA": lambda: _each(path, centres, by_one_read),
        "wsiscale": lambda: _ours(path, centres),
    }


def _ours(path: Path, centres: NDArray[np.float64]) -> int:
    with ws.open_slide(path) as slide:
        stack = ws.scale_stack(slide, centres, scales=SCALES, size=SIZE)
        for place in range(len(centres)):
            read_place(stack, place)
    return len(centres)


def _decoded(path: Path, centres: NDArray[np.float64]) -> int:
    side = math.ceil(SIZE * SCALES[-1]) + 1
    with ws.open_slide(path) as slide:
        for y, x in centres:
            slide.read(level=0, y=round(y - side / 2), x=round(x - side / 2), height=side, width=side)
    return len(centres)


def _each(
    path: Path, centres: NDArray[np.float64], view: Callable[[openslide.OpenSlide, float, float], list[NDArray[np.uint8]]]
) -> int:
    with openslide.OpenSlide(path) as slide:
        for y, x in centres:
            view(slide, y, x)
    return len(centres)


def by_openslide(slide: openslide.OpenSlide, y: float, x: float) -> list[NDArray[np.uint8]]:
    """The level that is just fine enough, a whole-pixel crop, resized: what most pipelines do."""
    views = []
    for scale in SCALES:
        level = slide.get_best_level_for_downsample(float(scale))
        downsample = slide.level_downsamples[level]
        side = round(SIZE * scale / downsample)
        corner = (round(x - SIZE * scale / 2), round(y - SIZE * scale / 2))
        region = slide.read_region(corner, level, (side, side)).convert("RGB")
        views.append(np.asarray(region.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return views


def by_one_read(slide: openslide.OpenSlide, y: float, x: float) -> list[NDArray[np.uint8]]:
    widest = math.ceil(SIZE * SCALES[-1]) + 2
    top, left = round(y - widest / 2), round(x - widest / 2)
    region = np.ascontiguousarray(np.asarray(slide.read_region((left, top), 0, (widest, widest)))[..., :3])
    views = []
    for scale in SCALES:
        side = round(SIZE * scale)
        row, column = round(y - SIZE * scale / 2) - top, round(x - SIZE * scale / 2) - left
        crop = region[row : row + side, column : column + side]
        views.append(cv2.resize(crop, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
    return views


def quality(path: Path, *, count: int = 4) -> dict[str, list[tuple[float, float, float]]]:
    """way -> for each octave (mean absolute difference to the exact area mean, largest median shift in px, Laplacian ratio)."""
    centres = places(path, count)
    found: dict[str, list[tuple[float, float, float]]] = {}
    with ws.open_slide(path) as ours, openslide.OpenSlide(path) as slide:
        truths = [[_exact(ours, y, x, float(scale)) for scale in SCALES] for y, x in centres]
        made = {
            "OpenSlide, best level, PIL BICUBIC": [by_openslide(slide, y, x) for y, x in centres],
            "OpenSlide, one read of level 0, cv2 INTER_AREA": [by_one_read(slide, y, x) for y, x in centres],
            "wsiscale": list(ws.scale_stack(ours, centres, scales=SCALES, size=SIZE).images.compute()),
        }
    for way, stacks in made.items():
        found[way] = []
        for octave in range(3):
            numbers = range(8 * octave, 8 * octave + 8)
            pairs = [[(stack[k], truth[k]) for stack, truth in zip(stacks, truths, strict=True)] for k in numbers]
            off = np.mean([np.abs(view - truth).mean() for of_scale in pairs for view, truth in of_scale])
            shift = max(np.median([_shift(view, truth) for view, truth in of_scale]) for of_scale in pairs)
            sharpness = np.mean([_laplacian(view) / _laplacian(truth) for of_scale in pairs for view, truth in of_scale])
            found[way].append((float(off), float(shift), float(sharpness)))
    return found


def _exact(slide: Reader, y: float, x: float, scale: float) -> NDArray[np.float64]:
    top, left = y - SIZE * scale / 2, x - SIZE * scale / 2
    side = math.ceil(SIZE * scale) + 2
    window = slide.read(level=0, y=math.floor(top), x=math.floor(left), height=side, width=side)
    return exact(window, (top - math.floor(top), left - math.floor(left)), scale, SIZE)


def _shift(view: NDArray[np.uint8], truth: NDArray[np.float64]) -> float:
    fade = np.hanning(SIZE)[:, None] * np.hanning(SIZE)
    one, other = ((i.mean(axis=2) - i.mean()) * fade for i in (truth, view.astype(np.float64)))
    shift, _, _ = phase_cross_correlation(one, other, upsample_factor=100, normalization=None)
    return float(np.abs(shift).max())


def _laplacian(view: NDArray[np.generic]) -> float:
    return float(cv2.Laplacian(view.mean(axis=2).astype(np.float32), cv2.CV_32F).var())
