"""µm/px from one layer of a network: a ridge from its channels, in the network's card. Pure numpy.

The layer is one that `probe` has found to know scale, the regression Graziani et al.'s ("On the Scale Invariance in State of
the Art CNNs Trained on ImageNet", MAKE 3(2), 2021). A slide is told by what it says over all scales; docs/slide-mpp.md has the
measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsiscale.card import packed, read_card, unpacked, update_card
from wsiscale.errors import ModelError, OptionError
from wsiscale.probe import Answers, Floats, by_slide, folds, rows_of
from wsiscale.profile import interval
from wsiscale.ridge import PENALTIES, fit_ridges
from wsiscale.types import ScaleResponse

VERSION = 1
LEAST_PLACES = 3


@dataclass(frozen=True)
class ScaleRegressor:
    """log2 µm/px of a tile from one layer's channels: intercept + ((x - mean) / std) @ weights."""

    layer: str
    mean: NDArray[np.float32]  # (K,)
    std: NDArray[np.float32]  # (K,)
    weights: NDArray[np.float32]  # (K,)
    intercept: float
    # What tiles of held-out slides are said to be at each µm/px. A ridge draws to the middle of its range, and at the range's
    # ends, where tissue looks alike, its answer turns round: a slide is told by its whole curve, laid along this one.
    octaves: NDArray[np.float32]  # (U,) log2 µm/px, EXPECTED_STEP apart
    expected: NDArray[np.float32]  # (U,) log2 µm/px
    slide_sd: float  # octaves, by which held-out slides are off, each told by all of its tiles
    mpp_range: tuple[float, float]  # µm/px that it was fitted to
    slides: int
    tile_size: int
    network: str | None = None  # networks.network_digest


@dataclass(frozen=True)
class RegressedMpp:
    """A slide's level-0 µm/px by a regressor, from its tiles at all scales."""

    mpp: float
    ci90: tuple[float, float]
    places: int


def fit_regressor(
    answers: Sequence[Answers],
    layer: str,
    *,
    tile_size: int,
    network: str | None = None,
    penalty: float | None = None,
    seed: int = 0,
) -> ScaleRegressor:
    """The regressor of `layer` from all slides, its errors from slides held out. Raises OptionError for fewer than three.

    Without a `penalty` it is the best for slides left out. Slides to come that are of another kind want a stronger one.
    """
    if len(answers) < 3:
        raise OptionError(f"{len(answers)} slides; a regressor needs three or more, each held out in turn")
    if layer not in answers[0].layers:
        raise OptionError(f"layer {layer!r} was not watched; there are {', '.join(answers[0].layers)}")
    values, target, slide = rows_of(answers, layer)
    penalties = PENALTIES if penalty is None else np.array([penalty])
    fold = folds(len(answers), seed)
    said = np.empty_like(target)
    for each in range(int(fold.max()) + 1):
        test = fold[slide] == each
        (ridge,) = fit_ridges(values[~test], target[~test, None], slide[~test], penalties=penalties)
        said[test] = ridge.predict(values[test])
    (ridge,) = fit_ridges(values, target[:, None], slide, penalties=penalties)
    octaves, expected = _expected(target, said, slide)
    off = []
    for rows in by_slide(slide):
        at = np.unique(target[rows])
        curve = np.array([np.median(said[rows][target[rows] == one]) for one in at])
        # As a slide of unknown µm/px would be: its finest scale is 0.
        shift = _shift(curve, at - at[0], octaves, expected)
        off.append(np.nan if shift is None else shift - at[0])
    if not np.isfinite(off).any():
        raise OptionError(f"layer {layer!r} tells no slide's µm/px from those of the others; give another, or more slides")
    # The card has no infinity; a channel that is constant has no weight.
    told = np.isfinite(ridge.unit)
    return ScaleRegressor(
        layer=layer,
        mean=ridge.center.astype(np.float32),
        std=np.where(told, ridge.unit, 1).astype(np.float32),
        weights=np.where(told, ridge.weights, 0).astype(np.float32),
        intercept=ridge.intercept,
        octaves=octaves.astype(np.float32),
        expected=expected.astype(np.float32),
        slide_sd=float(np.sqrt(np.nanmean(np.square(off)))),
        mpp_range=(float(2 ** target.min()), float(2 ** target.max())),
        slides=len(answers),
        tile_size=tile_size,
        network=network,
    )


EXPECTED_STEP = 0.25  # octaves
LEAST_SCALES = 4  # that a slide has within the regressor's range, where it is laid
_FINE = 0.02  # octaves between the shifts that are tried


