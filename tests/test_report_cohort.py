"""A cohort's page says what the manifest and the records say, links to the slides' pages, and needs no slide."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from reports import HOSTILE, Page, made_up_cohort, small_slide

from wsiscale.cli import main
from wsiscale.cohort.one_slide import RunOptions, process_slide, read_record, write_record
from wsiscale.cohort.records import write_results
from wsiscale.errors import StoreError
from wsiscale.report.cohort import HEADINGS, without_folders, write_cohort_page
from wsiscale.report.pages import number

QUICK = RunOptions(
    places=8,
    precision=None,
    mpp_range=(0.35, 1.4),
    profile=None,
    criterion="confidence",
    on_abstain="fixed:0.5",
    report=True,
    pixels="none",
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    made_up_cohort(tmp_path / "out")
    return tmp_path / "out"


def page_of(out: Path, **options: Any) -> Page:
    return Page(write_cohort_page(out, **options).read_text())


def test_the_table_is_the_manifest(out: Path) -> None:
    rows = page_of(out).rows("slides")

    manifest = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert rows[0] == [heading.name for heading in HEADINGS]
    assert len(rows) == 1 + len(manifest)
    for cells, line in zip(rows[1:], manifest, strict=True):
        shown = dict(zip((heading.key for heading in HEADINGS), cells, strict=True))
        for name in ("id", "status", "code", "tag", "mpp_source", "chosen_by"):
            assert shown[name] == (line[name] or ""), name
        for name in ("mpp", "tissue_mpp", "tiles", "failed_tiles", "seconds"):
            assert shown[name] == number(line[name]), name
        if line["ci90_low"] is not None:
            assert shown["interval"] == f"{number(line['ci90_low'])} to {number(line['ci90_high'])}"


def test_what_needs_a_person_is_listed_with_its_numbers(out: Path) -> None:
    page = page_of(out)

    assert "0.52 (0.45 to 0.6)" in page.text  # of the tissue; the tag
    assert "+1.06" in page.text  # log2(0.52 / 0.25)
    lists = page.text.partition("All slides")[0]
    assert "far from the others" in lists
    assert lists.count("s0 1 0.9 to 1.1") == 1
    for code in ("flat_curve", "NOT_FOUND", "no_tissue", "DAMAGED"):
        assert code in lists
    assert "The metadata of 1 slide is contradicted" in lists
    assert "1 slide went wrong" in lists
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert page.value("median") == pytest.approx(statistics.median(row["mpp"] for row in rows if row["mpp"] is not None))
    assert "net" in page.text
    assert "14 slides" in page.text
    assert "1.40 GB" in page.text


def test_names_with_markup_stay_names_and_folders_stay_away(out: Path) -> None:
    html = write_cohort_page(out).read_text()

    page = Page(html)
    assert HOSTILE in page.text
    assert len(page.all("script")) == 1  # the page's own, which its policy names by its digest
    assert not page.all("b")
    assert "Jane" not in html
    assert "s3.svs does not exist" in page.text
    assert str(out.parent) not in html


@pytest.mark.parametrize(
    ("message", "left"),
    [
        ("/data/Jane Doe/s.svs does not exist; check the path", "s.svs does not exist; check the path"),
        ("slides/Jane Doe/s.svs: 'Bad tile'", "s.svs: 'Bad tile'"),
        (r"C:\Users\Jane Doe\s.svs is empty", "s.svs is empty"),
        ("cannot open '/data/Jane/s.svs' (code 3)", "cannot open 's.svs' (code 3)"),
        ("/out/stores/x.ome.zarr cannot be written", "x.ome.zarr cannot be written"),
        ("the best is 0.5 µm/px, 1/2 of it; see docs", "the best is 0.5 µm/px, 1/2 of it; see docs"),
        ("0.0025 µm/px (aperio.MPP) is outside of 0.02 to 20", "0.0025 µm/px (aperio.MPP) is outside of 0.02 to 20"),
    ],
)
def test_a_message_loses_the_folders_of_its_paths(message: str, left: str) -> None:
    assert without_folders(message, "s.svs") == left


def test_pages_are_linked_where_they_are_from_wherever_the_page_is(out: Path, tmp_path: Path) -> None:
    for name in ("s5", "%3Cscript%3E", "s8"):
        record = read_record(out, name)
        assert record is not None
        write_record(out, {**record, "page": f"report/slides/{name}.html"})
    for name in ("s5", "%3Cscript%3E"):  # of s8 the page is gone, of s9 nobody knows any more
        (out / "report" / "slides").mkdir(parents=True, exist_ok=True)
        (out / "report" / "slides" / f"{name}.html").write_text("a page")
    (out / "report" / "slides" / "s9.html").write_text("of an older run")

    for into in (None, tmp_path / "else" / "where"):
        path = write_cohort_page(out, into)
        links = {a["href"] or "" for a, _ in Page(path.read_text()).all("a")}
        linked = {Path(os.path.normpath(path.parent / unquote(link))) for link in links if not link.startswith("#")}
        assert linked == {out / "report" / "slides" / f"{name}.html" for name in ("s5", "%3Cscript%3E")}


def test_records_alone_will_do_and_nothing_is_an_error(out: Path, tmp_path: Path) -> None:
    whole = page_of(out).rows("slides")
    (out / "manifest.jsonl").unlink()

    assert sorted(page_of(out).rows("slides")) == sorted(whole)
    with pytest.raises(StoreError, match="wsiscale run") as error:
        write_cohort_page(tmp_path / "nowhere")
    assert error.value.code == "NOT_A_COHORT"
    (out / "manifest.jsonl").write_text("[1, 2]\n")
    with pytest.raises(StoreError, match="line 1"):
        write_cohort_page(out)


def test_a_cohort_without_any_answer_has_a_page(tmp_path: Path) -> None:
    nothing = [
        {"schema": 1, "id": f"s{n}", "slide": f"s{n}.svs", "status": "missing", "message": "not done yet"} for n in range(2)
    ]
    write_results(tmp_path, nothing, done=0, resumed=0, seconds=0.0)

    page = page_of(tmp_path)

    assert "No slide has an estimate" in page.text
    assert len(page.rows("slides")) == 3


@pytest.mark.slow
def test_five_thousand_slides_are_a_page_of_some_megabytes(tmp_path: Path) -> None:
    made_up_cohort(tmp_path, slides=5000)

    html = write_cohort_page(tmp_path).read_text()

    assert html.count('<tr id="slide-') == 5000
    assert len(html) < 8_000_000


# --- run --report --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"id": "one", "path": str(small_slide(tmp_path_factory.mktemp("slides") / "one.svs", side=600))}


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry an estimate."""
    import wsiscale.estimation as estimation

    counted: list[int] = []
    real = estimation.estimate

    def estimate(*args: Any, **options: Any) -> Any:
        counted.append(1)
        return real(*args, **options)

    monkeypatch.setattr(estimation, "estimate", estimate)
    return counted


