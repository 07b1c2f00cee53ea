"""The page of a cohort: what became of every slide, from the manifest and the records alone; no slide has to be there.

Sorting and filtering are some forty lines of plain script in templates/table.js: what a library for tables would bring (paging,
editing, fetching) is not wanted here, and would be the larger part of the page. Without the script the table is a table.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from wsiscale.cohort.one_slide import read_record
from wsiscale.cohort.records import COLUMNS, STATUSES, WENT_WRONG, row_of
from wsiscale.errors import StoreError
from wsiscale.publishing import in_bytes
from wsiscale.report.figures import estimates_plot, tags_plot
from wsiscale.report.pages import number, write_page
from wsiscale.report.slide import REASONS

INDEX = "index.html"
MEANS = {
    "ok": "written",
    "partial": "written, but for what the slide is damaged under",
    "no_tissue": "nothing to look at",
    "abstained": "no best magnification there; not written",
    "bad_input": "no slide, or a µm/px that cannot be right",
    "failed": "something else: disk full, too much damage, too slow, a bug",
    "killed": "reading it ended its process twice; the code is the signal",
    "locked": "another run is writing it",
    "missing": "not begun",
}

# Octaves from the median; and so many times what half of the slides lie within, if that is more (3.5 standard deviations, the
# usual limit for medians: Iglewicz & Hoaglin 1993).
_OUTLYING, _TIMES = 0.25, 3.5 / 0.6745
_LISTED = 100  # slides in each short list; the table has all

_START = r"(?:^|(?<=[\s'\"(:=]))"  # where a path may begin


@dataclass(frozen=True)
class Heading:
    """One column of the table."""

    name: str
    key: str  # in the rows
    numeric: bool = False
    says: str = ""


HEADINGS = (
    Heading("Slide", "id"),
    Heading("Status", "status"),
    Heading("Code", "code"),
    Heading("Best µm/px", "mpp", numeric=True),
    Heading("90 % interval", "interval", numeric=True),
    Heading("Tag µm/px", "tag_mpp", numeric=True),
    Heading("Tissue µm/px", "tissue_mpp", numeric=True),
    Heading("Tag", "tag"),
    Heading("µm/px from", "mpp_source"),
    Heading("Chosen by", "chosen_by"),
    Heading("Tiles", "tiles", numeric=True),
    Heading("Damaged", "failed_tiles", numeric=True),
    Heading("Megapixels", "megapixels", numeric=True),
    Heading("Seconds", "seconds", numeric=True),
    Heading("Message", "message"),
)


def write_cohort_page(out: str | os.PathLike[str], into: str | os.PathLike[str] | None = None) -> Path:
    """What `run` recorded below `out` as one HTML file: `into`/index.html, or out/report/index.html; returns its path.

    Slides' own pages are linked where they are. Raises StoreError where `out` is no cohort, or the page cannot be written.
    """
    folder = Path(out)
    path = Path(into) / INDEX if into is not None else folder / "report" / INDEX
    rows, made = _read(folder)
    for at, row in enumerate(rows):
        there = row["page"] is not None and (folder / row["page"]).is_file()
        row["page"] = _relative(folder / row["page"], path.parent) if there else None
        row["anchor"] = f"slide-{at}"
        row["message"] = (
            None
            if row["message"] is None
            else without_folders(str(row["message"]).replace(f"{folder.absolute()}{os.sep}", ""), str(row["slide"]))
        )
    counts = Counter(row["status"] for row in rows)
    answers = [row for row in rows if row["mpp"] is not None and row["chosen_by"] == "estimate"]
    mpps = np.array([row["mpp"] for row in answers])
    both = [row for row in rows if row["tag_mpp"] is not None and row["tissue_mpp"] is not None]
    codes = Counter((row["status"], row["code"] or "") for row in rows if row["status"] != "ok")
    write_page(
        path,
        "cohort.html",
        title=folder.resolve().name,
        rows=rows,
        headings=HEADINGS,
        counts=[(status, counts[status], MEANS.get(status, "")) for status in _ordered(counts)],
        wrong=sum(counts[status] for status in WENT_WRONG),
        codes=[(*of, count, _help(*of)) for of, count in codes.most_common()],
        spread=[float(q) for q in np.percentile(mpps, [5, 50, 95])] if len(mpps) else None,
        answers=len(answers),
        relative=sum(row["mpp"] is None and row["scale"] is not None for row in rows),
        estimates_plot=estimates_plot(mpps, median=float(np.median(mpps))) if len(mpps) else None,
        outliers=_outliers(answers, mpps)[:_LISTED],
        conflicts=list(_conflicts(rows))[:_LISTED],
        compared=len(both),
        tags_plot=_tags_plot(both),
        totals=list(_totals(rows)),
        made=made,
    )
    return path


def without_folders(message: str, name: str) -> str:
    """A message without the folders in it, which may be named after people. `name` is the slide's own file name."""
    if name:  # up to which everything goes that may be a path, spaces in folders included
        message = re.sub(rf"{_START}(?!µm/px)(?:[A-Za-z]:)?[^\s'\"(:=]*[/\\].*?(?={re.escape(name)})", "", message)
    return re.sub(rf"{_START}(?:[A-Za-z]:)?\.{{0,2}}[/\\](?:[^\s'\"):;,/\\]+[/\\])*", "", message)


