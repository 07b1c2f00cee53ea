"""argv -> one public function -> text or JSON. JSON on stdout; progress, logs and errors on stderr.

Exit codes: 0 done, 1 failed, 2 usage, 3 abstained (or nothing to work on: no tissue), 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# Before anything imports torch: spinning OpenMP threads next to any other busy process cost up to 90x.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from wsiscale.errors import NoTissueError, OptionError, WsiscaleError
from wsiscale.memory import keep_memory

if TYPE_CHECKING:
    from wsiscale.types import Reader, ScaleEstimate

DONE, FAILED, USAGE, ABSTAINED, INTERRUPTED = 0, 1, 2, 3, 130

app = typer.Typer(
    name="wsiscale",
    help="Find the magnification at which a network works best on a slide, and write the slide's tissue at it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def run() -> None:
    """The `wsiscale` command."""
    keep_memory()
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Expected errors are one line on stderr; bugs keep their traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    command = typer.main.get_command(app)
    try:
        code = command.main(list(argv) if argv is not None else None, prog_name="wsiscale", standalone_mode=False)
    except OptionError as error:
        return _fail(str(error), USAGE)
    except NoTissueError as error:
        return _fail(str(error), ABSTAINED)
    except WsiscaleError as error:
        return _fail(str(error), FAILED)
    except typer.Abort:
        code = INTERRUPTED
    except BrokenPipeError:
        # `wsiscale info slide | head`: the reader has gone, and there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if (usage := getattr(error, "format_message", None)) is not None:  # click's own: unknown option, missing argument
            return _fail(usage() or "see wsiscale --help", getattr(error, "exit_code", USAGE))
        raise
    if code == INTERRUPTED:  # typer's answer to Ctrl-C
        return _fail("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else DONE


def _fail(message: str, code: int) -> int:
    print("wsiscale:", " ".join(message.split()), file=sys.stderr)
    return code


# What several commands take.
Slide = Annotated[str, typer.Argument(help="a whole-slide image: SVS, NDPI, MRXS, OME-TIFF, DICOM, ...", metavar="SLIDE")]
SlideMpp = Annotated[float | None, typer.Option(help="µm/px of level 0; overrides what the file says", metavar="UM")]
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


@app.command()
def info(
    slide: Slide, slide_mpp: SlideMpp = None, mpp_csv: MppCsv = None, reader: ReaderName = "auto", as_json: Json = False
) -> None:
    """What the file says, and whether to believe it.

    Example: wsiscale info slide.svs
    """
    with _open(slide, slide_mpp, mpp_csv, reader) as opened:
        record = _describe(opened)
    if as_json:
        _print_json(record)
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


@app.command()
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
    with _open(slide, slide_mpp, mpp_csv, reader) as opened:
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
        _print_json(record)
    else:
        area = "" if found.area_mm2 is None else f", {found.area_mm2:.3g} mm²"
        print(f"{found.fraction:.1%} of the slide is tissue{area}; {output}, one px for {found.step:g} level-0 px")


@app.command()
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
    timing: Annotated[bool, typer.Option("--timing", help="say where the time went, on stderr")] = False,
    as_json: Json = False,
) -> int:
    """The µm/px at which the network works best on this slide, or a named reason why that cannot be said (exit code 3).

    Example: wsiscale estimate slide.svs --model nets.py:factory
    """
    from wsiscale.estimation import as_record
    from wsiscale.timing import watch

    started = time.perf_counter()
    with _open(slide, slide_mpp, mpp_csv, reader) as opened, ExitStack() as watched:
        spent = watched.enter_context(watch()) if timing else {}  # on a GPU, watching costs waiting
        result = _estimate(
            opened,
            model=model,
            weights=weights,
            trust_model=trust_model,
            criterion=criterion,
            mpp_range=_parse_range(mpp_range, "--mpp-range"),
            scale_range=_parse_range(scale_range, "--scale-range"),
            tile_size=tile_size,
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
        )
    if timing:
        _print_timing(spent, time.perf_counter() - started)
    if as_json:
        _print_json(as_record(result))
    else:
        print(_sentence(result))
    return ABSTAINED if result.abstained is not None else DONE


@app.command()
def stack(
    slide: Slide,
    output: Annotated[Path, typer.Option("-o", "--output", help="zarr to make")],
    mpp: Annotated[str | None, typer.Option(help="µm/px, from fine to coarse: 0.25,0.5,1")] = None,
    scale: Annotated[str | None, typer.Option(help="instead of --mpp: level-0 px per px, 1,2,4")] = None,
    tile_size: Annotated[int, typer.Option(help="px of a tile, at every scale")] = 224,
    places: Annotated[int, typer.Option(help="places on tissue")] = 64,
    slide_mpp: SlideMpp = None,
    mpp_csv: MppCsv = None,
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

    with _open(slide, slide_mpp, mpp_csv, reader) as opened, _progress("places") as progress:
        mpps, scales = _parse_list(mpp, "--mpp"), _parse_list(scale, "--scale")
        if (mpps is None) == (scales is None):
            raise OptionError("give either --mpp or --scale")
        widest = scales[-1] if scales else scale_for_mpp((mpps or [1.0])[-1], opened.pyramid.mpp, opened.calibration)
        centers = sample_places(find_tissue(opened, detector), places, seed=seed, field=tile_size * widest)
        stacked = scale_stack(opened, centers, mpps=mpps, scales=scales, size=tile_size, max_upsample=max_upsample)
        write_stack(output, stacked, source=opened.source, overwrite=overwrite, progress=progress)
    print(f"{output}: {len(centers)} places x {len(stacked.scales)} scales of {tile_size} px")


@app.command()
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
    with _open(slide, slide_mpp, mpp_csv, reader) as opened:
        provenance = None
        target = _parse_mpp(mpp)
        if mpp == "auto":
            from wsiscale.estimation import as_record  # half of a second, which only this needs

            found = _estimate(
                opened,
                model=model,
                weights=weights,
                trust_model=trust_model,
                criterion=criterion,
                mpp_range=_parse_range(mpp_range, "--mpp-range"),
                scale_range=_parse_range(scale_range, "--scale-range"),
                tile_size=None,
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
                return _fail("nothing written; give --mpp UM to choose yourself", ABSTAINED)
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
        with _progress("chunks") as progress:
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
        _print_json(summary.as_record())
    else:
        print(summary.sentence())
    return DONE


@app.command(name="run")
def run_(
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
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Estimate and write a whole cohort; run it again to go on where it stopped. Exit code 1 where a slide failed.

    Example: wsiscale run 'slides/*.svs' -o out --workers 4
    """
    from wsiscale.cohort.engine import run_cohort
    from wsiscale.cohort.one_slide import RunOptions
    from wsiscale.cohort.plan import read_cohort, shard_of

    options = RunOptions(
        model=model,
        weights=None if weights is None else str(weights),
        trust_model=trust_model,
        criterion=criterion,
        mpp_range=_parse_range(mpp_range, "--mpp-range"),
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
    )
    specs = read_cohort(cohort)
    specs = specs if shard is None else shard_of(specs, shard)
    with _running(len(specs)) as told:
        summary = run_cohort(specs, output, options, client=scheduler, workers=workers, whole=shard is None, told=told)
    if as_json:
        _print_json({"out": str(summary.out), "counts": dict(summary.counts), "seconds": round(summary.seconds, 1)})
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