def test_a_slide_of_a_cohort_gets_its_page_once(slide: dict[str, Any], tmp_path: Path, estimates: list[int]) -> None:
    first = process_slide(slide, QUICK, tmp_path)
    page = tmp_path / "report" / "slides" / "one.html"
    before = page.stat().st_mtime_ns

    again = process_slide(slide, QUICK, tmp_path)

    assert first["page"] == again["page"] == "report/slides/one.html"
    assert Page(page.read_text()).all("h1")[0][1] == "one.svs"
    assert again["resumed"]
    assert page.stat().st_mtime_ns == before
    assert len(estimates) == 1
    page.unlink()  # as if it had not been asked for
    assert process_slide(slide, RunOptions(**{**vars(QUICK), "report": False}), tmp_path)["resumed"]
    assert not process_slide(slide, QUICK, tmp_path)["resumed"]
    assert page.is_file()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_page_that_cannot_be_written_is_noted_and_costs_nothing(
    slide: dict[str, Any], tmp_path: Path, estimates: list[int]
) -> None:
    (tmp_path / "report").write_text("a file where the folder should be")

    record = process_slide(slide, QUICK, tmp_path)
    again = process_slide(slide, QUICK, tmp_path)

    assert record["status"] == "ok"
    assert "cannot be written" in record["no_page"]
    assert "page" not in record
    assert "has no page" in (tmp_path / "logs" / "one.log").read_text()
    assert again["resumed"]
    assert len(estimates) == 1


@pytest.mark.slow
def test_a_bug_in_a_page_does_not_hide(slide: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("wsiscale.report.slide.write_slide_page", broken)

    record = process_slide(slide, QUICK, tmp_path)

    assert (record["status"], record["code"]) == ("failed", "UNEXPECTED")
    assert "ZeroDivisionError" in (tmp_path / "logs" / "one.log").read_text()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        return (code, *capsys.readouterr())

    return run


def test_report_writes_the_page_and_says_where(cli: Any, out: Path, tmp_path: Path) -> None:
    code, said, _ = cli("report", str(out), "-o", str(tmp_path / "pages"))

    assert code == 0
    assert said.strip() == str(tmp_path / "pages" / "index.html")
    assert (tmp_path / "pages" / "index.html").is_file()


def test_report_of_what_is_no_cohort_is_one_line(cli: Any, tmp_path: Path) -> None:
    code, said, err = cli("report", str(tmp_path))

    assert (code, said) == (1, "")
    assert err.count("\n") == 1
    assert "wsiscale run" in err
