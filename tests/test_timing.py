"""Where the time goes is told of every part, and of nothing while nobody watches."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from wsiscale.geometry import View, plan_read
from wsiscale.resample import resample
from wsiscale.timing import PARTS, timed, watch, watching
from wsiscale.types import Pyramid


def busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_seconds_of_all_threads_add_up_by_part() -> None:
    def work(_: int) -> None:
        with timed("decode"):
            busy(0.03)

    with watch() as spent, ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(4)))

    assert tuple(spent) == PARTS
    assert spent["decode"] == pytest.approx(0.12, abs=0.03)
    assert spent["forward"] == 0


def test_nothing_is_counted_while_nobody_watches() -> None:
    with watch() as spent:
        pass
    with timed("read"):
        busy(0.01)

    assert not watching()
    assert spent["read"] == 0


def test_an_error_inside_is_counted_and_passed_on() -> None:
    @timed("reduce")
    def fail() -> None:
        busy(0.01)
        raise ZeroDivisionError

    with watch() as spent, pytest.raises(ZeroDivisionError):
        fail()

    assert spent["reduce"] > 0.005


def test_resampling_is_a_part() -> None:
    plan = plan_read(Pyramid(shapes=((600, 600),), downsamples=(1.0,)), View(y=0, x=0, height=200, width=200, scale=2.7))
    window = np.zeros((plan.height, plan.width, 3), np.uint8)

    with watch() as spent:
        resample(plan, window)

    assert spent["resample"] > 0
