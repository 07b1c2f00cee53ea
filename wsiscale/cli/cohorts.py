"""Commands for many slides."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from wsiscale.cli.options import (
    DONE,
    FAILED,
    Criterion,
    Device,
    Durable,
    Json,
    MaxFailedTiles,
    MaxUpsample,
    Model,
    MppRange,
    Places,
    Precision,
    ReaderName,
    Seed,
    TissueSpec,
    Tolerance,
    TrustModel,
    TrustTag,
    Weights,
    parse_range,
    print_json,
)


def run(
    cohort: Annotated[str, typer.Argument(help="a folder, a pattern in quotes, or a CSV of path[,id][,mpp]", metavar="COHORT")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for stores, records and the manifest")],
    model: Model = None,
    weights: Weights = None,
    trust_model: TrustModel = False,
    criterion: Criterion = None,
    mpp_range: MppRange = None,
    places: Places = None,
    precision: Precision = 0.1,
    max_upsample: MaxUpsample = 1.0,
    profile: Annotated[
        str, typer.Option("--profile", help="auto: the network's own, else the cohort's; cohort; none; or a card.json with one")
    ] = "auto",
    trust_tag: TrustTag = True,
    detector: TissueSpec = None,
    reader: ReaderName = "auto",
    on_abstain: Annotated[
        str, typer.Option(help="slides without an answer: skip, fixed:MPP, or cohort-median", metavar="POLICY")
    ] = "skip",
    tile_size: Annotated[int, typer.Option(help="px of the tiles in a store's table")] = 512,
    overlap: Annotated[int, typer.Option(help="px shared by neighbouring tiles of the table")] = 0,
    min_tissue: Annotated[float, typer.Option(help="least share of tissue in a tile, 0..1")] = 0.1,
    ngff: Annotated[str, typer.Option(help="0.5, or 0.4 for QuPath and TIAToolbox")] = "0.5",
    pixels: Annotated[str, typer.Option(help="tissue, or none: table and estimate alone")] = "tissue",
    tolerance: Tolerance = 0.01,
    max_failed_tiles: MaxFailedTiles = 0.01,
    durable: Durable = False,
    workers: Annotated[int, typer.Option(help="processes on this machine")] = 1,
    scheduler: Annotated[str | None, typer.Option(help="address of a dask scheduler, in place of --workers")] = None,
    shard: Annotated[
        str | None, typer.Option(help="part i of n of the cohort, 0/8 to 7/8, for job arrays", metavar="I/N")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="slides that ended without a store, too")] = False,
    time_limit: Annotated[float, typer.Option(help="seconds for one slide")] = 3600,
    memory_limit: Annotated[float | None, typer.Option(help="GB for a slide that has killed its worker, tried alone")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="a page about each slide, and one about all, in OUTPUT/report")
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Estimate and write a whole cohort; run it again to go on where it stopped. Exit code 1 where a slide failed.

    Example: wsiscale run 'slides/*.svs' -o out --workers 4 --report
    """
    from wsiscale.cohort.engine import run_cohort
    from wsiscale.cohort.one_slide import RunOptions
    from wsiscale.cohort.plan import read_cohort, shard_of

    options = RunOptions(
        model=model,
        weights=None if weights is None else str(weights),
        trust_model=trust_model,
        criterion=criterion,
        mpp_range=parse_range(mpp_range, "--mpp-range"),
        places=places,
        precision=precision or None,
        max_upsample=max_upsample,
        seed=seed,
        profile=None if profile == "none" else profile,
        trust_tag=trust_tag,
        detector=detector,
        reader=reader,
        on_abstain=on_abstain,
        tiles=tile_size,
        overlap=overlap,
        min_tissue=min_tissue,
        ngff=ngff,
        pixels=pixels,
        tolerance=tolerance,
        max_failed_tiles=max_failed_tiles,
        durable=durable,
        device=device,
        time_limit=time_limit,
        memory_limit=memory_limit,
        retry=retry,
        report=report,
    )
    specs = read_cohort(cohort)
    specs = specs if shard is None else shard_of(specs, shard)
    with _running(len(specs)) as told:
        summary = run_cohort(specs, output, options, client=scheduler, workers=workers, whole=shard is None, told=told)
    if report:
        from wsiscale.report.cohort import write_cohort_page

        print(write_cohort_page(output), file=sys.stderr)
    if as_json:
        print_json({"out": str(summary.out), "counts": dict(summary.counts), "seconds": round(summary.seconds, 1)})
    else:
        print(summary.sentence())
    for count, what in (
        (summary.counts.get("abstained"), "have no answer and were not written"),
        (summary.counts.get("partial"), "are damaged, and their stores lack what could not be read"),
        (summary.conflicts, "have tissue that contradicts the µm/px of their tag"),
    ):
        if count:
            print(f"{count} slides {what}; see {output / 'summary.md'}", file=sys.stderr)
    return FAILED if summary.failed else DONE


@contextmanager
def _running(total: int) -> Iterator[Callable[[str, Any, Any], None]]:
    """A line for each slide that is being worked on and one for all, on stderr, silent where that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        all_of_them = bars.add_task("slides", total=total, rate="")
        lines: dict[str, Any] = {}
        done, megapixels = 0, 0.0

        def told(event: str, spec: Any, record: Any) -> None:
            nonlocal done, megapixels
            if event in ("asked", "started"):
                note = "  for a profile" if event == "asked" else ""
                lines[spec.id] = bars.add_task(f"  {spec.id}", total=None, rate=note)
                return
            if (line := lines.pop(spec.id, None)) is not None:
                bars.remove_task(line)
            if record is None:
                return
            if not record.get("resumed"):
                done, megapixels = done + 1, megapixels + (record.get("megapixels") or 0)
                seconds = bars.tasks[0].elapsed or 1e-9
                bars.update(all_of_them, rate=f"{done / seconds * 3600:.0f} slides/h  {megapixels / seconds:.1f} MP/s")
            bars.advance(all_of_them)
            if record["status"] not in ("ok", "no_tissue"):
                console.print(
                    f"{spec.id}: {record['status']} {record.get('code') or ''} {record.get('message') or ''}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )

        yield told
