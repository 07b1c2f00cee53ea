"""Answers of networks that do not exist: noise that knows nothing of scale, and ones with a planted optimum. Numpy only."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsiscale.geometry import scale_grid
from wsiscale.types import BatchNormStatistics, LayerMoments, Outputs, ScaleResponse

STAGES = ("stage1", "stage2", "stage3", "stage4", "stage5")
TURNED = ("rot90", "rot180", "flip")
NORMS = ("norm1", "norm2", "norm3")


def noise_response(
    *,
    seed: int = 0,
    places: int = 32,
    scales: NDArray[np.float64] | None = None,
    channels: int = 16,
    classes: int = 4,
    kind: Literal["white", "walk"] = "white",
    everything: bool = False,
) -> ScaleResponse:
    """Answers that hold nothing about scale: every estimate from them is wrong but "no estimate".

    "white" is independent from scale to scale; "walk" is a random walk from the finest scale on: smooth, with extrema
    anywhere, and spreading, so that what grows with a network's answers (confidence) is highest at the coarse end. With
    `everything` there are noisy views, agreement with them, and BatchNorm inputs that are noise around what was stored.
    """
    rng = np.random.default_rng(seed)
    grid = scale_grid(0.5, 16) if scales is None else scales

    def draw() -> NDArray[np.float64]:  # (N, S, K)
        noise = rng.normal(size=(places, len(grid), channels))
        return noise if kind == "white" else noise.cumsum(axis=1)

    weight = rng.normal(size=(classes, channels))
    features, stages = draw(), [np.maximum(draw(), 0) for _ in STAGES]
    plain = response_of(scales=grid, features=features, head_weight=weight, stages=stages)
    if not everything:
        return plain
    views = {view: response_of(scales=grid, features=draw(), head_weight=weight) for view in (*TURNED, "phase_scrambled")}
    norms = {name: (draw(), np.exp(0.1 * draw())) for name in NORMS}
    return with_views(with_batchnorm(plain, norms, seed=seed), views)


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
    everything: bool = False,
) -> ScaleResponse:
    """Answers that are strongest at `scale`, level-0 px per px: features, confidence and every stage peak there.

    Each place shows one class, and peaks `spread` octaves (standard deviation) away from `scale`. The peak is a Gaussian of
    `width` octaves and height 1, under white noise of standard deviation `noise`. With `everything` there are turned views,
    which see the same with other noise, scrambled ones, which see noise only, and BatchNorm layers: their inputs go through
    their stored moments at each place's scale, most channels monotonously, and differ from place to place by contents too.
    """
    rng = np.random.default_rng(seed)
    grid = scale_grid(0.5, 16) if scales is None else scales
    octaves = np.log2(grid / scale) - rng.normal(0, spread, (places, 1))
    bump = np.exp(-((octaves / width) ** 2) / 2)[:, :, None]  # (N, S, 1)
    weight = rng.normal(size=(classes, channels))
    shown = weight[rng.integers(classes, size=places)]  # (N, K)

    def noisy(clean: NDArray[np.float64]) -> NDArray[np.float64]:
        return clean + rng.normal(0, noise, clean.shape)

    features = noisy(bump * shown[:, None] / np.sqrt(channels))
    stages = [np.maximum(noisy(0.5 + bump * rng.uniform(0.5, 1, channels)), 0) for _ in STAGES]
    plain = response_of(scales=grid, features=features, head_weight=weight, stages=stages)
    if not everything:
        return plain
    turned = {view: noisy(bump * shown[:, None] / np.sqrt(channels)) for view in TURNED}
    views = turned | {"phase_scrambled": noisy(np.zeros_like(features))}

    def input_of_norm() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        contents = rng.normal(0, 0.3, (places, 1, channels))
        moved = np.tanh(octaves[:, :, None] * rng.uniform(0.3, 1, channels)) * rng.normal(0, 1, channels)
        return noisy(contents + moved), np.exp(0.2 * octaves[:, :, None] * rng.normal(0, 1, channels))

    seen = {view: response_of(scales=grid, features=values, head_weight=weight) for view, values in views.items()}
    return with_views(with_batchnorm(plain, {name: input_of_norm() for name in NORMS}, seed=seed), seen)


def with_views(response: ScaleResponse, views: dict[str, ScaleResponse]) -> ScaleResponse:
    """`response` with other views of the same places, and its agreement with the turned ones."""
    agreement = {}
    for view, seen in views.items():
        if view in TURNED:
            assert response.outputs is not None
            assert seen.outputs is not None
            apart = np.abs(response.outputs.probabilities - seen.outputs.probabilities).sum(axis=2) / 2
            agreement[view] = (1 - apart).astype(np.float32)
    return replace(response, views={**response.views, **views}, agreement={**response.agreement, **agreement})


def with_batchnorm(
    response: ScaleResponse, inputs: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]], *, seed: int = 0
) -> ScaleResponse:
    """`response` with BatchNorm layers whose inputs, in units of what they stored, have these means and variances (N, S, K)."""
    rng = np.random.default_rng(seed)
    layers, stored = dict(response.layers), dict(response.batchnorm)
    for name, (mean, variance) in inputs.items():
        channels = mean.shape[2]
        center, spread = rng.normal(0, 2, channels), rng.uniform(0.5, 2, channels)
        absolute = center + spread * mean
        layers[name] = LayerMoments(mean=_single(absolute), square=_single(absolute**2 + spread**2 * variance))
        stored[name] = BatchNormStatistics(
            mean=_single(center),
            var=_single(spread**2),
            weight=np.ones(channels, np.float32),
            bias=np.zeros(channels, np.float32),
            eps=0.0,
        )
    return replace(response, layers=layers, batchnorm=stored)


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


def _single(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)
