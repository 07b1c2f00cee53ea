"""Commands for what has been written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from wsiscale.cli.options import DONE, FAILED, Json, print_json
from wsiscale.publishing import in_bytes


def verify(
    store: Annotated[Path, typer.Argument(help="an OME-Zarr that wsiscale wrote", metavar="STORE")], as_json: Json = False
) -> int:
    """Whether a store is whole: every file there, nothing altered. Exit code 1 where it is not.

    Example: wsiscale verify slide.ome.zarr
    """
    from wsiscale.store import verify_store

    report = verify_store(store)
    if as_json:
        print_json({"store": str(store), "files": report.files, "problems": [vars(p) for p in report.problems]})
    else:
        for problem in report.problems:
            print(f"{problem.path}: {problem.what}")
        print(f"{store}: " + (f"{len(report.problems)} problems" if report.problems else f"whole, {report.files} files"))
    return FAILED if report.problems else DONE


def export(
    store: Annotated[
        Path, typer.Argument(help="an OME-Zarr that wsiscale wrote; for tables also the folder of a cohort", metavar="STORE")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="trident-h5, clam-h5, qupath-geojson, ome-tiff, spatialdata, webdataset, wsi-mpp-csv or hs2p-csv",
            metavar="FORMAT",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="the file, or folder, to write")],
    slides: Annotated[Path | None, typer.Option(help="the folder that a table names the slides in")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
    as_json: Json = False,
) -> int:
    """Write a store as what other tools read; what their format cannot say is said on stderr.

    Example: wsiscale export slide.ome.zarr --to trident-h5 -o slide_patches.h5
    """
    from wsiscale.export import export_store

    summary = export_store(store, output, to=to, slides=slides, overwrite=overwrite)
    for note in summary.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print_json({"store": str(store), **summary.as_record()})
    else:
        print(f"{output}: {summary.format}, {in_bytes(summary.bytes)}, {summary.seconds:.1f} s")
    return DONE


def report(
    out: Annotated[Path, typer.Argument(help="the folder that wsiscale run wrote", metavar="OUT")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="folder for index.html (none: OUT/report)", metavar="DIR")
    ] = None,
) -> None:
    """One page about a cohort: estimates, outliers, conflicts of metadata, and a table of all slides to sort and filter.

    It needs the manifest and the records alone, and links to the slides' own pages where `run --report` wrote them.

    Example: wsiscale report out -o pages
    """
    from wsiscale.report.cohort import write_cohort_page

    print(write_cohort_page(out, output))


def doctor(as_json: Json = False) -> int:
    """Check the installation, and say what to do about what is found. Exit code 1 where something needed does not work.

    Example: wsiscale doctor
    """
    from wsiscale.doctor import examine

    findings = examine()
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            mark = "ok" if finding.ok else "PROBLEM" if finding.needed else "-"
            advice = f"; {finding.advice}" if finding.advice else ""
            print(f"{mark:8}{finding.what}: {finding.detail}{advice}")
    return FAILED if any(finding.needed and not finding.ok for finding in findings) else DONE
