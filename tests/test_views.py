"""From a slide to the pixels of a view."""

from __future__ import annotations

import numpy as np
import pytest

from wsiscale import views
from wsiscale.geometry import View, blocks, canvas_shape
from wsiscale.readers import ArrayReader
from wsiscale.testing import where_am_i
from wsiscale.testing.slides import area_mean
from wsiscale.types import TileGrid
from wsiscale.views import read_tiles, read_view, thumbnail

HEIGHT, WIDTH = 640, 960


class Counting(ArrayReader):
    """Keeps the windows that were asked of it."""

    windows: list[tuple[int, int, int]]

    def read(self, *, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        self.windows = [*getattr(self, "windows", []), (level, height, width)]
        return super().read(level=level, y=y, x=x, height=height, width=width)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def slide(noise: np.ndarray) -> Counting:
    return Counting([area_mean(noise, factor) for factor in (1, 2, 4)], mpp=0.25)


def test_level_0_is_read_as_it_is(slide: Counting, noise: np.ndarray) -> None:
    pixels = read_view(slide, View(y=100, x=200, height=30, width=50, scale=1))

    np.testing.assert_array_equal(pixels, noise[100:130, 200:250])
    assert slide.windows == [(0, 30, 50)]


def test_a_coarse_view_reads_the_coarsest_level_that_will_do_unless_told(slide: Counting) -> None:
    view = View(y=100, x=200, height=30, width=50, scale=4.8)

    from_level_2 = read_view(slide, view)
    from_level_0 = read_view(slide, view, level=0)

    assert [level for level, _, _ in slide.windows] == [2, 0]
    assert np.abs(from_level_2.astype(int) - from_level_0).mean() < 12  # noise; a fifth of each pixel's edge is guessed


@pytest.mark.parametrize("scale", [1.0, 1.7, 2.0, 3.0, 4.0, 6.3, 0.5])
def test_outside_the_slide_is_white_and_at_its_edge_a_share_of_it(scale: float) -> None:
    slide = ArrayReader(np.zeros((80, 120, 3), np.uint8))
    # A view that starts 10.5 of its pixels before the slide: half of the eleventh is slide.
    view = View(y=-10.5 * scale, x=-10.5 * scale, height=20, width=20, scale=scale)

    pixels = read_view(slide, view)[..., 0]

    assert (pixels[:10] == 255).all()
    assert (pixels[:, :10] == 255).all()
    assert pixels[15, 10] in (127, 128)
    assert pixels[10, 10] in range(190, 193)
    assert pixels[15, 15] == 0


def test_the_last_pixels_of_a_canvas_are_blended_with_white() -> None:
    slide = ArrayReader(np.zeros((81, 122, 3), np.uint8))
    height, width = canvas_shape(slide.pyramid, 4.0)

    pixels = read_view(slide, View(y=0, x=0, height=height, width=width, scale=4.0))[..., 0]

    assert (height, width) == (21, 31)
    assert (pixels[:20, :30] == 0).all()
    assert (pixels[20, :30] == 191).all()  # a quarter of 4 rows is slide
    assert (np.abs(pixels[:20, 30].astype(int) - 127.5) < 1).all()


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 2.7, 7.9])
def test_a_view_read_in_blocks_is_the_view_read_whole(scale: float, slide: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    view = View(y=-20.25, x=13.5, height=int(600 / scale), width=int(900 / scale), scale=scale)
    whole = read_view(slide, view)
    slide.windows.clear()

    monkeypatch.setattr(views, "MAX_WINDOW", 20_000)
    parts = read_view(slide, view)

    assert len(slide.windows) >= 4
    assert max(height * width for _, height, width in slide.windows) <= 20_000
    assert np.abs(parts.astype(int) - whole).max() <= (0 if scale in (1.0, 1.5, 2.0) else 1)  # ties of float noise
    assert (parts != whole).mean() < 1e-3


def test_a_view_may_be_asked_for_in_blocks_too(slide: Counting) -> None:
    scale = 2.7
    whole = read_view(slide, View(y=10, x=20, height=200, width=300, scale=scale))

    for y, x, height, width in blocks(200, 300, 64):
        part = read_view(slide, View(y=10 + y * scale, x=20 + x * scale, height=height, width=width, scale=scale))

        assert np.abs(part.astype(int) - whole[y : y + height, x : x + width]).max() <= 1


def test_one_pixel_of_a_huge_slide_ends(slide: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "MAX_WINDOW", 100)

    pixels = read_view(slide, View(y=0, x=0, height=1, width=2, scale=400))

    assert pixels.shape == (1, 2, 3)


def test_tiles_come_in_grid_order_in_batches(slide: Counting) -> None:
    origins = np.array([[0, 0], [0, 100], [300, 20], [610, 900], [7, 5]])
    grid = TileGrid(origins=origins, tissue=np.ones(5, np.float32), scale=2.0, size=32, overlap=0, mpp=0.5)

    batches = list(read_tiles(slide, grid, batch=2))

    assert [batch.shape for batch in batches] == [(2, 32, 32, 3), (2, 32, 32, 3), (1, 32, 32, 3)]
    for tile, (y, x) in zip(np.concatenate(batches), origins, strict=True):
        np.testing.assert_array_equal(tile, read_view(slide, View(y=y, x=x, height=32, width=32, scale=2.0)))


def test_a_thumbnail_is_the_whole_slide_and_reads_a_coarse_level() -> None:
    image = where_am_i(HEIGHT, WIDTH)
    slide = Counting([area_mean(image, factor) for factor in (1, 2, 4)])

    pixels, unread = thumbnail(slide, step=20)

    assert pixels.shape == (32, 48, 3)
    assert not unread.any()
    assert slide.windows == [(2, 160, 240)]
    np.testing.assert_allclose(pixels[:12, 5, 1], 20 * np.arange(12) + 9.5, atol=1.1)  # green is y
    np.testing.assert_allclose(pixels[3, :12, 0], 20 * np.arange(12) + 9.5, atol=1.1)  # red is x


@pytest.mark.parametrize("scale", [1.0, 2.0, 2.7])
def test_a_view_can_be_read_into_an_array_that_is_there(scale: float) -> None:
    slide = ArrayReader(where_am_i(300, 300))
    view = View(y=4, x=6, height=40, width=50, scale=scale)
    batch = np.zeros((3, 40, 50, 3), np.uint8)

    result = read_view(slide, view, out=batch[1])

    assert np.shares_memory(result, batch)
    np.testing.assert_array_equal(batch[1], read_view(slide, view))
    assert not batch[[0, 2]].any()