def _read(out: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The manifest's rows, with what only records have, and how the cohort was made. Raises StoreError."""
    manifest = out / "manifest.jsonl"
    if manifest.is_file():
        rows = [_row(line, at, manifest) for at, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1)]
    else:  # slides that were done one by one
        names = sorted(path.stem for path in out.glob("slides/*.json"))
        rows = [row_of(record) for name in names if (record := read_record(out, name)) is not None]
    if not rows:
        what = "has neither a manifest nor records; give the folder that wsiscale run wrote"
        raise StoreError(f"{out} {what}", code="NOT_A_COHORT")
    made: dict[str, Counter[str]] = {name: Counter() for name in ("Network", "Criterion", "Seed", "wsiscale", "torch")}
    for row in rows:
        record = read_record(out, row["id"]) or {}
        estimate = record.get("estimate") or {}
        for name, value in (
            ("Network", estimate.get("model")),
            ("Criterion", estimate.get("criterion")),
            ("Seed", estimate.get("seed")),
            *((name, estimate.get("versions", {}).get(name)) for name in ("wsiscale", "torch")),
        ):
            if value is not None:
                made[name][str(value)] += 1
        by_metadata = row["slide_mpp"] if row["mpp_source"] in ("metadata", "override") else None
        row["page"] = record.get("page")
        row["tag_mpp"] = record.get("tag_mpp") or by_metadata
        low, high = row["ci90_low"], row["ci90_high"]
        row["interval"] = "" if low is None or high is None else f"{number(low)} to {number(high)}"
    return rows, [(name, ", ".join(_counted(values))) for name, values in made.items() if values]


def _relative(page: Path, folder: Path) -> str:
    """The address of `page` from `folder`."""
    return quote(Path(os.path.relpath(page.absolute(), folder.absolute())).as_posix())


def _counted(values: Counter[str]) -> list[str]:
    """What was used, the most used first, with how often where that is not always the same."""
    return [value if len(values) == 1 else f"{value} ({count})" for value, count in values.most_common()]


def _row(line: str, at: int, manifest: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        return {name: row.get(name) for name in COLUMNS}
    except (ValueError, AttributeError) as error:
        what = f"line {at} of {manifest} is no row of a manifest: {error}; run the cohort again"
        raise StoreError(what, code="DAMAGED") from error


def _ordered(counts: Mapping[str, int]) -> list[str]:
    return sorted(counts, key=lambda status: (STATUSES.index(status) if status in STATUSES else len(STATUSES), status))


def _help(status: str, code: str) -> str:
    """What a code means, and what to do."""
    if code in REASONS:
        what, todo = REASONS[code]
        return f"{what[0].upper()}{what[1:]}. {todo}"
    means = MEANS.get(status, "")
    return f"{means[:1].upper()}{means[1:]}." if means else ""


def _outliers(answers: Sequence[dict[str, Any]], mpps: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Slides far from the cohort's median, the furthest first."""
    if len(mpps) < 3:
        return []
    octaves = np.log2(mpps / np.median(mpps))
    limit = max(_OUTLYING, _TIMES * float(np.median(np.abs(octaves))))
    far = [number_ for number_ in np.argsort(-np.abs(octaves), kind="stable").tolist() if abs(octaves[number_]) > limit]
    return [{**answers[number_], "octaves": float(octaves[number_])} for number_ in far]


def _conflicts(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Slides whose metadata is contradicted, with both numbers where there are two."""
    for row in rows:
        if row["tag"] == "conflicts":
            tissue = f"{number(row['tissue_mpp'])} ({number(row['tissue_low'])} to {number(row['tissue_high'])})"
            apart = math.log2(row["tissue_mpp"] / row["tag_mpp"]) if row["tag_mpp"] else None
            yield {**row, "says": tissue, "octaves": apart, "why": "the tissue contradicts the tag"}
        elif row["code"] in ("metadata_conflict", "MPP_IMPLAUSIBLE"):
            yield {**row, "says": "", "octaves": None, "why": row["message"]}


def _tags_plot(both: Sequence[dict[str, Any]]) -> Any:
    if not both:
        return None
    tags, tissue = (np.array([row[name] for row in both]) for name in ("tag_mpp", "tissue_mpp"))
    return tags_plot(tags, tissue, np.array([row["tag"] == "conflicts" for row in both]))


def _totals(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    names = ("tiles", "failed_tiles", "megapixels", "bytes", "seconds", "forwards")
    total = {name: sum(row[name] or 0 for row in rows) for name in names}
    size = f"{number(total['megapixels'])} megapixels, {in_bytes(total['bytes'])}"
    yield "Written", f"{number(total['tiles'])} tiles, {size}"
    if total["failed_tiles"]:
        yield "Damaged", f"{number(total['failed_tiles'])} tiles, which are white"
    yield "Asked", f"{number(total['forwards'])} tiles of the network"
    each = f", {number(total['seconds'] / len(rows))} s a slide" if rows else ""
    yield "Worked", f"{_duration(total['seconds'])} of all workers{each}"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{number(seconds / length)} {unit}"
    return f"{number(seconds)} s"
