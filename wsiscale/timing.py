"""Where the time goes: CPU seconds by part of the work, from all threads, while somebody watches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("read", "decode", "resample", "copy", "forward", "reduce")

_watched: dict[str, float] | None = None
_lock = threading.Lock()


@contextmanager
def watch() -> Iterator[dict[str, float]]:
    """Seconds by part of what happens inside, in this process: CPU time of the part's own thread, or wall time.

    What an outer part calls is in it, too; no part of `PARTS` calls another. One watch at a time.
    """
    global _watched
    seconds = dict.fromkeys(PARTS, 0.0)
    _watched = seconds
    try:
        yield seconds
    finally:
        _watched = None


def watching() -> bool:
    return _watched is not None


@contextmanager
def timed(part: str, *, wall: bool = False) -> Iterator[None]:
    """Counts what happens inside to `part`. `wall` where other threads do the work, as in a network's forward pass."""
    if _watched is None:
        yield
        return
    clock = time.perf_counter if wall else time.thread_time
    start = clock()
    try:
        yield
    finally:
        spent = clock() - start
        with _lock:
            if _watched is not None:
                _watched[part] += spent
