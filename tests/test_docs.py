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
from reports import made_up_cohort

from wsiscale.cli import main
from wsiscale.readers import open_slide
from wsiscale.store import write_store
from wsiscale.testing import write_svs

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


PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
RUN, SHOWN = ("", "bash", "python"), ("text", "json", "snakemake", "groovy")
SLOW = ("cohorts", "faq", "getting-started", "probe", "profiles", "report", "slide-mpp")
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def what_pages_name(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages take for granted: slides, a network, a card, a store, a cohort."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(ROOT / "sample_slides", folder / "sample_slides", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "sample_slides" / "tissue_mpp0.25.svs", folder / "slide.svs")
    (folder / "slides").mkdir()
    (folder / "cohort.csv").write_text("path\nslides/a.svs\nslides/b.svs\n")
    (folder / "mpp.csv").write_text("wsi,mpp\nslide.svs,0.26\n")
    cards = ROOT / "wsiscale" / "cards"
    shutil.copy(cards / "default.json", folder / "card.json")
    shutil.copy(cards / "nuclei_default.safetensors", folder)
    (folder / "nets.py").write_text(NETS)
    with open_slide(folder / "slide.svs") as slide:
        write_store(folder / "slide.ome.zarr", slide, mpp=0.5)
        for name, y, x in (("a", 0, 0), ("b", 0, 1536), ("c", 1416, 0)):
            quarter = slide.read(level=0, y=y, x=x, height=1400, width=1500)
            write_svs(folder / "slides" / f"{name}.svs", quarter, mpp=0.25, power=40, levels=(1, 4))
    made_up_cohort(folder / "out")
    return folder


NETS = """
from wsiscale.default_network import default_network


def factory():
    return default_network(), {"tile_size": 128, "mean": [0.7, 0.5, 0.68], "std": [0.2, 0.2, 0.2], "training_mpp": 0.5}
"""


@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in PAGES])
def test_a_pages_python_and_commands_run_from_top_to_bottom(
    page: str, what_pages_name: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    folder = tmp_path / "page"
    shutil.copytree(what_pages_name, folder)
    monkeypatch.chdir(folder)
    for made in set(re.findall(r"-o (\S+)", text)):  # a page finds nothing of what it makes
        shutil.rmtree(folder / made) if (folder / made).is_dir() else (folder / made).unlink(missing_ok=True)
    names: dict[str, object] = {"__name__": "page"}

    for info, block in BLOCK.findall(text):
        if info == "python" and all(find_spec(name) for name in re.findall(r"# needs (\w+)", block)):
            exec(compile(block, f"{page}.md", "exec"), names)
        for line in block.splitlines() if info in ("", "bash") else ():
            if line.startswith("wsiscale "):
                assert main(as_the_shell_reads(line)) == 0, (line, capfd.readouterr())


def as_the_shell_reads(line: str) -> list[str]:
    """The arguments of a command: without its comment, patterns put in full."""
    shell = ["bash", "-c", f"wsiscale() {{ printf '%s\\n' \"$@\"; }}\n{line}"]
    return subprocess.run(shell, check=True, capture_output=True, text=True).stdout.splitlines()


def test_every_block_is_seen_and_those_that_are_not_run_say_why() -> None:
    for page in PAGES:
        text = (ROOT / "docs" / f"{page}.md").read_text()
        blocks = BLOCK.findall(text)
        assert 2 * len(blocks) == len(re.findall(r"^ *```", text, re.MULTILINE)), page
        for info, _ in blocks:
            assert info in RUN or info in SHOWN or re.fullmatch(r"(python|bash) no-run: .+", info), (page, info)


def cohort_block(start: str) -> str:
    """The one block of docs/cohorts.md whose info string starts so."""
    page = (ROOT / "docs" / "cohorts.md").read_text()
    (block,) = re.findall(rf"```{re.escape(start)}[^\n]*\n(.*?)```", page, re.DOTALL)
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
    (two_slides / "job.sh").write_text(cohort_block("bash no-run: a job array"))

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
        for target, _, heading in re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?\)", prose):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
                assert not heading or heading in headings(page.parent / target if target else page), f"{page.name}: {heading}"


def headings(page: Path) -> list[str]:
    """As links name them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles]


def test_the_readme_leads_to_every_page() -> None:
    for page in PAGES:
        assert f"(docs/{page}.md)" in README, page


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jupyter's own
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"

    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()

    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", []))
    assert all(not cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells), "commit notebooks without outputs"