@app.command()
def profile(
    slides: Annotated[list[str], typer.Argument(help="slides whose µm/px is right, unlabelled; two or more", metavar="SLIDES")],
    output: Annotated[Path, typer.Option("-o", "--output", help="model card to write, for --model")],
    model: Model = None,
    weights: Weights = None,
    trust_model: TrustModel = False,
    criterion: Criterion = None,
    mpp_range: MppRange = None,
    tile_size: TileSize = None,
    places: Places = None,
    max_upsample: MaxUpsample = 1.0,
    detector: TissueSpec = None,
    reader: ReaderName = "auto",
    device: Device = "auto",
    batch_size: BatchSize = None,
    seed: Seed = 0,
    keep: Annotated[Path | None, typer.Option(help="folder for what the network answers, to go on from")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace a card that is not --model's own")] = False,
    as_json: Json = False,
) -> None:
    """A network's profile, from slides, into its model card: what estimate goes by from then on (docs/profiles.md).

    Example: wsiscale profile *.svs --model nets.py:factory -o card.json
    """
    from wsiscale.networks import load_network
    from wsiscale.profile import save_profile
    from wsiscale.reference_slides import card_fields, profile_slides

    _check_card(output, model, overwrite=overwrite, renewed="profile")
    network = load_network(model, weights=weights, tile_size=tile_size, trust_model=trust_model)
    with _progress("slides") as progress:
        done = 0

        def told(name: str, left_out: str | None) -> None:
            nonlocal done
            done += 1
            progress(done, len(slides))
            if left_out is not None:
                print(f"wsiscale: {name} is left out: {left_out}", file=sys.stderr)

        made = profile_slides(
            slides,
            network,
            criterion=criterion,
            mpp_range=_parse_range(mpp_range, "--mpp-range"),
            places=places,
            max_upsample=max_upsample,
            detector=detector,
            reader=reader,
            device=device,
            batch_size=batch_size,
            seed=seed,
            keep=keep,
            told=told,
        )
    save_profile(made.profile, output, fields=card_fields(network, model, weights, output))
    if as_json:
        _print_json({"card": str(output), **made.as_record()})
    else:
        print(f"{output}: {made.sentence()}")


@app.command()
def calibrate(
    tiles: Annotated[
        list[str],
        typer.Argument(help="training tiles: folders, PNG, JPEG or TIFF files, or patterns with *", metavar="TILES"),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="model card to write, for --model")],
    model: Model = None,
    weights: Weights = None,
    trust_model: TrustModel = False,
    tile_mpp: Annotated[
        float | None, typer.Option(help="µm/px of the tiles (none: the card's training_mpp)", metavar="UM")
    ] = None,
    tile_size: TileSize = None,
    device: Device = "auto",
    batch_size: BatchSize = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="replace a card that is not --model's own")] = False,
    as_json: Json = False,
) -> None:
    """A reference from training tiles, into the network's model card: what estimate goes by from then on (docs/methods.md).

    The tiles are at the µm/px that the network was trained at; 200 images or more, each at least as wide as the network's tile,
    wider ones are better.

    Example: wsiscale calibrate tiles/ --model nets.py:factory --tile-mpp 0.5 -o card.json
    """
    from wsiscale.networks import load_network
    from wsiscale.reference_slides import card_fields
    from wsiscale.training_tiles import calibrate, find_images, read_images, save_reference

    if tile_mpp is not None and not tile_mpp > 0:
        raise OptionError(f"--tile-mpp is µm/px, above 0, not {tile_mpp:g}")
    _check_card(output, model, overwrite=overwrite, renewed="reference")
    files = find_images(tiles)
    network = load_network(model, weights=weights, tile_size=tile_size, trust_model=trust_model)
    mpp = network.training_mpp if tile_mpp is None else tile_mpp
    if network.training_mpp is not None and mpp is not None and abs(mpp / network.training_mpp - 1) > 0.05:
        raise OptionError(
            f"{network.name} was trained at {network.training_mpp:g} µm/px, and the tiles are at {mpp:g}; "
            "give tiles at the training's, or put the right training_mpp into the card"
        )
    with _progress("images") as progress:
        made = calibrate(
            network, read_images(files), mpp=mpp, seed=seed, device=device, batch_size=batch_size, progress=progress
        )
    fields = card_fields(network, model, weights, output)
    fields |= {} if mpp is None else {"training_mpp": mpp}
    fields |= {name: network.card[name] for name in ("profile",) if name in network.card}
    save_reference(made, output, fields=fields)
    record = {
        "card": str(output),
        "images": made.images,
        "tiles": made.tiles,
        "mpp": made.mpp,
        "object_px": made.object_px,
        "ridge_error": made.ridge_error,
        "distance_error": made.distance_error,
    }
    if as_json:
        _print_json(record)
        return
    at = "" if made.mpp is None else f" at {made.mpp:g} µm/px"
    print(f"{output}: reference of {made.tiles} tiles of {made.images} images{at}")
    errors = f"{made.distance_error:.2g} octave by their distance, by {made.ridge_error:.2g} by the ridge"
    print(f"  left-out images are off by {errors}")


