"""A cohort from slides to stores: every slide ends with a status, nothing is done twice, a bad slide costs only itself."""

from __future__ import annotations

import csv
import json
import logging
import os
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster, Nanny, Scheduler, SpecCluster

from wsiscale.cohort.engine import run_cohort
from wsiscale.cohort.one_slide import RunOptions, fingerprint, process_slide, read_record, record_path, store_path
from wsiscale.cohort.plan import SlideSpec, read_cohort
from wsiscale.errors import OptionError
from wsiscale.store import open_store, verify_store
from wsiscale.testing.procedural import tissue
from wsiscale.testing.slides import write_svs

QUICK = RunOptions(places=8, precision=None, mpp_range=(0.5, 2.0), seed=1, time_limit=120, pixels="tissue", tiles=256)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good slides, one without tissue, one without µm/px, one that is none."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(3):
        image, _ = tissue(800, 800, mpp=0.5, seed=number)
        write_svs(folder / f"good {number}.svs", image, mpp=0.5, power=20, levels=(1, 4))
    write_svs(folder / "glass.svs", np.full((512, 512, 3), 240, np.uint8), mpp=0.5, power=20, levels=(1, 4))
    (folder / "junk.svs").write_bytes(b"not a slide " * 500)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as made,
        Client(made, set_as_default=False) as client,
    ):
        yield client


def manifest(out: Path) -> dict[str, dict[str, Any]]:
    with (out / "manifest.csv").open(newline="") as file:
        table = {row["id"]: row for row in csv.DictReader(file)}
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(table)
    return {line["id"]: line for line in lines}


def digests(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The pixels and tables of every store, by its manifest; not what says when it was made."""
    found = {}
    for store in sorted((out / "stores").iterdir()):
        files = json.loads((store / "manifest.json").read_text())["files"]
        found[store.name] = sorted(json.dumps([name, entry]) for name, entry in files.items() if not name.endswith("zarr.json"))
    return found  # type: ignore[return-value]


def test_every_slide_ends_with_a_status_and_stores_are_whole(slides: Path, cluster: Client, tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []

    summary = run_cohort(
        read_cohort(slides), tmp_path, QUICK, client=cluster, told=lambda event, spec, record: told.append((event, spec.id))
    )

    rows = manifest(tmp_path)
    assert {name: row["status"] for name, row in rows.items() if not name.startswith("good")} == {
        "glass": "no_tissue",
        "junk": "bad_input",
    }
    assert rows["junk"]["code"] == "NOT_A_SLIDE"
    good = [row for name, row in rows.items() if name.startswith("good")]
    assert {row["status"] for row in good} <= {"ok", "abstained"}
    written = [row for row in good if row["status"] == "ok"]
    assert written
    for row in written:
        store = tmp_path / row["store"]
        assert verify_store(store).ok
        assert open_store(store).mpp == pytest.approx(row["mpp"], rel=0.011)
        assert row["ci90_low"] < row["mpp"] < row["ci90_high"]
        assert row["bytes"] > 1000
    assert sum(summary.counts.values()) == 5
    assert summary.failed == 1
    assert Counter(event for event, _ in told) == {"started": 5, "done": 5}
    text = (tmp_path / "summary.md").read_text()
    assert "junk" in text
    assert "NOT_A_SLIDE" in text
    assert not list(tmp_path.rglob("*.partial"))
    assert cluster.status == "running"  # a client that was given stays open


def test_the_same_again_does_nothing_and_what_changed_is_done_again(slides: Path, cluster: Client, tmp_path: Path) -> None:
    specs = read_cohort(slides)
    first = run_cohort(specs, tmp_path, QUICK, client=cluster)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("stores/*/manifest.json")}
    rows = manifest(tmp_path)

    again = run_cohort(specs, tmp_path, QUICK, client=cluster)

    assert (first.done, first.resumed) == (5, 0)
    assert (again.done, again.resumed) == (0, 5)
    assert manifest(tmp_path) == rows
    assert {path: path.stat().st_mtime_ns for path in before} == before

    name = next(name for name, row in rows.items() if row["status"] == "ok")
    zarr_json = store_path(tmp_path, name) / "0" / "zarr.json"
    zarr_json.parent.parent.joinpath("zarr.json").unlink()  # a store that is none any more
    mended = run_cohort(specs, tmp_path, QUICK, client=cluster)
    assert (mended.done, mended.resumed) == (1, 4)
    assert verify_store(store_path(tmp_path, name)).ok

    other = RunOptions(**{**vars(QUICK), "tiles": 128})
    changed = run_cohort(specs, tmp_path, other, client=cluster)
    assert changed.resumed == 0
    assert set(open_store(store_path(tmp_path, name)).tile_table["w"]) != set()


def test_one_slide_by_itself_says_the_same_as_the_cohort(slides: Path, cluster: Client, tmp_path: Path) -> None:
    specs = read_cohort(slides)
    run_cohort(specs, tmp_path / "dask", QUICK, client=cluster)

    alone = [process_slide(vars(spec), vars(QUICK), tmp_path / "alone") for spec in specs]

    rows = manifest(tmp_path / "dask")
    assert {record["id"]: (record["status"], record.get("mpp")) for record in alone} == {
        name: (row["status"], row["mpp"]) for name, row in rows.items()
    }
    assert digests(tmp_path / "alone") == digests(tmp_path / "dask")


FLAT = textwrap.dedent("""
    import torch
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 2, 1)
        def forward(self, tiles):
            return 0 * self.conv(tiles).mean((2, 3))
    def flat():
        return Flat()
