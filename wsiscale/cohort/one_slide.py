"""One slide of a cohort, start to end: `process_slide(spec, options, out) -> dict`, without dask, for whatever calls it.

What it is asked and what it answers is plain JSON. The answer also lies in OUT/slides/ID.json, the pixels in
OUT/stores/ID.ome.zarr, what was said on the way in OUT/logs/ID.log, and a page about it, if it is asked for, in
OUT/report/slides/ID.html. Done is what record and store say was made of the same options and the same slide; there is no other
book.
"""

from __future__ import annotations

import faulthandler
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
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiscale.card import read_card
from wsiscale.cohort.plan import SlideSpec
from wsiscale.errors import MppError, NoTissueError, OptionError, SlideError, StoreError, WsiscaleError
from wsiscale.versions import versions

if TYPE_CHECKING:
    from wsiscale.networks import Network
    from wsiscale.profile import Profile
    from wsiscale.readers.files import FileReader
    from wsiscale.responses import SavedResponse
    from wsiscale.types import Reader, ScaleEstimate

log = logging.getLogger(__name__)

SCHEMA = 1  # of the records
WRITTEN = ("ok", "partial")
FINISHED = (*WRITTEN, "no_tissue", "abstained", "bad_input")  # the same again would come of the same slide and options
_PART = 65_536  # bytes of a file's start, middle and end that tell it from another

_WITHOUT_SAY = (
    "device",
    "batch_size",
    "threads",
    "time_limit",
    "memory_limit",
    "retry",
    "durable",
    "report",
)  # in what comes out


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
    max_failed_tiles: float = 0.01  # share of a slide's tiles that may be damaged
    device: str = "auto"
    batch_size: int | None = None
    threads: int | None = 1  # that write a slide
    time_limit: float = 3600  # s for one slide
    memory_limit: float | None = None  # GB for one slide, where it is worked on alone
    retry: bool = False  # slides that ended without a store, too
    durable: bool = False  # stores and records outlive a power cut
    report: bool = False  # a page about the slide

    def __post_init__(self) -> None:
        policy, _, value = self.on_abstain.partition(":")
        if policy not in ("skip", "cohort-median", "fixed") or (policy == "fixed") != bool(value):
            raise OptionError(f"--on-abstain {self.on_abstain!r} is not skip, cohort-median, or fixed:MPP such as fixed:0.5")
        if policy == "fixed":
            fixed_mpp(self.on_abstain)

    def digest(self) -> str:
        """Of all that has a say in what comes out, the network's weights and this package's version included."""
        said = {name: value for name, value in asdict(self).items() if name not in _WITHOUT_SAY}
        said |= {name: _by_content(said[name]) for name in ("model", "weights", "profile", "detector")}
        said |= {"schema": SCHEMA, "versions": versions()}
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

    Never raises for what is wrong with a slide, its network or its store: `status` is ok, partial, no_tissue, abstained,
    bad_input, failed or locked, `code` and `message` say why. A slide that is done already, by the same options, is not looked
    at again (`resumed` is true then). Raises OptionError for options that make no sense.
    """
    return write_slide(spec, options, out, estimate_slide(spec, options, out))


def estimate_slide(
    spec: SlideSpec | Mapping[str, Any], options: RunOptions | Mapping[str, Any], out: str | os.PathLike[str]
) -> dict[str, Any]:
    """The first half of `process_slide`, for workers with a GPU: a record whose status is `estimated` or final."""
    spec, options, folder = plain_arguments(spec, options, out)

    def work(record: dict[str, Any]) -> None:
        record["made_of"] = {"options": options.digest(), "slide": fingerprint(spec.path), "mpp": repr(spec.mpp)}
        previous = _previous(spec, options, folder, record["made_of"])
        if previous is not None:
            record |= previous | {"resumed": True}
            return
        with opened_slide(spec, options) as slide:
            record |= _estimated(slide, spec, options, folder)
            record["reads"] = slide.reads

    before = {"schema": SCHEMA, "id": spec.id, "slide": Path(spec.path).name, "resumed": False}
    return _recorded(work, spec, folder, before, durable=options.durable)


def write_slide(
    spec: SlideSpec | Mapping[str, Any],
    options: RunOptions | Mapping[str, Any],
    out: str | os.PathLike[str],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """The second half: writes the store of a slide whose record says `estimated`; others it returns as they are."""
    if record["status"] != "estimated":
        return dict(record)
    spec, options, folder = plain_arguments(spec, options, out)

    def work(written: dict[str, Any]) -> None:
        with opened_slide(spec, options) as slide:
            written |= _written(slide, spec, options, folder, written)
            written["reads"] = written.get("reads", 0) + slide.reads

    return _recorded(work, spec, folder, record, durable=options.durable)


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


def write_record(out: str | os.PathLike[str], record: Mapping[str, Any], *, durable: bool = False) -> None:
    """Whole or not at all."""
    path = record_path(out, record["id"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=1, allow_nan=False, sort_keys=True) + "\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())
    partial.replace(path)


# Deciding


def _previous(spec: SlideSpec, options: RunOptions, out: Path, made_of: Mapping[str, str]) -> dict[str, Any] | None:
    """The record of a slide that need not be done again."""
    record = read_record(out, spec.id)
    if record is None or record.get("made_of") != made_of or record["status"] not in FINISHED:
        return None
    if options.report and not _has_page(record, out):
        return None
    if record["status"] not in WRITTEN:
        return None if options.retry else record
    return record if _store_made_of(store_path(out, spec.id)) == made_of else None


def _has_page(record: Mapping[str, Any], out: Path) -> bool:
    """Whether the slide's page is there; also of a slide that cannot have one."""
    if "estimate" not in record or "no_page" in record:
        return True
    return "page" in record and Path(out, record["page"]).is_file()


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