def _expected(target: Floats, said: Floats, slide: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """What held-out slides are said to be, by µm/px: the mean over the slides that are there, each as much as another."""
    octaves = np.arange(target.min(), target.max() + 1e-6, EXPECTED_STEP)
    nearest = np.abs(target[:, None] - octaves).argmin(axis=1)
    means = np.array(
        [
            [
                said[(slide == one) & (nearest == bin_)].mean() if ((slide == one) & (nearest == bin_)).any() else np.nan
                for bin_ in range(len(octaves))
            ]
            for one in range(int(slide.max()) + 1)
        ]
    )  # (R, U)
    there = np.isfinite(means).any(axis=0)
    expected = np.nanmean(means[:, there], axis=0)
    return octaves[there], expected


def _shift(curve: Floats, at: Floats, octaves: NDArray[np.floating], expected: NDArray[np.floating]) -> float | None:
    """log2 µm/px of level 0 at which a slide's curve (S,) over log2 scale (S,) is most like the expected; None at an end."""
    low, high = float(octaves[0]), float(octaves[-1])
    tried = np.arange(low - at[-1], high + _FINE, _FINE)
    there = (at + tried[:, None] >= low - 1e-6) & (at + tried[:, None] <= high + 1e-6)  # (D, S)
    squares = np.square(curve - np.interp(at + tried[:, None], octaves, expected))
    count = there.sum(axis=1)
    enough = count >= LEAST_SCALES
    if not enough.any():
        return None
    misfit = np.where(enough, (squares * there).sum(axis=1) / np.maximum(count, 1), np.inf)
    best = int(misfit.argmin())
    possible = np.flatnonzero(enough)
    return None if best in (possible[0], possible[-1]) else float(tried[best])


def predict_log2_mpp(response: ScaleResponse | NDArray[np.floating], regressor: ScaleRegressor) -> Floats:
    """log2 of the µm/px that each tile looks like: (N, S) of a response that watched the layer, (...,) of channels (..., K).

    Raises OptionError where the layer was not watched or has other channels.
    """
    if isinstance(response, ScaleResponse):
        if regressor.layer not in response.layers:
            raise OptionError(f"layer {regressor.layer!r} was not watched; respond with layers=[{regressor.layer!r}]")
        channels = response.layers[regressor.layer].mean
    else:
        channels = np.asarray(response)
    if channels.shape[-1] != len(regressor.weights):
        raise OptionError(
            f"{channels.shape[-1]} channels, and the regressor was fitted to the {len(regressor.weights)} of layer "
            f"{regressor.layer!r}; ask the network that it was made with"
        )
    standard = (channels.astype(np.float64) - regressor.mean) / regressor.std
    octaves: Floats = standard @ regressor.weights.astype(np.float64) + regressor.intercept
    return octaves


def regressed_mpp(response: ScaleResponse, regressor: ScaleRegressor) -> RegressedMpp | None:
    """The slide's level-0 µm/px, whatever its tag says; None where it cannot be told from the regressor's range alone.

    What its tiles are said to be at each scale, median over places, is laid along what slides of known µm/px were said to be;
    where it fits best is the slide's µm/px. Scales finer than level 0 do not count.
    """
    seen = predict_log2_mpp(response, regressor)  # (N, S)
    native = response.scales >= 1 - 1e-6
    seen = seen[np.isfinite(seen).all(axis=1)][:, native]
    if len(seen) < LEAST_PLACES or seen.shape[1] < LEAST_SCALES:
        return None
    best = _shift(np.median(seen, axis=0), np.log2(response.scales[native]), regressor.octaves, regressor.expected)
    return None if best is None else RegressedMpp(2**best, interval(2**best, regressor.slide_sd), len(seen))


_ARRAYS = ("mean", "std", "weights", "octaves", "expected")


def save_regressor(regressor: ScaleRegressor, card: str | Path, *, fields: Mapping[str, Any] | None = None) -> None:
    """Puts the regressor into a card's file as `scale_regressor`; the card's other fields stay, or become `fields`."""
    record: dict[str, Any] = {"version": VERSION} | vars(regressor)
    record["mpp_range"] = list(regressor.mpp_range)
    record["arrays"] = packed({name: record.pop(name) for name in _ARRAYS})
    update_card(card, {"scale_regressor": record}, fields=fields)


def load_regressor(card: str | Path) -> ScaleRegressor:
    """The regressor in a card's file. Raises ModelError where there is none."""
    found = regressor_of(read_card(card))
    if found is None:
        raise ModelError(f"the card {card} has no scale_regressor; make one with wsiscale probe SLIDES --fit {card}")
    return found


def regressor_of(card: Mapping[str, object]) -> ScaleRegressor | None:
    """The regressor in a card's fields (`network.card`), None where it has none. Raises ModelError for a damaged one."""
    record = card.get("scale_regressor")
    if record is None:
        return None
    try:
        if not isinstance(record, Mapping) or record["version"] != VERSION:
            raise ValueError("it is of another version of wsiscale")
        arrays = unpacked(record["arrays"], _ARRAYS)
        per_channel = {arrays[name].shape for name in ("mean", "std", "weights")}
        if len(per_channel) != 1 or arrays["mean"].ndim != 1 or arrays["octaves"].shape != arrays["expected"].shape:
            raise ValueError("its arrays are of different lengths")
        lo, hi = record["mpp_range"]
        return ScaleRegressor(
            layer=str(record["layer"]),
            mean=arrays["mean"].astype(np.float32),
            std=arrays["std"].astype(np.float32),
            weights=arrays["weights"].astype(np.float32),
            octaves=arrays["octaves"].astype(np.float32),
            expected=arrays["expected"].astype(np.float32),
            intercept=float(record["intercept"]),
            slide_sd=float(record["slide_sd"]),
            mpp_range=(float(lo), float(hi)),
            slides=int(record["slides"]),
            tile_size=int(record["tile_size"]),
            network=record["network"],
        )
    except (LookupError, TypeError, ValueError) as error:
        raise ModelError(f"the card's scale_regressor is damaged: {error}; make it anew with wsiscale probe --fit") from error
