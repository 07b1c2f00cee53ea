"""How well the scale is found by references from training tiles: `wsiscale calibrate`, on networks whose training is known.

    python benchmarks/calibration.py --patches DIR [--data DIR] [--half develop] [--families thesis,embedded,nuclei32]

| family | networks | training tiles | slides | quality |
|---|---|---|---|---|
| thesis | recovery/nets, without noise | 240 of their own patches, 224 px | canvases of the split | accuracy |
| embedded | the package's own | 100 procedural images, 400 px at 0.5 µm/px | MoNuSeg, procedural slides | Dice |
| nuclei32 | its five folds | the seven MoNuSeg images to develop on | MoNuSeg | AUC |

DIR of --patches is that of `python -m benchmarks.recovery.thesis data --cache DIR`.

Halves are those of benchmarks/recovery/split.json. On the half to develop on, nuclei32 has each image's own tiles left out.
Prints a table of all and one of each family. Answers are kept in --cache; about 20 CPU minutes without.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a script

from benchmarks.recovery import real, tables, thesis
from benchmarks.recovery.cases import Case, Half, MissingDataError, Range, Setting, half_of, joined, over_ranges
from benchmarks.recovery.methods import NotApplicableError, methods
from training.train_default import scanned
from wsiscale.analyzer import respond
from wsiscale.criteria import CRITERIA, Criterion
from wsiscale.networks import Network, load_network
from wsiscale.testing.procedural import colour, random_stain, render
from wsiscale.training_tiles import Reference, calibrate, distances, from_record, offsets, to_record
from wsiscale.types import ScaleResponse

PLACES = 24  # of an image
PROCEDURAL = {"develop": range(50, 54), "report": range(54, 58)}  # seeds of slides
TILE_SEED = 90_000  # of procedural training images
SHOWN = ("confidence", "batchnorm_tangent", "object_size", "reference")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=Path, help="training patches of the thesis's networks; without, they are left out")
    data = os.environ.get("WSISCALE_DATA")
    parser.add_argument("--data", type=Path, default=None if data is None else Path(data))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "wsiscale" / "calibration")
    parser.add_argument("--half", choices=("develop", "report"), default="develop")
    parser.add_argument("--families", type=lambda text: text.split(","), default=list(FAMILIES))
    arguments = parser.parse_args(argv)
    setting = Setting(cache=arguments.cache, data=arguments.data)
    records: list[tables.Record] = []
    for family in arguments.families:
        try:
            for case in FAMILIES[family](setting, arguments.half, arguments.patches):
                records += judged(case)
        except MissingDataError as error:
            setting.log(f"{family} is left out or cut short: {error}")
    for name, some in [("all", records), *((f, [r for r in records if r.family == f]) for f in FAMILIES)]:
        if some:
            print(f"\n{name}, {arguments.half}\n\n{tables.table(tables.by_method(some))}")
    tables.write_csv(arguments.cache / f"answers-{arguments.half}.csv", [({}, record) for record in records])
    return 0


def judged(case: Case) -> list[tables.Record]:
    """Every row's answer to the case."""
    parts = {"reference: distance alone": _distance_alone, "reference: ridge alone": _ridge_alone}
    criteria = {name: CRITERIA[name] for name in SHOWN if name in CRITERIA}
    criteria |= {name: Criterion(name, score, layers="auto") for name, score in parts.items()}
    found = []
    for name, method in methods(criteria).items():
        try:
            found.append(tables.judged(case, name, method(case)))
        except NotApplicableError:
            continue
    return found


def _distance_alone(response: ScaleResponse) -> NDArray[np.float64]:
    assert response.reference is not None
    score: NDArray[np.float64] = -distances(response.reference, response).mean(axis=0)
    return score


def _ridge_alone(response: ScaleResponse) -> NDArray[np.float64]:
    assert response.reference is not None
    score: NDArray[np.float64] = -np.square(offsets(response.reference, response).mean(axis=0))
    return score


# --- families -----------------------------------------------------------------------------------------------------------------


def thesis_cases(setting: Setting, half: Half, patches: Path | None) -> Iterator[Case]:
    """The thesis's networks without noise, on slides of 12 places a class, or 3 of each class."""
    if patches is None:
        raise MissingDataError("its patches are made by `python -m benchmarks.recovery.thesis data`; name their folder")
    for recipe in thesis.trained():
        mine = [slide for slide in thesis.slides() if half_of("thesis", network=recipe.name, slide=slide) == half]
        if recipe.noise or not mine:
            continue
        fed = load_network(thesis.load(recipe), name=recipe.name, tile_size=thesis.TILE, value_range=255)
        file = patches / f"patches-noise0-scale{recipe.scale:g}.npy"
        if not file.exists():
            raise MissingDataError(f"there is no {file.name} among the patches")
        every = np.load(file, mmap_mode="r")
        drawn = np.random.default_rng(0).permutation(len(every))[:240]
        reference = _kept(setting, recipe.name, partial(calibrate, fed, [np.asarray(every[i]) for i in np.sort(drawn)]))
        responses = {slide: _thesis_response(setting, fed, slide) for slide in mine}
        right = {slide: thesis._right(response, slide) for slide, response in responses.items()}
        for slide, response in responses.items():
            mixed = slide.startswith("mixed")
            seen = np.concatenate(list(right.values())) if mixed else right[slide]
            case = Case(
                name=f"thesis/{recipe.name}/{slide}",
                family="thesis",
                network=recipe.name,
                slide=slide,
                half=half,
                response=replace(response, reference=reference),
                oracle=thesis._oracle(response.scales, seen),
                train_scale=recipe.scale,
                range="whole",
                upsampled=True,
                tags=frozenset({"mixed" if mixed else "single-class"}),
            )
            yield from over_ranges(case, thesis.RANGES)


