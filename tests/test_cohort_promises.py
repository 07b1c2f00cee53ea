"""What a cohort promises, counted: a bad slide costs only itself, what is killed loses and doubles nothing, and where the
work is done has no say in what comes out. Every count has its seed in the test's id or message."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import skimage.data
from distributed import Client, LocalCluster
from numpy.typing import NDArray
from PIL import Image
from test_cohort import FLAT, digests, manifest

from wsiscale import open_slide
from wsiscale.cohort.engine import run_cohort
from wsiscale.cohort.one_slide import RunOptions, process_slide, read_record, record_path, store_path
from wsiscale.cohort.plan import SlideSpec, read_cohort
from wsiscale.store import verify_store
from wsiscale.testing.procedural import planted_slide, slide_image, tissue
from wsiscale.testing.slides import write_svs

slow = pytest.mark.slow
RUN = (sys.executable, "-c", "from wsiscale.cli import run; run()", "run")
PATIENCE = 600  # s for any one command


# A bad slide costs only itself

POISON = textwrap.dedent("""
    import os, signal, time
    from wsiscale.tissue import stained
    def detect(image):
        colour = tuple(int(v) for v in image[0, 0])
        if colour[0] < 60:
            {"r": lambda: os.kill(os.getpid(), signal.SIGSEGV), "g": os.abort, "b": lambda: time.sleep(1000)}[
                "rgb"[max(range(3), key=lambda i: colour[i])]]()
        return stained(image)
""")

POISONS = {
    "segfault": ((50, 0, 0), ("killed", "SIGSEGV")),
    "abort": ((0, 50, 0), ("killed", "SIGABRT")),
    "hang": ((0, 0, 50), ("failed", "TIMEOUT")),
}


@pytest.mark.parametrize(("count", "seed"), [(12, 0), *(pytest.param(60, seed, marks=slow) for seed in range(10))])
def test_a_slide_that_kills_its_worker_costs_only_itself(count: int, seed: int, tmp_path: Path) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    (tmp_path / "flat.py").write_text(FLAT)
    specs = poisoned_cohort(tmp_path / "slides", count, seed)
    options = RunOptions(
        model=f"{tmp_path / 'flat.py'}:flat",
        detector=f"{tmp_path / 'poison.py'}:detect",
        profile=None,
        tile_size=64,
        places=2,
        precision=None,
        mpp_range=(0.5, 2.0),
        on_abstain="fixed:1.0",
        tiles=64,
        pixels="none",
        time_limit=8.0,
    )
    good = [spec for spec in specs if spec.id not in POISONS]
    by_hand = {spec.id: process_slide(spec, options, tmp_path / "by hand") for spec in good}

    summary = run_cohort(specs, tmp_path / "out", options, workers=2)

    rows = manifest(tmp_path / "out")
    assert {name: (rows[name]["status"], rows[name]["code"]) for name in POISONS} == {
        name: ended for name, (_, ended) in POISONS.items()
    }, f"seed {seed}"
    assert {name: (row["status"], row["mpp"], row["tiles"]) for name, row in rows.items() if name not in POISONS} == {
        name: ("ok", 1.0, record["tiles"]) for name, record in by_hand.items()
    }, f"seed {seed}"
    assert digests(tmp_path / "out") == digests(tmp_path / "by hand")
    assert (summary.slides, summary.failed, len(good)) == (count, 3, count - 3)
    assert leftovers(tmp_path / "out") == []


def poisoned_cohort(folder: Path, count: int, seed: int) -> list[SlideSpec]:
    """`count` slides, of which three are the poisons; their sizes, and so when their turn comes, are drawn."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    image, _ = tissue(768, 768, mpp=0.5, seed=seed)
    places = rng.permutation(count)
    poisons = dict(zip(places.tolist(), POISONS, strict=False))
    specs = []
    for number in range(count):
        side = int(rng.integers(192, 449))
        y, x = rng.integers(0, 769 - side, 2)
        window = image[y : y + side, x : x + side].copy()
        name = poisons.get(number, f"good {number}")
        window[:96, :96] = POISONS[name][0] if name in POISONS else 240  # else a dark nucleus there would be poison
        write_svs(folder / f"{name}.svs", window, mpp=0.5, power=20, levels=(1,), quality=95)
        specs.append(SlideSpec(name, str(folder / f"{name}.svs")))
    return specs