def _check_card(output: Path, model: str | None, *, overwrite: bool, renewed: str) -> None:
    """Raises OptionError where a card may not be written: no folder, or another card that is not the model's own."""
    if not output.absolute().parent.is_dir():
        raise OptionError(f"{output.parent} is not a folder; make it first")
    own = model is not None and output.exists() and Path(model).exists() and output.samefile(model)
    if output.exists() and not own and not overwrite:
        raise OptionError(
            f"{output} is there already; give --overwrite, another -o, or --model {output} to renew its {renewed}"
        )


@app.command()
def verify(
    store: Annotated[Path, typer.Argument(help="an OME-Zarr that wsiscale wrote", metavar="STORE")], as_json: Json = False
) -> int:
    """Whether a store is whole: every file there, nothing altered. Exit code 1 where it is not.

    Example: wsiscale verify slide.ome.zarr
    """
    from wsiscale.store import verify_store

    report = verify_store(store)
    if as_json:
        _print_json({"store": str(store), "files": report.files, "problems": [vars(p) for p in report.problems]})
    else:
        for problem in report.problems:
            print(f"{problem.path}: {problem.what}")
        print(f"{store}: " + (f"{len(report.problems)} problems" if report.problems else f"whole, {report.files} files"))
    return FAILED if report.problems else DONE


