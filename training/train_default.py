"""Train the embedded network on procedural tissue: `python training/train_default.py --out FOLDER`.

Seeded, resumable (run it again with the same --out), CPU, about a quarter of an hour on two cores. The weights go to
FOLDER/nuclei_default.safetensors; `--install` copies them into the package.

What makes it a network that knows its scale: its target is sharp (0 or 1) only where a tile is near 0.5 µm/px, and fades to
"cannot say" (0.5) with the distance in octaves; outlier exposure (Hendrycks et al. 2019) with a soft edge.
"""

from __future__ import annotations

import argparse
import io
import math
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from queue import Queue

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage
from torch import nn

from wsiscale.default_network import NucleiNetwork
from wsiscale.testing.procedural import Pigments, colour, random_stain, render

SEED = 20240  # of the network that is shipped
MPP = 0.5  # where it is to work
SIZE = 128  # px of a tile
BATCH = 24
STEPS = 3000
FROZEN = 400  # of them at the end, with BatchNorm held
SHARPNESS = 0.5  # octaves, standard deviation, of the target's fading
MEAN, STD = (0.70, 0.50, 0.68), (0.20, 0.20, 0.20)  # of RGB / 255; the card says the same

# (px on a side, µm/px, how many): fine ones for tiles up to 1 µm/px, wide ones beyond.
FIELDS = ((1024, 0.25, 160), (2048, 0.5, 20))
HARD = 0.6  # share of the fields with what makes real slides hard
QUANTUM = 0.01  # of optical density, per step of a byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and weights; outside the repository")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED, help="another one shows how far training repeats itself")
    parser.add_argument("--install", action="store_true", help="copy the weights into the package when done")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    torch.manual_seed(arguments.seed)

    fields = make_fields(arguments.out, seed=arguments.seed)
    network = train(fields, arguments.out, steps=arguments.steps, seed=arguments.seed)
    weights = arguments.out / "nuclei_default.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, weights)
    print(f"{weights}: {weights.stat().st_size / 1e6:.2f} MB, {sum(p.numel() for p in network.parameters())} parameters")
    if arguments.install:
        shutil.copy(weights, Path(__file__).parents[1] / "wsiscale" / "cards" / weights.name)


def train(fields: list[list[np.ndarray]], out: Path, *, steps: int, seed: int) -> nn.Module:
    network = NucleiNetwork().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1, weight_decay=1e-3)
    first, checkpoint = 0, out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        first = saved["step"]
        print(f"going on from step {first}")
    started, losses = time.perf_counter(), []
    for step, (tiles, targets) in enumerate(batches(fields, first, steps, seed=seed), first):
        if step == max(steps - FROZEN, 0):
            settle_batchnorm(network, fields, seed=seed)
        network.train(step < steps - FROZEN)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = soft_cross_entropy(network(tiles), targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {np.mean(losses[-50:]):.4f} {time.perf_counter() - started:.0f} s", flush=True)
        if (step + 1) % 200 == 0:
            state = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    return network.eval()


def settle_batchnorm(network: nn.Module, fields: list[list[np.ndarray]], *, seed: int) -> None:
    """Statistics of tiles at the right scale alone: a fingerprint of the training scale, which a mixture of scales is not."""
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative mean
    network.train()
    with torch.inference_mode():
        for number in range(40):
            rng = np.random.default_rng([seed, 2, number])
            tiles = [tile(fields, rng, octaves=rng.normal(0, 0.1))[0] for _ in range(BATCH)]
            network(normalised(np.stack(tiles)))
    for layer in layers:
        layer.momentum = 0.1


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`targets`: (B, H, W) wanted probability of nucleus."""
    logit = logits[:, 1] - logits[:, 0]
    return F.binary_cross_entropy_with_logits(logit, targets)


def batches(
    fields: list[list[np.ndarray]], first: int, steps: int, *, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Step by step, each from its own seed, so that a resumed run sees what an unbroken one would have; made in threads."""
    threads = 2
    queues: list[Queue[tuple[torch.Tensor, torch.Tensor]]] = [Queue(4) for _ in range(threads)]

    def produce(part: int) -> None:
        for step in range(first + part, steps, threads):
            rng = np.random.default_rng([seed, 1, step])
            made = [example(fields, rng) for _ in range(BATCH)]
            queues[part].put((normalised(np.stack([m[0] for m in made])), torch.from_numpy(np.stack([m[1] for m in made]))))

    for part in range(threads):
        threading.Thread(target=produce, args=(part,), daemon=True).start()
    for step in range(first, steps):
        yield queues[(step - first) % threads].get()


def normalised(tiles: np.ndarray) -> torch.Tensor:
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return images.contiguous(memory_format=torch.channels_last)


def example(fields: list[list[np.ndarray]], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A tile (SIZE, SIZE, 3) uint8 and the wanted probability of nucleus (SIZE, SIZE) float32."""
    if rng.random() < 0.06:
        return no_tissue(rng), np.full((SIZE, SIZE), 0.5, np.float32)
    octaves = rng.normal(0, 0.3) if rng.random() < 0.5 else rng.uniform(-3, 3)
    image, nuclei = tile(fields, rng, octaves=octaves)
    sharpness = math.exp(-0.5 * (octaves / SHARPNESS) ** 2)
    return image, (0.5 + (nuclei - 0.5) * sharpness).astype(np.float32)


def tile(fields: list[list[np.ndarray]], rng: np.random.Generator, *, octaves: float) -> tuple[np.ndarray, np.ndarray]:
    """A tile that many octaves coarser than MPP, in some laboratory's colours, and which pixels are nucleus."""
    mpp = MPP * 2**octaves
    kind = 0 if SIZE * mpp < FIELDS[0][0] * FIELDS[0][1] * 0.7 else 1
    count = FIELDS[0][2]
    number = int(rng.integers(count)) if kind == 0 else count + int(rng.integers(FIELDS[1][2]))
    octave = max(0, math.floor(math.log2(mpp / FIELDS[kind][1])) - 1)  # twice as fine as the tile, or finer
    mips = fields[number]
    octave = min(octave, len(mips) - 1)
    level, field_mpp = mips[octave], FIELDS[kind][1] * 2**octave
    side = min(math.ceil(SIZE * mpp / field_mpp) + 2, level.shape[0])
    y, x = rng.integers(level.shape[0] - side + 1, size=2)
    crop = level[y : y + side, x : x + side]
    crop = np.rot90(crop, int(rng.integers(4)))[:, :: rng.choice([-1, 1])].astype(np.float32)
    haematoxylin, eosin, blood, ink = np.moveaxis(crop[..., :4] * QUANTUM, 2, 0)
    stain = random_stain(int(rng.integers(2**31)))
    pigments = Pigments(haematoxylin, eosin, blood, np.zeros(0, np.int32), ink)
    image = colour(pigments, stain, mpp=field_mpp, seed=int(rng.integers(2**31)))

    exact = SIZE * mpp / field_mpp  # px of the field that the tile covers
    box = ((side - exact) / 2, (side - exact) / 2, (side + exact) / 2, (side + exact) / 2)
    # Boxes are area means; where the tile is finer than the field it is interpolated, as upsampling a slide would.
    kernel = Image.Resampling.BOX if mpp > field_mpp else Image.Resampling.BILINEAR
    image = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), kernel, box=box))
    share = Image.fromarray(crop[..., 4] / 255).resize((SIZE, SIZE), kernel, box=box)
    return scanned(image, rng), (np.asarray(share) > 0.5).astype(np.float32)


