"""W4: how long until there is an answer, and how much of it is the network's own work."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

import wsiscale as ws
from benchmarks.performance.measure import as_installed, cpu_seconds
from wsiscale.timing import watch


def seconds(*argv: str) -> float:
    """Wall time of one `wsiscale` command, imports included."""
    command = [str(Path(sys.executable).with_name("wsiscale")), *argv]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=as_installed())
    if done.returncode not in (0, 3):  # 3: it abstained
        raise RuntimeError(f"wsiscale {' '.join(argv)}: {done.stderr}")
    return time.perf_counter() - started


def forward_share(slide: Path, model: str, *, places: int = 16, scales: int = 8) -> tuple[float, dict[str, float]]:
    """Share of the CPU time of reading and asking that is the network's forward passes, on one thread; seconds by part."""
    torch.set_num_threads(1)  # so that wall time of the forward passes is their CPU time
    network = ws.load_network(model)
    with ws.open_slide(slide) as opened:
        grid = [2 ** (step / 4) for step in range(scales)]
        centres = ws.sample_places(ws.find_tissue(opened), places, field=network.tile_size * grid[-1])
        stack = ws.scale_stack(opened, centres, scales=grid, size=network.tile_size)
        ws.respond(network, ws.scale_stack(opened, centres[:2], scales=grid, size=network.tile_size), device="cpu")
        with watch() as spent:
            started = cpu_seconds()
            ws.respond(network, stack, device="cpu")
            total = cpu_seconds() - started
    return spent["forward"] / total, dict(spent)
