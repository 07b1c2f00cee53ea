"""Plans: which level, which window, where the view lies in it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiscale.calibration import calibrate
from wsiscale.errors import MppError, OptionError, ScaleError
from wsiscale.geometry import (
    View,
    canvas_shape,
    centered_view,
    check_upsampling,
    level_for,
    nominal_downsamples,
    plan_read,
    scale_for_mpp,
    scale_grid,
    snapped_scale,
)
from wsiscale.types import Pyramid, ScaleTags

PYRAMID = Pyramid(shapes=((3567, 4443), (891, 1110), (222, 277)), downsamples=(1.0, 4.0, 16.0), mpp=0.25)

views = st.builds(
    View,
    y=st.floats(-1e5, 1e5),
    x=st.floats(-1e5, 1e5),
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    scale=st.floats(0.1, 300),
)


@given(view=views, level=st.none() | st.integers(0, 2))
@settings(max_examples=500, deadline=None)
def test_a_plan_covers_what_its_view_needs_and_hardly_more(view: View, level: int | None) -> None:
    plan = plan_read(PYRAMID, view, level=level)
    downsample = PYRAMID.downsamples[plan.level]
    slack = 1e-3  # px; far below what changes a grey level

    for start, length, first, count, offset in [
        (view.y, view.height, plan.y, plan.height, plan.offset_y),
        (view.x, view.width, plan.x, plan.width, plan.offset_x),
    ]:
        needed_from, needed_to = start / downsample, (start + length * view.scale) / downsample
        margin = 0 if plan.factor >= 1 else 1
        assert first + offset == pytest.approx(needed_from, abs=slack)
        assert first <= needed_from - margin + slack
        assert first + count >= needed_to + margin - slack
        assert count <= needed_to - needed_from + 2 + 2 * margin + slack
    assert plan.factor * downsample == pytest.approx(view.scale, rel=1e-5)
    assert (plan.out_height, plan.out_width) == (view.height, view.width)


def test_a_level_that_is_the_view_is_read_as_it_is() -> None:
    plan = plan_read(PYRAMID, View(y=-8, x=400, height=30, width=50, scale=4.0))

    assert plan.native
    assert (plan.level, plan.y, plan.x, plan.height, plan.width) == (1, -2, 100, 30, 50)


def test_half_a_pixel_off_the_grid_is_resampled_not_read_as_it_is() -> None:
    plan = plan_read(PYRAMID, View(y=2, x=0, height=30, width=50, scale=4.0))

    assert not plan.native
    assert (plan.y, plan.offset_y, plan.height, plan.width) == (0, 0.5, 31, 50)


def test_float_noise_is_not_a_resampling() -> None:
    scale = 4.0 * (1 + 1e-9)

    plan = plan_read(PYRAMID, View(y=10 * scale, x=20 * scale, height=30, width=50, scale=scale))

    assert plan.native
    assert (plan.y, plan.x) == (10, 20)


def test_what_is_finer_than_level_0_is_read_with_a_pixel_more_on_every_side() -> None:
    plan = plan_read(PYRAMID, View(y=10, x=20, height=8, width=6, scale=0.5))

    assert (plan.level, plan.y, plan.x, plan.height, plan.width) == (0, 9, 19, 6, 5)
    assert (plan.offset_y, plan.offset_x) == (1, 1)


@pytest.mark.parametrize(
    ("scale", "level"),
    [(0.5, 0), (1.0, 0), (3.95, 0), (3.97, 1), (4.0, 1), (4.1, 1), (15.8, 1), (15.85, 2), (1000, 2)],
)
def test_the_coarsest_level_that_is_fine_enough_is_taken_within_1_percent(scale: float, level: int) -> None:
    assert level_for(PYRAMID, scale) == level


def test_a_level_is_fine_enough_exactly_up_to_the_tolerance() -> None:
    assert level_for(PYRAMID, 4 / 1.01) == 1
    assert level_for(PYRAMID, 4 / 1.0101) == 0
    assert level_for(PYRAMID, 3.999, tolerance=0) == 0
    assert level_for(PYRAMID, 4.0, tolerance=0) == 1


def test_a_scale_snaps_to_a_level_within_the_tolerance_on_both_sides() -> None:
    assert snapped_scale(PYRAMID, 4.03) == 4.0
    assert snapped_scale(PYRAMID, 3.97) == 4.0
    assert snapped_scale(PYRAMID, 4.05) == 4.05
    assert snapped_scale(PYRAMID, 3.95) == 3.95
    assert snapped_scale(PYRAMID, 4.03, tolerance=0) == 4.03


def test_upsampling_is_an_error_unless_allowed_and_then_it_is_said() -> None:
    assert check_upsampling(PYRAMID, 1.0) is False
    assert check_upsampling(PYRAMID, 0.991) is False  # within the tolerance
    assert check_upsampling(PYRAMID, 0.5, max_upsample=2) is True
    with pytest.raises(ScaleError, match=r"0\.2475 µm/px is finer than .* 0\.25 µm/px; ask for 0\.25"):
        check_upsampling(PYRAMID, 0.99)
    with pytest.raises(ScaleError, match=r"ask for 0\.125 µm/px or more, or allow upsampling with --max-upsample 2\.5"):
        check_upsampling(PYRAMID, 0.4, max_upsample=2)
    with pytest.raises(ScaleError, match=r"scale 0\.5"):
        check_upsampling(Pyramid(shapes=((10, 10),), downsamples=(1.0,)), 0.5)


@pytest.mark.parametrize(
    ("shapes", "downsamples"),
    [
        (((32914, 46000), (8228, 11500), (2057, 2875)), (1, 4, 16)),
        (((3567, 4443), (1783, 2221)), (1, 2)),
        (((701, 1003), (351, 502), (176, 251)), (1, 2, 4)),  # rounded up
        (((1000, 2000), (400, 800)), (1, 2.5)),
        (((100, 200), (30, 60)), (1, (100 / 30 + 200 / 60) / 2)),
        (((1000, 1000), (998, 998)), (1, 1000 / 998)),  # no integer explains it
    ],
)
def test_the_downsample_that_the_scanner_meant(shapes: tuple, downsamples: tuple[float, ...]) -> None:
    assert nominal_downsamples(shapes) == pytest.approx(downsamples, abs=1e-12)


@given(
    height=st.integers(200, 200_000),
    width=st.integers(200, 200_000),
    factor=st.sampled_from([2, 4, 8, 16, 32]),
    up=st.booleans(),
)
def test_whole_downsamples_are_found_however_the_size_was_rounded(height: int, width: int, factor: int, up: bool) -> None:
    whole = math.ceil if up else math.floor
    # Where the coarse level is smaller than the factor, another integer explains it as well.
    if min(height, width) < 2 * factor**2:
        return

    assert nominal_downsamples(((height, width), (whole(height / factor), whole(width / factor)))) == (1, factor)


def test_the_canvas_holds_the_whole_slide() -> None:
    assert canvas_shape(PYRAMID, 1.0) == (3567, 4443)
    assert canvas_shape(PYRAMID, 4.0) == (892, 1111)
    assert canvas_shape(PYRAMID, 3.0) == (1189, 1481)  # exact division is not rounded up
    assert canvas_shape(PYRAMID, 0.5) == (7134, 8886)
    assert canvas_shape(PYRAMID, 1e6) == (1, 1)


@given(scale=st.floats(0.1, 500))
def test_the_canvas_is_the_smallest_that_holds_the_slide(scale: float) -> None:
    height, width = canvas_shape(PYRAMID, scale)

    assert height * scale >= 3567 - 1e-3 * scale
    assert (height - 1) * scale < 3567
    assert width * scale >= 4443 - 1e-3 * scale
    assert (width - 1) * scale < 4443


@given(size=st.integers(1, 500), scale=st.floats(0.1, 50), y=st.floats(-1e4, 1e4), x=st.floats(-1e4, 1e4))
def test_a_centered_view_has_its_middle_at_the_place(size: int, scale: float, y: float, x: float) -> None:
    view = centered_view((y, x), size=size, scale=scale)

    assert view.y + view.height * view.scale / 2 == pytest.approx(y, abs=1e-6)
    assert view.x + view.width * view.scale / 2 == pytest.approx(x, abs=1e-6)


@given(lo=st.floats(0.01, 10), octaves=st.floats(0.01, 8), per_octave=st.integers(1, 16))
def test_a_grid_of_scales_is_even_in_octaves_dense_enough_and_has_both_ends(lo: float, octaves: float, per_octave: int) -> None:
    grid = scale_grid(lo, lo * 2**octaves, per_octave=per_octave)

    steps = np.diff(np.log2(grid))
    assert grid[0] == pytest.approx(lo)
    assert grid[-1] == pytest.approx(lo * 2**octaves)
    assert np.allclose(steps, steps[0])
    assert steps[0] <= 1 / per_octave + 1e-6
    assert len(grid) <= octaves * per_octave + 2


@pytest.mark.parametrize(("lo", "hi"), [(1, 1), (2, 1), (0, 1), (-1, 1), (1, math.inf), (math.nan, 1)])
def test_a_range_that_is_none_is_a_usage_error(lo: float, hi: float) -> None:
    with pytest.raises(OptionError, match="low to high"):
        scale_grid(lo, hi)


def test_a_magnification_needs_a_slide_whose_own_is_known() -> None:
    refused = calibrate(ScaleTags(mpp_x=0.00499, mpp_y=0.00499, tag="tiff.XResolution"))

    assert scale_for_mpp(1.0, 0.25) == 4.0
    with pytest.raises(MppError, match=r"--slide-mpp.*--scale-range") as missing:
        scale_for_mpp(1.0, None, calibrate(ScaleTags()))
    with pytest.raises(MppError, match=r"0\.00499 µm/px \(tiff\.XResolution\).*--slide-mpp") as implausible:
        scale_for_mpp(1.0, None, refused)
    with pytest.raises(OptionError, match="above 0"):
        scale_for_mpp(0.0, 0.25)

    assert (missing.value.code, implausible.value.code) == ("MPP_MISSING", "MPP_IMPLAUSIBLE")
