"""What became of a cohort, in files: manifest.csv, manifest.jsonl, summary.md. Made of the slides' own records."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wsiscale.publishing import replacing

STATUSES = ("ok", "partial", "no_tissue", "abstained", "bad_input", "failed", "killed", "locked", "missing")
WENT_WRONG = ("bad_input", "failed", "killed", "locked", "missing")
COLUMNS = (
    *("id", "slide", "status", "code", "mpp", "ci90_low", "ci90_high", "scale", "slide_mpp", "mpp_source", "chosen_by"),
    *(
        "tissue_mpp",
        "tissue_low",
        "tissue_high",
        "tag_mpp",
        "tag",
        "tiles",
        "failed_tiles",
        "megapixels",
        "bytes",
        "forwards",
        "reads",
        "seconds",
    ),
    *("store", "message"),
)
_LISTED = 1000  # slides of each kind in the summary; the manifest has all


@dataclass(frozen=True)
class CohortSummary:
    """What a run of a cohort came to."""

    out: Path
    counts: Mapping[str, int]  # status -> slides, of the whole cohort
    conflicts: int  # slides whose tissue contradicts their tag
    done: int  # slides that this run worked on
    resumed: int  # slides that had been done before
    seconds: float
    profile: str | None  # what slides were registered to, in words

    @property
    def slides(self) -> int:
        return sum(self.counts.values())

    @property
    def failed(self) -> int:
        return sum(self.counts.get(status, 0) for status in WENT_WRONG)

    def sentence(self) -> str:
        parts = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        before = f", {self.resumed} of them done before" if self.resumed else ""
        tags = f"; the tissue of {self.conflicts} contradicts the µm/px of the tag" if self.conflicts else ""
        return f"{self.out}: {self.slides} slide{'' if self.slides == 1 else 's'}{before}: {parts}{tags}; {self.seconds:.0f} s"


@dataclass
class _Seen:
    """What the summary says of the slides that have gone by."""

    counts: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    mpps: list[float] = field(default_factory=list)
    needing: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    tiles: int = 0
    reads: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        self.counts[row["status"]] += 1
        for name in ("tiles", "reads", "seconds", "bytes"):
            setattr(self, name, getattr(self, name) + (row[name] or 0))
        if row["status"] in ("ok", "partial"):
            self.sources[str(row["mpp_source"])] += 1
            if row["mpp"] is not None:
                self.mpps.append(row["mpp"])
        if row["status"] not in ("ok", "no_tissue") and len(self.needing) < _LISTED:
            why = f"{row['status']} {_cell(row['code'])} | {_cell(row['message'])}"
            self.needing.append(f"| {_cell(row['id'])} | {why} |")
        if row["tag"] == "conflicts":
            found = f"{row['tissue_mpp']:.3g} ({row['tissue_low']:.3g} to {row['tissue_high']:.3g})"
            self.conflicts.append(f"| {_cell(row['id'])} | {row['tag_mpp']:.4g} | {found} |")


def write_results(
    out: Path, records: Iterable[Mapping[str, Any]], *, done: int, resumed: int, seconds: float, profile: str | None = None
) -> CohortSummary:
    """manifest.csv, manifest.jsonl and summary.md from the slides' records, each file whole or not at all."""
    seen = _Seen()
    with replacing(out / "manifest.csv") as table, replacing(out / "manifest.jsonl") as lines:
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for record in records:
            row = row_of(record)
            seen.add(row)
            writer.writerow(row)
            lines.write(json.dumps(row, allow_nan=False) + "\n")
    counts = {status: seen.counts[status] for status in STATUSES if seen.counts[status]}
    summary = CohortSummary(out, counts, len(seen.conflicts), done, resumed, seconds, profile)
    with replacing(out / "summary.md") as file:
        file.write("\n".join(_summary(summary, seen)) + "\n")
    return summary


def row_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a line of the manifest."""
    row = {name: record.get(name) for name in COLUMNS}
    for name in ("ci90", "tissue"):
        low, high = record.get("tissue_ci90" if name == "tissue" else name) or (None, None)
        row |= {f"{name}_low": low, f"{name}_high": high}
    return row


def _summary(summary: CohortSummary, seen: _Seen) -> Iterator[str]:
    """Counts, the estimates' distribution, and every slide that needs a person."""
    yield from (
        f"# {summary.out.name}",
        "",
        summary.sentence().partition(": ")[2] + ".",
        "",
        "| status | slides |",
        "|---|---|",
    )
    yield from (f"| {status} | {count} |" for status, count in summary.counts.items())
    if seen.mpps:
        low, middle, high = np.percentile(seen.mpps, [5, 50, 95])
        yield from ("", f"Written at {middle:.3g} µm/px in the median; 90 % of the slides between {low:.3g} and {high:.3g}.")
    if seen.sources:
        yield from ("", "µm/px from: " + ", ".join(f"{source} ({count})" for source, count in seen.sources.most_common()) + ".")
    if summary.profile is not None:
        yield from ("", f"Profile: {summary.profile}.")
    if seen.seconds:
        yield ""
        yield (
            f"{seen.tiles} tiles, {seen.bytes / 1e9:.3g} GB; {seen.seconds:.0f} worker-seconds, {seen.reads} reads of slides "
            f"({seen.reads / seen.seconds:.0f} a second and worker)."
        )
    if seen.conflicts:
        yield from ("", "## Slides whose tissue contradicts their tag", "")
        yield from ("| slide | tag, µm/px | tissue, µm/px (90 %) |", "|---|---|---|", *seen.conflicts)
    if seen.needing:
        yield from ("", "## Slides to look at", "", "| slide | status | why |", "|---|---|---|", *seen.needing)


def _cell(value: object) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
