"""What the thesis's estimator (bagamaev2022) answers where there is nothing to find: its published evaluation, run on noise.

    python benchmarks/thesis_null.py

The evaluation: 20 classes, 50 pyramids each, a class's answer is the median of its pyramids'; the true scale is 5 and the
range 0.5 to 9.9, whose middle is 5.2. Each row has 16 channels, of which the method keeps 8, and random head weights. Below
that, the same with a planted optimum, at other scales than 5 too. Takes some seconds; docs/methods.md quotes it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria import bagamaev2022_grid
from wsiscale.criteria.bagamaev2022 import bagamaev2022_with_labels
from wsiscale.testing.responses import noise_response, planted_response, response_of
from wsiscale.types import ScaleResponse

CLASSES = 20
PYRAMIDS = 50
CHANNELS = 16
TRUE = 5.0
WIDE = np.arange(5, 200) / 10  # 0.5 to 19.9

# Table 5 of the thesis: rows red, green, blue, yellow, purple; columns square, circle, cross, triangle.
THESIS = np.array(
    [
        [4.8, 3.8, 4.2, 4.65],
        [4.5, 4.8, 5.15, 4.8],
        [3.7, 5.0, 4.5, 4.85],
        [3.05, 4.4, 4.4, 5.05],
        [4.7, 4.8, 3.95, 5.6],
    ]
).ravel()


def main() -> None:
    grid = bagamaev2022_grid()
    print(f"{'curves over scale':<44}{'mean':>6}{'range':>14}{'SSE vs 5':>10}{'within 0.5':>12}{'within 1':>10}")
    report("white noise", [of_class(c, noise(c, grid, "white")) for c in range(CLASSES)])
    report("random walks", [of_class(c, noise(c, grid, "walk")) for c in range(CLASSES)])
    report("no network: always the range's middle", [float(np.median(grid))] * CLASSES)
    report("no network: always the range's log middle", [float(np.sqrt(grid[0] * grid[-1]))] * CLASSES)
    report("the thesis's network (its Table 5)", list(THESIS))
    report("monotone power curves, 2 % noise", [of_class(c, monotone(c, grid)) for c in range(CLASSES)])
    report("random walks, range 0.5 to 19.9", [of_class(c, noise(c, WIDE, "walk")) for c in range(CLASSES)])

    print(f"\n{'planted optimum':<44}{'mean':>6}{'range':>14}{'mean |octaves|':>16}")
    for scale in (1.0, 2.0, 3.0, 5.0, 7.0):
        for share in (0.0, 0.05):
            answers = np.array([of_class(c, planted(c, grid, scale, share)) for c in range(CLASSES)])
            error = np.abs(np.log2(answers / scale)).mean()
            name = f"at {scale:g}, noise {share:.0%} of the peak"
            print(f"{name:<44}{answers.mean():>6.2f}{span(answers):>14}{error:>16.2f}")


def of_class(label: int, response: ScaleResponse) -> float:
    """The median over the class's pyramids, given the true class as published."""
    answer = bagamaev2022_with_labels(response, np.full(response.places, label))
    assert answer is not None
    return answer


def noise(seed: int, grid: NDArray[np.float64], kind: str) -> ScaleResponse:
    return noise_response(seed=seed, places=PYRAMIDS, scales=grid, channels=CHANNELS, classes=CLASSES, kind=kind)


def planted(seed: int, grid: NDArray[np.float64], scale: float, share: float) -> ScaleResponse:
    return planted_response(
        scale, seed=seed, places=PYRAMIDS, scales=grid, channels=CHANNELS, classes=CLASSES, noise=share / np.sqrt(CHANNELS)
    )


def monotone(seed: int, grid: NDArray[np.float64]) -> ScaleResponse:
    """Each channel of each pyramid a power of scale, rising or falling over a height of 1."""
    rng = np.random.default_rng(seed)
    power = rng.uniform(0.3, 2, (PYRAMIDS, 1, CHANNELS)) * rng.choice([-1, 1], (PYRAMIDS, 1, CHANNELS))
    curves = grid[:, None] ** power
    curves = (curves - curves.min(axis=1, keepdims=True)) / np.ptp(curves, axis=1, keepdims=True)
    curves += rng.normal(0, 0.02, curves.shape)
    return response_of(scales=grid, features=curves, head_weight=rng.normal(size=(CLASSES, CHANNELS)))


def report(name: str, answers: list[float]) -> None:
    found = np.array(answers)
    error = np.abs(found - TRUE)
    half, one = (f"{(error < width).sum()}/{CLASSES}" for width in (0.5, 1))  # strictly within, as published
    print(f"{name:<44}{found.mean():>6.2f}{span(found):>14}{np.square(error).sum():>10.2f}{half:>12}{one:>10}")


def span(answers: NDArray[np.float64]) -> str:
    return f"{answers.min():.2f}-{answers.max():.2f}"


if __name__ == "__main__":
    main()
