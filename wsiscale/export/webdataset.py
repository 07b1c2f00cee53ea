"""A store's tiles as a WebDataset: tar files of PNG and JSON, to be streamed in training."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

from PIL import Image

from wsiscale.publishing import MANIFEST
from wsiscale.store import Store

_SHARD = 500_000_000  # bytes of a tar file, at most one tile more


def write_webdataset(store: Store, path: Path) -> list[str]:
    """A folder of tiles-000000.tar, ...: for each tile of the table KEY.png, without loss, and KEY.json: where it lies.

    The key is the slide's name and the tile's number. The same store gives the same bytes.
    """
    path.mkdir()
    # A key ends at its first dot.
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", Path(str(store.attributes["slide"]["name"])).stem)
    shards: list[str] = []
    samples = damaged = 0
    shard: tarfile.TarFile | None = None
    try:
        for pixels, tile in store.tiles():
            if tile.failed:
                damaged += 1
                continue
            if shard is None or shard.offset > _SHARD:
                if shard is not None:
                    shard.close()
                shards.append(f"tiles-{len(shards):06d}.tar")
                shard = tarfile.open(path / shards[-1], "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            about = {
                "slide": store.attributes["slide"]["name"],
                "index": tile.index,
                **{name: getattr(tile, name) for name in ("row", "col", "y", "x", "size", "tissue")},
                "scale": store.scale,
                "mpp": store.mpp,
                "slide_mpp": store.attributes["slide_mpp"],
            }
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "png", compress_level=3)
            _add(shard, f"{stem}_{tile.index:07d}.png", png.getvalue())
            _add(shard, f"{stem}_{tile.index:07d}.json", json.dumps(about, allow_nan=False).encode())
            samples += 1
    finally:
        if shard is not None:
            shard.close()
    manifest = {"format": "webdataset", "shards": shards, "samples": samples}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return [f"left out: {damaged} tiles under which the slide is damaged"] if damaged else []


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))
