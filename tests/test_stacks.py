"""Scale stacks: lazy, nested, from one level, the same on every scheduler, read by the workers."""

from __future__ import annotations

import hashlib
import os
import pickle
from dataclasses import replace
from pathlib import Path

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiscale.errors import MppError, OptionError, ScaleError
from wsiscale.geometry import View
from wsiscale.readers import ArrayReader, compatible, open_slide
from wsiscale.stacks import read_place, scale_stack
from wsiscale.testing import where_am_i, write_svs
from wsiscale.types import ScaleStack
from wsiscale.views import read_view

PLACES = np.array([[400.25, 700.5], [333.0, 250.75], [610.5, 90.0]])
SCALES = [1.0, 1.3, 2.0, 5.5]


class CountingReader(ArrayReader):
    """Writes a line for every read into a file: which process, which window."""

    def __init__(self, image: np.ndarray, log: Path) -> None:
        super().__init__(image, mpp=0.25)
        self.log = log

    def read(self, *, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {level} {height} {width}\n")
        return super().read(level=level, y=y, x=x, height=height, width=width)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return where_am_i(800, 1100)


def digest(stack: ScaleStack) -> str:
    return hashlib.sha256(np.ascontiguousarray(stack.images.compute()).tobytes()).hexdigest()


def test_every_scale_shows_the_same_centre(image: np.ndarray) -> None:
    slide = ArrayReader(image, mpp=0.25)

    stack = scale_stack(slide, PLACES, scales=SCALES, size=64)

    pixels = stack.images.compute()
    assert pixels.shape == (3, 4, 64, 64, 3)
    assert pixels.dtype == np.uint8
    for n, (y, x) in enumerate(PLACES):
        for s, scale in enumerate(SCALES):
            alone = read_view(slide, View(y=y - 32 * scale, x=x - 32 * scale, height=64, width=64, scale=scale))
            difference = np.abs(pixels[n, s].astype(int) - alone)
            assert difference.max() <= 1 if scale < 4 else difference.mean() <= 1  # from 4 on, mips stand in for the level
    assert np.allclose(stack.mpp, np.array(SCALES) * 0.25)
    assert not stack.upsampled.any()


def test_nothing_is_read_until_it_is_computed_and_then_once_a_place(image: np.ndarray, tmp_path: Path) -> None:
    slide = CountingReader(image, tmp_path / "log")

    stack = scale_stack(slide, PLACES, scales=SCALES, size=64)

    assert not (tmp_path / "log").exists()
    stack.images[1:].compute(scheduler="synchronous")
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_all_scales_come_from_the_level_of_the_finest(image: np.ndarray, tmp_path: Path) -> None:
    half = image.reshape(400, 2, 550, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
    slide = ArrayReader((image, half), mpp=0.25)

    assert scale_stack(slide, PLACES, scales=[1.5, 2.0, 4.0], size=32).source_level == 0
    assert scale_stack(slide, PLACES, scales=[2.0, 4.0], size=32).source_level == 1


def test_digests_are_equal_on_four_schedulers_and_workers_do_the_reading(image: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    write_svs(path, image, mpp=0.25, power=40, levels=(1, 4))
    log = tmp_path / "log"
    counting = CountingReader(image, log)

    with open_slide(path) as slide:
        stack = scale_stack(slide, PLACES, scales=SCALES, size=64)
        digests = {}
        for scheduler in ("synchronous", "threads", "processes"):
            with dask.config.set(scheduler=scheduler):
                digests[scheduler] = digest(stack)
        cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50)
        with cluster, Client(cluster) as client:
            digests["distributed"] = digest(stack)
            scale_stack(counting, PLACES, scales=SCALES, size=64).images.compute()
            workers = set(client.run(os.getpid).values())

    assert len(set(digests.values())) == 1, digests
    readers = [int(line.split()[0]) for line in log.read_text().splitlines()]
    assert len(readers) == 3
    assert set(readers) <= workers
    assert os.getpid() not in readers


def test_a_task_carries_coordinates_and_a_path_not_pixels(image: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    write_svs(path, image, mpp=0.25, power=40, levels=(1, 4))

    with open_slide(path) as slide:
        stack = scale_stack(slide, np.tile(PLACES, (40, 1)), scales=SCALES, size=64)

    import cloudpickle

    assert len(cloudpickle.dumps(stack.images.dask)) < 200_000
    assert len(pickle.dumps(slide)) < 2_000


def test_finer_than_level_0_is_an_error_unless_asked_for_and_then_marked(image: np.ndarray) -> None:
    slide = ArrayReader(image, mpp=0.25)

    with pytest.raises(ScaleError, match=r"0\.125 µm/px is finer than the slide's finest level.*0\.25 µm/px.*--max-upsample 2"):
        scale_stack(slide, PLACES, mpps=[0.125, 0.25], size=32)
    stack = scale_stack(slide, PLACES, mpps=[0.125, 0.25], size=32, max_upsample=2)

    assert stack.upsampled.tolist() == [True, False]
    assert stack.images.compute().shape == (3, 2, 32, 32, 3)


def test_magnifications_are_named_once_and_ascend(image: np.ndarray) -> None:
    unknown = ArrayReader(image)

    with pytest.raises(MppError, match="does not say"):
        scale_stack(unknown, PLACES, mpps=[0.5])
    with pytest.raises(OptionError, match="either"):
        scale_stack(unknown, PLACES)
    with pytest.raises(OptionError, match="fine to coarse"):
        scale_stack(unknown, PLACES, scales=[2.0, 1.0])


def test_a_field_wider_than_memory_allows_is_read_piece_by_piece(image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = ArrayReader(image, mpp=0.25)
    whole = scale_stack(slide, PLACES, scales=[1.0, 3.0, 9.0], size=64).images.compute()

    monkeypatch.setattr("wsiscale.stacks.MAX_WINDOW", 10_000)
    monkeypatch.setattr("wsiscale.views.MAX_WINDOW", 10_000)
    pieces = scale_stack(slide, PLACES, scales=[1.0, 3.0, 9.0], size=64).images.compute(scheduler="synchronous")

    assert np.abs(whole[:, :2].astype(int) - pieces[:, :2]).max() <= 1
    assert np.abs(whole.astype(int) - pieces).mean() < 1


def test_a_place_is_read_without_dask_and_a_stack_whose_images_were_changed_as_they_are_now(image: np.ndarray) -> None:
    stack = scale_stack(ArrayReader(image), PLACES, scales=SCALES, size=32)
    dark = replace(stack, images=stack.images // 2)

    assert stack.window(1) is not None
    np.testing.assert_array_equal(read_place(stack, 1), stack.images[1].compute())
    assert dark.window(1) is None
    np.testing.assert_array_equal(read_place(dark, 1), stack.images[1].compute() // 2)


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "OS-1-detail.ome.tif", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_tiles_and_stacks_are_the_same_through_either_reader(name: str, real_data: Path) -> None:
    with open_slide(real_data / "slides" / name) as ours, compatible(real_data / "slides" / name) as theirs:
        height, width = ours.pyramid.shape

        @settings(max_examples=100, deadline=None, derandomize=True, database=None)
        @given(y=st.floats(-50, height), x=st.floats(-50, width), scale=st.floats(1, 1.9), step=st.floats(1.05, 2.5))
        def same_pixels(y: float, x: float, scale: float, step: float) -> None:
            view = View(y=y, x=x, height=90, width=70, scale=scale)  # from level 0, which both decode alike
            np.testing.assert_array_equal(read_view(ours, view), read_view(theirs, view))
            stacks = [scale_stack(slide, np.array([[y, x]]), scales=[scale, scale * step], size=48) for slide in (ours, theirs)]
            np.testing.assert_array_equal(*(read_place(stack, 0) for stack in stacks))

        same_pixels()
