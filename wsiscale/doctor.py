"""Whether the installation works, part by part, and what to do where it does not."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wsiscale.errors import WsiscaleError


@dataclass(frozen=True)
class Finding:
    what: str
    ok: bool
    detail: str  # what was found, or what to do


def examine() -> list[Finding]:
    """One finding for each part that wsiscale stands on."""
    return [
        _try("OpenSlide", _openslide),
        _try("TiffSlide", lambda: importlib.metadata.version("tiffslide")),
        _try("codecs", _codecs),
        _try("zarr", lambda: importlib.metadata.version("zarr")),
        _try("torch", _torch),
        _try("torchvision", _torchvision),
        _try("embedded network", _embedded),
        _try("threads", _threads),
    ]


def _try(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, look())
    except (ImportError, OSError, RuntimeError, ValueError, WsiscaleError, importlib.metadata.PackageNotFoundError) as error:
        return Finding(what, False, " ".join(f"{type(error).__name__}: {error}".split()))


def _openslide() -> str:
    from wsiscale.readers.openslide import library_version

    version = library_version()
    if tuple(int(part) for part in version.split(".")[:3]) < (4, 0, 1):
        raise RuntimeError(f"OpenSlide {version} has known memory faults on crafted slides; pip install -U openslide-bin")
    return f"OpenSlide {version}"


def _codecs() -> str:
    import imagecodecs

    pixels = np.zeros((16, 16, 3), np.uint8)
    for name in ("jpeg8", "jpeg2k", "webp", "zstd"):
        getattr(imagecodecs, f"{name}_encode")(pixels)
    return f"imagecodecs {importlib.metadata.version('imagecodecs')}: JPEG, JPEG 2000, WebP, zstd"


def _torch() -> str:
    from wsiscale.networks import choose_device

    return f"{importlib.metadata.version('torch')}, works on {choose_device('auto')}"


def _torchvision() -> str:
    from wsiscale.networks import import_torchvision

    import_torchvision()
    return importlib.metadata.version("torchvision")


def _embedded() -> str:
    from wsiscale.networks import load_network

    return load_network(None).name


def _threads() -> str:
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.upper() != "PASSIVE":
        raise RuntimeError(
            "set OMP_WAIT_POLICY=PASSIVE before torch is imported: spinning threads cost up to 90x on shared cores"
        )
    return f"{os.cpu_count()} cores, OMP_WAIT_POLICY={policy}"
