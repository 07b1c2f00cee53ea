"""CPU and wall time of several ways of doing the same, interleaved in one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    count: int  # things made
    cpu: float  # seconds, of all threads and children
    wall: float  # seconds

    @property
    def cpu_ms(self) -> float:
        return 1000 * self.cpu / self.count


def interleaved(ways: Mapping[str, Callable[[], int]], *, rounds: int = 5) -> dict[str, list[Cost]]:
    """Each way once for warmth, then `rounds` times in turn. A way returns how many things it made."""
    for way in ways.values():
        way()
    found: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            count = way()
            found[name].append(Cost(count, cpu_seconds() - cpu, time.perf_counter() - wall))
    return found


def as_installed() -> dict[str, str]:
    """The environment of a command: one that may keep its compiled modules, as every installation does."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def cpu_seconds() -> float:
    """Of this process and of the children that it has waited for."""
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def median(costs: list[Cost]) -> float:
    """CPU-ms a thing."""
    return float(np.median([cost.cpu_ms for cost in costs]))


def rows(found: Mapping[str, list[Cost]], *, limit: str, peer: str) -> list[list[str]]:
    """name, CPU-ms a thing (from to), wall ms, share of the limit, times faster than the peer."""
    table = []
    for name, costs in found.items():
        each = [cost.cpu_ms for cost in costs]
        wall = np.median([1000 * cost.wall / cost.count for cost in costs])
        table.append(
            [
                name,
                f"{np.median(each):.3g} ({min(each):.3g} to {max(each):.3g})",
                f"{wall:.3g}",
                f"{paired(found[limit], costs):.2f}",
                f"{paired(found[peer], costs):.2f}",
            ]
        )
    return table


def paired(one: list[Cost], other: list[Cost]) -> float:
    """How many times as long `one` took as `other`: median of the ratios within a round."""
    return float(np.median([a.cpu_ms / b.cpu_ms for a, b in zip(one, other, strict=True)]))