def _by_content(name: str | None) -> Any:
    """What an option names: by their contents the files, of a card its weights' and its code's too, else the name itself."""
    if name is None:
        return None
    file, colon, inside = name.rpartition(":") if not Path(name).is_file() else (name, "", "")
    path = Path(file)
    if not file or not path.is_file():
        return name
    status = path.stat()
    said = [_sha256(path, status.st_size, status.st_mtime_ns), colon + inside]
    if path.suffix == ".json":
        card = read_card(path)
        beside = (str(path.parent / str(card[field])) for field in ("weights", "factory") if card.get(field) is not None)
        said += [_by_content(other) if Path(other.partition(":")[0]).is_file() else "" for other in beside]
    return said


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001  which tell whether it is still the same file
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Working


def _estimated(slide: Reader, spec: SlideSpec, options: RunOptions, out: Path) -> dict[str, Any]:
    from wsiscale.estimation import as_record, estimate

    network = loaded_network(options)
    answers: list[SavedResponse] = []
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
        profile=_profile(spec, options),
        trust_tag=options.trust_tag,
        answered=answers.append if options.report else None,
    )
    answer = as_record(found)
    result: dict[str, Any] = {"status": "estimated", "estimate": answer, "mpp_source": found.mpp_source}
    result |= {"slide_mpp": found.slide_mpp, "ci90": answer["ci90"], "forwards": found.forwards}
    result |= _tissue_says(found)
    if options.report:
        page = f"report/slides/{spec.id}.html"
        why = _unreported(out / page, slide, network, found, answers, options)
        result |= {"page": page} if why is None else {"no_page": why}
    if found.abstained is not None:
        result |= {"code": found.abstained.reason, "message": found.abstained.detail}
        policy = options.on_abstain.partition(":")[0]
        if found.abstained.reason == "no_tissue":
            return {**result, "status": "no_tissue"}
        if policy != "fixed":
            return {**result, "status": "abstained"}
        return {**result, "mpp": fixed_mpp(options.on_abstain), "chosen_by": options.on_abstain}
    return {**result, **_target(found)}


def _unreported(
    page: Path, slide: Reader, network: Network, found: ScaleEstimate, answers: list[SavedResponse], options: RunOptions
) -> str | None:
    """Writes the slide's page, or says why it cannot be written, which is not the slide's misfortune."""
    from wsiscale.report.slide import write_slide_page

    heard = answers[0] if answers else None
    try:
        write_slide_page(page, slide, network, found, heard, detector=options.detector, device=options.device)
    except (SlideError, StoreError, MemoryError) as error:
        why = " ".join(str(error).split())
        log.warning("the slide has no page: %s", why)
        return why
    return None


def _profile(spec: SlideSpec, options: RunOptions) -> Profile | str | None:
    """What a slide is registered to: a reference slide to the others, lest it agree with its own tag."""
    if options.profile == "cohort":
        raise OptionError("one slide is no cohort to make a profile of; give a card, auto or none")
    path = Path(options.profile or "auto")
    if options.profile in (None, "auto") or not path.is_file():
        return options.profile
    status = path.stat()
    profile, references = _loaded_profile(path, status.st_size, status.st_mtime_ns)
    return profile.without(references.index(spec.id)) if spec.id in references else profile


@lru_cache(maxsize=1)
def _loaded_profile(path: Path, size: int, mtime_ns: int) -> tuple[Profile, tuple[str, ...]]:  # noqa: ARG001  by which it is known
    from wsiscale.profile import load_profile

    return load_profile(path), tuple(json.loads(path.read_text(encoding="utf-8")).get("references", ()))


