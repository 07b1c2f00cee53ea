"""Tiles as GeoJSON that QuPath takes by drag and drop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsiscale.store import STATUS, Store


def write_qupath_geojson(store: Store, path: Path) -> list[str]:
    """A FeatureCollection of tile objects in level-0 px, (x, y), as QuPath counts them: from the scan's own corner on.

    QuPath crops a slide to its bounds (MIRAX and others have a larger canvas), so their corner is taken off.
    """
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(_features(store)):
            file.write((",\n" if number else "\n") + json.dumps(feature, allow_nan=False))
        file.write("\n]}\n")
    if "bounds" not in store.attributes["slide"]:
        return ["the store does not say where the scan begins; on a slide with bounds (MIRAX) the tiles would be shifted"]
    return []


def _features(store: Store) -> Iterator[dict[str, Any]]:
    top, left = (store.attributes["slide"].get("bounds") or (0, 0))[:2]
    table = store.tile_table
    for number, tissue, failed in zip(
        table["id"].tolist(), table["tissue"].tolist(), table["status"] == STATUS["failed"], strict=True
    ):
        x, y = int(table["x"][number]) - left, int(table["y"][number]) - top
        right, bottom = x + int(table["w"][number]), y + int(table["h"][number])
        kind = {"name": "damaged", "color": [200, 0, 0]} if failed else {"name": "wsiscale tile", "color": [0, 160, 80]}
        yield {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]]},
            "properties": {
                "objectType": "tile",
                "name": str(number),
                "classification": kind,
                "measurements": {"tissue": tissue},
            },
        }
