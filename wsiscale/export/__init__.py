"""A store as what other tools read. Each format says what it cannot say."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsiscale.errors import OptionError
from wsiscale.export.geojson import write_qupath_geojson
from wsiscale.export.hdf5 import write_clam_h5, write_trident_h5
from wsiscale.export.ometiff import write_ome_tiff
from wsiscale.export.spatialdata import write_spatialdata
from wsiscale.export.tables import Slide, slides_of, write_hs2p_csv, write_wsi_mpp_csv
from wsiscale.export.webdataset import write_webdataset
from wsiscale.publishing import published, published_file
from wsiscale.store import Store, open_store

# Each takes a store, or a cohort's slides, and a name that is free; and gives what the format could not say.
FILES: dict[str, Callable[[Store, Path], list[str]]] = {
    "trident-h5": write_trident_h5,
    "clam-h5": write_clam_h5,
    "qupath-geojson": write_qupath_geojson,
    "ome-tiff": write_ome_tiff,
}
FOLDERS: dict[str, Callable[[Store, Path], list[str]]] = {
    "spatialdata": write_spatialdata,
    "webdataset": write_webdataset,
}
TABLES: dict[str, Callable[[list[Slide], Path], list[str]]] = {
    "wsi-mpp-csv": write_wsi_mpp_csv,
    "hs2p-csv": write_hs2p_csv,
}
FORMATS = (*FILES, *FOLDERS, *TABLES)


@dataclass(frozen=True)
class ExportSummary:
    """What `export_store` wrote."""

    format: str
    path: Path
    bytes: int
    notes: tuple[str, ...]  # what the format could not say, for people
    seconds: float

    def as_record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "path": str(self.path), "notes": list(self.notes)}


def export_store(
    source: Store | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    to: str,
    slides: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> ExportSummary:
    """Writes a store in the format `to`, one of `FORMATS`, at `path`, whole or not at all; docs/exports.md describes them.

    The tables also take the folder that a cohort was written to, and give a row for each of its slides; `slides` is the folder
    that they name these in. Memory does not grow with the slide.

    Raises OptionError where there is no such format, and StoreError: EXISTS, MISSING_EXTRA, NO_PIXELS where the format needs
    them and the store has none, NO_MPP where the format has magnifications and the slide's µm/px is unknown, ...
    """
    started = time.perf_counter()
    final = Path(os.path.abspath(path))
    if to in TABLES:
        rows = slides_of(source.path if isinstance(source, Store) else Path(source), None if slides is None else Path(slides))
        with published_file(final, overwrite=overwrite) as temporary:
            notes = TABLES[to](rows, temporary)
    elif to in FILES or to in FOLDERS:
        store = source if isinstance(source, Store) else open_store(source)
        publish, write = (published_file, FILES[to]) if to in FILES else (published, FOLDERS[to])
        with publish(final, overwrite=overwrite) as temporary:
            notes = write(store, temporary)
    else:
        raise OptionError(f"there is no export {to!r}; choose one of {', '.join(FORMATS)}")
    return ExportSummary(
        format=to,
        path=final,
        bytes=sum(file.stat().st_size for file in (final, *final.rglob("*")) if file.is_file()),
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
    )