def _tissue_says(found: ScaleEstimate) -> dict[str, Any]:
    """The slide's µm/px by its tissue, registered to the network's profile, beside the one by its tag."""
    from wsiscale.profile import TAG_MARGIN, beyond

    by_tissue = found.registration
    if by_tissue is None or by_tissue.mpp is None or by_tissue.ci90 is None:
        return {}
    said: dict[str, Any] = {"tissue_mpp": by_tissue.mpp, "tissue_ci90": list(by_tissue.ci90), "tag_mpp": by_tissue.claimed}
    if by_tissue.claimed is None:
        return {**said, "tag": "missing"}
    return {**said, "tag": "conflicts" if beyond(by_tissue.claimed, by_tissue.ci90) > TAG_MARGIN else "agrees"}


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
        max_failed_tiles=options.max_failed_tiles,
        # Without how long it took, so that the same again is the same to the byte.
        estimate={name: value for name, value in record["estimate"].items() if name != "seconds"},
        made_of=record["made_of"],
        threads=options.threads,
        overwrite=True,
        durable=options.durable,
    )
    damage: dict[str, Any] = {"status": "ok"}
    if summary.failed_chunks:
        where = f"{summary.failed} of {summary.tiles} tiles, in {summary.failed_chunks} chunks"
        damage = {"status": "partial", "code": "DAMAGED", "message": f"the slide is damaged under {where}; these are white"}
    return {
        **damage,
        "store": f"stores/{path.name}",
        "tiles": summary.tiles,
        "failed_tiles": summary.failed,
        "megapixels": round(summary.megapixels, 3),
        "bytes": summary.bytes,
        "scale": summary.scale,
    }


def loaded_network(options: RunOptions) -> Network:
    """Once a process, by name: weights never travel."""
    return _network(options.model, options.weights, options.tile_size, options.trust_model)


@lru_cache(maxsize=1)
def _network(model: str | None, weights: str | None, tile_size: int | None, trust_model: bool) -> Network:
    from wsiscale.networks import load_network

    return load_network(model, weights=None if weights is None else Path(weights), tile_size=tile_size, trust_model=trust_model)


@contextmanager
def opened_slide(spec: SlideSpec, options: RunOptions) -> Iterator[FileReader[Any]]:
    from wsiscale.readers import open_slide
    from wsiscale.readers.files import FileReader

    with open_slide(spec.path, mpp=spec.mpp, reader=options.reader) as slide:
        assert isinstance(slide, FileReader)
        yield slide


def _recorded(
    work: Callable[[dict[str, Any]], None], spec: SlideSpec, out: Path, before: Mapping[str, Any], *, durable: bool
) -> dict[str, Any]:
    """The record that `work` has filled, on disk if its status is final; what it raises becomes one."""
    started = time.perf_counter()
    record = dict(before)
    with _logged(out, spec.id):
        try:
            work(record)
        except OptionError:
            raise
        except WsiscaleError as error:
            record |= {"status": status_of(error), "code": error.code, "message": without_folders(str(error), spec)}
        except MemoryError as error:
            record |= {"status": "failed", "code": "MEMORY", "message": f"out of memory: {error}"}
        except Exception as error:  # noqa: BLE001  the slide's own misfortune, whatever it is
            log.error("%s", traceback.format_exc())
            message = f"{type(error).__name__}: {without_folders(str(error), spec)}"
            record |= {"status": "failed", "code": "UNEXPECTED", "message": message}
        if not record["resumed"]:
            record["seconds"] = round(record.get("seconds", 0.0) + time.perf_counter() - started, 3)
            if record["status"] not in ("estimated", "locked"):  # whoever holds the lock writes the record
                write_record(out, record, durable=durable)
            log.info("%s %s %s", record["status"], record.get("code", ""), record.get("message", ""))
    return record


def without_folders(message: str, spec: SlideSpec) -> str:
    """A message in one line, its slide named without its folders, which may name a patient."""
    folder = os.path.dirname(spec.path)
    short = message.replace(os.path.join(folder, ""), "") if folder else message
    return " ".join(short.split())


def status_of(error: WsiscaleError) -> str:
    """What an expected error makes of a slide."""
    if isinstance(error, NoTissueError):
        return "no_tissue"
    if isinstance(error, StoreError) and error.code == "LOCKED":
        return "locked"
    if isinstance(error, SlideError) and error.code == "DAMAGED":
        return "failed"
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


def plain_arguments(
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
    import_module("wsiscale.estimation")  # which may take seconds, and is not the slide's fault
    faulthandler.dump_traceback_later(options.time_limit, exit=True)
    print(json.dumps(process_slide(asked["spec"], replace(options, threads=1), asked["out"])))  # noqa: T201


if __name__ == "__main__":
    main()
