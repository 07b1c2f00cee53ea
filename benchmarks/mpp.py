"""How well the true µm/px of a slide is told from its pixels, on real tissue that nothing was trained on.

    python -m benchmarks.mpp [--data DATA] [--cache FOLDER] [--write docs/slide-mpp.md]

DATA ($WSISCALE_DATA) holds slides/ and patches/. Each image is asked as it is and read again at 1/2, 0.7, 1.4, 2 and 2.8 times
its µm/px, without a tag: coarser copies are area means, finer ones bicubic. Halves are those of docs/profiles.md: what was
developed on, and what was only reported on. With --write the tables replace those between the markers of that page.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import wsiscale as ws
from benchmarks.recovery.real import MONUSEG, monuseg_mpp
from benchmarks.recovery.tables import markdown
from wsiscale.slide_mpp import as_record, find_mpp
from wsiscale.tissue import find_tissue
from wsiscale.upsampling import find_upsampling

ROOT = Path(__file__).parents[1]
FACTORS = (1.0, 0.5, 0.7, 1.4, 2.0, 2.8)  # of the image's µm/px
OPINIONS = ("registration", "regression", "nuclei")
SPLIT = json.loads((ROOT / "benchmarks/recovery/split.json").read_text())
DEVELOPED_ON = {"CMU-1", "OS-1"} | {
    name for family in SPLIT["families"].values() for name in family.get("slides", {}).get("develop", [])
}
MARKS = ("<!-- measured -->", "<!-- end -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("WSISCALE_DATA", ROOT.parent / "shared" / "data")))
    parser.add_argument("--cache", type=Path, help="folder for what was found, to go on from")
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    options = parser.parse_args()

    rows = [row for name, image, mpp in images(options.data) for row in asked(name, image, mpp, options.cache)]
    text = "\n\n".join([accuracy(rows), by_factor(rows), upsampled(options.data), special(options.data)])
    print(text)
    if options.write is not None:
        page = options.write.read_text(encoding="utf-8")
        before, rest = page.split(MARKS[0])
        options.write.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


def images(data: Path) -> Iterator[tuple[str, NDArray[np.uint8], float]]:
    """(name, pixels, µm/px)"""
    for name, file, mpp in (("CMU-1", "CMU-1-Small-Region.svs", 0.499), ("OS-1", "OS-1-detail.ome.tif", 0.2271)):
        with ws.open_slide(data / "slides" / file) as slide:
            height, width = slide.pyramid.shape
            yield name, slide.read(level=0, y=0, x=0, height=height, width=width), mpp
    for file in sorted((data / "patches" / "instanseg_he").glob("*.tif*")):
        yield "instanseg", np.asarray(Image.open(file).convert("RGB")), 0.5001
    tiles = [np.asarray(Image.open(file).convert("RGB")) for file in sorted((data / "patches/crc_val_he_7k").rglob("*.*g"))]
    tiles = tiles or [
        np.asarray(Image.open(file).convert("RGB")) for file in sorted((data / "patches/crc_val_he_7k").rglob("*.tif"))
    ]
    # 32 tiles of as many patients, laid side by side: no slide, but all there is of the set.
    yield "CRC-VAL", np.concatenate([np.concatenate(tiles[i : i + 8], axis=1) for i in range(0, 32, 8)]), 0.5
    for name in MONUSEG:
        file = next((data / "patches" / "monuseg" / "images").glob(f"{name}*.png"))
        yield name, np.asarray(Image.open(file).convert("RGB")), monuseg_mpp(name)


def asked(name: str, image: NDArray[np.uint8], mpp: float, cache: Path | None) -> Iterator[dict[str, Any]]:
    """What `find_mpp` says of the image at each factor."""
    for factor in FACTORS:
        kept = None if cache is None else cache / f"{name}-{factor}.json"
        if kept is not None and kept.exists():
            yield json.loads(kept.read_text())
            continue
        pixels = image if factor == 1 else resized(image, 1 / factor)
        found = as_record(find_mpp(ws.ArrayReader(pixels, name=name), seed=0))
        row = {"name": name, "factor": factor, "truth": mpp * image.shape[0] / pixels.shape[0], "found": found}
        print(f"{name} at {row['truth']:.3f} µm/px: {found['mpp']} {found['detail']}", flush=True)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(row))
        yield row


def resized(image: NDArray[np.uint8], times: float, how: Image.Resampling | None = None) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    how = how or (Image.Resampling.BICUBIC if times > 1 else Image.Resampling.BOX)
    return np.asarray(Image.fromarray(image).resize((round(width * times), round(height * times)), how))


def accuracy(rows: list[dict[str, Any]]) -> str:
    """By opinion and half: how many answer, how far they are off, how often the interval holds the truth."""
    halves = {
        "all": rows,
        "developed on": [row for row in rows if row["name"] in DEVELOPED_ON],
        "reported on": [row for row in rows if row["name"] not in DEVELOPED_ON],
    }
    lines = []
    for half, some in halves.items():
        for opinion in ("joined", *OPINIONS):
            said = [(row["truth"], answer(row, opinion)) for row in some]
            lines.append([half, f"**{opinion}**" if opinion == "joined" else opinion, *told(said)])
    columns = ["images and copies", "opinion", "answered", "median, 90 % of errors", "bias", "90 % interval holds", "its width"]
    return markdown(columns, lines)


def by_factor(rows: list[dict[str, Any]]) -> str:
    lines = []
    for factor in sorted(FACTORS):
        said = [(row["truth"], answer(row, "joined")) for row in rows if row["factor"] == factor]
        lines.append([f"x{factor:g}", *told(said)])
    columns = ["µm/px", "answered", "median, 90 % of errors", "bias", "90 % interval holds", "its width"]
    return markdown(columns, lines)


Answer = tuple[float, tuple[float, float]] | None


def answer(row: dict[str, Any], opinion: str) -> Answer:
    found = row["found"]
    if opinion != "joined":
        found = next((o for o in found["opinions"] if o["name"] == opinion), {"mpp": None})
    return None if found["mpp"] is None else (found["mpp"], tuple(found["ci90"]))


def told(said: list[tuple[float, Answer]]) -> list[str]:
    answers = [(truth, *answer) for truth, answer in said if answer is not None]
    if not answers:
        return [f"0 of {len(said)}", "", "", "", ""]
    off = np.array([np.log2(mpp / truth) for truth, mpp, _ in answers])
    held = np.array([lo <= truth <= hi for truth, _, (lo, hi) in answers])
    width = np.array([np.log2(hi / lo) for _, _, (lo, hi) in answers])
    return [
        f"{len(off)} of {len(said)}",
        f"{np.median(np.abs(off)):.2f}, {np.percentile(np.abs(off), 90):.2f}",
        f"{np.median(off):+.2f}",
        f"{held.mean():.0%}",
        f"{np.median(width):.2f}",
    ]


def upsampled(data: Path) -> str:
    """What the spectrum says of the images, and of copies that were interpolated."""
    how = Image.Resampling
    kinds: dict[str, tuple[float, Image.Resampling | None]] = {
        "as they are": (1, None),
        "area means, half as large": (0.5, None),
        "bilinear, twice as large": (2, how.BILINEAR),
        "bicubic, twice as large": (2, how.BICUBIC),
        "Lanczos, twice as large": (2, how.LANCZOS),
        "bicubic, 1.4 times as large": (1.4, how.BICUBIC),
    }
    every = list(images(data))
    lines = []
    for kind, (times, kernel) in kinds.items():
        found = []
        for _, image, _ in every:
            slide = ws.ArrayReader(image if times == 1 else resized(image, times, kernel))
            found.append(find_upsampling(slide, find_tissue(slide)))
        falls = [f.fall for f in found if f.fall is not None]
        spread = f"{max(falls):.1f} to {min(falls):.1f}" if falls else ""
        lines.append([kind, f"{sum(f.found is True for f in found)} of {len(falls)}", spread])
    return markdown(["pixels", "called upsampled", "octaves from coarse to fine"], lines)


def special(data: Path) -> str:
    """Files whose tags are wrong or missing, and what is no tissue."""
    lines = []
    for file in (
        "CMU-1-Small-Region.svs",
        "CMU-1-Small-Region.jpeg.tiff",
        "OS-1-detail.ome.tif",
        "TCGA-CR-7395-01A-01-TS1.svs",
        "test3-DAPI-2-(387).ndpi",
    ):
        with ws.open_slide(data / "slides" / file) as slide:
            found = find_mpp(slide, seed=0)
        said = "" if found.claimed is None else f"{found.claimed:.4g}"
        pixels = "" if found.mpp is None or found.ci90 is None else "{:.3g} ({:.3g} to {:.3g})".format(found.mpp, *found.ci90)
        why = "" if found.abstained is None else f" ({found.abstained.reason})"
        lines.append([file, said, pixels, found.verdict + why])
    blank = find_mpp(ws.ArrayReader(np.full((2048, 2048, 3), 243, np.uint8)), seed=0)
    lines.append(["a blank slide", "", "", blank.verdict + f" ({blank.abstained.reason if blank.abstained else ''})"])
    return markdown(["file", "its tag", "its pixels", "verdict"], lines)


if __name__ == "__main__":
    main()
