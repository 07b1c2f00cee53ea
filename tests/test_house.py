"""What holds for the project as a whole: quick imports, typed names, no foreign paths."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import wsiscale

ROOT = Path(__file__).parents[1]


def test_importing_wsiscale_imports_neither_torch_nor_openslide() -> None:
    heavy = {"torch", "torchvision", "openslide", "tiffslide", "zarr", "dask", "skimage", "numpy"}
    code = f"import sys, wsiscale; print(sorted({heavy} & set(sys.modules)))"

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in wsiscale.__all__:
        assert getattr(wsiscale, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = wsiscale.nonsense


def test_estimate_is_the_function_whatever_was_imported_before() -> None:
    code = "import wsiscale.estimation, wsiscale; assert callable(wsiscale.estimate)"

    subprocess.run([sys.executable, "-c", code], check=True)


def test_constraints_pin_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()

    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line), line


def test_torch_is_capped_so_that_pip_does_not_take_cuda_by_gigabytes() -> None:
    text = (ROOT / "pyproject.toml").read_text()

    assert '"torch>=2.4,<2.14"' in text
    assert '"torchvision>=0.19,<0.29"' in text


def test_nothing_shipped_is_large() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file():
            assert path.stat().st_size < 2_000_000, name
