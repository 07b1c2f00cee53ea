"""The numbers of docs/default-network.md: `python training/evaluate_default.py [DATA] [--weights FILE]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import rankdata

import wsiscale
from wsiscale.geometry import centered_view, scale_grid
from wsiscale.networks import Network
from wsiscale.readers.array import ArrayReader
from wsiscale.testing.procedural import random_stain, tissue
from wsiscale.views import read_view

SEEDS = range(90_000, 90_010)  # training's fields come from seeds above 20 million
PER_OCTAVE = 4
TWENTY = ("TCGA-HE-7128", "TCGA-HE-7129")  # scanned at 0.5 µm/px, and not at the 0.25 of their data sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="with patches/monuseg and slides; without it only procedural tissue")
    parser.add_argument("--weights", type=Path, help="of another training, in place of the embedded ones")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    network = wsiscale.load_network()
    if arguments.weights is not None:
        network.module.load_state_dict(load_file(arguments.weights))
    # In training mode BatchNorm takes the batch's own statistics, which looks better than what anyone will get.
    assert not network.module.training
    found, away = [], []
    for seed in SEEDS:
        image, nuclei = tissue(512, 512, mpp=0.5, seed=seed, stain=random_stain(seed))
        found.append(area_under_curve(nucleus(network, image), nuclei > 0))
        image, _ = tissue(1024, 1024, mpp=0.25, seed=seed, stain=random_stain(seed))
        away.append(report(network, f"procedural {seed}, AUC {found[-1]:.3f}", image, 0.25))
    summary("procedural", found, away)
    if arguments.data is None:
        return
    data, found, away = arguments.data, [], []
    for path in sorted((data / "patches" / "monuseg" / "images").glob("*.png")):
        image = np.asarray(Image.open(path).convert("RGB"))
        truth = np.asarray(Image.open(path.parents[1] / "masks" / path.name)) > 0
        if path.stem.startswith(TWENTY):
            at_half, there, mpp = image[:992, :992], truth[:992, :992], 0.5
        else:
            at_half = image.reshape(500, 2, 500, 2, 3).mean(axis=(1, 3)).astype(np.uint8)[:496, :496]
            there, mpp = truth[::2, ::2][:496, :496], 0.25
        found.append(area_under_curve(nucleus(network, at_half), there))
        away.append(report(network, f"{path.stem[:15]}, AUC {found[-1]:.3f}", image, mpp))
    summary("MoNuSeg", found, away)
    report(network, "CMU-1", tifffile.imread(data / "slides" / "CMU-1-Small-Region.svs"), 0.499)
    image = tifffile.imread(data / "slides" / "OS-1-detail.ome.tif")
    report(network, "OS-1", np.ascontiguousarray(np.moveaxis(image, 0, -1) if image.shape[0] == 3 else image), 0.2271)


def report(network: Network, name: str, image: NDArray[np.uint8], mpp: float, *, places: int = 16) -> float:
    """Octaves between the peak of confidence and 0.5 µm/px."""
    slide, size = ArrayReader(image, mpp=mpp), network.tile_size
    extent = np.array(image.shape[:2], float)
    coloured = np.argwhere(np.ptp(image[::8, ::8].astype(int), axis=2) > 25) * 8
    centres = np.random.default_rng(0).choice(coloured, places)
    # Upsampled by up to 2.8, so that a slide of 0.25 µm/px has finer ones than the optimum to choose from.
    mpps = np.array(
        [m for m in scale_grid(0.0884, 4.0, per_octave=PER_OCTAVE) if 0.35 * mpp <= m <= 1.3 * extent.min() * mpp / size]
    )
    curve = np.zeros(len(mpps))
    for centre in centres:
        tiles = []
        for scale in mpps / mpp:
            half = np.minimum(size * scale / 2, extent / 2)
            y, x = np.clip(centre, half, extent - half)
            tiles.append(read_view(slide, centered_view((y, x), size=size, scale=scale)))
        curve += probabilities(network, np.stack(tiles)).max(axis=1).mean(axis=(1, 2)) / places
    k = int(np.clip(curve.argmax(), 1, len(mpps) - 2))
    left, top, right = curve[k - 1 : k + 2]
    octaves = float(np.log2(mpps[k] / 0.5) + (0.5 * (left - right) / (left - 2 * top + right)) / PER_OCTAVE)
    print(
        f"{name:32s} peak {0.5 * 2**octaves:.3f} um/px, {octaves:+.2f} octaves; " + " ".join(f"{v:.2f}" for v in curve),
        flush=True,
    )
    return octaves


def summary(name: str, found: list[float], away: list[float]) -> None:
    distance = np.abs(away)
    print(f"{name}: AUC mean {np.mean(found):.3f}, least {np.min(found):.3f}")
    print(f"  octaves: median {np.median(distance):.2f}, most {distance.max():.2f}, bias {np.median(away):+.2f}")
    print(f"  {np.sum(distance <= 0.35)} of {len(away)} within 0.35 octaves")


def probabilities(network: Network, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    images = torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(network.mean)[:, None, None]) / torch.tensor(network.std)[:, None, None]
    with torch.inference_mode():
        answers: NDArray[np.float32] = network.module(images).softmax(dim=1).numpy()
    return answers


def nucleus(network: Network, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    return probabilities(network, image[None])[0, 1]


def area_under_curve(score: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    rank, positives = rankdata(score.ravel()), int(truth.sum())
    return float((rank[truth.ravel()].sum() - positives * (positives + 1) / 2) / (positives * (truth.size - positives)))


if __name__ == "__main__":
    main()
