"""Commands for one slide."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsiscale.cli.options import (
    ABSTAINED,
    DONE,
    BatchSize,
    Criterion,
    Device,
    Durable,
    Json,
    Keep,
    MaxFailedTiles,
    MaxUpsample,
    Model,
    MppCsv,
    MppFromPixels,
    MppRange,
    Places,
    Precision,
    ProfileCard,
    ReaderName,
    Reuse,
    ScaleRange,
    Seed,
    Slide,
    SlideMpp,
    TileSize,
    TissueSpec,
    Tolerance,
    TrustModel,
    TrustTag,
    Weights,
    fail,
    open_asked,
    parse_list,
    parse_mpp,
    parse_range,
    print_json,
    progress_bar,
    sentence_of_mpp,
)
from wsiscale.errors import OptionError

if TYPE_CHECKING:
    from wsiscale.networks import Network
    from wsiscale.responses import SavedResponse
    from wsiscale.slide_mpp import SlideMpp as FoundMpp
    from wsiscale.types import Reader, ScaleEstimate


def info(
    slide: Slide,
    slide_mpp: SlideMpp = None,
    mpp_csv: MppCsv = None,
    pixels: Annotated[bool, typer.Option("--pixels", help="ask the pixels too (wsiscale mpp), which takes seconds")] = False,
    reader: ReaderName = "auto",
    as_json: Json = False,
) -> None:
    """What the file says, and whether to believe it.

    Example: wsiscale info slide.svs
    """
    found = None
    with open_asked(slide, slide_mpp, mpp_csv, reader) as opened:
        record = _describe(opened)
        if pixels:
            from wsiscale.slide_mpp import as_record, find_mpp

            with progress_bar("tiles") as progress:
                found = find_mpp(opened, progress=progress)
            record["pixels"] = as_record(found)
    if as_json:
        print_json(record)
        return
    calibration = record["calibration"]
    mpp = record["mpp"]
    print(f"{record['slide']}  ({record['vendor']}, read by {record['reader']})")
    print(f"  µm/px      {'unknown' if mpp is None else f'{mpp:.4g}'}  {calibration['verdict']}: {calibration['detail']}")
    for level in record["levels"]:
        at = "" if mpp is None else f"  {level['downsample'] * mpp:.4g} µm/px"
        print(f"  level {level['level']}    {level['width']} x {level['height']} px, 1/{level['downsample']:g}{at}")
    if record["bounds"]:
        print(f"  scanned    y, x, height, width = {record['bounds']} in level-0 px")
    if found is not None:
        print(f"  pixels     {sentence_of_mpp(found).removeprefix(found.slide + ': ')}")
    elif calibration["verdict"] != "trusted":
        print(f"  wsiscale mpp {record['slide']} asks its pixels")


def mpp(
    slide: Slide,
    model: Model = None,
    weights: Weights = None,
    trust_model: TrustModel = False,
    slide_mpp: SlideMpp = None,
    mpp_csv: MppCsv = None,
    detector: TissueSpec = None,
    reader: ReaderName = "auto",
    device: Device = "auto",
    batch_size: BatchSize = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """The slide's true µm/px as its pixels tell it, and whether the file agrees; exit code 3 where they do not tell.

    Example: wsiscale mpp slide.svs
    """
    from wsiscale.networks import load_network
    from wsiscale.slide_mpp import as_record, find_mpp

    network = load_network(model, weights=weights, trust_model=trust_model)
    with open_asked(slide, slide_mpp, mpp_csv, reader) as opened, progress_bar("tiles") as progress:
        found = find_mpp(opened, network, detector=detector, device=device, batch_size=batch_size, seed=seed, progress=progress)
    if as_json:
        print_json(as_record(found))
    else:
        print(sentence_of_mpp(found))
        print("\n".join(_opinions(found)))
    return ABSTAINED if found.abstained is not None else DONE


def tissue(
    slide: Slide,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG, white where tissue is")],
    detector: TissueSpec = None,
    slide_mpp: SlideMpp = None,
    mpp_csv: MppCsv = None,
    reader: ReaderName = "auto",
    as_json: Json = False,
) -> None:
    """Where the tissue is, as a mask.

    Example: wsiscale tissue slide.svs -o mask.png
    """
    from PIL import Image

    from wsiscale.tissue import find_tissue

    if not output.parent.is_dir():
        raise OptionError(f"{output.parent} is not a folder; make it first")
    with open_asked(slide, slide_mpp, mpp_csv, reader) as opened:
        found = find_tissue(opened, detector)
    Image.fromarray((found.mask * 255).astype("uint8")).save(output)
    record = {
        "slide": Path(slide).name,
        "mask": str(output),
        "step": found.step,
        "fraction": round(found.fraction, 6),
        "area_mm2": found.area_mm2,
    }
    if as_json:
        print_json(record)
    else:
        area = "" if found.area_mm2 is None else f", {found.area_mm2:.3g} mm²"
        print(f"{found.fraction:.1%} of the slide is tissue{area}; {output}, one px for {found.step:g} level-0 px")


def estimate(
    slide: Slide,
    model: Model = None,
    weights: Weights = None,
    trust_model: TrustModel = False,
    criterion: Criterion = None,
    mpp_range: MppRange = None,
    scale_range: ScaleRange = None,
    tile_size: TileSize = None,
    places: Places = None,
    slide_mpp: SlideMpp = None,
    mpp_csv: MppCsv = None,
    max_upsample: MaxUpsample = 1.0,
    precision: Precision = 0.1,
    detector: TissueSpec = None,
    reader: ReaderName = "auto",
    device: Device = "auto",
    batch_size: BatchSize = None,
    seed: Seed = 0,
    profile: ProfileCard = "auto",
    trust_tag: TrustTag = True,
    keep: Keep = None,
    reuse: Reuse = None,
    overwrite: Annotated[bool, typer.Option(help="replace what stands at --keep")] = False,
    report: Annotated[Path | None, typer.Option(help="folder for a page about this slide, SLIDE.html", metavar="DIR")] = None,
    timing: Annotated[bool, typer.Option("--timing", help="say where the time went, on stderr")] = False,
    as_json: Json = False,
) -> int:
    """The µm/px at which the network works best on this slide, or a named reason why that cannot be said (exit code 3).

    Example: wsiscale estimate slide.svs --model nets.py:factory --report pages
    """
    from wsiscale.estimation import as_record
    from wsiscale.networks import load_network
    from wsiscale.timing import watch

    started = time.perf_counter()
    answers: list[SavedResponse] = []
    with open_asked(slide, slide_mpp, mpp_csv, reader) as opened, ExitStack() as watched:
        page = None if report is None else report / f"{opened.source.name}.html"
        if report is not None:
            from wsiscale.report.pages import make_folder

            make_folder(report)
        spent = watched.enter_context(watch()) if timing else {}  # on a GPU, watching costs waiting
        network = load_network(model, weights=weights, tile_size=tile_size, trust_model=trust_model)
        result = _estimate(
            opened,
            network,
            criterion=criterion,
            mpp_range=parse_range(mpp_range, "--mpp-range"),
            scale_range=parse_range(scale_range, "--scale-range"),
            places=places,
            max_upsample=max_upsample,
            precision=precision or None,
            detector=detector,
            device=device,
            batch_size=batch_size,
            seed=seed,
            profile=None if profile == "none" else profile,
            trust_tag=trust_tag,
            keep=keep,
            reuse=reuse,
            overwrite=overwrite,
            answered=answers.append,
        )
        watched.close()
        if timing:
            _print_timing(spent, time.perf_counter() - started)
        if as_json:
            print_json(as_record(result))
        else:
            print(_sentence(result))
        if page is not None:
            from wsiscale.report.slide import write_slide_page

            heard = answers[0] if answers else None
            write_slide_page(page, opened, network, result, heard, detector=detector, device=device)
            print(page, file=sys.stderr)
    return ABSTAINED if result.abstained is not None else DONE


def stack(
    slide: Slide,
    output: Annotated[Path, typer.Option("-o", "--output", help="zarr to make")],
    mpp: Annotated[str | None, typer.Option(help="µm/px, from fine to coarse: 0.25,0.5,1")] = None,
    scale: Annotated[str | None, typer.Option(help="instead of --mpp: level-0 px per px, 1,2,4")] = None,
    tile_size: Annotated[int, typer.Option(help="px of a tile, at every scale")] = 224,
    places: Annotated[int, typer.Option(help="places on tissue")] = 64,
    slide_mpp: SlideMpp = None,
    mpp_csv: MppCsv = None,
    mpp_from_pixels: MppFromPixels = False,
    max_upsample: MaxUpsample = 1.0,
    detector: TissueSpec = None,
    reader: ReaderName = "auto",
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="replace what stands at the output")] = False,
) -> None:
    """Tiles at several magnifications, nested on one centre, to zarr.

    Example: wsiscale stack slide.svs --mpp 0.25,0.5,1 -o stacks.zarr
    """
    from wsiscale.geometry import scale_for_mpp
    from wsiscale.places import sample_places
    from wsiscale.stacks import scale_stack
    from wsiscale.store import write_stack
    from wsiscale.tissue import find_tissue

    with (
        open_asked(slide, slide_mpp, mpp_csv, reader, mpp_from_pixels=mpp_from_pixels) as opened,
        progress_bar("places") as progress,
    ):
        mpps, scales = parse_list(mpp, "--mpp"), parse_list(scale, "--scale")
        if (mpps is None) == (scales is None):
            raise OptionError("give either --mpp or --scale")
        widest = scales[-1] if scales else scale_for_mpp((mpps or [1.0])[-1], opened.pyramid.mpp, opened.calibration)
        centers = sample_places(find_tissue(opened, detector), places, seed=seed, field=tile_size * widest)
        stacked = scale_stack(opened, centers, mpps=mpps, scales=scales, size=tile_size, max_upsample=max_upsample)
        write_stack(output, stacked, source=opened.source, overwrite=overwrite, progress=progress)
    print(f"{output}: {len(centers)} places x {len(stacked.scales)} scales of {tile_size} px")


def tile(
    slide: Slide,
    output: Annotated[Path, typer.Option("-o", "--output", help="OME-Zarr to make, slide.ome.zarr")],
    mpp: Annotated[str | None, typer.Option(help="µm/px, or auto: estimate it first", metavar="UM|auto")] = None,
    scale: Annotated[float | None, typer.Option(help="instead of --mpp: level-0 px per px")] = None,
    tile_size: Annotated[int, typer.Option(help="px of the tiles in the table, at the target")] = 512,
    overlap: Annotated[int, typer.Option(help="px shared by neighbouring tiles of the table")] = 0,
    min_tissue: Annotated[float, typer.Option(help="least share of tissue in a tile, 0..1")] = 0.1,
    ngff: Annotated[str, typer.Option(help="0.5, or 0.4 for QuPath and TIAToolbox")] = "0.5",
    pixels: Annotated[str, typer.Option(help="tissue, or none: table and estimate alone")] = "tissue",
    tolerance: Tolerance = 0.01,
    max_upsample: MaxUpsample = 1.0,
    model: Model = None,
    weights: Weights = None,
    trust_model: TrustModel = False,
    criterion: Criterion = None,
    mpp_range: MppRange = None,
    scale_range: ScaleRange = None,
    places: Places = None,
    slide_mpp: SlideMpp = None,
    mpp_csv: MppCsv = None,
    mpp_from_pixels: MppFromPixels = False,
    detector: TissueSpec = None,
    reader: ReaderName = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    profile: ProfileCard = "auto",
    trust_tag: TrustTag = True,
    max_failed_tiles: MaxFailedTiles = 0.01,
    durable: Durable = False,
    overwrite: Annotated[bool, typer.Option(help="replace what stands at the output")] = False,
    as_json: Json = False,
) -> int:
    """The slide's tissue at one magnification, as OME-Zarr for segmentation.

    Example: wsiscale tile slide.svs --mpp 0.5 -o slide.ome.zarr
    """
    from wsiscale.store import check_destination, plan_store, write_store
    from wsiscale.tissue import find_tissue

    check_destination(output, overwrite=overwrite)
    if (mpp is None) == (scale is None):
        raise OptionError("give either --mpp UM, --mpp auto, or --scale")
    with open_asked(slide, slide_mpp, mpp_csv, reader, mpp_from_pixels=mpp_from_pixels) as opened:
        provenance = None
        target = parse_mpp(mpp)
        if mpp == "auto":
            from wsiscale.estimation import as_record  # half of a second, which only this needs
            from wsiscale.networks import load_network

            found = _estimate(
                opened,
                load_network(model, weights=weights, trust_model=trust_model),
                criterion=criterion,
                mpp_range=parse_range(mpp_range, "--mpp-range"),
                scale_range=parse_range(scale_range, "--scale-range"),
                places=places,
                max_upsample=max_upsample,
                detector=detector,
                device=device,
                batch_size=None,
                seed=seed,
                profile=None if profile == "none" else profile,
                trust_tag=trust_tag,
            )
            print(_sentence(found), file=sys.stderr)
            if found.abstained is not None:
                return fail("nothing written; give --mpp UM to choose yourself", ABSTAINED)
            # What the tissue says of its µm/px is not in the slide's tag, which a target in µm/px would be read by.
            by_tag = found.mpp is not None and found.mpp_source != "estimated"
            target, scale = (found.mpp, None) if by_tag else (None, found.scale)
            provenance = as_record(found)
        where = find_tissue(opened, detector)
        options: dict[str, Any] = {
            "mpp": target,
            "scale": scale,
            "tissue": where,
            "tile_size": tile_size,
            "overlap": overlap,
            "min_tissue": min_tissue,
            "ngff": ngff,
            "pixels": pixels,
            "tolerance": tolerance,
            "max_upsample": max_upsample,
        }
        plan = plan_store(output, opened, **options)
        print(plan.sentence(), file=sys.stderr)
        with progress_bar("chunks") as progress:
            summary = write_store(
                output,
                opened,
                **options,
                estimate=provenance,
                max_failed_tiles=max_failed_tiles,
                overwrite=overwrite,
                durable=durable,
                progress=progress,
            )
    if summary.failed_chunks:
        print(
            f"{slide} is damaged: what could not be read is white, and marked as failed in the table of tiles", file=sys.stderr
        )
    if as_json:
        print_json(summary.as_record())
    else:
        print(summary.sentence())
    return DONE


def _opinions(found: FoundMpp) -> Iterator[str]:
    for opinion in found.opinions:
        if opinion.mpp is None or opinion.ci90 is None:
            why = opinion.refused
            yield f"  {opinion.name:<13} -      " + ("" if why is None else f"{why.reason}, {why.detail}")
        else:
            yield f"  {opinion.name:<13} {opinion.mpp:<6.3g} ({opinion.ci90[0]:.3g} to {opinion.ci90[1]:.3g})"
    if found.upsampling is not None and found.upsampling.found is not None:
        empty = "its pixels were interpolated from half as many a side or fewer: the finest detail is empty"
        yield f"  {'upsampled':<13} " + (f"yes    {empty}" if found.upsampling.found else "no")


def _describe(slide: Reader) -> dict[str, Any]:
    pyramid, calibration, source = slide.pyramid, slide.calibration, slide.source
    return {
        "slide": source.name,
        "vendor": source.vendor,
        "reader": source.reader,
        "bytes": source.size,
        "mpp": pyramid.mpp,
        "calibration": vars(calibration),
        "width": pyramid.shape[1],
        "height": pyramid.shape[0],
        "bounds": pyramid.bounds,
        "levels": [
            {"level": i, "width": w, "height": h, "downsample": d}
            for i, ((h, w), d) in enumerate(zip(pyramid.shapes, pyramid.downsamples, strict=True))
        ],
    }


def _estimate(opened: Reader, network: Network, **options: Any) -> ScaleEstimate:
    from wsiscale.estimation import estimate

    with progress_bar("tiles") as progress:
        return estimate(opened, network, progress=progress, **options)


def _sentence(result: ScaleEstimate) -> str:
    """The answer for people."""
    unit, factor = ("µm/px", result.slide_mpp) if result.slide_mpp is not None else ("level-0 px per px", 1.0)
    assert factor is not None
    lines = []
    if result.abstained is not None or result.scale is None or result.ci90 is None:
        why = result.abstained
        lines.append(
            f"no estimate for {result.slide}: {why.reason}, {why.detail}" if why else f"no estimate for {result.slide}"
        )
    else:
        lo, hi = (bound * factor for bound in result.ci90)
        mag = "" if result.magnification is None else f", about {result.magnification:.3g}x"
        lines.append(
            f"{result.slide}: {result.model} works best at {result.scale * factor:.3g} {unit}{mag} "
            f"(90 % within {lo:.3g} to {hi:.3g}; {result.places} places)"
        )
    if result.curve is not None:
        ends = result.curve.scales[[0, -1]] * factor
        lines.append(f"  {result.criterion}  {ends[0]:.3g} {_spark(result.curve.score)} {ends[1]:.3g} {unit}")
    return "\n".join([*lines, *(f"  note: {note}" for note in result.notes)])


def _print_timing(spent: dict[str, float], elapsed: float) -> None:
    """On stderr: seconds of the parts' own threads, which overlap, so that they may add up to more than has passed."""
    for part, seconds in spent.items():
        print(f"  {part:9s}{seconds:8.2f} s  {seconds / max(sum(spent.values()), 1e-9):4.0%}", file=sys.stderr)
    print(f"  in {elapsed:.2f} s, of all threads {sum(spent.values()):.2f} s in these parts", file=sys.stderr)


def _spark(score: Any) -> str:
    """A curve in one line of text."""
    lo, hi = min(score), max(score)
    if not hi > lo:
        return "▁" * len(score)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int((value - lo) / (hi - lo) * 8))] for value in score)
