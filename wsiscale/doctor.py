"""Whether the installation works, part by part, and what to do where it does not."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from wsiscale.publishing import in_bytes


@dataclass(frozen=True)
class Finding:
    what: str
    ok: bool
    detail: str  # what was found
    advice: str = ""  # what to do about it
    needed: bool = True  # False: what goes without it is named in the advice


def examine() -> list[Finding]:
    """One finding for each part that wsiscale stands on, then one for each extra. Reads no slide of yours."""
    needed = [_needed(what, look, advice) for what, look, advice in PARTS]
    return needed + [_extra(package, gives, install) for package, gives, install in EXTRAS]


def _needed(what: str, look: Callable[[], str], advice: str) -> Finding:
    try:
        return Finding(what, True, look())
    except Exception as error:  # noqa: BLE001 whatever a broken part raises is the finding
        return Finding(what, False, " ".join(f"{type(error).__name__}: {error}".split()), advice)


def _extra(package: str, gives: str, install: str) -> Finding:
    if find_spec(package) is None:
        return Finding(package, False, "not installed", f"{gives}: {install}", needed=False)
    return Finding(package, True, _version(package), needed=False)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _openslide() -> str:
    from wsiscale.readers.openslide import library_version

    version = library_version()
    if tuple(int(part) for part in version.split(".")[:3]) < (4, 0, 1):
        raise RuntimeError(f"{version} has known memory faults on crafted slides")
    return version


def _codecs() -> str:
    import imagecodecs

    pixels = np.repeat(np.arange(0, 192, 4, dtype=np.uint8)[:, None, None], 3, axis=2).repeat(48, axis=1)  # (48, 48, 3)
    broken = []
    for name, codec in CODECS.items():
        given = pixels if codec in PICTURES else pixels.tobytes()
        try:
            encoded = getattr(imagecodecs, f"{codec}_encode")(given)
            decoded = getattr(imagecodecs, f"{codec}_decode")(encoded)
        except Exception:  # noqa: BLE001 each codec has errors of its own
            broken.append(name)
            continue
        back = np.frombuffer(decoded, np.uint8) if isinstance(decoded, bytes | bytearray) else np.ravel(decoded)
        if back.size != pixels.size or np.abs(back.astype(int) - pixels.ravel()).mean() > 4:
            broken.append(name)
    if broken:
        raise RuntimeError(f"does not give back what it was given: {', '.join(broken)}")
    return f"imagecodecs {_version('imagecodecs')}: {', '.join(CODECS)}"


CODECS = {"JPEG": "jpeg8", "JPEG 2000": "jpeg2k", "LZW": "lzw", "deflate": "deflate", "WebP": "webp", "zstd": "zstd"}
PICTURES = ("jpeg8", "jpeg2k", "webp")


def _torch() -> str:
    import torch

    seen = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{torch.__version__}, " + (f"CUDA devices: {', '.join(seen)}" if seen else "no CUDA device; the CPU will do")


def _torchvision() -> str:
    from wsiscale import networks

    networks.import_torchvision()
    bridged = "" if networks._declared_operators is None else ", made for another torch; that is bridged"
    return f"{_version('torchvision')}{bridged}"


def _slide() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path, pixels = _small_slide(Path(folder))
        from wsiscale.readers import open_slide

        for reader in READERS:
            with open_slide(path, reader=reader) as slide:
                tile = slide.read(level=0, y=100, x=300, height=256, width=200)
            if np.abs(tile.astype(int) - pixels[100:356, 300:500]).mean() > 8:  # JPEG costs 2 to 3 grey levels
                raise RuntimeError(f"{reader} gives other pixels than were written")
    return f"written, and read by {', '.join(READERS)}"


READERS = ("jpegtiff", "openslide", "tiffslide")


def _small_slide(folder: Path) -> tuple[Path, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    from wsiscale.testing import planted_slide, write_svs

    pixels = planted_slide(24, seed=0, size=768).read(level=0, y=0, x=0, height=768, width=768)
    write_svs(folder / "small.svs", pixels, mpp=0.25, power=40, levels=(1, 4))
    return folder / "small.svs", pixels


def _network() -> str:
    from wsiscale.analyzer import respond
    from wsiscale.networks import choose_device, load_network
    from wsiscale.testing import planted_slide

    network, device = load_network(None), choose_device("auto")
    pixels = planted_slide(24, seed=0, size=network.tile_size).read(
        level=0, y=0, x=0, height=network.tile_size, width=network.tile_size
    )
    response = respond(network, [pixels[None]], scales=[1.0], layers="none", device=str(device))
    if response.outputs is None or not np.isfinite(response.outputs.margin).all():
        raise RuntimeError(f"{network.name} answers what is no number on {device}")
    return f"{network.name} answered on {device}"


def _store() -> str:
    from wsiscale.readers import open_slide
    from wsiscale.store import verify_store, write_store

    with tempfile.TemporaryDirectory() as folder:
        for ngff in ("0.5", "0.4"):
            with open_slide(_small_slide(Path(folder))[0]) as slide:
                write_store(Path(folder) / f"{ngff}.ome.zarr", slide, mpp=0.5, ngff=ngff)
            if problems := verify_store(Path(folder) / f"{ngff}.ome.zarr").problems:
                raise RuntimeError(f"an OME-Zarr {ngff} is not as it was written: {problems[0].path}: {problems[0].what}")
    return f"zarr {_version('zarr')}: OME-Zarr 0.5 (zstd) and 0.4 (blosc) written and verified"


def _disk() -> str:
    here, temporary = Path.cwd(), Path(tempfile.gettempdir())
    free = {folder: shutil.disk_usage(folder).free for folder in (here, temporary)}
    for folder, left in free.items():
        if left < LEAST_DISK:
            raise RuntimeError(f"{in_bytes(left)} free in {folder}")
    return f"{in_bytes(free[here])} free here, {in_bytes(free[temporary])} in {temporary}"


def _memory() -> str:
    from distributed.system import MEMORY_LIMIT  # knows containers and job schedulers, which the machine's own number does not

    if MEMORY_LIMIT < LEAST_MEMORY:
        raise RuntimeError(f"{in_bytes(MEMORY_LIMIT)} of memory")
    return f"{in_bytes(MEMORY_LIMIT)} of memory"


def _threads() -> str:
    from dask.system import CPU_COUNT

    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.upper() != "PASSIVE":
        raise RuntimeError(f"OMP_WAIT_POLICY is {policy or 'not set'}: spinning threads cost up to 90x on shared cores")
    return f"{CPU_COUNT} cores, OMP_WAIT_POLICY={policy}"


LEAST_DISK = 2e9  # a slide at 0.5 µm/px is half a GB to one
LEAST_MEMORY = 2e9

PARTS: tuple[tuple[str, Callable[[], str], str], ...] = (
    ("OpenSlide", _openslide, "pip install -U openslide-bin openslide-python"),
    ("codecs", _codecs, "pip install -U imagecodecs; conda's is made without some: take the one of PyPI"),
    ("torch", _torch, "install it anew, for your CUDA or for the CPU: https://pytorch.org/get-started/locally"),
    ("torchvision", _torchvision, "pip install -U torchvision, of the release that goes with your torch"),
    ("slide", _slide, "pip install -U openslide-bin tiffslide tifffile imagecodecs"),
    ("network", _network, "pip install --force-reinstall --no-deps wsiscale; if it is the GPU, --device cpu works without it"),
    ("store", _store, "pip install -U 'zarr>=3.1.3,<4' numcodecs; and see that the temporary folder can be written to"),
    ("disk", _disk, "make room, write elsewhere (-o), or set TMPDIR"),
    ("memory", _memory, "ask for 2 GB or more for each worker; run --workers 1, --batch-size 4"),
    ("threads", _threads, "export OMP_WAIT_POLICY=PASSIVE before Python starts; the command does so by itself"),
)

EXTRAS = (
    ("timm", "networks of timm, and pathology's foundation models", "pip install 'wsiscale[timm]'"),
    ("captum", "Grad-CAM over scale", "pip install 'wsiscale[captum]'"),
    ("wsidicom", "DICOM slides", "pip install 'wsiscale[dicom]'"),
    ("h5py", "export to TRIDENT and CLAM", "pip install 'wsiscale[exports]'"),
    ("spatialdata", "export to SpatialData", "pip install 'wsiscale[spatialdata]'"),
    ("monai", "stores in MONAI", "pip install 'wsiscale[monai]'"),
    ("wsidata", "stores in LazySlide", "pip install lazyslide"),
    ("napari", "stores on the screen", "pip install 'napari[all]'"),
    ("playwright", "the reports' tests in a browser", "pip install 'wsiscale[browser]'"),
)
