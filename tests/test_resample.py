"""The kernel against the area mean worked out another way, and against where things are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.registration import phase_cross_correlation

from wsiscale.geometry import ReadPlan, View, blocks, centered_view, plan_read
from wsiscale.resample import halve, resample, resample_stack
from wsiscale.testing.procedural import tissue
from wsiscale.types import Pyramid

HEIGHT, WIDTH = 190, 230
PYRAMID = Pyramid(shapes=((HEIGHT, WIDTH),), downsamples=(1.0,))


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def windowed(image: np.ndarray, plan: ReadPlan) -> np.ndarray:
    return image[plan.y : plan.y + plan.height, plan.x : plan.x + plan.width]


def area_means(image: np.ndarray, view: View) -> np.ndarray:
    """By differences of the integral image, read between its samples, in float64: (height, width, 3)."""
    integral = np.zeros((image.shape[0] + 1, image.shape[1] + 1, 3))
    integral[1:, 1:] = image.astype(np.float64).cumsum(axis=0).cumsum(axis=1)

    def at(position: np.ndarray, axis: int, table: np.ndarray) -> np.ndarray:
        first = np.minimum(position.astype(int), table.shape[axis] - 2)
        share = np.expand_dims(position - first, [i for i in range(3) if i != axis])
        return (1 - share) * table.take(first, axis) + share * table.take(first + 1, axis)

    rows = view.y + np.arange(view.height + 1) * view.scale
    columns = view.x + np.arange(view.width + 1) * view.scale
    sums = at(columns, 1, at(rows, 0, integral))
    return np.diff(np.diff(sums, axis=0), axis=1) / view.scale**2


@given(
    factor=st.floats(1, 40) | st.sampled_from([1.0, 2.0, 3.0, 2.5, 4.0, 7.999999, 16.0]),
    down=st.floats(0, 1),
    across=st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_it_is_the_area_mean_to_rounding_at_any_factor_and_offset(
    noise: np.ndarray, factor: float, down: float, across: float
) -> None:
    height, width = min(9, int(HEIGHT / factor)), min(13, int(WIDTH / factor))
    view = View(
        y=down * (HEIGHT - height * factor), x=across * (WIDTH - width * factor), height=height, width=width, scale=factor
    )
    plan = plan_read(PYRAMID, view)

    result = resample(plan, windowed(noise, plan))

    assert result.shape == (height, width, 3)
    assert result.dtype == np.uint8
    # Half a grey level is the rounding; the rest is the slack of 1e-6 px in which a plan takes two edges for one.
    assert np.abs(result - area_means(noise, view)).max() <= 0.5 + 1e-3


@given(level=st.integers(0, 255), factor=st.floats(0.2, 60), y=st.floats(0, 1), x=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_a_plain_colour_stays_what_it_is(level: int, factor: float, y: float, x: float) -> None:
    plan = plan_read(PYRAMID, View(y=5 + y, x=7 + x, height=3, width=2, scale=factor))

    result = resample(plan, np.full((plan.height, plan.width, 3), level, np.uint8))

    assert (result == level).all()


@pytest.mark.parametrize("factor", [1.1, 1.5, 2.0, 2.7, 4.0, 5.3, 8.0, 11.3, 16.0])
@pytest.mark.parametrize(("y", "x"), [(0.0, 0.0), (10.3, 20.8)])
def test_nothing_is_displaced_by_a_fiftieth_of_a_pixel(factor: float, y: float, x: float) -> None:
    view = View(y=y, x=x, height=64, width=72, scale=factor)
    plan = plan_read(PYRAMID, view)
    pixels = waves(plan.y + np.arange(plan.height) + 0.5, plan.x + np.arange(plan.width) + 0.5, factor)
    rows, columns = (start + (np.arange(n) + 0.5) * factor for start, n in ((y, view.height), (x, view.width)))
    truth = waves(rows, columns, factor)

    result = resample(plan, pixels)

    assert np.abs(displacement(truth, result)).max() < 0.02
    # A registration that could not tell would pass anything: half a pixel of the view must show.
    nudged = waves(rows + factor / 2, columns, factor)
    assert displacement(nudged, result) == pytest.approx([-0.5, 0], abs=0.05)


def displacement(truth: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(y, x) by which `image` has to be moved to lie on `truth`, in pixels."""
    # Faded out at the edges, where what enters on one side and leaves on the other would pull towards no shift at all.
    fade = np.hanning(truth.shape[0])[:, None] * np.hanning(truth.shape[1])
    one, other = ((i[..., 0] - i[..., 0].mean()) * fade for i in (truth, image))
    shift, _, _ = phase_cross_correlation(one, other, upsample_factor=100, normalization=None)
    return np.asarray(shift)


def waves(y: np.ndarray, x: np.ndarray, factor: float) -> np.ndarray:
    """A pattern that is known between pixels too, too coarse for any of the views to alias."""
    random = np.random.default_rng(5)
    total = np.zeros((len(y), len(x)))
    for _ in range(30):
        length, turn, phase = random.uniform(7, 30) * factor, random.uniform(0, np.pi), random.uniform(0, 2 * np.pi)
        total += np.sin(2 * np.pi / length * (np.cos(turn) * y[:, None] + np.sin(turn) * x) + phase)
    return np.repeat(np.clip(128 + 10 * total, 0, 255).round().astype(np.uint8)[..., None], 3, axis=2)


