"""`python -m benchmarks.performance [--data DIR] [--rounds 5] [--parts tiles,stacks,writing,answer]`: docs/performance.md.

Everything is measured side by side in one run, in CPU seconds, since these stand other load better than wall time does; read
ratios, not seconds. Slides are made once, into --cache, from real tissue where --data has it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import numpy as np

from benchmarks.performance import answer, slides, stacks, tiles, writing
from benchmarks.performance.measure import interleaved, rows
from benchmarks.recovery.tables import markdown
from wsiscale.memory import keep_memory

ROOT = Path(__file__).parents[2]
LIMIT, OPENSLIDE = 0, 1  # which of the ways
HEAD = """# How fast it is

Written by `make bench` (`python -m benchmarks.performance`); do not edit. {machine}, {slides}. Each way in turn, {rounds}
rounds after one for warmth, one thread but where it says two; CPU-ms a tile or place (median, and from to), wall ms, and the
median of the ratios within a round: to the limit, which is what decoding alone takes, and to OpenSlide. The page cache is warm.
"""


def main() -> None:
    arguments = _parsed()
    keep_memory()  # for all of them
    cv2.setNumThreads(1)
    large = slides.slide(arguments.cache, slides.LARGE, data=arguments.data)
    small = slides.slide(arguments.cache, slides.SMALL, data=arguments.data)
    sections: dict[str, Callable[[], str]] = {
        "tiles": lambda: _tiles(large, arguments.rounds, arguments.tiles),
        "stacks": lambda: _stacks(large, arguments.rounds, arguments.places),
        "writing": lambda: _writing(small, arguments.rounds, arguments.cache),
        "answer": lambda: _answer(small),
    }
    about = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    source = "slides of real H&E" if large.name.startswith("real") else "slides of procedural tissue"
    text = [HEAD.format(machine=about, slides=source, rounds=arguments.rounds)]
    for name in arguments.parts.split(","):
        print(name, file=sys.stderr, flush=True)
        text.append(sections[name]())
    (arguments.docs / "performance.md").write_text("\n".join(text))
    print(f"written: {arguments.docs / 'performance.md'}", file=sys.stderr)


COLUMNS = ["", "CPU-ms", "wall ms", "of the limit", "times OpenSlide"]


def _tiles(path: Path, rounds: int, count: int | None) -> str:
    text = ["## Tissue tiles of 256 px from a slide of 0.25 µm/px\n"]
    for mpp in (0.5, 0.37):
        ways = tiles.ways(path, mpp=mpp, tiles=count)
        found = interleaved(ways, rounds=rounds)
        names = list(ways)
        off, most = tiles.exactness(path, mpp=mpp)
        text += [
            f"### At {mpp} µm/px, {next(iter(found.values()))[0].count} tiles\n",
            markdown(COLUMNS, rows(found, limit=names[LIMIT], peer=names[OPENSLIDE])),
            f"\nOurs differ from the exact area mean by {off:.2f} grey levels on average, {most:.2f} at most.\n",
        ]
    return "\n".join(text)


def _stacks(path: Path, rounds: int, count: int) -> str:
    ways = stacks.ways(path, count=count)
    found = interleaved(ways, rounds=rounds)
    names = list(ways)
    made = [
        [way, *(f"{off:.2f}, {shift:.2f}, {sharp:.2f}" for off, shift, sharp in octaves)]
        for way, octaves in stacks.quality(path).items()
    ]
    return "\n".join(
        [
            f"## 24 scales of {stacks.SIZE} px around a place, {count} places\n",
            markdown(COLUMNS, rows(found, limit=names[LIMIT], peer=names[OPENSLIDE])),
            "\nMean difference to the exact area mean in grey levels, displacement in px of the view (median over places, "
            "worst scale), and variance of the Laplacian over the exact mean's, by octave:\n",
            markdown(["", "0.25 to 0.5 µm/px", "0.5 to 1", "1 to 2"], made),
            "",
        ]
    )


def _writing(path: Path, rounds: int, cache: Path) -> str:
    text = [
        "## A slide of 64 MP to disk\n",
        "Each a process of its own, imports included. The limit decodes, resamples and writes one flat array of the whole "
        "canvas; ours writes the tissue, its pyramid, a label, a tile table and a manifest of digests.\n",
    ]
    for mpp in (0.5, 0.37):
        found: dict[str, list[writing.Written]] = {}
        for number in range(1 + rounds):  # the first for warmth
            for way in writing.WAYS:
                if mpp == 0.5 or "dask" not in way:
                    written = writing.written(way, path, cache / "out.zarr", mpp)
                    found.setdefault(way, []).extend([written] if number else [])
        limit = found[next(iter(found))]
        cells = [
            [
                way,
                f"{np.median([w.cpu for w in all_of]):.2f}",
                f"{np.median([w.cpu / best.cpu for w, best in zip(all_of, limit, strict=True)]):.2f}",
                f"{np.median([w.wall for w in all_of]):.2f}",
                f"{np.median([w.peak for w in all_of]):.0f}",
                f"{all_of[0].megabytes:.0f}",
                str(all_of[0].files),
            ]
            for way, all_of in found.items()
        ]
        text += [
            f"### At {mpp} µm/px\n",
            markdown(["", "CPU-s", "to the limit", "wall s", "peak MiB", "MB", "files"], cells),
            "",
        ]
    return "\n".join(text)


def _answer(path: Path) -> str:
    runs = 3
    sample = str(ROOT / "sample_slides" / "tissue_mpp0.25.svs")
    cells = [
        [" ".join(argv[:1]), f"{np.median([answer.seconds(*argv) for _ in range(runs)]):.2f}"]
        for argv in (("--help",), ("info", sample), ("estimate", sample))
    ]
    share, spent = answer.forward_share(path, "torchvision:resnet50")
    parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in spent.items())
    return "\n".join(
        [
            "## Time to an answer\n",
            f"Seconds of a command on `sample_slides/tissue_mpp0.25.svs`, imports included, median of {runs}:\n",
            markdown(["wsiscale", "s"], cells),
            f"\nOf what reading and asking a ResNet-50 costs on one thread, {share:.0%} are its forward passes ({parts}).\n",
        ]
    )


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance", description=(__doc__ or "").split("\n\n")[0])
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wsiscale-benchmark" / "performance"
    known = Path(os.environ.get("WSISCALE_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=known, help="folder of third-party slides, where there is one")
    parser.add_argument("--cache", type=Path, default=kept, help=f"folder for the slides (default {kept})")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiles", type=int, help="no more tiles than this")
    parser.add_argument("--places", type=int, default=32)
    parser.add_argument("--parts", default="tiles,stacks,writing,answer")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder for performance.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