""")


def test_slides_without_an_answer_follow_the_policy(slides: Path, cluster: Client, tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text(FLAT)
    flat = RunOptions(**{**vars(QUICK), "model": f"{tmp_path / 'flat.py'}:flat", "profile": None, "tile_size": 64})
    specs = [spec for spec in read_cohort(slides) if spec.id.startswith("good")]

    silent = run_cohort(specs, tmp_path / "skip", flat, client=cluster)
    fixed = run_cohort(specs, tmp_path / "fixed", RunOptions(**{**vars(flat), "on_abstain": "fixed:1.0"}), client=cluster)

    assert silent.counts == {"abstained": 3}
    assert not (tmp_path / "skip" / "stores").exists()
    assert fixed.counts == {"ok": 3}
    assert {(row["mpp"], row["chosen_by"]) for row in manifest(tmp_path / "fixed").values()} == {(1.0, "fixed:1.0")}
    for wrong in ("median", "fixed", "fixed:0", "fixed:x", "skip:1"):
        with pytest.raises(OptionError, match="--on-abstain"):
            RunOptions(on_abstain=wrong)


def test_workers_with_a_gpu_estimate_and_the_others_write(slides: Path, tmp_path: Path) -> None:
    specs = [spec for spec in read_cohort(slides) if spec.id.startswith("good")]
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
    workers = {
        "gpu": {"cls": Nanny, "options": {"nthreads": 1, "resources": {"GPU": 1}, "host": "127.0.0.1"}},
        "cpu": {"cls": Nanny, "options": {"nthreads": 1, "host": "127.0.0.1"}},
    }
    with SpecCluster(workers, scheduler, silence_logs=logging.ERROR) as made, Client(made, set_as_default=False) as client:
        client.wait_for_workers(2)
        summary = run_cohort(specs, tmp_path, QUICK, client=client)
        tasks = client.run(lambda dask_worker: (bool(dask_worker.state.total_resources), dask_worker.state.executed_count))

    assert sum(summary.counts.values()) == 3
    assert summary.failed == 0
    assert summary.counts["ok"] >= 1
    assert sorted(tasks.values()) == [(False, summary.counts["ok"]), (True, 1 + 3)]  # one looks at the network's profile


def test_a_cluster_without_workers_is_refused(slides: Path, tmp_path: Path) -> None:
    with (
        LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0") as made,
        Client(made, set_as_default=False) as client,
        pytest.raises(OptionError, match="no workers"),
    ):
        run_cohort(read_cohort(slides), tmp_path, QUICK, client=client)


def test_a_slide_is_known_by_what_it_holds(slides: Path, tmp_path: Path) -> None:
    one, other = slides / "good 0.svs", slides / "good 1.svs"
    copy = tmp_path / "renamed.svs"
    copy.write_bytes(one.read_bytes())

    assert fingerprint(copy) == fingerprint(one) != fingerprint(other)
    with copy.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\0")
    assert fingerprint(copy) != fingerprint(one)


def test_what_a_record_holds_is_plain_and_names_no_folder(slides: Path, tmp_path: Path) -> None:
    (spec,) = [spec for spec in read_cohort(slides) if spec.id == "junk"]
    record = process_slide(spec, QUICK, tmp_path)

    assert record == read_record(tmp_path, "junk")
    assert str(slides) not in record_path(tmp_path, "junk").read_text()
    assert (record["status"], record["code"]) == ("bad_input", "NOT_A_SLIDE")
    gone = process_slide(SlideSpec("gone", str(tmp_path / "gone.svs")), QUICK, tmp_path)
    assert (gone["status"], gone["code"]) == ("bad_input", "NOT_FOUND")


@pytest.mark.slow
def test_a_cluster_that_has_lost_all_its_workers_gets_new_ones(slides: Path, tmp_path: Path) -> None:
    # A nanny gives a worker up that is killed while it starts. The run used to wait for ever for the last one.
    ended: list[bool] = []

    def given_up(event: str, spec: SlideSpec, record: dict[str, Any] | None) -> None:
        if event == "started" and not ended:
            (made,) = (
                made for made in SpecCluster._instances if isinstance(made, LocalCluster) and made.scheduler_info["workers"]
            )
            for nanny in made.workers.values():
                made.sync(nanny.close)
            ended.append(True)

    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
        summary = run_cohort(read_cohort(slides), tmp_path, QUICK, workers=1, told=given_up)

    assert ended
    assert summary.counts == {"ok": 3, "no_tissue": 1, "bad_input": 1}


def test_what_went_wrong_is_told_without_the_slides_folders(tmp_path: Path) -> None:
    folder = tmp_path / "Jane Doe 1970"
    folder.mkdir()
    (folder / "junk.svs").write_bytes(b"not a slide " * 500)

    for name in ("junk.svs", "lost.svs"):
        record = process_slide(SlideSpec(name, str(folder / name)), QUICK, tmp_path / "out")

        assert record["status"] == "bad_input"
        assert name in record["message"]
    written = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".log"))
    assert "Jane" not in written
