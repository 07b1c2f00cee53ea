"""Many slides on dask.distributed. One slide is one task; workers open slides; small dicts travel, pixels never.

A sliding window: no more tasks are out than there are workers, so that a slide that kills its worker is the only one that is
blamed. Such a slide is tried once more, alone in a process of its own, and that names what it died of.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import dask
import numpy as np
from distributed import Client, Future, KilledWorker, LocalCluster

from wsiscale.cohort.one_slide import (
    SCHEMA,
    WRITTEN,
    RunOptions,
    estimate_slide,
    process_slide,
    read_record,
    without_folders,
    write_record,
    write_slide,
)
from wsiscale.cohort.plan import SlideSpec
from wsiscale.cohort.records import CohortSummary, write_results
from wsiscale.cohort.reference import (
    FEWEST,
    REFERENCES,
    ask_reference,
    candidates,
    make_cohort_profile,
    profile_path,
    profile_to_use,
)
from wsiscale.errors import OptionError, StoreError
from wsiscale.memory import keep_memory
from wsiscale.views import cores

log = logging.getLogger(__name__)

logger = logging.getLogger(__name__)

# ("started" or "done", slide, its record); before that ("asked" or "answered", slide, None) of slides for a profile
Told = Callable[[str, SlideSpec, dict[str, Any] | None], None]

# dask takes 10 ms to send a task. Slides that are over soon (done before, not found) are sent some at a time; of others no
# more are out than there are workers.
QUICK, QUICK_AHEAD = 0.25, 8  # s, tasks a worker
LOGGED = 100  # tasks
STARTING = 120  # s that a process of its own may take before it begins with its slide
TIMED_OUT = "Timeout ("  # what faulthandler says first
SILENCE = 60  # s without news, after which the cluster is looked at
LEAST_FREE = 100_000_000  # bytes; each store asks for what it needs itself


def run_cohort(
    specs: Sequence[SlideSpec],
    out: str | os.PathLike[str],
    options: RunOptions | None = None,
    *,
    client: Client | str | None = None,
    workers: int = 1,
    whole: bool = True,
    told: Told | None = None,
) -> CohortSummary:
    """Estimates and writes every slide of `specs` below `out`: stores, records, logs, manifest.csv, manifest.jsonl, summary.md.

    On `client` (a dask client, or a scheduler's address), or on a cluster of `workers` processes on this machine. A client that
    is given is not closed. Where workers offer a resource GPU, slides are estimated on those and written on the others. What
    was done before, with the same options, is not done again; so a run that was interrupted goes on when it is called again.

    With the profile "auto" a network that brings none gets one of the cohort's own (see `reference`), with "cohort" any network
    does; not where `specs` are a part of the cohort (`whole` is False), unless it is there already.

    Raises OptionError for options that make no sense, and for a cluster without workers, ModelError where a worker cannot load
    the network, and StoreError where nothing can be written.
    """
    options = RunOptions() if options is None else options
    folder = Path(os.path.abspath(out))
    check_writable(folder)
    for partial in (
        *folder.glob("slides/*.partial"),
        *folder.glob("report/**/*.partial"),
    ):  # of a process that was killed, unless somebody is at it now
        if time.time() - partial.stat().st_mtime > STARTING:
            partial.unlink(missing_ok=True)
    started = time.perf_counter()
    locked: dict[str, dict[str, Any]] = {}  # by others, who will write these slides' records
    by_profile: str | None = None
    counts = {"done": 0, "resumed": 0}

    def heard(event: str, spec: SlideSpec, record: dict[str, Any] | None) -> None:
        if record is not None:
            counts["resumed" if record.get("resumed") else "done"] += 1
            if record["status"] == "locked":
                locked[spec.id] = record
        if told is not None:
            told(event, spec, record)

    def summarised() -> CohortSummary:
        records = (locked.get(spec.id) or read_record(folder, spec.id) or missing(spec) for spec in specs)
        seconds = time.perf_counter() - started
        return write_results(
            folder, records, done=counts["done"], resumed=counts["resumed"], seconds=seconds, profile=by_profile
        )

    try:
        with _client(client, workers) as dask_client:
            options, by_profile = _with_profile(dask_client, specs, folder, options, whole, heard)
            poisonous = _worked(dask_client, sorted(specs, key=_size, reverse=True), folder, options, heard)
        for spec in poisonous:
            heard("started", spec, None)
            heard("done", spec, alone(spec, options, folder))
        if options.on_abstain == "cohort-median":
            _by_median(specs, options, folder)
    except KeyboardInterrupt:
        summarised()
        raise
    return summarised()


def missing(spec: SlideSpec) -> dict[str, Any]:
    """The record of a slide that has none: not begun, or locked by another process."""
    return {"schema": SCHEMA, "id": spec.id, "slide": Path(spec.path).name, "status": "missing", "message": "not done yet"}


def alone(spec: SlideSpec, options: RunOptions, out: Path) -> dict[str, Any]:
    """One slide in a process of its own, with the limits of `options`: what kills it is known by its signal."""
    asked = json.dumps({"spec": asdict(spec), "options": asdict(options), "out": str(out)})
    record = {**missing(spec), "resumed": False}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "wsiscale.cohort.one_slide"],
            input=asked,
            capture_output=True,
            text=True,
            timeout=options.time_limit + STARTING,  # in which it ends itself
        )
        too_long = done.stderr.startswith(TIMED_OUT) or f"\n{TIMED_OUT}" in done.stderr
    except subprocess.TimeoutExpired:
        too_long = True
    if too_long:
        record |= {"status": "failed", "code": "TIMEOUT", "message": f"not done in {options.time_limit:g} s (--time-limit)"}
    else:
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
        name = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        last = (done.stderr.strip().splitlines() or [""])[-1]
        record |= {
            "status": "killed",
            "code": name,
            "message": f"reading it ended the process twice: {without_folders(last, spec)[:300]}",
        }
    write_record(out, record)
    return record


def _with_profile(
    client: Client, specs: Sequence[SlideSpec], out: Path, options: RunOptions, whole: bool, told: Told
) -> tuple[RunOptions, str | None]:
    """The options with the profile that slides are to be registered to, made if need be, and what to say of it."""
    if options.profile not in ("auto", "cohort"):
        return options, None
    if options.profile == "cohort" and not options.trust_tag:
        raise OptionError("a cohort's own profile rests on its tags; give either --profile cohort or --no-trust-tag")
    found = _asked(client, profile_to_use, asdict(options), str(out))
    if found == "auto":
        return replace(options, profile="auto"), "the one in the network's card"
    if found is not None:
        return replace(options, profile=found), f"{Path(found).name}, of an earlier run"
    left_out = Counter[str]()
    references: list[dict[str, Any]] = []
    if whole and options.trust_tag and len(specs) >= FEWEST:
        references, left_out = _references(client, candidates(specs)[: 4 * REFERENCES], out, options, told)
    if len(references) >= FEWEST:
        said = _asked(client, make_cohort_profile, references, asdict(options), str(out))
        return replace(options, profile=str(profile_path(out))), f"{profile_path(out).name}, of this cohort: {said}"
    why = "; ".join(f"{count} x {reason}" for reason, count in left_out.most_common(3))
    few = f"{len(references)} slides of the cohort may be references, and {FEWEST} are needed" + (f" ({why})" if why else "")
    if options.profile == "cohort":
        raise OptionError(f"no profile can be made: {few if whole else 'this is a part of the cohort; run it whole once'}")
    return replace(options, profile=None), f"none: the network's card has none, and {few}" if whole else None


def _asked(client: Client, work: Callable[..., Any], *asked: Any) -> Any:
    """What `work` answers on a worker, of which one may be lost while it is asked, and a second."""
    where = {"resources": {"GPU": 1}} if _slots(client)[0] else {}
    for _ in range(2):
        with suppress(KilledWorker):
            return client.submit(work, *asked, pure=False, **where).result()
    return client.submit(work, *asked, pure=False, **where).result()


def _references(
    client: Client, specs: Sequence[SlideSpec], out: Path, options: RunOptions, told: Told
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """What was kept of the first slides of `specs` that can be references, and why others cannot: the same on any cluster."""
    gpus, _, slots = _slots(client)
    where = {"resources": {"GPU": 1}} if gpus else {}
    references: list[dict[str, Any]] = []
    left_out = Counter[str]()
    waiting = deque(specs)
    while waiting and len(references) < REFERENCES:
        some = [waiting.popleft() for _ in range(min(REFERENCES - len(references), len(waiting)))]
        answers: dict[str, dict[str, Any]] = {}
        for first in range(0, len(some), gpus or slots):  # no more than there are workers, for the reason at the top
            running = {}
            for spec in some[first : first + (gpus or slots)]:
                told("asked", spec, None)
                asked = (asdict(spec), asdict(options), str(out))
                running[spec.id] = client.submit(_within, options.time_limit, ask_reference, *asked, pure=False, **where)
            for spec in some[first : first + (gpus or slots)]:
                try:
                    answers[spec.id] = running[spec.id].result()
                except KilledWorker:
                    answers[spec.id] = {"why": "its worker died"}
                except OptionError:
                    raise
                except Exception as error:  # noqa: BLE001  the slide's own misfortune, which its own turn will name
                    answers[spec.id] = {"why": type(error).__name__}
                told("answered", spec, None)
        references += [answers[spec.id] for spec in some if answers[spec.id]["why"] is None]
        left_out.update(answer["why"] for answer in answers.values() if answer["why"] is not None)
    return references, left_out


def check_writable(folder: Path) -> None:
    """Raises StoreError where nothing can be written, before any slide is read."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror or error}", code="NOT_WRITABLE") from error
    if free < LEAST_FREE:
        raise StoreError(f"{free / 1e6:.0f} MB are free for {folder}, and a slide may need many; make room", code="NO_SPACE")


