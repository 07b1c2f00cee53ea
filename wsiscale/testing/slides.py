"""Slide files out of pixels: small pyramidal TIFFs that OpenSlide and TiffSlide take for Aperio's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray


def write_svs(
    path: str | Path,
    image: NDArray[np.uint8],
    *,
    mpp: float | None,
    power: float | None,
    levels: Sequence[int] = (1, 4, 16),
    quality: int = 80,
    tile: int = 256,
) -> None:
    """Write RGB `image` (H, W, 3) as an SVS whose levels are its exact means over `levels` x `levels` pixels, tiled JPEG.

    `mpp` and `power` are what the file claims, true or not; None leaves the tag out. The same pixels give the same bytes.
    """
    height, width = image.shape[:2]
    claims = "".join(f"|{name} = {value:.6g}" for name, value in (("AppMag", power), ("MPP", mpp)) if value is not None)
    first = f"{_MAKER}\r\n{width}x{height} [0,0 {width}x{height}] ({tile}x{tile}) JPEG/RGB Q={quality}{claims}"
    with tifffile.TiffWriter(path, bigtiff=image.nbytes > 2**31) as file:
        for number, factor in enumerate(levels):
            level = area_mean(image, factor)
            h, w = level.shape[:2]
            # 'rgb' is what the pixels are; the JPEG stores YCbCr with halved chroma, as scanners do.
            common = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": quality}, "metadata": None}
            description = first if number == 0 else f"{_MAKER}\r\n{width}x{height} -> {w}x{h} - {claims}"
            file.write(level, tile=(tile, tile), description=description, software=False, **common)
            if number == 0:
                # Readers know Aperio's thumbnail by its place, second, and by its strips; without one they miss the levels.
                thumbnail = area_mean(image, max(1, -(-max(height, width) // 512)))
                h, w = thumbnail.shape[:2]
                description = f"{_MAKER}\r\n{width}x{height} -> {w}x{h} - {claims}"
                file.write(thumbnail, rowsperstrip=16, description=description, software=False, **common)


def area_mean(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Means over `factor` x `factor` pixels, rounded; what is left over at the lower and right edge is dropped."""
    if factor == 1:
        return image
    height, width = image.shape[0] // factor, image.shape[1] // factor
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.asarray(blocks.mean(axis=(1, 3), dtype=np.float32) + 0.5, np.uint8)


# OpenSlide recognises the vendor by "Aperio" at the start of the description.
_MAKER = "Aperio Image Library (synthetic, wsiscale) "