@app.command()
def cards(as_json: Json = False) -> None:
    """The networks that wsiscale has a card of, for --model card:NAME; their weights you download yourself.

    Example: wsiscale cards
    """
    from wsiscale.card import read_card, shipped_cards

    shown = ("tile_size", "training_mpp", "output", "licence", "weights_from")
    found = {name: read_card(path) for name, path in shipped_cards().items()}
    if as_json:
        _print_json([{"name": name, **{field: card.get(field) for field in shown}} for name, card in found.items()])
        return
    for name, card in found.items():
        mpp = "µm/px unknown" if card.get("training_mpp") is None else f"{card['training_mpp']:g} µm/px"
        print(f"{name:<26}{card.get('tile_size', 224):>4} px  {mpp:<14}  {card.get('licence', '')}")


@app.command()
def doctor(as_json: Json = False) -> int:
    """Check the installation, and say what to do about what is found.

    Example: wsiscale doctor
    """
    from wsiscale.doctor import examine

    findings = examine()
    if as_json:
        _print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok     ' if finding.ok else 'PROBLEM'}  {finding.what}: {finding.detail}")
    return DONE if all(finding.ok for finding in findings) else FAILED


@contextmanager
def _open(slide: str, slide_mpp: float | None, mpp_csv: Path | None, reader: str) -> Iterator[Reader]:
    from wsiscale.calibration import read_mpp_table
    from wsiscale.readers import open_slide

    if slide_mpp is None and mpp_csv is not None:
        table = read_mpp_table(mpp_csv)
        slide_mpp = table.get(slide, table.get(Path(slide).name))
    with open_slide(slide, mpp=slide_mpp, reader=reader) as opened:
        yield opened


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


def _estimate(
    opened: Reader, *, model: str | None, weights: Path | None, trust_model: bool, tile_size: int | None, **options: Any
) -> ScaleEstimate:
    from wsiscale.estimation import estimate
    from wsiscale.networks import load_network

    network = load_network(model, weights=weights, tile_size=tile_size, trust_model=trust_model)
    with _progress("tiles") as progress:
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


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, silent where that is not a terminal. Yields what takes (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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


def _parse_range(text: str | None, option: str) -> tuple[float, float] | None:
    if text is None:
        return None
    lo, _, hi = text.partition(":")
    try:
        return float(lo), float(hi)
    except ValueError as error:
        raise OptionError(f"{option} {text!r} is not LO:HI, such as 0.25:2") from error


def _parse_list(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise OptionError(f"{option} {text!r} is not numbers with commas, such as 0.25,0.5,1") from error


def _parse_mpp(text: str | None) -> float | None:
    if text is None or text == "auto":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(f"--mpp {text!r} is not µm/px, such as 0.5, nor auto") from error


def _print_json(record: Any) -> None:
    print(json.dumps(record, ensure_ascii=False, allow_nan=False, indent=2))
