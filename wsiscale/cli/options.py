"""What the commands have in common: options, exit codes, how they open, show progress and print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsiscale.errors import OptionError

if TYPE_CHECKING:
    from wsiscale.slide_mpp import SlideMpp as FoundMpp
    from wsiscale.types import Reader

DONE, FAILED, USAGE, ABSTAINED, INTERRUPTED = 0, 1, 2, 3, 130


def fail(message: str, code: int) -> int:
    print("wsiscale:", " ".join(message.split()), file=sys.stderr)
    return code


# What several commands take.
Slide = Annotated[str, typer.Argument(help="a whole-slide image: SVS, NDPI, MRXS, OME-TIFF, DICOM, ...", metavar="SLIDE")]
SlideMpp = Annotated[float | None, typer.Option(help="µm/px of level 0; overrides what the file says", metavar="UM")]
MppFromPixels = Annotated[
    bool, typer.Option("--mpp-from-pixels", help="go by the µm/px of the pixels (wsiscale mpp) where the tag does not agree")
]
MppCsv = Annotated[Path | None, typer.Option(help="CSV with the columns wsi,mpp; overrides what the files say")]
ReaderName = Annotated[str, typer.Option(help="auto, openslide, tiffslide or dicom")]
TissueSpec = Annotated[str | None, typer.Option("--tissue", help="own tissue detector, file.py:name")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Model = Annotated[
    str | None,
    typer.Option(
        help="torchvision:NAME, timm:NAME, file.py:factory, package:factory, model.pt2, card.json, or card:NAME of "
        "wsiscale cards (none: the embedded one)"
    ),
]
Weights = Annotated[Path | None, typer.Option(help="weights for --model: safetensors, or a plain state dict")]
TrustModel = Annotated[bool, typer.Option(help="load files that can execute code (model.pt2, pickled modules)")]
Criterion = Annotated[
    str | None,
    typer.Option(
        help="reference, confidence, margin_over_null, ... (docs/methods.md), file.py:name (none: what suits the card)"
    ),
]
MppRange = Annotated[str | None, typer.Option(help="look between these µm/px (none: 0.125:4)", metavar="LO:HI")]
ScaleRange = Annotated[str | None, typer.Option(help="look between these level-0 px per px", metavar="LO:HI")]
TileSize = Annotated[int | None, typer.Option(help="px the network takes (none: the model's own)")]
Places = Annotated[
    int | None, typer.Option(help="places on tissue to look at, at most (none: 64, more where tiles are below 128 px)")
]
MaxUpsample = Annotated[float, typer.Option(help="how much finer than level 0 is allowed; 1: not at all")]
Precision = Annotated[
    float,
    typer.Option(help="add places until the answer is good to so many octaves either way; 0: all places at all scales"),
]
Keep = Annotated[Path | None, typer.Option(help="write what the network answered there, to be reused")]
Reuse = Annotated[Path | None, typer.Option(help="answers kept there by an earlier run; the network is not asked")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda:0, mps")]
BatchSize = Annotated[int | None, typer.Option(help="tiles a forward pass (none: found by itself)")]
Seed = Annotated[int, typer.Option(help="of the places and the bootstrap")]
ProfileCard = Annotated[
    str, typer.Option("--profile", help="auto: the network's own, if its card has one; none; or a card.json with one")
]
TrustTag = Annotated[bool, typer.Option("--trust-tag/--no-trust-tag", help="go by the slide's µm/px, or by its tissue alone")]
Tolerance = Annotated[float, typer.Option(help="a level this near (0.01: 1 %) is taken as it is, without resampling")]
MaxFailedTiles = Annotated[float, typer.Option(help="share of the tiles that a damaged slide may lack and still be written")]
Durable = Annotated[bool, typer.Option("--durable", help="on the disk before it has its name; slower, outlives a power cut")]


@contextmanager
def open_asked(
    slide: str, slide_mpp: float | None, mpp_csv: Path | None, reader: str, *, mpp_from_pixels: bool = False
) -> Iterator[Reader]:
    from wsiscale.calibration import read_mpp_table
    from wsiscale.readers import open_slide

    if slide_mpp is None and mpp_csv is not None:
        table = read_mpp_table(mpp_csv)
        slide_mpp = table.get(slide, table.get(Path(slide).name))
    with open_slide(slide, mpp=slide_mpp, reader=reader) as opened:
        if not mpp_from_pixels:
            yield opened
            return
        from wsiscale.slide_mpp import find_mpp, with_mpp_from_pixels

        with progress_bar("tiles") as progress:
            found = find_mpp(opened, progress=progress)
        print(sentence_of_mpp(found), file=sys.stderr)
        yield with_mpp_from_pixels(opened, found)


def sentence_of_mpp(found: FoundMpp) -> str:
    """What the pixels say, and what that makes of the file, in a line."""
    if found.mpp is None or found.ci90 is None:
        return f"{found.slide}: its pixels do not tell its µm/px ({found.detail})"
    low, high = found.ci90
    return (
        f"{found.slide}: {found.mpp:.3g} µm/px by its pixels (90 % within {low:.3g} to {high:.3g}), which {found.verdict}: "
        f"{found.detail}"
    )


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, silent where that is not a terminal. Yields what takes (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def parse_range(text: str | None, option: str) -> tuple[float, float] | None:
    if text is None:
        return None
    lo, _, hi = text.partition(":")
    try:
        return float(lo), float(hi)
    except ValueError as error:
        raise OptionError(f"{option} {text!r} is not LO:HI, such as 0.25:2") from error


def parse_list(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise OptionError(f"{option} {text!r} is not numbers with commas, such as 0.25,0.5,1") from error


def parse_mpp(text: str | None) -> float | None:
    if text is None or text == "auto":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(f"--mpp {text!r} is not µm/px, such as 0.5, nor auto") from error


def print_json(record: Any) -> None:
    print(json.dumps(record, ensure_ascii=False, allow_nan=False, indent=2))