def _worked(client: Client, specs: Sequence[SlideSpec], out: Path, options: RunOptions, told: Told) -> list[SlideSpec]:
    """Every slide once; returns those that killed their worker."""
    gpus, free_of_gpus, slots = _slots(client)
    # A preference: a worker that was started again has another address.
    elsewhere = {"workers": free_of_gpus, "allow_other_workers": True} if gpus and free_of_gpus else {}
    to_estimate = deque(specs)
    to_write: deque[tuple[SlideSpec, dict[str, Any]]] = deque()
    running: dict[Future, tuple[SlideSpec, bool, float]] = {}  # on a GPU; since when
    ahead = 1
    poisonous: list[SlideSpec] = []
    limit = options.time_limit
    finished: SimpleQueue[Future] = SimpleQueue()

    def submit(spec: SlideSpec, on_gpu: bool, work: Callable[..., dict[str, Any]], *more: Any, **where: Any) -> None:
        future = client.submit(_within, limit, work, asdict(spec), asdict(options), str(out), *more, pure=False, **where)
        running[future] = (spec, on_gpu, time.monotonic())
        future.add_done_callback(finished.put)

    def fill() -> None:
        busy = sum(on_gpu for _, on_gpu, _ in running.values())
        while gpus and to_estimate and busy < gpus:
            spec = to_estimate.popleft()
            told("started", spec, None)
            submit(spec, True, estimate_slide, resources={"GPU": 1})
            busy += 1
        free = ahead * slots - (len(running) - busy)
        while free > 0 and (to_write or (to_estimate and not gpus)):
            if to_write:
                spec, record = to_write.popleft()
                submit(spec, False, write_slide, record, **elsewhere)
            else:
                spec = to_estimate.popleft()
                told("started", spec, None)
                submit(spec, False, process_slide)
            free -= 1

    def ended() -> list[tuple[SlideSpec, BaseException | None, dict[str, Any]]]:
        """Slides whose task is over; their records in one message where there are several."""
        nonlocal ahead
        some = [_patiently(finished, client)]
        while not finished.empty():
            some.append(finished.get())
        sound = [future for future in some if future.status == "finished"]
        records = dict(zip(sound, client.gather(sound), strict=True))
        found = []
        for future in some:
            spec, _, submitted = running.pop(future)
            ahead = QUICK_AHEAD if time.monotonic() - submitted < QUICK else 1
            found.append((spec, None if future in records else future.exception(), records.get(future, {})))
            future.release()
        return found

    fill()
    try:
        while running:
            for spec, error, record in ended():
                if error is None and record["status"] == "estimated":
                    to_write.append((spec, record))
                elif error is None:
                    told("done", spec, record)
                elif isinstance(error, KilledWorker):
                    poisonous.append(spec)
                elif isinstance(error, OptionError):
                    raise error
                else:
                    record = {
                        **missing(spec),
                        "status": "failed",
                        "code": "CLUSTER",
                        "message": without_folders(str(error), spec),
                        "resumed": False,
                    }
                    write_record(out, record)
                    told("done", spec, record)
            fill()
    except BaseException:
        client.cancel(list(running), force=True)
        raise
    return poisonous


