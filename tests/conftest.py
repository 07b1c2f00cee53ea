"""What every test file shares: where the real data is, if it is."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads on shared cores cost up to 90x

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# On shared cores a test may take as long as it takes.
hypothesis.settings.register_profile("wsiscale", deadline=None)
hypothesis.settings.load_profile("wsiscale")

DATA = Path(os.environ.get("WSISCALE_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def exact_arithmetic() -> Iterator[None]:
    """Networks answer in float32 whatever this machine's cores can do, so that a test may ask for equality."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wsiscale.analyzer.has_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real slides, patches and weights; skips where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}; set WSISCALE_DATA to run this")
    return DATA