# What is killed loses and doubles nothing


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve slides, each best at another scale or, two of them, without an answer; and their network."""
    folder = tmp_path_factory.mktemp("planted")
    card = {"name": "planted", "tile_size": 64}
    (folder / "net.py").write_text(
        f"from wsiscale.testing.procedural import planted_network\n\ndef planted():\n    return planted_network(), {card!r}\n"
    )
    for number in range(12):
        slide = planted_slide(10 + number % 6 * 2, number, size=640)
        image = slide.read(level=0, y=0, x=0, height=640, width=640)
        image[:, : 40 + 20 * number] = 240
        write_svs(folder / f"planted {number}.svs", image, mpp=0.5, power=20, levels=(1, 4))
    return folder


def options_for(folder: Path) -> RunOptions:
    return RunOptions(
        model=f"{folder / 'net.py'}:planted",
        criterion="confidence",
        profile=None,
        places=8,
        precision=None,
        mpp_range=(0.5, 2.0),
        tiles=64,
        time_limit=120,
    )


def command_for(folder: Path, out: Path, *more: str) -> list[str]:
    """What makes the same as `options_for`."""
    options = options_for(folder)
    words = [
        "--model",
        str(options.model),
        "--criterion",
        "confidence",
        "--profile",
        "none",
        "--places",
        "8",
        "--precision",
        "0",
    ]
    words += ["--mpp-range", "0.5:2", "--tile-size", "64", "--time-limit", "120"]
    return [*RUN, str(folder), "-o", str(out), *words, *more]


@pytest.fixture(scope="module")
def undisturbed(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(command_for(planted, out, "--workers", "2"), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    rows = manifest(out)
    assert sorted(row["status"] for row in rows.values()) == ["abstained"] * 2 + ["ok"] * 10
    assert len({row["mpp"] for row in rows.values()}) == 11  # each has its own, so that none stands for another
    return out


@pytest.mark.parametrize("allowed", [0, 3])  # deaths that the cluster itself tries again
@pytest.mark.parametrize(("kills", "seed"), [(1, 0), pytest.param(25, 1, marks=slow)])
def test_workers_that_are_killed_lose_and_double_nothing(
    kills: int, seed: int, allowed: int, planted: Path, undisturbed: Path, tmp_path: Path
) -> None:
    rng = random.Random(seed * 10 + allowed)
    specs, options = read_cohort(planted), options_for(planted)
    done = 0
    with some_cluster(allowed) as (address, client), Client(address, set_as_default=False) as other:
        for number in itertools.count():
            out = tmp_path / str(number)
            with killing_workers(other, rng, most=min(5, kills - done)) as killed:
                run_cohort(specs, out, options, client=client)

            done += len(killed)
            same_as(undisturbed, out, f"seed {seed}, run {number}, killed {killed}")
            if done == kills:
                break
            client.wait_for_workers(1)
    assert done == kills


@contextmanager
def some_cluster(allowed: int) -> Iterator[tuple[str, Client]]:
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": allowed}),
        LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs="CRITICAL"
        ) as made,
        Client(made, set_as_default=False) as client,
    ):
        # A worker that is killed while it starts is given up by its nanny: a cluster of workers that come again, as of SLURM.
        made.adapt(minimum=2, maximum=2, interval="1s")
        yield made.scheduler_address, client


@contextmanager
def killing_workers(client: Client, rng: random.Random, *, most: int) -> Iterator[list[int]]:
    """Ends up to `most` workers, one after the other, at moments that are drawn; gives those that were."""
    over = threading.Event()
    killed: list[int] = []

    def work() -> None:
        while len(killed) < most and not over.wait(rng.uniform(0.2, 2.5)):
            pids = sorted(client.run(os.getpid, on_error="ignore").values())
            if pids and not over.is_set():
                pid = rng.choice(pids)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(("kills", "seed"), [(1, 0), pytest.param(20, 1, marks=slow)])
def test_a_driver_that_is_killed_goes_on_where_it_was(
    kills: int, seed: int, planted: Path, undisturbed: Path, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    done = 0
    for number in itertools.count():
        out = tmp_path / str(number)
        command = command_for(planted, out, "--workers", "2")
        finished: dict[Path, int] = {}
        for _ in range(min(4, kills - done)):
            killed = kill_a_driver(command, out, rng, least=1 if done == 0 else 0)
            done += killed
            now = written(out)
            assert {path: now[path] for path in finished} == finished, f"seed {seed}, run {number}: written again"
            finished = now
            if not killed:
                break
        before = len(list(out.glob("slides/*.json")))

        again = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)

        assert again.returncode == 0, again.stderr
        assert f"{before} of them done before" in again.stdout or before == 0
        now = written(out)
        assert {path: now[path] for path in finished} == finished, f"seed {seed}, run {number}: written again"
        same_as(undisturbed, out, f"seed {seed}, run {number}")
        if done == kills:
            break


def kill_a_driver(command: Sequence[str], out: Path, rng: random.Random, *, least: int) -> bool:
    """Starts `command` and kills it once some more slides are done and a moment has passed; False where it ended before."""
    more = len(list(out.glob("slides/*.json"))) + rng.randint(least, 3)
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while len(list(out.glob("slides/*.json"))) < more and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with suppress(subprocess.TimeoutExpired):
            driver.wait(rng.uniform(0, 1))
        if driver.poll() is not None:
            return False
        if rng.random() < 0.3:
            driver.kill()  # its workers have to see for themselves that it is gone
            driver.wait()
            time.sleep(2)
        return True
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def written(out: Path) -> dict[Path, int]:
    """The records, and the manifests of their stores -> when they were written."""
    records = list(out.glob("slides/*.json"))
    stores = [store_path(out, path.stem) / "manifest.json" for path in records]
    return {path: path.stat().st_mtime_ns for path in (*records, *stores) if path.exists()}


# Where the work is done has no say

THREADS = textwrap.dedent("""
    import json, sys
    from distributed import Client, LocalCluster
    from wsiscale.cohort.engine import run_cohort
    from wsiscale.cohort.one_slide import RunOptions
    from wsiscale.cohort.plan import read_cohort
    cohort, out, options = json.loads(sys.argv[1])
    threads = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with LocalCluster(**threads) as made, Client(made) as client:
        run_cohort(read_cohort(cohort), out, RunOptions.of(options), client=client)
