"""Many slides on dask.distributed. One slide is one task; workers open slides; small dicts travel, pixels never.

A sliding window: no more tasks are out than there are workers, so that a slide that kills its worker is the only one that is
blamed. Such a slide is tried once more, alone in a process of its own, and that names what it died of.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import dask
import numpy as np
from distributed import Client, Future, KilledWorker, LocalCluster

from wsiscale.cohort.one_slide import SCHEMA, RunOptions, estimate_slide, process_slide, read_record, write_record, write_slide
from wsiscale.cohort.plan import SlideSpec
from wsiscale.cohort.records import CohortSummary, row_of, write_manifest, write_summary
from wsiscale.errors import OptionError
from wsiscale.memory import keep_memory
from wsiscale.views import cores

log = logging.getLogger(__name__)

Told = Callable[[str, SlideSpec, dict[str, Any] | None], None]  # ("started" or "done", slide, its record)


def run_cohort(
    specs: Sequence[SlideSpec],
    out: str | os.PathLike[str],
    options: RunOptions | None = None,
    *,
    client: Client | str | None = None,
    workers: int = 1,
    told: Told | None = None,
) -> CohortSummary:
    """Estimates and writes every slide of `specs` below `out`: stores, records, logs, manifest.csv, manifest.jsonl, summary.md.

    On `client` (a dask client, or a scheduler's address), or on a cluster of `workers` processes on this machine. A client that
    is given is not closed. Where workers offer a resource GPU, slides are estimated on those and written on the others. What
    was done before, with the same options, is not done again; so a run that was interrupted goes on when it is called again.

    Raises OptionError for options that make no sense, and for a cluster without workers.
    """
    options = RunOptions() if options is None else options
    folder = Path(os.path.abspath(out))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    counts = {"done": 0, "resumed": 0}

    def heard(event: str, spec: SlideSpec, record: dict[str, Any] | None) -> None:
        if record is not None:
            counts["resumed" if record.get("resumed") else "done"] += 1
        if told is not None:
            told(event, spec, record)

    def summarised() -> CohortSummary:
        rows = [row_of(read_record(folder, spec.id) or missing(spec)) for spec in specs]
        by_status = write_manifest(folder, rows)
        summary = CohortSummary(folder, by_status, counts["done"], counts["resumed"], time.perf_counter() - started)
        write_summary(folder, rows, summary)
        return summary

    try:
        with _client(client, workers) as dask_client:
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
            timeout=options.time_limit,
        )
    except subprocess.TimeoutExpired:
        record |= {"status": "failed", "code": "TIMEOUT", "message": f"not done in {options.time_limit:g} s (--time-limit)"}
    else:
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
        name = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        last = (done.stderr.strip().splitlines() or [""])[-1]
        record |= {"status": "killed", "code": name, "message": f"reading it ended the process twice: {last[:300]}"}
    write_record(out, record)
    return record


def _worked(client: Client, specs: Sequence[SlideSpec], out: Path, options: RunOptions, told: Told) -> list[SlideSpec]:
    """Every slide once; returns those that killed their worker."""
    gpus, free_of_gpus, slots = _slots(client)
    # A preference: a worker that was started again has another address.
    elsewhere = {"workers": free_of_gpus, "allow_other_workers": True} if gpus and free_of_gpus else {}
    to_estimate = deque(specs)
    to_write: deque[tuple[SlideSpec, dict[str, Any]]] = deque()
    running: dict[Future, tuple[SlideSpec, bool]] = {}  # on a GPU
    poisonous: list[SlideSpec] = []
    limit = options.time_limit
    finished: SimpleQueue[Future] = SimpleQueue()

    def submit(spec: SlideSpec, on_gpu: bool, work: Callable[..., dict[str, Any]], *more: Any, **where: Any) -> None:
        future = client.submit(_within, limit, work, asdict(spec), asdict(options), str(out), *more, pure=False, **where)
        running[future] = (spec, on_gpu)
        future.add_done_callback(finished.put)

    def fill() -> None:
        busy = sum(on_gpu for _, on_gpu in running.values())
        while gpus and to_estimate and busy < gpus:
            spec = to_estimate.popleft()
            told("started", spec, None)
            submit(spec, True, estimate_slide, resources={"GPU": 1})
            busy += 1
        free = slots - (len(running) - busy)
        while free > 0 and (to_write or (to_estimate and not gpus)):
            if to_write:
                spec, record = to_write.popleft()
                submit(spec, False, write_slide, record, **elsewhere)
            else:
                spec = to_estimate.popleft()
                told("started", spec, None)
                submit(spec, False, process_slide)
            free -= 1

    fill()
    try:
        while running:
            future = finished.get()
            spec, _ = running.pop(future)
            error = future.exception()
            if error is None:
                record = future.result()
                if record["status"] == "estimated":
                    to_write.append((spec, record))
                else:
                    told("done", spec, record)
            elif isinstance(error, KilledWorker):
                poisonous.append(spec)
            elif isinstance(error, OptionError):
                raise error
            else:
                record = {**missing(spec), "status": "failed", "code": "CLUSTER", "message": str(error), "resumed": False}
                write_record(out, record)
                told("done", spec, record)
            future.release()
            fill()
    except BaseException:
        client.cancel(list(running), force=True)
        raise
    return poisonous


def _within(limit: float, work: Callable[..., dict[str, Any]], *asked: Any) -> dict[str, Any]:
    """On a worker: `work`, or the worker's end when it takes longer than `limit` s, even inside of native code."""
    keep_memory()
    faulthandler.dump_traceback_later(limit, exit=True)
    try:
        return work(*asked)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _by_median(specs: Sequence[SlideSpec], options: RunOptions, out: Path) -> None:
    """Writes the slides without an answer at the median of the others'."""
    records = [record for spec in specs if (record := read_record(out, spec.id)) is not None]
    answers = [record["mpp"] for record in records if record["status"] == "ok" and record.get("mpp") is not None]
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
    settings = {"distributed.scheduler.allowed-failures": 0, "distributed.worker.daemon": False}
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
        yield connected


def _size(spec: SlideSpec) -> int:
    """The largest first, so that the last ones to run are short."""
    try:
        return os.stat(spec.path).st_size
    except OSError:
        return 0
