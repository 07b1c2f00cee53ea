"""What the allocator is told: the command says it, importing the library does not."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

GLIBC = hasattr(ctypes.CDLL(None), "mallopt")

FAULTS = """
import resource
import numpy as np
{before}
def fill():
    for _ in range(50):
        a = np.full(3_000_000, 1, np.uint8)
        b = np.full(7_000_000, 1, np.uint8)
        del a, b
fill()
start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


@pytest.mark.skipif(not GLIBC, reason="another allocator than glibc's")
def test_memory_that_was_kept_is_not_handed_out_page_by_page_again() -> None:
    def faults(before: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS.format(before=before)], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("from wsiscale.memory import keep_memory; keep_memory()") < 100
    # What there is to avoid: glibc as it is when something has freed little so far.
    assert faults("import ctypes; ctypes.CDLL(None).mallopt(-3, 131072)") > 5000