""")

WAYS: Mapping[str, Mapping[str, Any]] = {
    "1 worker, 3 threads write": {"workers": 1, "threads": 3},
    "threads": {"workers": None, "threads": 1},
    "1 worker": {"workers": 1, "threads": 1},
    "2 workers, 2 threads write": {"workers": 2, "threads": 2},
    "4 workers": {"workers": 4, "threads": 1},
}


@pytest.mark.parametrize("way", [*list(WAYS)[:2], *(pytest.param(way, marks=slow) for way in list(WAYS)[2:])])
def test_stores_are_the_same_for_any_number_of_workers_threads_or_processes(
    way: str, planted: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_in_a_way(planted, tmp_path, replace(options_for(planted), threads=WAYS[way]["threads"]), WAYS[way]["workers"])

    same_as(undisturbed, tmp_path, way)


def run_in_a_way(cohort: Path, out: Path, options: RunOptions, workers: int | None) -> None:
    """On `workers` processes, or on two threads of one; never in this process, whose arithmetic conftest.py changes."""
    if workers is not None:
        run_cohort(read_cohort(cohort), out, options, workers=workers)
        return
    asked = json.dumps([str(cohort), str(out), asdict(options)])
    done = subprocess.run([sys.executable, "-c", THREADS, asked], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def test_two_shards_at_once_and_a_last_run_make_the_whole_cohort(planted: Path, undisturbed: Path, tmp_path: Path) -> None:
    both = [subprocess.Popen(command_for(planted, tmp_path, "--shard", f"{part}/2"), stderr=subprocess.PIPE) for part in (0, 1)]
    for one in both:
        assert one.communicate(timeout=PATIENCE) is not None
        assert one.returncode == 0
    before = written(tmp_path)

    last = subprocess.run(command_for(planted, tmp_path), capture_output=True, text=True, timeout=PATIENCE)

    assert last.returncode == 0, last.stderr
    assert "12 slides, 12 of them done before" in last.stdout
    assert written(tmp_path) == before
    same_as(undisturbed, tmp_path, "shards")


@pytest.mark.parametrize("races", [1, pytest.param(5, marks=slow)])
def test_two_drivers_on_one_output_mix_nothing(races: int, planted: Path, undisturbed: Path, tmp_path: Path) -> None:
    for race in range(races):
        out = tmp_path / str(race)
        both = [
            subprocess.Popen(command_for(planted, out, "--workers", "2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)
        ]
        ends = [(one.communicate(timeout=PATIENCE), one.returncode)[1] for one in both]
        assert set(ends) <= {0, 1}, ends  # 1 where a slide was the other's just then
        assert all(verify_store(path).ok for path in out.glob("stores/*.ome.zarr"))
        before = written(out)

        later = subprocess.run(command_for(planted, out), capture_output=True, text=True, timeout=PATIENCE)

        assert later.returncode == 0, later.stderr
        assert "12 of them done before" in later.stdout, f"race {race}"
        assert written(out) == before
        same_as(undisturbed, out, f"race {race}")


# Real tissue on two clusters


@slow
def test_a_cluster_here_and_one_of_separate_processes_make_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    stained = mirrored(skimage.data.immunohistochemistry(), 1024, 896)
    write_svs(folder / "immunohistochemistry.svs", stained, mpp=0.5, power=20, levels=(1, 4))
    write_svs(folder / "finer.svs", resized(stained[:640, :768], 1.5), mpp=0.5 / 1.5, power=None, levels=(1, 4))
    write_svs(folder / "procedural.svs", tissue(1024, 768, mpp=0.4, seed=3)[0], mpp=0.4, power=None, levels=(1, 4))
    write_svs(folder / "outlined.svs", slide_image(1024, 1280, 0.6, 4), mpp=0.6, power=None, levels=(1, 4))

    rows = on_both_clusters(folder, tmp_path, RunOptions(places=6, precision=None, mpp_range=(0.4, 1.2)))

    assert len(rows) == 4
    assert sum(row["status"] == "ok" for row in rows.values()) >= 2, rows


@slow
def test_24_slides_of_real_tissue_are_the_same_on_two_clusters(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    for name, image, mpp in real_slides(real_data):
        write_svs(folder / f"{name}.svs", image, mpp=mpp, power=None, levels=(1, 4))

    rows = on_both_clusters(folder, tmp_path, RunOptions(places=24))

    assert len(rows) == 24
    assert sum(row["status"] == "ok" for row in rows.values()) >= 16, rows
    assert {row["status"] for row in rows.values()} <= {"ok", "abstained", "no_tissue"}


def real_slides(data: Path) -> Iterator[tuple[str, NDArray[np.uint8], float | None]]:
    """24 of them: windows of four real slides and skimage's picture, as they are and rescaled; name, pixels, µm/px."""
    sources: list[tuple[str, NDArray[np.uint8], float | None]] = []
    for name, windows in (
        ("CMU-1-Small-Region.svs", [(0, 0, 2000, 2220), (967, 0, 2000, 2220)]),
        (
            "TCGA-CR-7395-01A-01-TS1.svs",
            [(0, 0, 2000, 2200), (1567, 0, 2000, 2200), (0, 2243, 2000, 2200), (1567, 2243, 2000, 2200)],
        ),
        ("OS-1-detail.ome.tif", [(0, 0, 1101, 1101)]),
        ("kidney-48-5.tif", [(0, 0, 901, 1493)]),
    ):
        with open_slide(data / "slides" / name) as slide:
            mpp = slide.calibration.mpp
            for number, (y, x, height, width) in enumerate(windows):
                image = slide.read(level=0, y=y, x=x, height=height, width=width)
                sources.append((f"{name.partition('.')[0]} {number}", image, mpp))
    sources.append(("immunohistochemistry", mirrored(skimage.data.immunohistochemistry(), 2048, 2048), 0.5))
    for name, image, mpp in sources:
        yield name, image, mpp
        yield f"{name} coarser", resized(image, 0.7), None if mpp is None else mpp / 0.7
    for name, image, mpp in sources[:6]:  # 9 x 2 + 6
        part = image[200:1500, 100:1700]
        yield f"{name} finer", resized(part, 1.4), None if mpp is None else mpp / 1.4