def scanned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What scanners do after the optics: focus, sharpening, tone, noise, JPEG."""
    pixels = image.astype(np.float32)
    if rng.random() < 0.4:
        sigma = rng.uniform(0.2, 1.0)
        pixels = ndimage.gaussian_filter(pixels, (sigma, sigma, 0))
    if rng.random() < 0.4:
        pixels += rng.uniform(0.2, 1.2) * (pixels - ndimage.gaussian_filter(pixels, (1, 1, 0)))
    gamma = np.exp(rng.normal(0, 0.15)) * np.exp(rng.normal(0, 0.06, 3))
    pixels = 255 * (np.clip(pixels, 0, 255) / 255) ** gamma
    pixels = (pixels - 128) * np.exp(rng.normal(0, 0.12)) + 128 + rng.normal(0, 8)
    if rng.random() < 0.5:
        pixels += rng.uniform(0, 6) * rng.standard_normal(pixels.shape)
    image = np.clip(pixels, 0, 255).astype(np.uint8)
    if rng.random() < 0.6:
        compressed = io.BytesIO()
        Image.fromarray(image).save(compressed, "jpeg", quality=int(rng.integers(35, 96)))
        image = np.asarray(Image.open(compressed))
    return image


def no_tissue(rng: np.random.Generator) -> np.ndarray:
    """Glass, flat colour, white noise, smooth noise: nothing to be certain of."""
    base = rng.uniform(225, 255) + rng.normal(0, 4, 3) if rng.random() < 0.5 else rng.uniform(20, 255, 3)
    noise = rng.standard_normal((SIZE, SIZE, 3 if rng.random() < 0.5 else 1))
    sigma = float(rng.choice([0, 0, 1, 2, 4, 8, 16]))
    if sigma:
        noise = ndimage.gaussian_filter(noise, (sigma, sigma, 0))
        noise /= noise.std()
    pixels = base + noise * float(np.exp(rng.uniform(0, 4)))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def make_fields(out: Path, *, seed: int) -> list[list[np.ndarray]]:
    """Each field as its octave mips of bytes (H, W, 5): haematoxylin, eosin, blood, ink in QUANTUM, nucleus 0 or 255."""
    jobs = [(size, mpp, number, seed) for size, mpp, count in FIELDS for number in range(count)]
    cached = out / "fields.npz"
    if not cached.exists():
        started = time.perf_counter()
        with ProcessPoolExecutor(2) as workers:
            made = list(workers.map(field, *zip(*jobs, strict=True)))
        np.savez(cached, *made)
        print(f"{len(made)} fields in {time.perf_counter() - started:.0f} s", flush=True)
    with np.load(cached) as loaded:
        finest = [loaded[f"arr_{number}"] for number in range(len(jobs))]
    return [_mips(f) for f in finest]


def field(size: int, mpp: float, number: int, seed: int) -> np.ndarray:
    hard = number % 10 < 10 * HARD
    pigments = render(size, size, mpp=mpp, seed=seed * 1000 + number + (500 if mpp == FIELDS[1][1] else 0), hard=hard)
    ink = np.zeros_like(pigments.blood) if pigments.ink is None else pigments.ink
    stains = np.stack([pigments.haematoxylin, pigments.eosin, pigments.blood, ink], axis=2) / QUANTUM
    nucleus = (pigments.nuclei > 0)[..., None] * 255.0
    return np.clip(np.concatenate([stains, nucleus], axis=2) + 0.5, 0, 255).astype(np.uint8)


def _mips(finest: np.ndarray) -> list[np.ndarray]:
    levels = [finest]
    while levels[-1].shape[0] > 256:
        n = levels[-1].shape[0] // 2
        levels.append((levels[-1].reshape(n, 2, n, 2, levels[-1].shape[2]).mean(axis=(1, 3)) + 0.5).astype(np.uint8))
    return levels


if __name__ == "__main__":
    main()
