"""Commands for what has been written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wsiscale.cli.options import DONE, FAILED, Json, print_json


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
    """Check the installation, and say what to do about what is found.

    Example: wsiscale doctor
    """
    from wsiscale.doctor import examine

    findings = examine()
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok     ' if finding.ok else 'PROBLEM'}  {finding.what}: {finding.detail}")
    return DONE if all(finding.ok for finding in findings) else FAILED