def mirrored(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    return np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)), mode="symmetric")


def resized(image: NDArray[np.uint8], times: float) -> NDArray[np.uint8]:
    height, width = (round(side * times) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def on_both_clusters(folder: Path, tmp_path: Path, options: RunOptions) -> dict[str, dict[str, Any]]:
    """Runs `folder` on a LocalCluster and on processes started one by one; asserts that both made the same; its manifest."""
    words = ["--places", str(options.places), "--precision", str(options.precision or 0)]
    if options.mpp_range is not None:
        words += ["--mpp-range", "{}:{}".format(*options.mpp_range)]
    with some_cluster(3) as (_, client):
        run_cohort(read_cohort(folder), tmp_path / "here", options, client=client)
    with separate_processes(tmp_path) as address:
        command = [*RUN, str(folder), "-o", str(tmp_path / "there"), "--scheduler", address, *words]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same_as(tmp_path / "here", tmp_path / "there", "two clusters")
    return manifest(tmp_path / "there")


@contextmanager
def separate_processes(folder: Path) -> Iterator[str]:
    """The address of a scheduler with two workers, each started by itself, as on a cluster."""
    file = folder / "scheduler.json"
    scheduler = ["dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    worker = ["dask_worker", "--scheduler-file", str(file), "--nthreads", "1", "--host", "127.0.0.1", "--no-dashboard"]
    with ExitStack() as stack:
        for words in (scheduler, worker, worker):
            log = stack.enter_context((folder / f"{words[0]}.log").open("a"))
            command = [sys.executable, "-m", f"distributed.cli.{words[0]}", *words[1:]]
            stack.callback(ended, subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True))
        deadline = time.monotonic() + PATIENCE
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        address: str = json.loads(file.read_text())["address"]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=PATIENCE)
        yield address


