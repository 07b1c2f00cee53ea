"""W2: a slide of 64 MP to disk at 0.5 and at 0.37 µm/px, each way a process of its own, imports included.

`python -m benchmarks.performance.writing WAY SLIDE OUT MPP` is one such process.
"""

from __future__ import annotations

import atexit
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.performance.measure import as_installed

MPP = 0.25  # of the slide
CHUNK, SHARD = 256, 2048


@dataclass(frozen=True)
class Written:
    """What one process cost."""

    cpu: float  # s
    wall: float  # s
    peak: float  # MiB
    megabytes: float
    files: int


def written(way: str, path: Path, out: Path, mpp: float) -> Written:
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name, way, str(path), str(out), str(mpp)]
    process = subprocess.Popen(command, env=as_installed(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{way} ended with {process.returncode}")
    files = [file for file in out.rglob("*") if file.is_file()] if out.exists() else []
    return Written(
        cpu=used.ru_utime + used.ru_stime,
        wall=time.perf_counter() - started,
        peak=int(_peak_file(out).read_text()) / 1024,
        megabytes=sum(file.stat().st_size for file in files) / 1e6,
        files=len(files),
    )


def _peak_file(out: Path) -> Path:
    return out.with_suffix(".peak")


def _note_peak(out: Path) -> None:
    """Peak memory in KiB of this process alone: what the parent is told of it starts with the parent's own."""
    status = Path("/proc/self/status").read_text()
    _peak_file(out).write_text(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def limit(path: Path, out: Path, mpp: float) -> None:
    """Every JPEG tile decoded once, rows of them resampled by OpenCV, one flat array of zstd 1."""
    import cv2
    import imagecodecs
    import numpy as np
    import tifffile
    import zarr

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offsets, sizes, side = page.dataoffsets, page.databytecounts, page.tilewidth
        height, width = page.imagelength, page.imagewidth
    across, scale = math.ceil(width / side), mpp / MPP
    shape = (math.ceil(height / scale), math.ceil(width / scale))
    array = zarr.create_array(
        out,
        shape=(*shape, 3),
        dtype="uint8",
        chunks=(CHUNK, CHUNK, 3),
        shards=(SHARD, SHARD, 3),
        compressors=zarr.codecs.ZstdCodec(level=1),
    )
    descriptor = os.open(path, os.O_RDONLY)
    slab = np.zeros(((math.ceil(SHARD * scale / side) + 1) * side, across * side, 3), np.uint8)
    for top in range(0, shape[0], SHARD):
        first = int(top * scale) // side
        last = min(math.ceil((top + SHARD) * scale / side), first + len(slab) // side, math.ceil(height / side))
        for row in range(first, last):
            for column in range(across):
                number = row * across + column
                tile = imagecodecs.jpeg8_decode(os.pread(descriptor, sizes[number], offsets[number]))
                slab[(row - first) * side : (row - first + 1) * side, column * side : (column + 1) * side] = tile
        rows = min(SHARD, shape[0] - top)
        source = slab[: min(round(rows * scale), height), :width]
        array[top : top + rows] = cv2.resize(source, (shape[1], rows), interpolation=cv2.INTER_AREA)
    os.close(descriptor)


def ours(path: Path, out: Path, mpp: float) -> None:
    from wsiscale.cli import run

    sys.argv = ["wsiscale", "tile", str(path), "--mpp", str(mpp), "-o", str(out)]
    run()


def by_dask(path: Path, out: Path, mpp: float) -> None:
    """TiffSlide's array through dask's coarsen into ome-zarr-py: at whole factors alone."""
    import dask.array as da
    import numpy as np
    import tifffile
    import zarr
    from ome_zarr.writer import write_image

    factor = round(mpp / MPP)
    with tifffile.TiffFile(path) as file:
        level = zarr.open(file.pages[0].aszarr(), mode="r")
        image = da.from_zarr(level, chunks=(CHUNK * factor * 4, CHUNK * factor * 4, 3))
        image = da.coarsen(np.mean, image, {0: factor, 1: factor}, trim_excess=True).round().astype("uint8")
        image = image.transpose(2, 0, 1).rechunk((3, CHUNK, CHUNK))
        write_image(image, str(out), axes="cyx", scale_factors=[2, 4, 8])


WAYS: dict[str, Callable[[Path, Path, float], None]] = {
    "limit: decode, area mean, zstd, flat": limit,
    "wsiscale tile": ours,
    "dask and ome-zarr-py": by_dask,
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    atexit.register(_note_peak, Path(sys.argv[3]))
    WAYS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