def _patiently(finished: SimpleQueue[Future], client: Client) -> Future:
    """The next task that is over. A cluster of somebody else's may get new workers at any time, and is waited for."""
    while True:
        try:
            return finished.get(timeout=SILENCE)
        except Empty:
            if not client.scheduler_info(n_workers=-1)["workers"]:
                logger.warning("the cluster has no workers left; waiting for new ones (Ctrl-C ends, and a rerun goes on)")


# Workers that are threads of one process work at one slide at a time: its network, clock and log are theirs together.
_ONE = threading.Lock()


def _within(limit: float, work: Callable[..., dict[str, Any]], *asked: Any) -> dict[str, Any]:
    """On a worker: `work`, or the worker's end when it takes longer than `limit` s, even inside of native code."""
    keep_memory()
    import_module("wsiscale.estimation")  # which may take seconds, and is not the slide's fault

    with _ONE:
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            return work(*asked)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _by_median(specs: Sequence[SlideSpec], options: RunOptions, out: Path) -> None:
    """Writes the slides without an answer at the median of the others'."""
    records = [record for spec in specs if (record := read_record(out, spec.id)) is not None]
    answers = [record["mpp"] for record in records if record["status"] in WRITTEN and record.get("mpp") is not None]
    if not answers:
        log.warning("no slide of the cohort has an answer, so that there is no median for those without")
        return
    chosen = {"status": "estimated", "mpp": float(np.median(answers)), "scale": None, "chosen_by": "cohort-median"}
    by_id = {spec.id: spec for spec in specs}
    for record in records:
        if record["status"] == "abstained":
            write_slide(by_id[record["id"]], options, out, {**record, **chosen, "resumed": False})


