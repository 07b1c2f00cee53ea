"""`python -m benchmarks.performance [--data DIR] [--rounds 5] [--parts tiles,stacks,...]`: docs/performance.md.

Everything is measured side by side in one run, in CPU seconds, since these stand other load better than wall time does; read
ratios, not seconds. Slides are made once, into --cache, from real tissue where --data has it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import numpy as np

from benchmarks.performance import answer, figure, growth, slides, stacks, tiles, writing
from benchmarks.performance.measure import interleaved, median, rows
from benchmarks.recovery.tables import markdown
from wsiscale.memory import keep_memory
from wsiscale.views import cores

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
    bars: dict[str, dict[str, float]] = {}  # of the figure
    growing: dict[str, dict[int, float]] = {}
    sections: dict[str, Callable[[], str]] = {
        "tiles": lambda: _tiles(large, arguments.rounds, arguments.tiles, bars),
        "stacks": lambda: _stacks(large, arguments.rounds, arguments.places, bars),
        "writing": lambda: _writing(small, arguments.rounds, arguments.cache, bars),
        "answer": lambda: _answer(small, arguments.data),
        "growth": lambda: _growth(large, arguments.rounds, arguments.cache, arguments.data, growing),
    }
    about = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    source = "slides of real H&E" if large.name.startswith("real") else "slides of procedural tissue"
    text = [HEAD.format(machine=about, slides=source, rounds=arguments.rounds)]
    for name in arguments.parts.split(","):
        print(name, file=sys.stderr, flush=True)
        text.append(sections[name]())
    if bars and growing:
        figure.draw(arguments.docs / "figures" / "performance.png", bars, growing)
        text.insert(1, "![what a tile, a place and a slide cost, and how cost grows](figures/performance.png)\n")
    (arguments.docs / "performance.md").write_text("\n".join(text))
    print(f"written: {arguments.docs / 'performance.md'}", file=sys.stderr)


COLUMNS = ["", "CPU-ms", "wall ms", "of the limit", "times OpenSlide"]


def _tiles(path: Path, rounds: int, count: int | None, bars: dict[str, dict[str, float]]) -> str:
    text = ["## Tissue tiles of 256 px from a slide of 0.25 µm/px\n"]
    for mpp in (0.5, 0.37):
        ways = tiles.ways(path, mpp=mpp, tiles=count)
        found = interleaved(ways, rounds=rounds)
        names = list(ways)
        if mpp == 0.5:
            bars["CPU-ms a tile of 256 px at 0.5 µm/px"] = {
                way: median(costs) for way, costs in found.items() if "two" not in way
            }
        off, most = tiles.exactness(path, mpp=mpp)
        text += [
            f"### At {mpp} µm/px, {next(iter(found.values()))[0].count} tiles\n",
            markdown(COLUMNS, rows(found, limit=names[LIMIT], peer=names[OPENSLIDE])),
            f"\nOurs differ from the exact area mean by {off:.2f} grey levels on average, {most:.2f} at most.\n",
        ]
    return "\n".join(text)


def _stacks(path: Path, rounds: int, count: int, bars: dict[str, dict[str, float]]) -> str:
    ways = stacks.ways(path, count=count)
    found = interleaved(ways, rounds=rounds)
    bars["CPU-ms a place, 24 scales of 224 px"] = {way: median(costs) for way, costs in found.items()}
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


def _writing(path: Path, rounds: int, cache: Path, bars: dict[str, dict[str, float]]) -> str:
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
        if mpp == 0.5:
            bars["CPU-s, 64 MP to OME-Zarr at 0.5 µm/px"] = {
                way: _median(w.cpu for w in all_of) for way, all_of in found.items()
            }
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


def _growth(path: Path, rounds: int, cache: Path, data: Path | None, growing: dict[str, dict[int, float]]) -> str:
    text = [
        "## How cost grows\n",
        "CPU-ms of one, by how many there are: tiles of 256 px at 0.5 µm/px, scales of a place (three octaves; ms a scale), "
        "places of 24 scales; and wall ms of a tile by threads.\n",
    ]
    for what, costs in growth.grown(path, rounds=rounds, cores=cores()).items():
        share = 1.0
        of_one = {}
        for number, all_of in costs.items():
            each = [1000 * c.wall / c.count for c in all_of] if what == "threads" else [c.cpu_ms for c in all_of]
            share = number if what == "scales" else 1.0
            of_one[number] = float(np.median(each)) / share
        if what != "threads":
            growing[what] = of_one
        text += [markdown([what, *map(str, of_one)], [["ms", *(f"{ms:.3g}" for ms in of_one.values())]]), ""]
    written = growth.areas(cache, data)
    megapixels = {side: round(side * side / 1e6) for side in written}
    growing["slide written"] = {megapixels[side]: w.cpu / megapixels[side] for side, w in written.items()}
    rows_of = [
        ["CPU-s", *(f"{w.cpu:.2f}" for w in written.values())],
        ["peak MiB", *(f"{w.peak:.0f}" for w in written.values())],
        ["MB written", *(f"{w.megabytes:.0f}" for w in written.values())],
    ]
    text += [
        "A slide written at 0.5 µm/px, once each, by its area:\n",
        markdown(["", *(f"{n} MP" for n in megapixels.values())], rows_of),
        "",
    ]
    return "\n".join(text)


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def _answer(path: Path, data: Path | None) -> str:
    runs = 3
    sample = str(ROOT / "sample_slides" / "tissue_mpp0.25.svs")
    commands: dict[str, tuple[str, ...]] = {"--help": ("--help",), "info": ("info", sample), "estimate": ("estimate", sample)}
    real = None if data is None else data / "slides" / "CMU-1-Small-Region.svs"
    if real is not None and real.exists():
        commands["estimate, CMU-1-Small-Region"] = ("estimate", str(real))
    cells = [[name, f"{_median(answer.seconds(*argv) for _ in range(runs)):.2f}"] for name, argv in commands.items()]
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
    parser.add_argument("--parts", default="tiles,stacks,writing,answer,growth")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder for performance.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
