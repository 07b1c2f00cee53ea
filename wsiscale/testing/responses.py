"""Answers of networks that do not exist: noise that knows nothing of scale, and ones with a planted optimum. Numpy only."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsiscale.geometry import scale_grid
from wsiscale.types import LayerMoments, Outputs, ScaleResponse

STAGES = ("stage1", "stage2", "stage3", "stage4", "stage5")


def noise_response(
    *,
    seed: int = 0,
    places: int = 32,
    scales: NDArray[np.float64] | None = None,
    channels: int = 16,
    classes: int = 4,
    kind: Literal["white", "walk"] = "white",
) -> ScaleResponse:
    """Answers that hold nothing about scale: every estimate from them is wrong but "no estimate".

    "white" is independent from scale to scale; "walk" is a random walk from the finest scale on: smooth, with extrema
    anywhere, and spreading, so that what grows with a network's answers (confidence) is highest at the coarse end.
    """
    rng = np.random.default_rng(seed)
    grid = scale_grid(0.5, 16) if scales is None else scales

    def draw() -> NDArray[np.float64]:  # (N, S, K)
        noise = rng.normal(size=(places, len(grid), channels))
        return noise if kind == "white" else noise.cumsum(axis=1)

    return response_of(
        scales=grid,
        features=draw(),
        head_weight=rng.normal(size=(classes, channels)),
        stages=[np.maximum(draw(), 0) for _ in STAGES],
    )


def planted_response(
    scale: float,
    *,
    seed: int = 0,
    places: int = 32,
    scales: NDArray[np.float64] | None = None,
    channels: int = 16,
    classes: int = 4,
    noise: float = 0.05,
    spread: float = 0.1,
    width: float = 0.75,
) -> ScaleResponse:
    """Answers that are strongest at `scale`, level-0 px per px: features, confidence and every stage peak there.

    Each place shows one class, and peaks `spread` octaves (standard deviation) away from `scale`. The peak is a Gaussian of
    `width` octaves and height 1, under white noise of standard deviation `noise`.
    """
    rng = np.random.default_rng(seed)
    grid = scale_grid(0.5, 16) if scales is None else scales
    octaves = np.log2(grid / scale) - rng.normal(0, spread, (places, 1))
    bump = np.exp(-((octaves / width) ** 2) / 2)[:, :, None]  # (N, S, 1)
    weight = rng.normal(size=(classes, channels))
    shown = weight[rng.integers(classes, size=places)]  # (N, K)

    def noisy(clean: NDArray[np.float64]) -> NDArray[np.float64]:
        return clean + rng.normal(0, noise, clean.shape)

    return response_of(
        scales=grid,
        features=noisy(bump * shown[:, None] / np.sqrt(channels)),
        head_weight=weight,
        stages=[np.maximum(noisy(0.5 + bump * rng.uniform(0.5, 1, channels)), 0) for _ in STAGES],
    )


def response_of(
    *,
    scales: NDArray[np.float64],
    features: NDArray[np.float64],
    head_weight: NDArray[np.float64],
    stages: list[NDArray[np.float64]] | None = None,
    slide_mpp: float | None = 0.25,
) -> ScaleResponse:
    """What a classifier with features (N, S, F), a head (C, F) without bias and stages' pooled means (N, S, K) would answer."""
    logits = features @ head_weight.T  # (N, S, C)
    top = logits.max(axis=2, keepdims=True)
    total = np.exp(logits - top).sum(axis=2, keepdims=True)
    probabilities = np.exp(logits - top) / total
    ordered = np.sort(logits, axis=2)
    surprise = np.where(probabilities > 0, -np.log(np.maximum(probabilities, 1e-300)), 0)
    outputs = Outputs(
        logits=_single(logits),
        probabilities=_single(probabilities),
        confidence=_single(probabilities.max(axis=2)),
        margin=_single(ordered[:, :, -1] - ordered[:, :, -2]),
        entropy=_single((probabilities * surprise).sum(axis=2)),
        energy=_single((top + np.log(total))[:, :, 0]),
    )
    means = [] if stages is None else [_single(stage) for stage in stages]
    # Of each channel's positions a unit variance: nothing here looks at it, but a mean square below the mean's is impossible.
    layers = {f"stage{i}": LayerMoments(mean=mean, square=mean**2 + 1) for i, mean in enumerate(means, start=1)}
    return ScaleResponse(
        scales=scales,
        slide_mpp=slide_mpp,
        outputs=outputs,
        features=_single(features),
        layers=layers,
        stages=tuple(layers),
        head_weight=_single(head_weight),
        head_bias=np.zeros(len(head_weight), np.float32),
    )


def _single(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return values.astype(np.float32)
