"""What a cohort costs beyond its slides: time and memory of the driver a slide, and what a second worker brings.

    python benchmarks/cohort.py [--counts 1000,5000,20000] [--slides 24] [--rounds 2] [--only growth|workers]

Growth: slides on which there is nothing to do, since their files do not exist. Each goes the whole real way for all that
(submitted, worked on in a worker, recorded on disk, told, in the manifest) and ends as bad_input NOT_FOUND. The driver, with
dask's scheduler in the same process, may take 6 ms and 2 kB a slide. Two minutes; a process for each count.

Workers: `wsiscale run` on procedural slides of 2000 px with the embedded network, with one worker and with two in turn. Two
have to be 1.7 times as fast. A quarter of an hour, and only worth something where nothing else runs.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a script

from benchmarks.performance.measure import as_installed
from wsiscale.cohort.engine import run_cohort
from wsiscale.cohort.one_slide import RunOptions, process_slide
from wsiscale.cohort.plan import SlideSpec
from wsiscale.testing.procedural import slide_image
from wsiscale.testing.slides import write_svs

WARM = 200  # slides before anything is looked at: by then what a driver needs but once is there
FULL = 1000  # slides before dask's logs of what happened are full
MILLISECONDS, KILOBYTES, SPEEDUP = 6.0, 2.0, 1.7  # what is asked for
SIDE, MPP = 2000, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--counts", default="1000,5000,20000", help="of slides without work")
    parser.add_argument("--slides", type=int, default=24, help="with work")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=("growth", "workers"))
    parser.add_argument("--one-count", type=int, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.one_count:
        print(json.dumps(driven(options.one_count)))
        return
    print(f"load average {', '.join(f'{load:.2f}' for load in os.getloadavg())}; {os.cpu_count()} cores\n")
    if options.only != "workers":
        growth([int(count) for count in options.counts.split(",")])
    if options.only != "growth":
        workers(options.slides, options.rounds)


def growth(counts: list[int]) -> None:
    print(
        "| slides | ms a slide | CPU-ms of the driver | ms in a worker | kB a slide | kB after the 1,000th "
        "| kB with the manifest | s to start | s to end |\n|---|---|---|---|---|---|---|---|---|"
    )
    for count in counts:
        command = [sys.executable, str(Path(__file__)), "--one-count", str(count)]
        done = subprocess.run(command, env=as_installed(), stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        cells = ("-" if value is None else f"{value:.2f}" for value in found.values())
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)
    print(f"\nAsked for: {MILLISECONDS:g} ms and {KILOBYTES:g} kB a slide.\n")


def driven(count: int) -> dict[str, float | None]:
    """What `count` slides without work cost the driver, scheduler included, on one worker; in the order of the table."""
    here = psutil.Process()
    seen: dict[int, tuple[float, float, float]] = {}  # slides done -> wall s, CPU-s of the driver, its kB

    def told(event: str, _spec: SlideSpec, _record: dict[str, Any] | None) -> None:
        nonlocal done
        done += event == "done"
        if event == "done" and done in (1, WARM, FULL, count):
            seen[done] = (time.perf_counter(), sum(here.cpu_times()[:2]), here.memory_info().rss / 1e3)

    done = 0
    with tempfile.TemporaryDirectory() as folder:
        specs = [SlideSpec(f"slide {number:06d}", f"{folder}/nothing/{number}.svs") for number in range(count)]
        started = time.perf_counter()
        summary = run_cohort(specs, Path(folder, "out"), RunOptions(profile=None), workers=1, told=told)
        ended, kilobytes = time.perf_counter(), here.memory_info().rss / 1e3
        assert summary.counts == {"bad_input": count}
        in_worker = by_hand(specs[:WARM], Path(folder, "by hand"))
    wall, cpu, held = ((seen[count][which] - seen[WARM][which]) / (count - WARM) for which in range(3))
    return {
        "ms": 1e3 * wall,
        "cpu_ms": 1e3 * cpu,
        "worker_ms": in_worker,
        "kb": held,
        "kb_full": (seen[count][2] - seen[FULL][2]) / (count - FULL) if count > FULL else None,
        "kb_end": (kilobytes - seen[WARM][2]) / (count - WARM),
        "start": seen[1][0] - started,
        "end": ended - seen[count][0],
    }


def by_hand(specs: list[SlideSpec], out: Path) -> float:
    """ms a slide for what a worker does, without dask."""
    started = time.perf_counter()
    for spec in specs:
        process_slide(spec, RunOptions(profile=None), out)
    return 1e3 * (time.perf_counter() - started) / len(specs)


def workers(slides: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(slides):
            image = slide_image(SIDE, SIDE, MPP, number)
            write_svs(folder / f"slides {number}.svs", image, mpp=MPP, power=None, levels=(1, 4))
        command_took(folder, folder / "warm", 1, f"{folder}/slides 0.svs")
        took: dict[int, list[float]] = {1: [], 2: []}
        for number in range(rounds):
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                took[count].append(command_took(folder, folder / f"{count} in round {number}", count))
    print(f"{slides} slides of {SIDE} x {SIDE} px, `wsiscale run`, load average now {os.getloadavg()[0]:.2f}\n")
    print("| workers | s | slides an hour |\n|---|---|---|")
    for count, seconds in took.items():
        said = ", ".join(f"{one:.0f}" for one in seconds)
        print(f"| {count} | {said} | {3600 * slides / statistics.median(seconds):.0f} |")
    ratios = [one / two for one, two in zip(took[1], took[2], strict=True)]
    print(f"\nTwo workers are {', '.join(f'{ratio:.2f}' for ratio in ratios)} times as fast; asked for: {SPEEDUP:g}.")


def command_took(folder: Path, out: Path, count: int, cohort: str | None = None) -> float:
    """Seconds of `wsiscale run`, start and end of the cluster included."""
    command = [sys.executable, "-c", "from wsiscale.cli import run; run()", "run", cohort or f"{folder}/slides *.svs"]
    started = time.perf_counter()
    subprocess.run([*command, "-o", str(out), "--workers", str(count)], env=as_installed(), check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