def _thesis_response(setting: Setting, fed: Network, slide: str) -> ScaleResponse:
    def ask() -> ScaleResponse:
        return joined([respond(fed, thesis._looked_at(0, slide, label), device="cpu") for label in thesis._classes(slide)])

    setting.log(f"thesis/{fed.name}/{slide}")
    return setting.cached_response(f"calibration/{fed.name}/{slide}", ask)


def embedded_cases(setting: Setting, half: Half, _: Path | None) -> Iterator[Case]:
    """The embedded network with procedural tiles, on real and on procedural slides."""
    network = load_network(None)
    # Its own card may have a reference, which is not the one to be measured.
    network = replace(network, card={name: value for name, value in network.card.items() if name != "reference"})

    def make() -> Reference:
        return calibrate(network, [procedural_image(i) for i in range(100)], mpp=0.5)

    reference = _kept(setting, "embedded", make)
    slides: list[tuple[str, str, NDArray[np.uint8], NDArray[np.bool_], float]] = []
    for seed in PROCEDURAL[half]:
        pigments = render(1000, 1000, mpp=0.25, seed=seed)
        image = colour(pigments, random_stain(seed), mpp=0.25, seed=seed)
        slides.append((f"procedural-{seed}", "embedded, procedural", image, pigments.nuclei > 0, 0.25))
    if setting.data is not None:
        for slide in real.MONUSEG:
            if half_of("embedded", network=real.EMBEDDED, slide=slide) == half:
                slides.append((slide, "embedded, MoNuSeg", *real._monuseg(setting.data, slide), real.monuseg_mpp(slide)))
    for slide, family, image, mask, mpp in slides:
        response = _image_response(setting, network, slide, image, real.EMBEDDED_RANGES)
        key = f"calibration/embedded/{slide}"
        oracle = setting.cached_oracle(key, lambda i=image, m=mask: real._dice_oracle(network, i, m))
        case = Case(
            name=f"{family}/{slide}",
            family=family,
            network="embedded",
            slide=slide,
            half=half,
            response=replace(response, reference=reference, object_px=reference.object_px),
            oracle=oracle,
            train_scale=0.5 / mpp,
            range="whole",
            upsampled=True,
        )
        yield from over_ranges(case, real.EMBEDDED_RANGES)


def procedural_image(number: int) -> NDArray[np.uint8]:
    """A training image of 400 px at 0.5 µm/px, as the embedded network was shown them: some laboratory's stain and scanner."""
    rng = np.random.default_rng([7, number])
    pigments = render(800, 800, mpp=0.25, seed=TILE_SEED + number)
    fine = colour(pigments, random_stain(int(rng.integers(2**31))), mpp=0.25, seed=int(rng.integers(2**31)))
    halved = fine.reshape(400, 2, 400, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    return scanned(halved, rng)


def nuclei32_cases(setting: Setting, half: Half, _: Path | None) -> Iterator[Case]:
    """The folds of nuclei32 with tiles of the images to develop on."""
    data = setting.needs_data()
    ranges: tuple[Range, ...] = real.NUCLEI32_RANGES
    tiles = [s for s in real.MONUSEG if "develop" in (half_of("embedded", network=real.EMBEDDED, slide=s) or "")]
    pictures = {slide: real._monuseg(data, slide)[0] for slide in tiles}
    for name in real.FOLDS:
        mine = [slide for slide in real.MONUSEG if half_of("nuclei32", network=name, slide=slide) == half]
        if not mine:
            continue
        network = real._fold(data, name)
        for slide in mine:
            others = [picture for other, picture in pictures.items() if other != slide]
            key = f"{name}.without-{slide}" if slide in pictures else name
            reference = _kept(setting, key, partial(calibrate, network, others, mpp=0.25))
            image, mask = real._monuseg(data, slide)
            response = _image_response(setting, network, slide, image, ranges)
            pixels, nucleus = real._labelled_pixels(mask, slide)

            def oracle(network: Network = network, image: NDArray[np.uint8] = image, pixels=pixels, nucleus=nucleus):
                return real._auc_oracle(network, real._stack(image, pixels, ranges, size=32), nucleus, seed=0)

            case = Case(
                name=f"nuclei32/{name}/{slide}",
                family="nuclei32",
                network=name,
                slide=slide,
                half=half,
                response=replace(response, reference=reference),
                oracle=setting.cached_oracle(f"calibration/{name}/{slide}", oracle),
                train_scale=0.25 / real.monuseg_mpp(slide),
                range="whole",
                upsampled=True,
            )
            yield from over_ranges(case, ranges)


def _image_response(
    setting: Setting, network: Network, slide: str, image: NDArray[np.uint8], ranges: tuple[Range, ...]
) -> ScaleResponse:
    def ask() -> ScaleResponse:
        places = real._inner_places(image, PLACES, slide)
        return respond(network, real._stack(image, places, ranges, size=network.tile_size), device="cpu")

    setting.log(f"{network.name}/{slide}")
    return setting.cached_response(f"calibration/{network.name}/{slide}", ask)


def _kept(setting: Setting, name: str, make) -> Reference:
    """A reference, made or of an earlier run; remove its file after a change of how references are made."""
    import json

    file = setting.cache / "references" / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(to_record(make())))
    return from_record(json.loads(file.read_text()))


FAMILIES = {"thesis": thesis_cases, "embedded": embedded_cases, "nuclei32": nuclei32_cases}

if __name__ == "__main__":
    sys.exit(main())
