"""What a process that only reads slides tells the allocator: keep what you have."""

from __future__ import annotations

import ctypes

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # of glibc's mallopt
_LARGEST, _FREE = 8 * 2**20, 256 * 2**20  # bytes


def keep_memory() -> None:
    """For programs, before they start threads: one heap, of which up to 256 MB stay with the process when they are free.

    Else glibc gives arrays of a megabyte back as soon as they are free, has each page of the next one handed out anew, and
    keeps a heap for each thread: writing a slide takes a tenth more time and a third more memory. Arrays above 8 MB, which
    would leave holes, are given back all the same. Nothing on other systems.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _FREE)
