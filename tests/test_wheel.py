"""What pip installs is whole: built, installed elsewhere and used without the source tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest

from wsiscale.testing import slide_image, write_svs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of an earlier build gets in, and nothing of this one stays."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "wsiscale", folder / "wsiscale", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    (folder / "benchmarks").mkdir()
    for name in ("tests/conftest.py", "benchmarks/cohort.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "dist",
        ".",
    ]

    subprocess.run(pip, cwd=folder, check=True)

    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a program of an environment that has the wheel and this one's libraries, in an empty folder; gives its stdout."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # A path in a .pth file is searched last, and the .pth files in it, which make the source tree importable, are not read.
    (site / "libraries.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    (folder / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(program: str, *argv: str) -> str:
        command = [str(python.parent / program), *argv]
        done = subprocess.run(command, cwd=folder / "empty", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout

    return run


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()

    info = f"wsiscale-{version('wsiscale')}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"wsiscale", info}
    assert not [name for name in names if "__pycache__" in name]
    source = (path for path in (ROOT / "wsiscale").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert {str(path.relative_to(ROOT)) for path in source} == {name for name in names if name.startswith("wsiscale/")}
    for name in ("py.typed", "bridges/napari.yaml", "cards/nuclei_default.safetensors", "report/templates/slide.html"):
        assert f"wsiscale/{name}" in names
    assert wheel.stat().st_size < 3_000_000


def test_the_installed_package_is_the_wheels(installed: Callable[..., str]) -> None:
    printed = installed(
        "python",
        "-c",
        "import sys, wsiscale\n"
        "from importlib.metadata import entry_points\n"
        "from importlib.resources import files\n"
        "print(wsiscale.__file__.startswith(sys.prefix))\n"
        "(plugin,) = entry_points(group='napari.manifest', name='wsiscale')\n"
        "module, _, file = plugin.value.partition(':')\n"
        "print(files(module).joinpath(file).read_text())\n",
    )

    assert printed.startswith("True\n")
    assert "wsiscale" in printed.removeprefix("True\n")
    assert installed("wsiscale", "--version") == f"wsiscale {version('wsiscale')}\n"
    assert len(json.loads(installed("wsiscale", "cards", "--json"))) == len(list((ROOT / "wsiscale" / "cards").glob("*.json")))


@pytest.mark.slow
def test_the_installed_package_works(installed: Callable[..., str], tmp_path: Path) -> None:
    write_svs(tmp_path / "slide.svs", slide_image(1024, 1280, 0.25, seed=3), mpp=0.25, power=40, levels=(1, 4))

    findings = json.loads(installed("wsiscale", "doctor", "--json"))
    assert all(finding["ok"] for finding in findings if finding["needed"])
    looking = ["--mpp-range", "0.25:1", "--places", "16", "--json", "--report", str(tmp_path / "pages")]
    record = json.loads(installed("wsiscale", "estimate", str(tmp_path / "slide.svs"), *looking))
    assert record["ci90"][0] <= record["mpp"] <= record["ci90"][1]
    assert "</html>" in (tmp_path / "pages" / "slide.svs.html").read_text()
