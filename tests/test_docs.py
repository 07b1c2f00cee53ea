"""What the README and the notebooks show works as written."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from wsiscale.readers import open_slide
from wsiscale.store import write_store

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readmes_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-W", "error", "-c", block], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "256, 256, 3" in done.stdout


def test_the_readmes_commands_run(tmp_path: Path) -> None:
    shutil.copy(ROOT / "sample_slides" / "tissue_mpp0.25.svs", tmp_path / "slide.svs")
    (tmp_path / "nets.py").write_text("from wsiscale.default_network import default_network as factory\n")
    commands = [line.partition("#")[0] for line in README.splitlines() if line.startswith("wsiscale ")]
    assert len(commands) == 6

    for command in commands:
        argv = [str(Path(sys.executable).parent / "wsiscale"), *shlex.split(command)[1:]]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
        # A bare factory brings no model card, so the estimate with it may abstain; the store is then written below.
        assert done.returncode in (0, 3), (command, done.stderr)
        if "--mpp auto" in command and done.returncode == 3:
            argv[argv.index("auto")] = "0.5"
            subprocess.run(argv, cwd=tmp_path, check=True, capture_output=True)
        assert done.stderr.count("Traceback") == 0


def test_one_slide_of_a_cohort_as_the_docs_have_it(tmp_path: Path) -> None:
    (tmp_path / "sample_slides").symlink_to(ROOT / "sample_slides")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cohorts.md").read_text(), re.DOTALL)

    done = subprocess.run([sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("ok", "abstained")
    assert (tmp_path / "out" / "slides" / "a.json").exists()


@pytest.fixture(scope="module")
def slide_and_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with slide.svs and slide.ome.zarr."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copy(ROOT / "sample_slides" / "tissue_mpp0.25.svs", folder / "slide.svs")
    with open_slide(folder / "slide.svs") as slide:
        write_store(folder / "slide.ome.zarr", slide, mpp=0.5)
    return folder


@pytest.mark.parametrize("page", ["exports", "pipelines"])
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str, slide_and_store: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)

    run = [block for block in blocks if all(find_spec(name) for name in re.findall(r"# needs (\w+)", block))]
    assert run
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(run)], cwd=slide_and_store, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def cohort_block(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "cohorts.md").read_text(), re.DOTALL)
    return str(block)


@pytest.fixture
def two_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with slides/ and cohort.csv, and the command on the path."""
    (tmp_path / "slides").mkdir()
    for name in ("no_mpp", "tissue_mpp0.25"):
        shutil.copy(ROOT / "sample_slides" / f"{name}.svs", tmp_path / "slides")
    (tmp_path / "cohort.csv").write_text("path\nslides/no_mpp.svs\nslides/tissue_mpp0.25.svs\n")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_job_array_of_the_docs_runs(two_slides: Path) -> None:
    (two_slides / "job.sh").write_text(cohort_block("bash"))

    for number in range(2):
        slurm = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "2"}
        subprocess.run(["bash", "job.sh"], env=os.environ | slurm, check=True, capture_output=True)
    whole = subprocess.run(["wsiscale", "run", "cohort.csv", "-o", "out"], check=True, capture_output=True, text=True)

    assert "2 slides, 2 of them done before" in whole.stdout


@pytest.mark.slow
def test_the_snakefile_of_the_docs_runs(two_slides: Path) -> None:
    if shutil.which("snakemake") is None:
        pytest.skip("snakemake is not installed; pip install snakemake to run this")
    (two_slides / "Snakefile").write_text(cohort_block("snakemake"))
    (two_slides / "slides" / "junk.svs").write_bytes(b"not a slide" * 100)

    done = subprocess.run(["snakemake", "--cores", "1"], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    rows = {row["id"]: row["status"] for row in map(json.loads, (two_slides / "out/manifest.jsonl").read_text().splitlines())}
    assert rows == {"junk": "bad_input", "no_mpp": "ok", "tissue_mpp0.25": "ok"}


def test_every_link_in_the_docs_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)", prose):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jupyter's own
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"

    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()

    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", []))
    assert all(not cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells), "commit notebooks without outputs"