def ended(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# What is compared


def same_as(expected: Path, out: Path, what: str) -> None:
    """The same stores, records and manifest, but for how long they took; each store whole, and nothing else beside it."""
    assert rows_of(out) == rows_of(expected), what
    assert digests(out) == digests(expected), what
    names = list(manifest(out))
    assert {name: answer(out, name) for name in names} == {name: answer(expected, name) for name in names}, what
    assert all(verify_store(path).ok for path in (out / "stores").iterdir()), what
    assert leftovers(out) == [], what
    assert {path.stem for path in (out / "slides").iterdir()} == set(names), what


TIMED = ("seconds",)


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {name: untimed(row) for name, row in manifest(out).items()}


def answer(out: Path, name: str) -> object:
    record = read_record(out, name)
    assert record is not None, f"{record_path(out, name)} is missing"
    return record["status"], untimed(record.get("estimate") or {}), record.get("made_of")


def untimed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMED}


def leftovers(out: Path) -> list[str]:
    """What is neither a store, a record, a log nor a table of the cohort."""
    inside = [path for folder in (out, out / "stores", out / "slides") if folder.exists() for path in folder.iterdir()]
    expected = ("stores", "slides", "logs", "manifest.csv", "manifest.jsonl", "summary.md")
    return [path.name for path in inside if path.name not in expected and not path.name.endswith((".ome.zarr", ".json"))]
