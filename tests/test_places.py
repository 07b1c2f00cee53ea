"""Where to look: a grid of tiles, or a spread-out sample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiscale.errors import MppError, NoTissueError, OptionError
from wsiscale.places import default_places, sample_places, tile_grid
from wsiscale.types import Tissue


def tissue(mask: np.ndarray, *, step: float = 10, mpp: float | None = 0.5) -> Tissue:
    return Tissue(mask=mask, step=step, shape=(int(mask.shape[0] * step), int(mask.shape[1] * step)), mpp=mpp)


def blob() -> np.ndarray:
    mask = np.zeros((60, 100), bool)
    mask[10:30, 50:90] = True
    return mask


def test_tiles_lie_on_tissue_and_know_how_much() -> None:
    grid = tile_grid(tissue(blob()), mpp=1.0, size=50)  # 100 level-0 px, 10 mask px

    expected = [(y, x) for y in (100, 200) for x in (500, 600, 700, 800)]
    assert grid.origins.tolist() == [list(o) for o in expected]
    assert grid.tissue.tolist() == [1.0] * 8
    assert (grid.scale, grid.mpp) == (2.0, 1.0)


def test_the_share_of_tissue_is_exact_between_mask_pixels() -> None:
    grid = tile_grid(tissue(blob()), scale=1.0, size=170, min_tissue=0.0)
    found = {tuple(o): s for o, s in zip(grid.origins.tolist(), grid.tissue, strict=True)}

    # The blob is level-0 rows 100-300 and columns 500-900.
    for (y, x), share in found.items():
        high = max(0, min(y + 170, 300) - max(y, 100))
        wide = max(0, min(x + 170, 900) - max(x, 500))
        assert share == pytest.approx(high * wide / 170**2, abs=1e-6)
    assert sum(found.values()) * 170**2 == pytest.approx(200 * 400)


@pytest.mark.parametrize("least", [0.05, 0.5, 1.0])
def test_min_tissue_is_a_bound_from_below(least: float) -> None:
    full = tile_grid(tissue(blob()), scale=1.0, size=170, min_tissue=0.0)
    some = tile_grid(tissue(blob()), scale=1.0, size=170, min_tissue=least)

    assert (some.tissue >= least).all()
    assert len(some) == (full.tissue >= least).sum()


@given(overlap=st.integers(0, 40), scale=st.floats(0.7, 5), size=st.integers(41, 90))
def test_overlapping_tiles_cover_all_tissue(overlap: int, scale: float, size: int) -> None:
    grid = tile_grid(tissue(blob()), scale=scale, size=size, overlap=overlap, min_tissue=0.0)

    covered = np.zeros((600, 1000), bool)
    for y, x in grid.origins:
        covered[int(y) : int(np.ceil(y + size * scale)) + 1, int(x) : int(np.ceil(x + size * scale)) + 1] = True
    assert covered[100:300, 500:900].all()


def test_a_grid_needs_a_scale_that_it_can_know() -> None:
    with pytest.raises(MppError, match="--slide-mpp"):
        tile_grid(tissue(blob(), mpp=None), mpp=1.0)
    with pytest.raises(OptionError, match="either mpp or scale"):
        tile_grid(tissue(blob()), mpp=1.0, scale=2.0)
    with pytest.raises(OptionError, match="overlap"):
        tile_grid(tissue(blob()), mpp=1.0, size=64, overlap=64)


def test_places_lie_on_tissue_are_seeded_and_never_repeat() -> None:
    places = sample_places(tissue(blob()), 40, seed=1)

    rows, columns = (places / 10).astype(int).T
    assert blob()[rows, columns].all()
    assert len(set(zip(rows, columns, strict=True))) == 40
    assert (places == sample_places(tissue(blob()), 40, seed=1)).all()
    assert (places != sample_places(tissue(blob()), 40, seed=2)).any()


def test_places_are_spread_out() -> None:
    nearest, by_chance = [], []
    rng = np.random.default_rng(0)
    pixels = np.argwhere(blob())
    for seed in range(10):
        for found, points in (
            (nearest, sample_places(tissue(blob()), 30, seed=seed) / 10),
            (by_chance, rng.choice(pixels, 30, replace=False)),
        ):
            distance = np.linalg.norm(points[:, None] - points[None], axis=2)
            np.fill_diagonal(distance, np.inf)
            found.append(distance.min())

    assert np.mean(nearest) > 2 * np.mean(by_chance)


def test_little_tissue_gives_few_places_and_none_is_an_error() -> None:
    speck = np.zeros((60, 100), bool)
    speck[5, 7:10] = True

    assert len(sample_places(tissue(speck), 40)) == 3
    with pytest.raises(NoTissueError, match="--tissue"):
        sample_places(tissue(np.zeros((60, 100), bool)), 40)


def test_places_keep_their_field_inside_the_slide_where_they_can() -> None:
    everywhere = tissue(np.ones((60, 100), bool))

    places = sample_places(everywhere, 50, seed=3, field=300)

    assert (places >= 145).all()
    assert (places <= np.array([600, 1000]) - 145).all()
    assert len(sample_places(everywhere, 50, seed=3, field=5000)) == 50  # nowhere fits: then anywhere


@pytest.mark.parametrize(("tile_size", "count"), [(512, 64), (224, 64), (128, 64), (96, 85), (64, 128), (32, 256), (8, 256)])
def test_smaller_tiles_take_more_places(tile_size: int, count: int) -> None:
    assert default_places(tile_size) == count
