"""Where `wsiscale estimate` lands with the bundled network, without any option, against where its masks are best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

import wsiscale as ws
from benchmarks.recovery.real import MONUSEG, _monuseg, monuseg_mpp

SLIDES = ("CMU-1-Small-Region.svs", "OS-1-detail.ome.tif")


def estimates(data: Path) -> Iterator[tuple[str, float | None]]:
    """(slide, µm/px or None) of every image with its tag, and of the slides that have no labels."""
    network = ws.load_network()
    for slide in MONUSEG:
        image, _ = _monuseg(data, slide)
        mpp = monuseg_mpp(slide)
        found = ws.estimate(ws.ArrayReader(image, mpp=mpp), network).scale
        yield slide, None if found is None else found * mpp
    for name in SLIDES:
        with ws.open_slide(data / "slides" / name) as opened:
            yield name, ws.estimate(opened, network).mpp


def peak(curve: Mapping[float, float]) -> float:
    """Where a curve over µm/px is highest, by a parabola through its best three points in octaves."""
    mpps = np.array(sorted(curve))
    values = np.array([curve[m] for m in mpps])
    k = int(np.clip(values.argmax(), 1, len(mpps) - 2))
    left, top, right = values[k - 1 : k + 2]
    step = np.log2(mpps[k + 1] / mpps[k])
    return float(mpps[k] * 2 ** (step * 0.5 * (left - right) / (left - 2 * top + right)))


def row(name: str, found: Sequence[float | None], best: float) -> list[str]:
    there = np.array([value for value in found if value is not None])
    near = np.abs(np.log2(there / best)) <= 0.3
    said = f"{np.median(there):.3g}" + (f" ({there.min():.3g} to {there.max():.3g})" if len(there) > 1 else "")
    return [name, f"{len(found) - len(there)} of {len(found)}", said, f"{near.sum()} of {len(found)}"]
