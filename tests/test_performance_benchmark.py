"""benchmarks/performance runs, and what it measures is right: nothing here is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.performance import figure, growth, slides, stacks, tiles, writing
from benchmarks.performance.measure import Cost, interleaved, paired


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slides.slide(tmp_path_factory.mktemp("performance"), 2560)


@pytest.mark.parametrize("mpp", [0.5, 0.37])
def test_every_way_makes_the_same_tiles_and_ours_are_the_area_mean(slide: Path, mpp: float) -> None:
    made = {name: way() for name, way in tiles.ways(slide, mpp=mpp, tiles=6).items() if "LazySlide" not in name}

    assert set(made.values()) == {6}, made
    mean, most = tiles.exactness(slide, mpp=mpp)
    assert mean <= 0.26
    assert most <= 0.51  # rounding in float32


def test_a_stack_is_nearly_the_area_mean_in_every_octave_and_nowhere_displaced(slide: Path) -> None:
    assert {way() for way in stacks.ways(slide, count=2).values()} == {2}

    found = stacks.quality(slide, count=2)

    for mean, shift, sharpness in found["wsiscale"]:
        assert mean <= 2.5
        assert shift <= 0.01
        assert sharpness == pytest.approx(1, abs=0.06)
    assert max(shift for _, shift, _ in found["OpenSlide, best level, PIL BICUBIC"]) > 0.1  # what there is to see


def test_a_slide_is_written_and_its_cost_known(slide: Path, tmp_path: Path) -> None:
    written = {way: writing.written(way, slide, tmp_path / "out.zarr", 0.5) for way in writing.WAYS if "dask" not in way}

    for cost in written.values():
        assert cost.cpu > 0
        assert 30 < cost.peak < 1000
        assert cost.files >= 2
        assert cost.megabytes > 0.5


def test_growth_and_the_figure(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "COUNTS", {"tiles": (2, 4), "scales": (2,), "places": (1,), "threads": (1, 2)})

    found = growth.grown(slide, rounds=1, cores=2)
    of_one = {what: {n: costs[0].cpu_ms for n, costs in by_number.items()} for what, by_number in found.items()}
    figure.draw(tmp_path / "figure.png", {"ms": {"limit": 1.0, "wsiscale": 1.2, "OpenSlide, slowly": 5.0}}, of_one)

    assert {what: list(by_number) for what, by_number in found.items()} == {
        "tiles": [2, 4],
        "scales": [2],
        "places": [1],
        "threads": [1, 2],
    }
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_ways_take_turns_and_ratios_are_within_a_round() -> None:
    calls: list[str] = []
    found = interleaved({name: lambda name=name: calls.append(name) or 2 for name in "ab"}, rounds=3)  # type: ignore[misc,func-returns-value]

    assert "".join(calls) == "abababab"
    assert [len(costs) for costs in found.values()] == [3, 3]
    one = [Cost(1, cpu, 0) for cpu in (1.0, 10.0, 2.0)]
    assert paired(one, [Cost(1, cpu, 0) for cpu in (2.0, 5.0, 2.0)]) == np.median([0.5, 2.0, 1.0])
