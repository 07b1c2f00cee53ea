"""Cohorts and pages that several test files look at."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

import wsiscale as ws
from wsiscale.cohort.one_slide import write_record
from wsiscale.cohort.records import write_results
from wsiscale.report.slide import write_slide_page
from wsiscale.responses import SavedResponse
from wsiscale.testing.procedural import tissue
from wsiscale.testing.slides import write_svs
from wsiscale.types import ScaleEstimate

HOSTILE = '<script>alert("x")</script>&<b>'


class Page(HTMLParser):
    """A page's elements: (tag, attributes, text inside)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in ("meta", "link", "img", "input", "br", "col"):
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "dt", "dd"):
            self.handle_data(" ")
        while self.open and self.elements[self.open.pop()][0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for number in self.open:
            self.elements[number][2].append(data)

    def all(self, tag: str, **having: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, " ".join("".join(text).split()))
            for name, attributes, text in self.elements
            if name == tag and all(attributes.get(key.rstrip("_")) == value for key, value in having.items())
        ]

    def value(self, name: str) -> float:
        """Of <data id=name value=...>."""
        ((attributes, _),) = self.all("data", id=name)
        return float(attributes["value"] or "nan")

    @property
    def text(self) -> str:
        return self.all("body")[0][1]

    def rows(self, table: str) -> list[list[str]]:
        """Of the table with this id, its cells' text."""
        start = next(n for n, (tag, attributes, _) in enumerate(self.elements) if attributes.get("id") == table)
        rows: list[list[str]] = []
        for tag, _, text in self.elements[start + 1 :]:
            if tag == "table":
                break
            if tag == "tr":
                rows.append([])
            elif tag in ("td", "th"):
                rows[-1].append(" ".join("".join(text).split()))
        return rows


def page_of(slide: Path, page: Path, model: str | None = None, **options: Any) -> ScaleEstimate:
    """The estimate of a slide, and its page."""
    heard: list[SavedResponse] = []
    with ws.open_slide(slide, mpp=options.pop("mpp", None)) as opened:
        network = ws.load_network(model)
        found = ws.estimate(opened, network, answered=heard.append, **options)
        write_slide_page(page, opened, network, found, heard[0] if heard else None)
    return found


def small_slide(path: Path, *, mpp: float | None = 0.35, true_mpp: float = 0.35, seed: int = 0, side: int = 800) -> Path:
    image, _ = tissue(side, side, mpp=true_mpp, seed=seed)
    write_svs(path, image, mpp=mpp, power=None, levels=(1, 4))
    return path


def made_up_cohort(out: Path, *, slides: int = 14) -> list[dict[str, Any]]:
    """The manifest and records of a cohort of which nothing else is there, with one slide of each kind."""
    rng = np.random.default_rng(0)
    mpps = 0.5 * np.exp2(rng.normal(0, 0.04, slides))
    records: list[dict[str, Any]] = []
    for number, mpp in enumerate(mpps.tolist()):
        record: dict[str, Any] = {
            "schema": 1,
            "id": f"s{number}",
            "slide": f"s{number}.svs",
            "status": "ok",
            "chosen_by": "estimate",
            "mpp": mpp,
            "ci90": [mpp * 0.9, mpp * 1.1],
            "slide_mpp": 0.25,
            "mpp_source": "metadata",
            "tag": "agrees",
            "tag_mpp": 0.25,
            "tissue_mpp": 0.26,
            "tissue_ci90": [0.22, 0.3],
            "tiles": 100 + number,
            "failed_tiles": 0,
            "megapixels": 1234.5,
            "bytes": 10**8,
            "forwards": 800,
            "reads": 900,
            "seconds": 9.0 + number,
            "store": f"stores/s{number}.ome.zarr",
            "estimate": {"model": "net", "criterion": "consensus", "seed": 0, "versions": {"wsiscale": "0.1.0", "torch": "2"}},
        }
        records.append(record)
    none = {**dict.fromkeys(("mpp", "ci90", "tissue_mpp", "tissue_ci90", "tiles", "chosen_by", "tag")), "megapixels": None}
    records[0] |= {"mpp": 1.0, "ci90": [0.9, 1.1]}  # far from the others
    records[1] |= {"tag": "conflicts", "tissue_mpp": 0.52, "tissue_ci90": [0.45, 0.6]}
    records[2] |= {**none, "status": "abstained", "code": "flat_curve", "message": "the score does not change"}
    records[3] |= {**none, "status": "bad_input", "code": "NOT_FOUND", "message": "/data/Jane Doe/s3.svs does not exist"}
    records[4] |= {**none, "status": "no_tissue", "code": "no_tissue", "message": "nothing looks like tissue"}
    records[5] |= {"status": "partial", "code": "DAMAGED", "message": "3 of 105 tiles", "failed_tiles": 3}
    records[6] |= {"id": "%3Cscript%3E", "slide": HOSTILE, "message": HOSTILE}
    records[7] |= {"mpp": None, "ci90": None, "scale": 2.0, "slide_mpp": None, "mpp_source": "none", "tag_mpp": None}
    for record in records:
        write_record(out, record)
    write_results(out, records, done=len(records), resumed=0, seconds=100.0)
    return records


def twelve_slides(folder: Path, samples: Path, real: Path | None) -> Path:
    """Slides that end in every way: ok, abstained, no tissue, no slide, a tag that the tissue contradicts."""
    folder.mkdir()
    for seed in range(4):
        small_slide(folder / f"good {seed}.svs", seed=seed, side=1200)
    small_slide(folder / "contradicted.svs", mpp=0.5, true_mpp=0.25, seed=9, side=1600)
    small_slide(folder / "no mpp.svs", mpp=None, seed=10, side=1200)
    small_slide(folder / "implausible.svs", mpp=0.0025, seed=11, side=600)
    write_svs(folder / "glass.svs", np.full((600, 600, 3), 242, np.uint8), mpp=0.5, power=20, levels=(1, 4))
    noise = np.random.default_rng(0).normal([200, 120, 180], 35, (900, 900, 3))
    write_svs(folder / "noise.svs", np.clip(noise, 0, 255).astype(np.uint8), mpp=0.5, power=20, levels=(1, 4))
    (folder / "<script>alert(1)<b>.svs").write_bytes(b"not a slide " * 300)
    (folder / "empty.svs").write_bytes(b"")
    last = samples / "tissue_mpp0.25.svs" if real is None else real / "slides" / "CMU-1-Small-Region.svs"
    shutil.copy(last, folder)
    return folder