def test_finer_than_the_source_is_linear_between_pixel_centres() -> None:
    ramp = np.arange(HEIGHT, dtype=np.uint8)[:, None, None].repeat(WIDTH, 1).repeat(3, 2)
    plan = plan_read(PYRAMID, View(y=10, x=20, height=40, width=8, scale=0.25))

    result = resample(plan, windowed(ramp, plan))

    centres = 10 + (np.arange(40) + 0.5) * 0.25 - 0.5  # pixel i has its centre, and the value i, at i + 0.5
    assert np.abs(result[:, 0, 0] - centres).max() <= 0.5 + 1e-4


def test_axes_and_channels_stay_in_their_places(noise: np.ndarray) -> None:
    plan = plan_read(PYRAMID, View(y=20.5, x=11.25, height=30, width=40, scale=1.7))
    window = windowed(noise, plan)
    turned = ReadPlan(
        level=0, y=plan.x, x=plan.y, height=plan.width, width=plan.height, offset_y=plan.offset_x, offset_x=plan.offset_y,
        factor=plan.factor, out_height=plan.out_width, out_width=plan.out_height,
    )  # fmt: skip

    result = resample(plan, window)

    # Rows are summed before columns in float32, so that a tie may round the other way.
    assert np.abs(resample(turned, window.swapaxes(0, 1)).astype(int) - result.swapaxes(0, 1)).max() <= 1
    np.testing.assert_array_equal(resample(plan, window[..., ::-1]), result[..., ::-1])


# White noise is the worst there is: every pixel at a box's edge differs from the next.
@pytest.mark.parametrize(("image", "most", "mean"), [("noise", 50, 8), ("tissue", 25, 2)])
def test_a_stack_is_its_single_views_exactly_or_nearly(image: str, most: int, mean: float) -> None:
    pixels = {
        "noise": lambda: np.random.default_rng(1).integers(0, 256, (2700, 2800, 3), dtype=np.uint8),
        "tissue": lambda: tissue(2700, 2800, mpp=0.25, seed=1)[0],
    }[image]()
    pyramid = Pyramid(shapes=((2700, 2800),), downsamples=(1.0,))
    scales = [1.0, 1.3, 2.0, 3.9, 4.1, 6.0, 8.0, 11.7, 15.9, 16.1, 24.0, 40.0]
    plans = [plan_read(pyramid, centered_view((1351.3, 1404.8), size=64, scale=s), level=0) for s in scales]
    widest = plans[-1]

    stack = resample_stack(plans, windowed(pixels, widest), y=widest.y, x=widest.x)

    assert stack.shape == (len(scales), 64, 64, 3)
    for view, plan in zip(stack, plans, strict=True):
        difference = view.astype(int) - resample(plan, windowed(pixels, plan))
        exact = plan.factor <= 3.5
        assert np.abs(difference).max() <= (1 if exact else most)  # 1: at a factor of 2 a single view rounds halves up
        assert np.abs(difference).mean() <= (0.15 if exact else mean)
        assert abs(difference.mean()) < 0.05  # no scale is brighter


def test_a_stack_is_not_displaced() -> None:
    scales = [1.0, 2.3, 4.0, 6.1, 9.7, 14.9]
    pyramid = Pyramid(shapes=((1100, 1100),), downsamples=(1.0,))
    centre = (531.3, 544.8)
    plans = [plan_read(pyramid, centered_view(centre, size=64, scale=s), level=0) for s in scales]
    widest = plans[-1]
    for number, (scale, plan) in enumerate(zip(scales, plans, strict=True)):
        window = waves(widest.y + np.arange(widest.height) + 0.5, widest.x + np.arange(widest.width) + 0.5, scale)
        rows, columns = (c + (np.arange(64) - 31.5) * scale for c in centre)

        view = resample_stack(plans, window, y=widest.y, x=widest.x)[number]

        assert np.abs(displacement(waves(rows, columns, scale), view)).max() < 0.02, plan


def test_halving_is_the_mean_and_brightens_nothing() -> None:
    image = np.random.default_rng(2).integers(0, 256, (301, 403, 3), dtype=np.uint8)

    half = halve(image)

    assert half.shape == (151, 202, 3)
    exact = image[:300, :402].reshape(150, 2, 201, 2, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(half[:150, :201], np.rint(exact))
    assert abs((half[:150, :201] - exact).mean()) < 0.01  # it was 0.125 an octave, when halves were rounded up
    np.testing.assert_array_equal(half[150, :201], np.rint(image[300, :402].reshape(201, 2, 3).mean(axis=1)))


@given(height=st.integers(1, 300), width=st.integers(1, 300), size=st.integers(1, 400))
def test_blocks_cover_the_rectangle_once_in_reading_order(height: int, width: int, size: int) -> None:
    if height * width > 300 * size**2:
        size += 17
    covered = np.zeros((height, width), int)
    corners = []

    for y, x, h, w in blocks(height, width, size):
        assert 0 < h <= size
        assert 0 < w <= size
        covered[y : y + h, x : x + w] += 1
        corners.append((y, x))

    assert (covered == 1).all()
    assert corners == sorted(corners)
