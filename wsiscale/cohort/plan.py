"""A folder, a pattern or a table -> the slides of a cohort, each with an id that is safe as a file's name. Pure."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from wsiscale.errors import OptionError
from wsiscale.tables import read_table

SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif")  # of slide files
LONGEST = 200  # bytes of an id: file systems end at 255, and names grow by what is written beside the store


@dataclass(frozen=True)
class SlideSpec:
    """One slide of a cohort."""

    id: str  # unique in the cohort, and the name of what is written
    path: str
    mpp: float | None = None  # µm/px of level 0, overriding what the file says


def read_cohort(cohort: str | os.PathLike[str]) -> list[SlideSpec]:
    """The slides of a folder (and what is below it), of a pattern with *, or of a CSV table, in order of their ids.

    A table has the columns `path[,id][,mpp]`, `wsi,mpp` or `sample_id,image_path,spacing_at_level_0`; others are passed over,
    and its paths start at its own folder. Without an id it is the path from the cohort's folder on, without the suffix.
    Raises OptionError: nothing found, a bad line, two slides of one id.
    """
    text = os.fspath(cohort)
    here = Path(text)
    if here.is_dir():
        specs = [_spec(file, here) for file in _slides_below(here)]
        what = f"no slides below {text}; slides end in {', '.join(SUFFIXES)}, or are folders of .dcm files"
    elif here.suffix.lower() == ".csv":
        specs = list(_rows_of(here))
        what = f"{text} has no lines but its header"
    else:
        found = [Path(path) for path in sorted(glob.glob(text, recursive=True))]
        root = Path(os.path.commonpath([path.parent.absolute() for path in found])) if found else here
        specs = [_spec(path.absolute(), root) for path in found]
        what = f"nothing is called {text}; give a folder, a pattern such as 'slides/*.svs' in quotes, or a table.csv"
    if not specs:
        raise OptionError(what)
    _check_ids(specs)
    return sorted(specs, key=lambda spec: spec.id)


def shard_of(specs: Sequence[SlideSpec], shard: str) -> list[SlideSpec]:
    """The part `i/n` of a cohort, i from 0 to n - 1, by a hash of the ids: the same whatever else the cohort holds."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or int(match[1]) >= int(match[2]):
        raise OptionError(f"--shard {shard!r} is not i/n with i from 0 to n - 1, such as 0/8")
    number, count = int(match[1]), int(match[2])
    return [spec for spec in specs if int(hashlib.sha256(spec.id.encode()).hexdigest()[:12], 16) % count == number]


def _slides_below(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        folders.sort()
        slides = sorted(name for name in files if name.lower().endswith(SUFFIXES))
        if not slides and any(name.lower().endswith(".dcm") for name in files):
            folders.clear()
            yield Path(here)
            continue
        # A MIRAX slide keeps its pixels in a folder of its own name; OME-Zarr stores are folders, too.
        stems = {Path(name).stem for name in slides}
        folders[:] = [name for name in folders if name not in stems and not name.endswith(".zarr")]
        yield from (Path(here, name) for name in slides)


def _spec(path: Path, root: Path, mpp: float | None = None) -> SlideSpec:
    inside = path.relative_to(root)
    name = inside.with_suffix("") if path.suffix.lower() in SUFFIXES else inside
    return SlideSpec(id=safe_id(name.as_posix() if name.parts else path.name), path=str(path), mpp=mpp)


def safe_id(name: str) -> str:
    """`name` as one file name that cannot leave its folder: other than letters, digits, -_.~ and spaces become %XX."""
    safe = quote(name, safe=" ", errors="surrogatepass")
    if safe.startswith("."):
        safe = "%2E" + safe[1:]  # neither hidden nor . or ..
    if safe.endswith((".", " ")):
        safe = safe[:-1] + f"%{ord(safe[-1]):02X}"  # which Windows drops
    if not safe or len(safe.encode()) > LONGEST:
        raise OptionError(f"an id has 1 to {LONGEST} bytes as a file name; got {name[:60]!r}")
    return safe


def _rows_of(table: Path) -> Iterator[SlideSpec]:
    for row in read_table(table):
        file = Path(os.path.abspath(table.parent / row.path))
        try:
            spec = _spec(file, file.parent, row.mpp)
            yield SlideSpec(safe_id(row.id), spec.path, spec.mpp) if row.id else spec
        except OptionError as error:
            raise OptionError(f"{table}, line {row.line}: {error}") from error


def _check_ids(specs: Sequence[SlideSpec]) -> None:
    """Raises OptionError for two slides whose ids a file system may take for one."""
    seen: dict[str, SlideSpec] = {}
    for spec in specs:
        other = seen.setdefault(spec.id.casefold(), spec)
        if other is not spec:
            raise OptionError(f"{other.path} and {spec.path} would both be written as {spec.id}; give a table with a column id")