def _slots(client: Client) -> tuple[int, list[str], int]:
    """How many tasks may run on GPUs, the workers without one, and how many tasks all others take (all, without any)."""
    known = client.scheduler_info(n_workers=-1)["workers"]
    if not known:
        raise OptionError("the cluster has no workers; start some, then run this again")
    gpus = int(sum(worker["resources"].get("GPU", 0) for worker in known.values()))
    plain = [address for address, worker in known.items() if not worker["resources"].get("GPU")]
    return gpus, plain, len(plain or known)


@contextmanager
def _client(client: Client | str | None, workers: int) -> Iterator[Client]:
    if isinstance(client, Client):
        yield client
        return
    if client is not None:
        with Client(client, set_as_default=False) as connected:
            yield connected
        return
    if workers < 1:
        raise OptionError(f"at least one worker is needed, not {workers}")
    for name in ("distributed", "distributed.scheduler", "distributed.nanny", "distributed.worker", "distributed.core"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own; what became of a slide is told
    # A worker that dies takes one slide with it, and that one is tried again elsewhere: not three times here.
    settings = {
        "distributed.scheduler.allowed-failures": 0,
        # What dask remembers of tasks that are over; nobody looks at it here.
        "distributed.admin.low-level-log-length": LOGGED,
    }
    env = {"OMP_NUM_THREADS": str(max(1, cores() // workers)), "OMP_WAIT_POLICY": "PASSIVE"}
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # somewhere: 8787 may be taken
            silence_logs=logging.ERROR,
            env=env,
        ) as cluster,
        Client(cluster, set_as_default=False) as connected,
    ):
        # A worker that is killed while it starts is given up by its nanny, and the last one would be waited for for ever.
        cluster.adapt(minimum=workers, maximum=workers, interval="5s")
        yield connected


def _size(spec: SlideSpec) -> int:
    """The largest first, so that the last ones to run are short."""
    try:
        return os.stat(spec.path).st_size
    except OSError:
        return 0
