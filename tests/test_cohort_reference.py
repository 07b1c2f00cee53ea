"""A cohort is its own reference: its tagged slides make the network's profile, and every slide is held against it."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster

from wsiscale.cohort.engine import run_cohort
from wsiscale.cohort.one_slide import RunOptions, process_slide
from wsiscale.cohort.plan import SlideSpec, read_cohort
from wsiscale.cohort.records import row_of
from wsiscale.errors import OptionError, StoreError
from wsiscale.networks import load_network
from wsiscale.profile import load_profile, save_profile
from wsiscale.reference_slides import profile_slides
from wsiscale.store import open_store
from wsiscale.testing import planted_slide
from wsiscale.testing.slides import write_svs

BEST = 0.5  # µm/px: the network likes blobs 6 px wide, and on the slides they are 3 µm
TRUE = (0.2, 0.25, 0.3, 0.2, 0.25, 0.4, 0.25, 0.3)
NETWORK = """
import os, signal
import numpy as np
from wsiscale.testing import planted_network
def blobs():
    return planted_network(6.0)
def everything(image):
    if image[:4, :4].max() < 60:
        os.kill(os.getpid(), signal.SIGSEGV)
    return np.ones(image.shape[:2], bool)
"""


def write_blobs(path: Path, *, true: float, tag: float | None, seed: int) -> None:
    pixels = planted_slide(3.0 / true, seed=seed, size=1000).read(level=0, y=0, x=0, height=1000, width=1000)
    write_svs(path, pixels, mpp=tag, power=None, levels=(1,), quality=95)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight slides that say their µm/px, one that says twice as much, one that says nothing."""
    folder = tmp_path_factory.mktemp("blobs")
    (folder / "network.py").write_text(NETWORK)
    for seed, true in enumerate(TRUE):
        write_blobs(folder / f"right {seed}.svs", true=true, tag=true, seed=seed)
    write_blobs(folder / "wrong.svs", true=0.25, tag=0.5, seed=20)
    write_blobs(folder / "silent.svs", true=0.25, tag=None, seed=21)
    return folder


