"""A user's table of slides, as CSV: `path[,id][,mpp]`, or with the columns that other tools call them by."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass

from wsiscale.errors import OptionError

_PATH = ("path", "wsi", "image_path")
_ID = ("id", "sample_id")
_MPP = ("mpp", "spacing_at_level_0")
_NONE = ("", "nan", "none", "na")


@dataclass(frozen=True)
class Row:
    """One slide of a table."""

    line: int  # of the file
    path: str
    id: str  # "" where the table has none
    mpp: float | None  # µm/px of level 0; None where the table has none


def read_table(path: str | os.PathLike[str], *, needs_mpp: bool = False) -> list[Row]:
    """The rows of a CSV table of slides; other columns and empty lines are passed over.

    Raises OptionError that names the line and the column: a slide without a name, a µm/px that is none, or with `needs_mpp`
    not given.
    """
    name = os.fspath(path)
    wanted = "wsi,mpp; path,mpp; or image_path,spacing_at_level_0" if needs_mpp else "path, wsi or image_path; id; mpp"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OptionError(f"{name} cannot be read as a CSV table: {error}; give a file with the columns {wanted}") from error
    header = [cell.strip().lower() for cell in lines[0]] if lines else []
    columns = [next((header.index(alias) for alias in aliases if alias in header), None) for aliases in (_PATH, _ID, _MPP)]
    if columns[0] is None or (needs_mpp and columns[2] is None):
        raise OptionError(f"{name}, line 1: the columns are {','.join(header) or 'none'}; name them {wanted}")
    rows = []
    for line, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        slide, own, text = ("" if at is None or at >= len(cells) else cells[at].strip() for at in columns)
        if not slide:
            raise OptionError(f"{name}, line {line}, column {header[columns[0]]}: empty; name the slide's file")
        rows.append(Row(line, slide, own, _mpp(text, needed=needs_mpp, where=f"{name}, line {line}, column mpp")))
    return rows


def _mpp(text: str, *, needed: bool, where: str) -> float | None:
    if not needed and text.lower() in _NONE:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"{where}: {text!r} is not a µm/px; give a number above 0")
    return value
