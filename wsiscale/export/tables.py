"""Which µm/px each slide has, as tables that TRIDENT, AtlasPatch and hs2p take. Nothing here reads pixels."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from wsiscale.errors import StoreError
from wsiscale.store import open_store


@dataclass(frozen=True)
class Slide:
    """A slide as the tables name it."""

    id: str
    path: str  # from the slides' own folder on, or below the folder that was given
    mpp: float | None  # µm/px of its level 0
    target_mpp: float | None  # µm/px at which it was, or is to be, read


def slides_of(source: Path, folder: Path | None) -> list[Slide]:
    """The slide of a store, or all slides of the folder that a cohort was written to. `folder` is where the slides are."""
    manifest = source / "manifest.jsonl"
    if manifest.is_file():
        records = [json.loads(line) for line in manifest.read_text().splitlines()]
        found = [Slide(r["id"], _path_of(r), r["slide_mpp"], r["mpp"]) for r in records]
    else:
        store = open_store(source)
        name = str(store.attributes["slide"]["name"])
        found = [Slide(Path(name).stem, name, store.attributes["slide_mpp"], store.mpp)]
    if folder is None:
        return found
    return [Slide(slide.id, str(folder / slide.path), slide.mpp, slide.target_mpp) for slide in found]


def _path_of(record: dict[str, Any]) -> str:
    """A cohort's record has the slide's name; its folder is in the ID, where that was made of the path."""
    name, inside = str(record["slide"]), PurePosixPath(unquote(record["id"]))
    return str(inside.parent / name) if inside.name in (name, PurePosixPath(name).stem) else name


def write_wsi_mpp_csv(slides: Sequence[Slide], path: Path) -> list[str]:
    """`wsi,mpp`, as TRIDENT (`--custom_list_of_wsis`), AtlasPatch and wsiscale (`--mpp-csv`) take it; and `target_mpp`."""
    known = [slide for slide in slides if slide.mpp is not None]
    if not known:
        raise StoreError(
            "there is no slide of known µm/px to write; give it when the store is written (--slide-mpp, --mpp-csv)",
            code="NO_MPP",
        )
    _write(path, ("wsi", "mpp", "target_mpp"), [(slide.path, slide.mpp, slide.target_mpp) for slide in known])
    missing = [slide.path for slide in slides if slide.mpp is None]
    return [f"left out, of unknown µm/px: {_listed(missing)}"] if missing else []


def write_hs2p_csv(slides: Sequence[Slide], path: Path) -> list[str]:
    """`sample_id,image_path,mask_path,spacing_at_level_0`, as hs2p and slide2vec take it; and `target_mpp`."""
    columns = ("sample_id", "image_path", "mask_path", "spacing_at_level_0", "target_mpp")
    _write(path, columns, [(slide.id, slide.path, None, slide.mpp, slide.target_mpp) for slide in slides])
    missing = [slide.path for slide in slides if slide.mpp is None]
    notes = [f"hs2p will take what the files say of {_listed(missing)}, whose µm/px is unknown"] if missing else []
    if not all(Path(slide.path).is_absolute() for slide in slides):
        notes.append("hs2p looks for image_path from where it is started; --slides FOLDER puts a folder before the names")
    return notes


def _write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([["" if cell is None else cell for cell in row] for row in rows])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
