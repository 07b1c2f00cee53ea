"""A slide whose pixels say where they are, and what every reader promises, as tests to inherit. Needs pytest and hypothesis."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsiscale.errors import OptionError, SlideError
from wsiscale.geometry import View
from wsiscale.readers.array import ArrayReader
from wsiscale.types import Reader
from wsiscale.views import read_view

Window = tuple[int, int, int, int]  # (y, x, height, width) in pixels of a level

_MAX_SIDE = 4096  # 8 bits of low and 4 bits of high part for each of y and x


def where_am_i(height: int, width: int) -> NDArray[np.uint8]:
    """An image in which no two pixels are alike and each says where it is: (height, width, 3), sides up to 4096.

    Red is x modulo 256, green is y modulo 256, blue is 16 * (y // 256) + x // 256. `whereabouts` reads it back.
    """
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE):
        raise OptionError(f"{height} x {width} px cannot be told apart; give sides of 1 to {_MAX_SIDE}")
    y, x = np.indices((height, width), dtype=np.uint16)
    return np.stack([x & 255, y & 255, (y >> 8 << 4) | (x >> 8)], axis=2).astype(np.uint8)


def whereabouts(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Level-0 (y, x) of pixels of `where_am_i`: (..., 3) -> (..., 2). White is (4095, 4095)."""
    red, green, blue = np.moveaxis(pixels.astype(np.int64), -1, 0)
    return np.stack([green + 256 * (blue >> 4), red + 256 * (blue & 15)], axis=-1)


class ReaderContract:
    """What every reader promises. Inherit it in a class that pytest collects, and give the two fixtures.

    The slide should be of `where_am_i` or as rich in texture, at least 64 px wide and high on its coarsest level, with
    unequal sides, its coarser levels area means of level 0, and stored without loss.
    """

    examples = 200  # a property
    tolerance = 2.0  # grey levels by which a row or column of a coarser level may differ from the area mean, on average
    rounding = 0  # grey levels by which a pixel of a coarser level may depend on the window it is read in

    @pytest.fixture
    def reader(self) -> Reader:
        raise NotImplementedError("give a fixture `reader`")

    @pytest.fixture
    def truth(self) -> NDArray[np.uint8]:
        """The pixels of level 0."""
        raise NotImplementedError("give a fixture `truth`")

    def test_its_levels_run_from_fine_to_coarse(self, reader: Reader, truth: NDArray[np.uint8]) -> None:
        pyramid = reader.pyramid

        assert pyramid.shape == truth.shape[:2]
        assert pyramid.downsamples[0] == 1.0
        assert len(pyramid.downsamples) == len(pyramid.shapes)
        assert list(pyramid.downsamples) == sorted(pyramid.downsamples)
        assert reader.calibration.mpp == pyramid.mpp

    def test_level_0_is_exact_and_white_outside(self, reader: Reader, truth: NDArray[np.uint8]) -> None:
        def check(window: Window) -> None:
            np.testing.assert_array_equal(_read(reader, 0, window), _cut(truth, window))

        self._for_all(check, _windows(reader, 0))

    def test_every_level_shows_the_same_places(self, reader: Reader, truth: NDArray[np.uint8]) -> None:
        slide = ArrayReader(truth)

        def check(pick: tuple[int, Window]) -> None:
            level, (y, x, height, width) = pick
            scale = reader.pyramid.downsamples[level]
            # One pixel more on every side, to see whether a neighbouring place fits better than the right one.
            view = View(y=(y - 1) * scale, x=(x - 1) * scale, height=height + 2, width=width + 2, scale=scale)
            around = read_view(slide, view, level=0).astype(np.float64)
            got = _read(reader, level, (y, x, height, width)).astype(np.float64)
            misfit = {
                (dy, dx): np.abs(got - around[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width])
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
            }
            here = misfit.pop((0, 0))
            assert max(here.mean(axis=(0, 2)).max(), here.mean(axis=(1, 2)).max()) <= self.tolerance
            better = [place for place, there in misfit.items() if there.mean() < here.mean() - 0.25]
            assert not better, f"level {level} fits better {better} pixels (y, x) away"

        if len(reader.pyramid.shapes) > 1:
            self._for_all(check, _inner_windows(reader))

    def test_every_level_is_white_outside(self, reader: Reader) -> None:
        def check(pick: tuple[int, Window]) -> None:
            level, (y, x, height, width) = pick
            rows, columns = np.arange(y, y + height), np.arange(x, x + width)
            level_height, level_width = reader.pyramid.shapes[level]
            outside = ((rows < 0) | (rows >= level_height))[:, None] | ((columns < 0) | (columns >= level_width))

            assert (_read(reader, level, (y, x, height, width))[outside] == 255).all()

        self._for_all(check, _any_windows(reader))

    def test_a_window_is_as_large_as_asked(self, reader: Reader) -> None:
        def check(pick: tuple[int, Window]) -> None:
            level, window = pick
            pixels = _read(reader, level, window)

            assert pixels.shape == (*window[2:], 3)
            assert pixels.dtype == np.uint8

        self._for_all(check, _any_windows(reader))

    def test_a_window_is_the_sum_of_its_parts(self, reader: Reader) -> None:
        def check(pick: tuple[int, Window], down: float, across: float) -> None:
            level, (y, x, height, width) = pick
            top, left = round(height * down), round(width * across)
            parts = [
                [
                    _read(reader, level, (y, x, top, left)),
                    _read(reader, level, (y, x + left, top, width - left)),
                ],
                [
                    _read(reader, level, (y + top, x, height - top, left)),
                    _read(reader, level, (y + top, x + left, height - top, width - left)),
                ],
            ]
            joined = np.concatenate([np.concatenate(row, axis=1) for row in parts], axis=0).astype(int)
            difference = np.abs(joined - _read(reader, level, (y, x, height, width)))

            assert difference.max(initial=0) <= (self.rounding if level else 0)

        self._for_all(check, _any_windows(reader), st.floats(0, 1), st.floats(0, 1))

    def test_the_same_window_gives_the_same_pixels_after_pickling(self, reader: Reader) -> None:
        again: Reader = pickle.loads(pickle.dumps(reader))

        def check(pick: tuple[int, Window]) -> None:
            level, window = pick
            np.testing.assert_array_equal(_read(again, level, window), _read(reader, level, window))

        assert (again.pyramid, again.calibration, again.source) == (reader.pyramid, reader.calibration, reader.source)
        with again:
            self._for_all(check, _any_windows(reader))

    def test_threads_see_what_one_thread_sees(self, reader: Reader) -> None:
        random = np.random.default_rng(0)
        picks = []
        for level, (height, width) in enumerate(reader.pyramid.shapes):
            for _ in range(12):
                picks.append((level, (int(random.integers(height)), int(random.integers(width)), 40, 56)))
        alone = [_read(reader, *pick) for pick in picks]

        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(lambda pick: _read(reader, *pick), picks * 4))

        for expected, got in zip(alone * 4, together, strict=True):
            np.testing.assert_array_equal(got, expected)

    def test_what_is_not_there_is_an_error(self, reader: Reader) -> None:
        for level in (-1, len(reader.pyramid.shapes)):
            with pytest.raises(SlideError, match="level"):
                _read(reader, level, (0, 0, 1, 1))
        with pytest.raises(OptionError):
            _read(reader, 0, (0, 0, -1, 1))

    def _for_all(self, check: Callable[..., None], *strategies: st.SearchStrategy[object]) -> None:
        # The same examples each time: a contract that fails now and then says nothing about the change at hand.
        fixed = settings(max_examples=self.examples, deadline=None, database=None, derandomize=True, report_multiple_bugs=False)
        fixed(given(*strategies)(check))()


