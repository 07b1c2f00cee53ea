"""One slide of a cohort, start to end: `process_slide(spec, options, out) -> dict`, without dask, for whatever calls it.

What it is asked and what it answers is plain JSON. The answer also lies in OUT/slides/ID.json, the pixels in
OUT/stores/ID.ome.zarr, what was said on the way in OUT/logs/ID.log. Done is what these two say was made of the same options
and the same slide; there is no other book.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiscale.cohort.plan import SlideSpec
from wsiscale.errors import MppError, NoTissueError, OptionError, SlideError, StoreError, WsiscaleError
from wsiscale.versions import versions

if TYPE_CHECKING:
    from wsiscale.networks import Network
    from wsiscale.types import Reader, ScaleEstimate

log = logging.getLogger(__name__)

SCHEMA = 1  # of the records
FINISHED = ("ok", "no_tissue", "abstained", "bad_input")  # the same again would come of the same slide and options
_PART = 65_536  # bytes of a file's start, middle and end that tell it from another

_WITHOUT_SAY = ("device", "batch_size", "threads", "time_limit", "memory_limit", "retry")  # in what comes out


@dataclass(frozen=True)
class RunOptions:
    """What to do with every slide of a cohort. Plain values, so that it travels as JSON."""

    model: str | None = None
    weights: str | None = None
    trust_model: bool = False
    criterion: str | None = None
    mpp_range: tuple[float, float] | None = None
    tile_size: int | None = None  # px that the network takes
    places: int | None = None
    precision: float | None = 0.1
    max_upsample: float = 1.0
    seed: int = 0
    profile: str | None = "auto"
    trust_tag: bool = True
    detector: str | None = None
    reader: str = "auto"
    on_abstain: str = "skip"  # or fixed:MPP, cohort-median
    tiles: int = 512  # px of the tiles in a store's table
    overlap: int = 0
    min_tissue: float = 0.1
    ngff: str = "0.5"
    pixels: str = "tissue"
    tolerance: float = 0.01
    device: str = "auto"
    batch_size: int | None = None
    threads: int | None = 1  # that write a slide
    time_limit: float = 3600  # s for one slide
    memory_limit: float | None = None  # GB for one slide, where it is worked on alone
    retry: bool = False  # slides that ended without a store, too

    def __post_init__(self) -> None:
        policy, _, value = self.on_abstain.partition(":")
        if policy not in ("skip", "cohort-median", "fixed") or (policy == "fixed") != bool(value):
            raise OptionError(f"--on-abstain {self.on_abstain!r} is not skip, cohort-median, or fixed:MPP such as fixed:0.5")
        if policy == "fixed":
            fixed_mpp(self.on_abstain)

    def digest(self) -> str:
        """Of all that has a say in what comes out, the network's weights and this package's version included."""
        said = {name: value for name, value in asdict(self).items() if name not in _WITHOUT_SAY}
        said |= {"schema": SCHEMA, "versions": versions()}
        said |= {"files": {name: _file_digest(said[name]) for name in ("model", "weights", "profile", "detector")}}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RunOptions:
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise OptionError(f"there is no option {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
        mpp_range = values.get("mpp_range")
        return cls(**{**values, "mpp_range": None if mpp_range is None else (float(mpp_range[0]), float(mpp_range[1]))})


def fixed_mpp(policy: str) -> float:
    """The µm/px of `fixed:MPP`. Raises OptionError."""
    try:
        mpp = float(policy.partition(":")[2])
    except ValueError:
        mpp = 0.0
    if not 0 < mpp < float("inf"):
        raise OptionError(f"--on-abstain {policy!r} has no µm/px above 0; give fixed:0.5")
    return mpp


def process_slide(
    spec: SlideSpec | Mapping[str, Any], options: RunOptions | Mapping[str, Any], out: str | os.PathLike[str]
) -> dict[str, Any]:
    """Estimates a slide's best µm/px and writes its tissue at it below `out`; returns the record, which also lies there.

    Never raises for what is wrong with a slide, its network or its store: `status` is ok, no_tissue, abstained, bad_input,
    failed or locked, `code` and `message` say why. A slide that is done already, by the same options, is not looked at again
    (`resumed` is true then). Raises OptionError for options that make no sense.
    """
    return write_slide(spec, options, out, estimate_slide(spec, options, out))


def estimate_slide(
    spec: SlideSpec | Mapping[str, Any], options: RunOptions | Mapping[str, Any], out: str | os.PathLike[str]
) -> dict[str, Any]:
    """The first half of `process_slide`, for workers with a GPU: a record whose status is `estimated` or final."""
    spec, options, folder = _plain(spec, options, out)

    def work(record: dict[str, Any]) -> None:
        record["made_of"] = {"options": options.digest(), "slide": fingerprint(spec.path), "mpp": repr(spec.mpp)}
        previous = _previous(spec, options, folder, record["made_of"])
        if previous is not None:
            record |= previous | {"resumed": True}
            return
        with _opened(spec, options) as slide:
            record |= _estimated(slide, options)

    return _recorded(work, spec, folder, {"schema": SCHEMA, "id": spec.id, "slide": Path(spec.path).name, "resumed": False})


def write_slide(
    spec: SlideSpec | Mapping[str, Any],
    options: RunOptions | Mapping[str, Any],
    out: str | os.PathLike[str],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """The second half: writes the store of a slide whose record says `estimated`; others it returns as they are."""
    if record["status"] != "estimated":
        return dict(record)
    spec, options, folder = _plain(spec, options, out)

    def work(written: dict[str, Any]) -> None:
        with _opened(spec, options) as slide:
            written |= _written(slide, spec, options, folder, written)

    return _recorded(work, spec, folder, record)


def store_path(out: str | os.PathLike[str], name: str) -> Path:
    return Path(out, "stores", f"{name}.ome.zarr")


def record_path(out: str | os.PathLike[str], name: str) -> Path:
    return Path(out, "slides", f"{name}.json")


def read_record(out: str | os.PathLike[str], name: str) -> dict[str, Any] | None:
    """What was recorded of a slide; None where nothing was, or nothing that can be read."""
    try:
        record = json.loads(record_path(out, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema") == SCHEMA else None


def write_record(out: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    path = record_path(out, record["id"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


# Deciding


def _previous(spec: SlideSpec, options: RunOptions, out: Path, made_of: Mapping[str, str]) -> dict[str, Any] | None:
    """The record of a slide that need not be done again."""
    record = read_record(out, spec.id)
    if record is None or record.get("made_of") != made_of or record["status"] not in FINISHED:
        return None
    if record["status"] != "ok":
        return None if options.retry else record
    return record if _store_made_of(store_path(out, spec.id)) == made_of else None


def _store_made_of(path: Path) -> Any:
    from wsiscale.store import open_store

    try:
        return open_store(path).attributes.get("made_of")
    except StoreError:
        return None


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Of a slide: its files' sizes, and what they hold at their start, middle and end. Not its name, place or age."""
    file = Path(path)
    companion = file.with_suffix("")  # of a MIRAX slide
    files = [file] if file.is_file() else []
    for folder in (file, companion):
        if folder.is_dir():
            files += sorted(inside for inside in folder.rglob("*") if inside.is_file())
    if not files:
        raise SlideError(f"{file} does not exist; check the path", code="NOT_FOUND")
    digest = hashlib.sha256()
    for one in files:
        with one.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "big"))
            for at in (0, (size - _PART) // 2, size - _PART):
                opened.seek(max(0, at))
                digest.update(opened.read(_PART))
    return digest.hexdigest()


def _file_digest(name: str | None) -> str | None:
    """Of a file that an option names, or of the file in `file.py:name`; None where it names none."""
    if name is None:
        return None
    path = next((p for p in (Path(name), Path(name.rpartition(":")[0])) if p.is_file()), None)
    if path is None:
        return None
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001  which tell whether it is still the same file
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Working


def _estimated(slide: Reader, options: RunOptions) -> dict[str, Any]:
    from wsiscale.estimation import as_record, estimate

    network = _network(options.model, options.weights, options.tile_size, options.trust_model)
    found = estimate(
        slide,
        network,
        mpp_range=options.mpp_range,
        criterion=options.criterion,
        places=options.places,
        max_upsample=options.max_upsample,
        precision=options.precision,
        detector=options.detector,
        device=options.device,
        batch_size=options.batch_size,
        seed=options.seed,
        profile=options.profile,
        trust_tag=options.trust_tag,
    )
    answer = as_record(found)
    result: dict[str, Any] = {"status": "estimated", "estimate": answer, "mpp_source": found.mpp_source}
    result |= {"slide_mpp": found.slide_mpp, "ci90": answer["ci90"], "forwards": found.forwards}
    if found.abstained is not None:
        result |= {"code": found.abstained.reason, "message": found.abstained.detail}
        policy = options.on_abstain.partition(":")[0]
        if found.abstained.reason == "no_tissue":
            return {**result, "status": "no_tissue"}
        if policy != "fixed":
            return {**result, "status": "abstained"}
        return {**result, "mpp": fixed_mpp(options.on_abstain), "chosen_by": options.on_abstain}
    return {**result, **_target(found)}


def _target(found: ScaleEstimate) -> dict[str, Any]:
    # What the tissue says of its µm/px is not in the slide's tag, which a target in µm/px would be read by.
    by_tag = found.mpp is not None and found.mpp_source != "estimated"
    return {"mpp": found.mpp, "scale": None if by_tag else found.scale, "chosen_by": "estimate"}


def _written(slide: Reader, spec: SlideSpec, options: RunOptions, out: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    from wsiscale.store import write_store
    from wsiscale.tissue import find_tissue

    path = store_path(out, spec.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = record.get("scale")
    summary = write_store(
        path,
        slide,
        mpp=record["mpp"] if scale is None else None,
        scale=scale,
        tissue=find_tissue(slide, options.detector),
        tile_size=options.tiles,
        overlap=options.overlap,
        min_tissue=options.min_tissue,
        ngff=options.ngff,  # type: ignore[arg-type]
        pixels=options.pixels,  # type: ignore[arg-type]
        tolerance=options.tolerance,
        max_upsample=options.max_upsample,
        estimate=record["estimate"],
        made_of=record["made_of"],
        threads=options.threads,
        overwrite=True,
    )
    return {
        "status": "ok",
        "store": f"stores/{path.name}",
        "tiles": summary.tiles,
        "bytes": summary.bytes,
        "scale": summary.scale,
    }


@lru_cache(maxsize=1)
def _network(model: str | None, weights: str | None, tile_size: int | None, trust_model: bool) -> Network:
    """Once a process, by name: weights never travel."""
    from wsiscale.networks import load_network

    return load_network(model, weights=None if weights is None else Path(weights), tile_size=tile_size, trust_model=trust_model)


@contextmanager
def _opened(spec: SlideSpec, options: RunOptions) -> Iterator[Reader]:
    from wsiscale.readers import open_slide

    with open_slide(spec.path, mpp=spec.mpp, reader=options.reader) as slide:
        yield slide


def _recorded(work: Callable[[dict[str, Any]], None], spec: SlideSpec, out: Path, before: Mapping[str, Any]) -> dict[str, Any]:
    """The record that `work` has filled, on disk if its status is final; what it raises becomes one."""
    started = time.perf_counter()
    record = dict(before)
    with _logged(out, spec.id):
        try:
            work(record)
        except OptionError:
            raise
        except WsiscaleError as error:
            record |= {"status": status_of(error), "code": error.code, "message": " ".join(str(error).split())}
        except MemoryError as error:
            record |= {"status": "failed", "code": "MEMORY", "message": f"out of memory: {error}"}
        except Exception as error:  # noqa: BLE001  the slide's own misfortune, whatever it is
            log.error("%s", traceback.format_exc())
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            record |= {"status": "failed", "code": "UNEXPECTED", "message": message}
        if not record["resumed"]:
            record["seconds"] = round(record.get("seconds", 0.0) + time.perf_counter() - started, 3)
            if record["status"] not in ("estimated", "locked"):  # whoever holds the lock writes the record
                write_record(out, record)
            log.info("%s %s %s", record["status"], record.get("code", ""), record.get("message", ""))
    return record


def status_of(error: WsiscaleError) -> str:
    """What an expected error makes of a slide."""
    if isinstance(error, NoTissueError):
        return "no_tissue"
    if isinstance(error, StoreError) and error.code == "LOCKED":
        return "locked"
    return "bad_input" if isinstance(error, SlideError | MppError) else "failed"


@contextmanager
def _logged(out: Path, name: str) -> Iterator[None]:
    folder = out / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"{name}.log", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("wsiscale")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


def _plain(
    spec: SlideSpec | Mapping[str, Any], options: RunOptions | Mapping[str, Any], out: str | os.PathLike[str]
) -> tuple[SlideSpec, RunOptions, Path]:
    return (
        spec if isinstance(spec, SlideSpec) else SlideSpec(**spec),
        options if isinstance(options, RunOptions) else RunOptions.of(options),
        Path(os.path.abspath(out)),
    )


def main() -> None:
    """`python -m wsiscale.cohort.one_slide`: a slide alone in its process; JSON on stdin, the record on stdout."""
    asked = json.load(sys.stdin)
    options = RunOptions.of(asked["options"])
    if options.memory_limit is not None:
        limit = round(options.memory_limit * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(process_slide(asked["spec"], replace(options, threads=1), asked["out"])))  # noqa: T201


if __name__ == "__main__":
    main()