@pytest.fixture(scope="module")
def options(slides: Path) -> RunOptions:
    files = {"model": f"{slides / 'network.py'}:blobs", "detector": f"{slides / 'network.py'}:everything"}
    return RunOptions(**files, tile_size=96, places=16, criterion="confidence", pixels="none", tiles=256)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as made,
        Client(made, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def out(slides: Path, options: RunOptions, cluster: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    run_cohort(read_cohort(slides), folder, options, client=cluster)
    return folder


def rows(out: Path) -> dict[str, dict[str, Any]]:
    found = {row["id"]: row for row in map(json.loads, (out / "manifest.jsonl").read_text().splitlines())}
    for row in found.values():
        del row["seconds"]
    return found


def octaves(found: float, truth: float) -> float:
    return abs(float(np.log2(found / truth)))


def test_the_profile_is_made_of_slides_whose_tags_agree_with_each_other(out: Path) -> None:
    references = json.loads((out / "profile.json").read_text())["references"]

    assert sorted(references) == [f"right {seed}" for seed in range(len(TRUE))]
    assert octaves(load_profile(out / "profile.json").optimum or 0, BEST) < 0.1
    assert "profile.json, of this cohort: profile of 8 slides" in (out / "summary.md").read_text()


def test_a_wrong_tag_is_listed_with_both_numbers_and_a_missing_one_is_filled_in(out: Path) -> None:
    found = rows(out)

    assert found["wrong"]["tag"] == "conflicts"
    assert octaves(found["wrong"]["tissue_mpp"], 0.25) < 0.2
    text = (out / "summary.md").read_text()
    assert "## Slides whose tissue contradicts their tag" in text
    assert f"| wrong | 0.5 | {found['wrong']['tissue_mpp']:.3g} (" in text
    assert (found["silent"]["tag"], found["silent"]["mpp_source"]) == ("missing", "estimated")
    assert octaves(open_store(out / "stores" / "silent.ome.zarr").scale, BEST / 0.25) < 0.2
    agreeing = [row["tag"] for name, row in found.items() if name.startswith("right")]
    assert agreeing.count("agrees") == len(TRUE)
    with (out / "manifest.csv").open(newline="") as file:
        assert {row["id"]: row["tag"] for row in csv.DictReader(file)} == {name: row["tag"] for name, row in found.items()}


def test_a_reference_slide_is_held_against_the_others_and_not_against_itself(
    slides: Path, out: Path, options: RunOptions, tmp_path: Path
) -> None:
    """Held against itself, a slide with a wrong tag would agree with it."""
    names = ("right 0", "right 1", "right 4", "right 6", "wrong")
    files = [slides / f"{name}.svs" for name in names]
    how = {"criterion": "confidence", "places": 16, "detector": options.detector}
    made = profile_slides(files, load_network(str(options.model), tile_size=96), **how)
    save_profile(made.profile, tmp_path / "card.json", fields={"references": list(names)})
    held = replace(options, profile=str(tmp_path / "card.json"))

    known = process_slide(SlideSpec("wrong", str(files[-1])), held, tmp_path)
    stranger = process_slide(SlideSpec("a copy", str(files[-1])), held, tmp_path)

    assert known["tag"] == "conflicts"
    assert octaves(known["tissue_mpp"], 0.25) < 0.2
    # The tag that is listed is the file's, and not what the slide was worked at (which it was where tags are not trusted).
    distrusted = process_slide(SlideSpec("wrong", str(files[-1])), replace(held, trust_tag=False), tmp_path / "distrusted")
    assert row_of(distrusted)["tag_mpp"] == 0.5
    assert distrusted["slide_mpp"] == distrusted["tissue_mpp"]
    assert stranger["tag"] == "agrees"  # with what it was told of itself: the promise is one about names
    assert made.profile.without(4).slides == 4


def test_slides_that_come_later_need_no_new_profile(
    slides: Path, out: Path, options: RunOptions, cluster: Client, tmp_path: Path
) -> None:
    shutil.copytree(out, tmp_path / "out")
    shutil.copytree(slides, tmp_path / "slides")
    write_blobs(tmp_path / "slides" / "later.svs", true=0.3, tag=0.3, seed=40)
    asked: list[str] = []

    summary = run_cohort(
        read_cohort(tmp_path / "slides"),
        tmp_path / "out",
        options,
        client=cluster,
        told=lambda event, spec, record: asked.append(event),
    )

    # Folders may be moved: what is done is known by what it was made of, not by where it lies.
    assert (summary.done, summary.resumed) == (1, len(TRUE) + 2)
    assert "asked" not in asked
    assert (tmp_path / "out" / "profile.json").read_bytes() == (out / "profile.json").read_bytes()
    assert summary.profile == "profile.json, of an earlier run"
    assert rows(tmp_path / "out")["later"]["tag"] == "agrees"


@pytest.mark.slow
def test_the_profile_and_all_that_rests_on_it_are_the_same_with_one_worker(
    slides: Path, out: Path, options: RunOptions, tmp_path: Path
) -> None:
    run_cohort(read_cohort(slides), tmp_path, options, workers=1)

    assert (tmp_path / "profile.json").read_bytes() == (out / "profile.json").read_bytes()
    assert rows(tmp_path) == rows(out)


def test_without_enough_tags_each_slide_has_its_own_curve_alone(
    slides: Path, options: RunOptions, cluster: Client, tmp_path: Path
) -> None:
    specs = [spec for spec in read_cohort(slides) if spec.id in ("right 0", "right 1", "silent", "wrong", "right 2")]

    summary = run_cohort(specs, tmp_path / "few", options, client=cluster)
    part = run_cohort(read_cohort(slides)[:6], tmp_path / "part", options, client=cluster, whole=False)

    assert summary.profile is not None
    assert "4 slides of the cohort may be references, and 5 are needed (1 x its µm/px is missing)" in summary.profile
    for folder in ("few", "part"):
        assert not (tmp_path / folder / "profile.json").exists()
        assert {row["tag"] for row in rows(tmp_path / folder).values()} == {None}
    assert part.profile is None
    asked = RunOptions(**{**vars(options), "profile": "cohort"})
    with pytest.raises(OptionError, match="no profile can be made: 4 slides"):
        run_cohort(specs, tmp_path / "few", asked, client=cluster)
    with pytest.raises(OptionError, match="rests on its tags"):
        run_cohort(specs, tmp_path / "few", RunOptions(**{**vars(asked), "trust_tag": False}), client=cluster)


@pytest.mark.slow
def test_a_slide_that_kills_its_worker_is_no_reference_and_costs_only_itself(
    slides: Path, options: RunOptions, tmp_path: Path
) -> None:
    for seed in range(5):
        shutil.copy(slides / f"right {seed}.svs", tmp_path)
    poison = np.full((1000, 1000, 3), 200, np.uint8)
    poison[:256, :256] = 20
    write_svs(tmp_path / "poison.svs", poison, mpp=0.25, power=None, levels=(1,), quality=95)

    summary = run_cohort(read_cohort(tmp_path), tmp_path / "out", options, workers=2)

    found = rows(tmp_path / "out")
    assert (found["poison"]["status"], found["poison"]["code"]) == ("killed", "SIGSEGV")
    assert summary.profile is not None
    assert "profile of 5 slides" in summary.profile
    assert {row["status"] for name, row in found.items() if name != "poison"} == {"ok"}


def test_what_dooms_every_slide_is_said_before_the_first(slides: Path, cluster: Client, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"none\.py"):
        run_cohort(read_cohort(slides), tmp_path / "out", RunOptions(model=str(tmp_path / "none.py") + ":net"), client=cluster)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError) as caught:
        run_cohort(read_cohort(slides), tmp_path / "file", RunOptions(), client=cluster)

    assert caught.value.code == "NOT_WRITABLE"
    assert not list((tmp_path / "out").glob("slides/*"))
