"""Commands for networks and their cards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from wsiscale.cli.options import (
    BatchSize,
    Criterion,
    Device,
    Json,
    MaxUpsample,
    Model,
    MppRange,
    Places,
    ReaderName,
    Seed,
    TileSize,
    TissueSpec,
    TrustModel,
    Weights,
    parse_range,
    print_json,
    progress_bar,
)
from wsiscale.errors import OptionError


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
    with progress_bar("slides") as progress:
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
            mpp_range=parse_range(mpp_range, "--mpp-range"),
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
        print_json({"card": str(output), **made.as_record()})
    else:
        print(f"{output}: {made.sentence()}")


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
    with progress_bar("images") as progress:
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
        print_json(record)
        return
    at = "" if made.mpp is None else f" at {made.mpp:g} µm/px"
    print(f"{output}: reference of {made.tiles} tiles of {made.images} images{at}")
    errors = f"{made.distance_error:.2g} octave by their distance, by {made.ridge_error:.2g} by the ridge"
    print(f"  left-out images are off by {errors}")


def probe(
    slides: Annotated[list[str], typer.Argument(help="slides whose µm/px is right; three or more", metavar="SLIDES")],
    model: Model = None,
    weights: Weights = None,
    trust_model: TrustModel = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="folder for probe.json and probe.png")] = None,
    known_mpp: Annotated[float | None, typer.Option(help="µm/px of level 0 of all slides", metavar="UM")] = None,
    as_published: Annotated[
        bool, typer.Option("--as-published", help="least squares to µm/px itself, tiles split at random")
    ] = False,
    fit: Annotated[Path | None, typer.Option(help="model card to write, with µm/px from the layer to cut at")] = None,
    cut: Annotated[Path | None, typer.Option(help="model card to write of the network up to that layer")] = None,
    octaves: Annotated[float, typer.Option(help="how far beyond level 0 tiles are read again")] = 3.0,
    factors: Annotated[int, typer.Option(help="scales that those octaves are read at")] = 12,
    places: Annotated[int, typer.Option(help="places on tissue at each scale")] = 16,
    tile_size: TileSize = None,
    reader: ReaderName = "auto",
    device: Device = "auto",
    batch_size: BatchSize = None,
    seed: Seed = 0,
    keep: Annotated[Path | None, typer.Option(help="folder for what the layers answer, to go on from")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace cards that are not --model's own")] = False,
    as_json: Json = False,
) -> None:
    """Where a network keeps scale: how well each of its layers tells µm/px, and where to cut it (docs/probe.md).

    Example: wsiscale probe *.svs --model nets.py:factory -o probed
    """
    from wsiscale.cutting import cut_network, save_cut
    from wsiscale.networks import load_network, network_digest
    from wsiscale.probe import probe_slides
    from wsiscale.reference_slides import card_fields
    from wsiscale.regressor import fit_regressor, save_regressor

    for card in (fit, cut):
        if card is not None:
            _check_card(card, model if card is fit else None, overwrite=overwrite, renewed="scale_regressor")
    if fit is not None and cut is not None and fit.absolute() == cut.absolute():
        raise OptionError(f"--fit and --cut are both {fit}; they are two networks, and need two cards")
    if known_mpp is not None and not known_mpp > 0:
        raise OptionError(f"--known-mpp is µm/px, above 0, not {known_mpp:g}")
    network = load_network(model, weights=weights, tile_size=tile_size, trust_model=trust_model)
    with progress_bar("slides") as progress:
        done = 0

        def told(name: str, left_out: str | None) -> None:
            nonlocal done
            done += 1
            progress(done, len(slides))
            if left_out is not None:
                print(f"wsiscale: {name} is left out: {left_out}", file=sys.stderr)

        found, answers = probe_slides(
            slides,
            network,
            known_mpp=known_mpp,
            as_published=as_published,
            octaves=octaves,
            factors=factors,
            places=places,
            reader=reader,
            device=device,
            batch_size=batch_size,
            seed=seed,
            keep=keep,
            told=told,
        )
    record = found.as_record()
    if fit is not None or cut is not None:
        regressor = fit_regressor(
            answers, found.prune_at, tile_size=network.tile_size, network=network_digest(network), seed=seed
        )
    if fit is not None:
        fields = card_fields(network, model, weights, fit)
        fields |= {name: network.card[name] for name in ("profile", "reference") if name in network.card}
        save_regressor(regressor, fit, fields=fields)
    if cut is not None:
        save_cut(
            cut_network(network, found.prune_at, regressor=regressor), cut, fields=card_fields(network, model, weights, cut)
        )
    if output is not None:
        from wsiscale.figures import probe_figure

        output.mkdir(parents=True, exist_ok=True)
        (output / "probe.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        probe_figure(found).savefig(output / "probe.png", dpi=150)
    if as_json:
        print_json(record)
        return
    print(found.sentence())
    for card, what in ((fit, "µm/px from that layer"), (cut, "the network up to that layer")):
        if card is not None:
            print(f"{card}: {what}")


def _check_card(output: Path, model: str | None, *, overwrite: bool, renewed: str) -> None:
    """Raises OptionError where a card may not be written: no folder, or another card that is not the model's own."""
    if not output.absolute().parent.is_dir():
        raise OptionError(f"{output.parent} is not a folder; make it first")
    own = model is not None and output.exists() and Path(model).exists() and output.samefile(model)
    if output.exists() and not own and not overwrite:
        raise OptionError(
            f"{output} is there already; give --overwrite, another -o, or --model {output} to renew its {renewed}"
        )


def cards(as_json: Json = False) -> None:
    """The networks that wsiscale has a card of, for --model card:NAME; their weights you download yourself.

    Example: wsiscale cards
    """
    from wsiscale.card import read_card, shipped_cards

    shown = ("tile_size", "training_mpp", "output", "licence", "weights_from")
    found = {name: read_card(path) for name, path in shipped_cards().items()}
    if as_json:
        print_json([{"name": name, **{field: card.get(field) for field in shown}} for name, card in found.items()])
        return
    for name, card in found.items():
        mpp = "µm/px unknown" if card.get("training_mpp") is None else f"{card['training_mpp']:g} µm/px"
        print(f"{name:<26}{card.get('tile_size', 224):>4} px  {mpp:<14}  {card.get('licence', '')}")
