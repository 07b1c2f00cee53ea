"""Where ImageNet's networks keep scale, on real tissue; and whether cutting them there helps. Writes docs/probe.md.

    python -m benchmarks.probe --data DIR [--cache DIR] [--places 12] [--networks densenet121,vgg16]

17 images of known µm/px from three sources, each one slide: held out whole. Needs third-party images and weights. Answers are
cached one network and slide at a time; from nothing it takes half an hour on one core, from the cache a few minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tifffile
from torch import nn

import wsiscale as ws
from benchmarks.recovery.photos import imagenet_network
from benchmarks.recovery.real import MONUSEG, _rgb, monuseg_mpp
from wsiscale.networks import Network, load_network

ROOT = Path(__file__).parents[1]
TILE = 96  # px: eight times as coarse, and a little more, still lies within 1000 px
PLACES = 12
NETWORKS = ("densenet121", "vgg16")


def slides(data: Path) -> Iterator[ws.Reader]:
    """Real tissue of known µm/px, one at a time."""
    for name in ("CMU-1-Small-Region.svs", "OS-1-detail.ome.tif"):
        with ws.open_slide(data / "slides" / name) as slide:
            yield slide
    yield ws.ArrayReader(tifffile.imread(data / "patches/instanseg_he/HE_example.tif"), mpp=0.5001, name="instanseg")
    for name in MONUSEG:
        yield ws.ArrayReader(_rgb(data / "patches/monuseg/images" / f"{name}.png"), mpp=monuseg_mpp(name), name=name)


def network(name: str, data: Path) -> Network:
    """The trunk, up to what its classifier would get."""
    trunk = imagenet_network(name, data / "weights", tile_size=TILE)
    if name == "vgg16":
        return trunk
    # torchvision's DenseNet has its last ReLU outside of its trunk.
    return load_network(
        nn.Sequential(trunk.module, nn.ReLU()), name=name, tile_size=TILE, mean=trunk.mean, std=trunk.std, output="features"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    data = os.environ.get("WSISCALE_DATA")
    parser.add_argument("--data", type=Path, required=data is None, default=None if data is None else Path(data))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "wsiscale" / "probe")
    parser.add_argument("--places", type=int, default=PLACES)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    options = parser.parse_args()
    for name in options.networks.split(","):
        began, told = time.perf_counter(), partial(print, name, file=sys.stderr)
        probe, _ = ws.probe_slides(
            slides(options.data),
            network(name, options.data),
            places=options.places,
            keep=options.cache,
            told=told,
        )
        print(probe.sentence())
        print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