def _read(reader: Reader, level: int, window: Window) -> NDArray[np.uint8]:
    y, x, height, width = window
    return reader.read(level=level, y=y, x=x, height=height, width=width)


def _cut(image: NDArray[np.uint8], window: Window) -> NDArray[np.uint8]:
    """A window of an image, white outside of it, by the plainest way there is."""
    y, x, height, width = window
    rows, columns = np.arange(y, y + height)[:, None], np.arange(x, x + width)
    inside = (rows >= 0) & (rows < image.shape[0]) & (columns >= 0) & (columns < image.shape[1])
    cut = image[np.clip(rows, 0, image.shape[0] - 1), np.clip(columns, 0, image.shape[1] - 1)]
    return np.where(inside[..., None], cut, np.uint8(255))


@st.composite
def _windows(draw: st.DrawFn, reader: Reader, level: int) -> Window:
    """Windows of up to 80 px, inside of a level, across its edges, and well outside; many at the edges, where errors are."""
    height, width = draw(st.integers(0, 80)), draw(st.integers(0, 80))
    y, x = (
        draw(
            st.integers(-size, 0) | st.integers(0, extent) | st.integers(extent - size, extent) | st.integers(-100, extent + 99)
        )
        for size, extent in zip((height, width), reader.pyramid.shapes[level], strict=True)
    )
    return y, x, height, width


@st.composite
def _any_windows(draw: st.DrawFn, reader: Reader) -> tuple[int, Window]:
    level = draw(st.integers(0, len(reader.pyramid.shapes) - 1))
    return level, draw(_windows(reader, level))


@st.composite
def _inner_windows(draw: st.DrawFn, reader: Reader) -> tuple[int, Window]:
    """Windows of 16 to 48 px of the coarser levels, within what level 0 covers whole pixels of."""
    level = draw(st.integers(1, len(reader.pyramid.shapes) - 1))
    height, width = draw(st.integers(16, 48)), draw(st.integers(16, 48))
    downsample = reader.pyramid.downsamples[level]
    last_y, last_x = (
        min(coarse, int(fine / downsample + 1e-6)) - size
        for coarse, fine, size in zip(reader.pyramid.shapes[level], reader.pyramid.shape, (height, width), strict=True)
    )
    # The far edge is where levels whose sizes were rounded go wrong, so that it gets more than its share.
    y, x = (draw(st.just(last) | st.integers(0, last)) for last in (last_y, last_x))
    return level, (y, x, height, width)
