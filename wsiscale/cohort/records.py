"""What became of a cohort, in files: manifest.csv, manifest.jsonl, summary.md. Made of the slides' own records."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STATUSES = ("ok", "no_tissue", "abstained", "bad_input", "failed", "killed", "locked", "missing")
COLUMNS = (
    *("id", "slide", "status", "code", "mpp", "ci90_low", "ci90_high", "scale", "slide_mpp", "mpp_source", "chosen_by"),
    *("tiles", "bytes", "forwards", "seconds", "store", "message"),
)


@dataclass(frozen=True)
class CohortSummary:
    """What a run of a cohort came to."""

    out: Path
    counts: Mapping[str, int]  # status -> slides, of the whole cohort
    done: int  # slides that this run worked on
    resumed: int  # slides that had been done before
    seconds: float

    @property
    def slides(self) -> int:
        return sum(self.counts.values())

    @property
    def failed(self) -> int:
        return sum(self.counts.get(status, 0) for status in ("bad_input", "failed", "killed", "locked", "missing"))

    def sentence(self) -> str:
        parts = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        before = f", {self.resumed} of them done before" if self.resumed else ""
        return f"{self.out}: {self.slides} slide{'' if self.slides == 1 else 's'}{before}: {parts}; {self.seconds:.0f} s"


def row_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a line of the manifest."""
    low, high = record.get("ci90") or (None, None)
    return {name: record.get(name) for name in COLUMNS} | {"ci90_low": low, "ci90_high": high}


def write_manifest(out: Path, rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """manifest.csv and manifest.jsonl, each whole or not at all; returns the number of slides by status."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    lines = []
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["status"]] += 1
        writer.writerow(row)
        lines.append(json.dumps(dict(row), allow_nan=False))
    _replace(out / "manifest.csv", table.getvalue())
    _replace(out / "manifest.jsonl", "".join(f"{line}\n" for line in lines))
    return {status: counts[status] for status in STATUSES if counts[status]}


def write_summary(out: Path, rows: Sequence[Mapping[str, Any]], summary: CohortSummary) -> None:
    """summary.md: counts, the estimates' distribution, and every slide that needs a person."""
    answered = [float(row["mpp"]) for row in rows if row["status"] == "ok" and row.get("mpp") is not None]
    text = [f"# {out.name}", "", summary.sentence().partition(": ")[2] + ".", "", "| status | slides |", "|---|---|"]
    text += [f"| {status} | {count} |" for status, count in summary.counts.items()]
    if answered:
        low, middle, high = np.percentile(answered, [5, 50, 95])
        text += ["", f"Written at {middle:.3g} µm/px in the median; 90 % of the slides between {low:.3g} and {high:.3g}."]
    sources = Counter(str(row.get("mpp_source")) for row in rows if row["status"] == "ok")
    if sources:
        text += ["", "µm/px from: " + ", ".join(f"{source} ({count})" for source, count in sources.most_common()) + "."]
    needing = [row for row in rows if row["status"] not in ("ok", "no_tissue")]
    if needing:
        text += ["", "## Slides to look at", "", "| slide | status | why |", "|---|---|---|"]
        text += [
            f"| {_cell(row['id'])} | {row['status']} {_cell(row.get('code'))} | {_cell(row.get('message'))} |"
            for row in needing
        ]
    _replace(out / "summary.md", "\n".join(text) + "\n")


def _cell(value: object) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
