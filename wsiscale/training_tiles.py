"""What a network answers to its own training tiles, seen at known factors: a reference that new slides are held against.

Two things are learned from the tiles. How each channel's mean and spread vary from tile to tile at the training scale, with a
covariance of low rank: the distance of a tile from there. And a ridge regression from the same numbers to log2 scale, as the
size model of Cellpose does from its style vector (Stringer et al., Nature Methods 18, 2021), here with any network's layers
(Graziani et al., 2021: the middle layers of a network know scale). Neither needs BatchNorm, a head or a label. Pure numpy but
for `calibrate`, which asks the network; docs/methods.md has the measurements.
"""

from __future__ import annotations

import glob
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from wsiscale.card import packed, unpacked, update_card
from wsiscale.errors import ModelError, OptionError
from wsiscale.types import ScaleResponse

if TYPE_CHECKING:
    from wsiscale.networks import Network

VERSION = 1
TILES = 240  # that are looked at, at most; 200 and more are advised
MIN_TILES, MIN_IMAGES = 30, 5  # fewer tell neither a covariance nor, left out in turn, an error
CHANNELS = 512  # that are kept, at most: those that tell scales apart best
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

# Octaves coarser than the training tiles at which they are looked at again. Finer ones can only be interpolated, which shows;
# they serve the error of the distance, and no ridge is fitted to them.
OCTAVES = np.arange(-1.0, 1.51, 0.25)
# Each image is off that grid by so much, to either side: a tile at exactly its own scale is the only one that no kernel has
# been over, and it would be known by its sharpness and not by its scale.
JITTER = (1 / 64, 1 / 16)
SOFT = 0.8  # px, standard deviation: tiles are made up to so much softer, or sharper by as much
FOLDS = 5
PENALTIES: NDArray[np.float64] = np.logspace(-5, 2, 8)  # of the ridge, per view
RANKS = (4, 8, 16, 32, 64)  # of the covariance
# Octaves: tiles left out are of the same laboratory as the others, and a slide is not, so that no error below is believed.
SMALLEST_ERROR = 0.1
NEAR = 0.55  # octaves around the training scale in which the distance's bend is measured
# A spread counts in the logarithm from a hundredth of the channel's usual one on, a tile's deviation from a twentieth of what
# all views vary by: below, rounding would be an event.
_SPECK, _STILL = 0.01, 0.05


@dataclass(frozen=True)
class Reference:
    """How tiles of the training set look to the network at their own scale, and how it tells that they are at another.

    A channel here is a layer's channel's mean over a tile, or the logarithm of its standard deviation over the tile.
    """

    layers: tuple[tuple[str, int], ...]  # name and number of channels, in forward order
    channels: NDArray[np.int32]  # (K,) of the layers' means and log spreads laid end to end, those that are kept
    specks: NDArray[np.float32]  # (K,) what is added to a spread before its logarithm is taken; 0 for means

    # log2(scale over the training scale) = intercept + (x - center) @ slopes
    center: NDArray[np.float32]  # (K,)
    slopes: NDArray[np.float32]  # (K,)
    intercept: float

    # At the training scale x is normal: mean, and covariance unit * (basis' variances basis + rest) * unit.
    mean: NDArray[np.float32]  # (K,)
    unit: NDArray[np.float32]  # (K,) standard deviation
    basis: NDArray[np.float32]  # (P, K) orthonormal
    variances: NDArray[np.float32]  # (P,)
    rest: float

    # Of tiles whose images were left out.
    ridge_error: float  # octaves, root mean square over images
    distance_error: float  # octaves, of where an image's distance is smallest
    distance_bend: float  # of the mean log distance over octaves: a parabola's second coefficient
    distance_floor: float  # the mean log distance at the training scale

    tiles: int
    images: int
    mpp: float | None = None  # µm/px of the tiles
    object_px: float | None = None  # median diameter of a segmenter's objects in them


def calibrate(
    network: Network,
    images: Iterable[NDArray[np.uint8]],
    *,
    mpp: float | None = None,
    tiles: int = TILES,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """The reference of `network` from training images (H, W, 3) uint8 at its training µm/px, at least a tile wide each.

    Larger images are cut into tiles, of which `tiles` are drawn, the same number of each image. Coarser views see what lies
    around a tile, and beyond the image's edge its mirror image. Raises OptionError where images are too small or too few.
    """
    from wsiscale.analyzer import respond

    pictures = list(images)
    size = network.tile_size
    for number, picture in enumerate(pictures, start=1):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or min(picture.shape[:2]) < size:
            raise OptionError(
                f"image {number} of {len(pictures)} is {picture.dtype} {picture.shape}; RGB of uint8, at least {size} px a "
                "side, is needed, at the µm/px that the network was trained at"
            )
    if len(pictures) < MIN_IMAGES:
        raise OptionError(
            f"{len(pictures)} images; at least {MIN_IMAGES} are needed, each left out in turn, and 200 are better"
        )
    share = max(math.ceil(tiles / len(pictures)), 1)
    rng = np.random.default_rng(seed)
    centers = [_centers(picture, size, share, rng) for picture in pictures]
    found = sum(map(len, centers))
    if found < MIN_TILES:
        raise OptionError(f"{found} tiles of {size} px in {len(pictures)} images; at least {MIN_TILES} are needed")
    moments, octaves, objects = [], [], []
    layers: tuple[tuple[str, int], ...] = ()
    for number, (picture, places) in enumerate(zip(pictures, centers, strict=True)):
        offset = rng.uniform(*JITTER) * rng.choice([-1, 1])
        # The tile as it is, the same nearly so, and the grid.
        at = np.concatenate([[0.0, -offset], OCTAVES + offset])
        order = np.argsort(at)
        scales = np.exp2(at[order])
        tiles_seen = _stack(picture, places, scales, size).images.compute(scheduler="synchronous")  # (N, V, H, W, 3)
        shown = [
            tiles_seen[:, v] if order[v] == 0 else np.stack([_worn(tile, rng) for tile in tiles_seen[:, v]])
            for v in range(len(at))
        ]
        response = respond(network, shown, scales=scales, layers="auto", device=device, batch_size=batch_size)
        layers = layers_of(response)
        moments.append(moments_of(response, layers)[:, np.argsort(order)])
        octaves.append(np.repeat(at[None], len(places), axis=0))
        if response.outputs is not None:
            objects.append(response.outputs.object_px[:, int(np.flatnonzero(order == 0)[0])])
        if progress is not None:
            progress(number + 1, len(pictures))
    return make_reference(
        np.concatenate(moments),
        np.concatenate(octaves),
        np.repeat(np.arange(len(pictures)), [len(places) for places in centers]),
        layers=layers,
        mpp=mpp,
        object_px=_median(np.concatenate(objects)) if objects else None,
    )


def make_reference(
    moments: NDArray[np.floating],
    octaves: NDArray[np.float64],
    image: NDArray[np.intp],
    *,
    layers: tuple[tuple[str, int], ...],
    mpp: float | None = None,
    object_px: float | None = None,
) -> Reference:
    """The reference from what the layers answer to tiles at known octaves from the training scale.

    `moments` (T, V, M) as `moments_of` has them, `octaves` (T, V), and the `image` (T,) of each tile, by which tiles are
    left out together. The first view of each tile is the tile as it is.
    """
    finite = np.isfinite(moments).all(axis=(1, 2))
    if finite.sum() < MIN_TILES or len(np.unique(image[finite])) < MIN_IMAGES:
        raise OptionError(
            f"{finite.sum()} of {len(finite)} tiles have finite answers; {MIN_TILES} of {MIN_IMAGES} images are needed"
        )
    answers, octaves, image = moments[finite].astype(np.float64), octaves[finite], image[finite]
    spreads = _is_spread(layers)
    specks = np.where(spreads, _SPECK * np.median(answers[:, 0], axis=0) + 1e-12, 0)
    values = _logarithmic(answers, specks)  # (T, V, M)
    channels = _telling(values)
    values, specks = values[:, :, channels], specks[channels]
    still = _STILL * values.reshape(-1, len(channels)).std(axis=0)
    fold = _folds(image)

    coarser = octaves > -JITTER[1] - 1e-9
    own = np.abs(octaves) <= JITTER[1] + 1e-9  # the training scale: as it is, and a little off
    penalty, predicted = _best_penalty(values, octaves, coarser, fold)
    center, slopes, intercept = _ridge(values[coarser], octaves[coarser], [penalty])
    missed = np.where(coarser, predicted - octaves, np.nan)
    bias = float(np.nanmedian(missed[own]))
    by_image = np.array([np.nanmean(missed[image == i]) for i in np.unique(image)]) - bias

    rank, bend, floor, error = _best_rank(values, octaves, own, fold, image, still)
    mean, unit, basis, variances, rest = _normal(values[own], rank, still)
    return Reference(
        layers=layers,
        channels=channels.astype(np.int32),
        specks=specks.astype(np.float32),
        center=center.astype(np.float32),
        slopes=slopes[0].astype(np.float32),
        intercept=intercept - bias,
        mean=mean.astype(np.float32),
        unit=unit.astype(np.float32),
        basis=basis.astype(np.float16).astype(np.float32),
        variances=variances.astype(np.float32),
        rest=rest,
        ridge_error=max(float(np.sqrt(np.square(by_image).mean())), SMALLEST_ERROR),
        distance_error=max(error, SMALLEST_ERROR),
        distance_bend=bend,
        distance_floor=floor,
        tiles=len(values),
        images=len(np.unique(image)),
        mpp=mpp,
        object_px=object_px,
    )


def offsets(reference: Reference, response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S) how many octaves coarser than the training tiles each tile looks to the ridge."""
    octaves: NDArray[np.float64] = (values_of(reference, response) - reference.center) @ reference.slopes.astype(np.float64)
    return octaves + reference.intercept


def distances(reference: Reference, response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S) log of the mean squared distance, per channel, of each tile from those of the training set at their own scale."""
    normal = (reference.mean, reference.unit, reference.basis, reference.variances, reference.rest)
    return _log_distance(values_of(reference, response), normal)


def values_of(reference: Reference, response: ScaleResponse) -> NDArray[np.float64]:
    """(N, S, K) the reference's channels. Raises OptionError where the response has not its layers."""
    moments = moments_of(response, reference.layers)[:, :, reference.channels]
    return _logarithmic(moments.astype(np.float64), reference.specks.astype(np.float64))


def layers_of(response: ScaleResponse) -> tuple[tuple[str, int], ...]:
    """All that was watched: the stages and the inputs of BatchNorm layers, or what the card names."""
    found = tuple((name, moments.mean.shape[2]) for name, moments in response.layers.items())
    if not found:
        raise OptionError("no layer of this network can be watched, and a reference is made of layers")
    return found


def moments_of(response: ScaleResponse, layers: Sequence[tuple[str, int]]) -> NDArray[np.float32]:
    """(N, S, M) each layer's means and standard deviations over the tile's positions, end to end."""
    parts = []
    for name, count in layers:
        moments = response.layers.get(name)
        if moments is None or moments.mean.shape[2] != count:
            raise OptionError(
                f"the reference was made with layer {name!r} of {count} channels, which was not watched in this network; "
                "respond with layers='auto', or calibrate this network"
            )
        parts += [moments.mean, np.sqrt(np.maximum(moments.square - np.square(moments.mean), 0))]
    return np.concatenate(parts, axis=2)


# --- images -----------------------------------------------------------------------------------------------------------------


def find_images(where: Sequence[str | Path]) -> list[Path]:
    """The image files meant by folders, files and patterns with * in them, sorted. Raises OptionError where there is none."""
    found: set[Path] = set()
    for each in where:
        path = Path(each)
        if path.is_dir():
            found |= {file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES}
        else:
            found |= {Path(name) for name in glob.glob(str(each), recursive=True)}
    if not found:
        raise OptionError(
            f"no images in {', '.join(map(str, where))}; give a folder, files or a pattern of {', '.join(SUFFIXES)}"
        )
    return sorted(found)


def read_images(paths: Sequence[Path]) -> list[NDArray[np.uint8]]:
    """(H, W, 3) each. Raises OptionError for what is no image."""
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pictures.append(np.asarray(image.convert("RGB")))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise OptionError(f"{path} cannot be read as an image: {error}") from error
    return pictures


def _centers(picture: NDArray[np.uint8], size: int, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(n, 2) centres of up to `count` tiles beside each other."""
    sides = [np.arange(side // size) * size + size / 2 + (side % size) // 2 for side in picture.shape[:2]]
    every = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)
    return every[np.sort(rng.permutation(len(every))[:count])]


def _stack(picture: NDArray[np.uint8], centers: NDArray[np.float64], scales: NDArray[np.float64], size: int) -> Any:
    """Views of `size` px; beyond its edges the picture is mirrored as often as it takes."""
    from wsiscale.readers.array import ArrayReader
    from wsiscale.stacks import scale_stack

    pad = math.ceil(size * float(scales[-1]) / 2)
    slide = ArrayReader(np.pad(picture, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric"))
    return scale_stack(slide, centers + pad, scales=scales, size=size, max_upsample=1.01 / float(scales[0]))


def _worn(tile: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The tile (H, W, 3) a little sharper or softer, and, one in two, through JPEG as scanners write it.

    A slide has been through another scanner, compression and kernel than the training tiles. What those change is then a
    direction in which tiles differ, and not a sign of scale: without it a network of fine scale finds slides that were never
    compressed half an octave too coarse.
    """
    pixels = tile.astype(np.float32)
    soft = ndimage.gaussian_filter(pixels, (SOFT, SOFT, 0))
    worn = np.clip(np.rint(pixels + rng.uniform(-1, 1) * (pixels - soft)), 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        return worn
    compressed = io.BytesIO()
    Image.fromarray(worn).save(compressed, "jpeg", quality=int(rng.integers(50, 96)))
    return np.asarray(Image.open(compressed))


def _median(values: NDArray[np.floating]) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


# --- the ridge and the normal distribution ----------------------------------------------------------------------------------


def _is_spread(layers: Sequence[tuple[str, int]]) -> NDArray[np.bool_]:
    """(M,) which of the moments are standard deviations."""
    return np.concatenate([np.repeat([False, True], count) for _, count in layers])


def _logarithmic(moments: NDArray[np.float64], specks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means as they are, standard deviations in the logarithm."""
    spread = specks > 0
    values = moments.copy()
    values[..., spread] = np.log(moments[..., spread] + specks[spread])
    return values


def _telling(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """The channels whose means change most over views in units of what tiles differ by in one view: (K,) ascending."""
    within, between = values.var(axis=0).mean(axis=0), values.mean(axis=0).var(axis=0)
    alive = within > 1e-12 * max(float(within.max()), 1e-30)
    if not alive.any():
        raise OptionError("the network answers the same for every tile; there is nothing to make a reference of")
    information = np.where(alive, between / np.where(alive, within, 1), -1)
    order = np.argsort(-information, kind="stable")[:CHANNELS]
    return np.sort(order[information[order] >= 0])


def _folds(image: NDArray[np.intp]) -> NDArray[np.intp]:
    """(T,) the fold of each tile; an image's tiles share one."""
    names, which = np.unique(image, return_inverse=True)
    shuffled = np.random.default_rng(0).permutation(len(names)) % FOLDS
    return np.asarray(shuffled[which], np.intp)


def _ridge(
    values: NDArray[np.float64], octaves: NDArray[np.float64], penalties: Sequence[float] | NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Centre (K,), slopes (L, K) for each penalty, and the intercept, from views (n, K) in units of their spread."""
    center, unit = values.mean(axis=0), values.std(axis=0)
    unit = np.where(unit > 0, unit, 1)
    left, sizes, right = np.linalg.svd((values - center) / unit, full_matrices=False)
    along = left.T @ (octaves - octaves.mean())
    slopes = np.stack([(sizes / (sizes**2 + penalty * len(values)) * along) @ right for penalty in penalties]) / unit
    return center, slopes, float(octaves.mean())


def _best_penalty(
    values: NDArray[np.float64], octaves: NDArray[np.float64], used: NDArray[np.bool_], fold: NDArray[np.intp]
) -> tuple[float, NDArray[np.float64]]:
    """The penalty that predicts left-out images best, and what it predicts of each: (T, V)."""
    predicted = np.empty((len(PENALTIES), *octaves.shape))
    for each in np.unique(fold):
        rest = (fold != each)[:, None] & used
        center, slopes, intercept = _ridge(values[rest], octaves[rest], PENALTIES)
        predicted[:, fold == each] = np.moveaxis((values[fold == each] - center) @ slopes.T, 2, 0) + intercept
    best = int(np.square(predicted - octaves)[:, used].mean(axis=1).argmin())
    return float(PENALTIES[best]), predicted[best]


Normal = tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating], NDArray[np.floating], float]


def _normal(values: NDArray[np.float64], rank: int, still: NDArray[np.float64]) -> Normal:
    """Mean (K,), unit (K,), basis (P, K), variances (P,) and the variance in all other directions, from views (n, K)."""
    mean = values.mean(axis=0)
    unit = np.maximum(values.std(axis=0), np.maximum(still, 1e-12))
    _, sizes, right = np.linalg.svd((values - mean) / unit, full_matrices=False)
    variances = sizes**2 / len(values)
    rest = float(variances[rank:].sum() / max(values.shape[1] - rank, 1))
    # No direction is known to be as still as the rest's mean of few views says.
    return mean, unit, right[:rank], variances[:rank], max(rest, 1e-3)


def _log_distance(values: NDArray[np.float64], normal: Normal) -> NDArray[np.float64]:
    """(...,) log of the squared Mahalanobis distance over the number of channels, of (..., K)."""
    mean, unit, basis, variances, rest = normal
    standard = (values - mean) / unit
    along = standard @ basis.T.astype(np.float64)
    beside = np.maximum(np.square(standard).sum(axis=-1) - np.square(along).sum(axis=-1), 0)
    square = (np.square(along) / np.maximum(variances, rest)).sum(axis=-1) + beside / rest
    logarithm: NDArray[np.float64] = np.log(np.maximum(square / values.shape[-1], 1e-12))
    return logarithm


def _best_rank(
    values: NDArray[np.float64],
    octaves: NDArray[np.float64],
    own: NDArray[np.bool_],
    fold: NDArray[np.intp],
    image: NDArray[np.intp],
    still: NDArray[np.float64],
) -> tuple[int, float, float, float]:
    """The covariance's rank with which left-out images find the training scale best; bend, floor and error at that rank.

    The bend is that of the mean log distance near the training scale, the floor its value there, the error octaves.
    """
    order = np.argsort(octaves, axis=1)
    ascending = np.take_along_axis(octaves, order, axis=1)
    best: tuple[float, int, float, float] | None = None
    for rank in [r for r in RANKS if r <= min(len(values) // 3, values.shape[2] - 1)] or [1]:
        found = np.empty(octaves.shape)
        for each in np.unique(fold):
            normal = _normal(values[fold != each][own[fold != each]], rank, still)
            found[fold == each] = _log_distance(values[fold == each], normal)
        sorted_found = np.take_along_axis(found, order, axis=1)
        off = [_lowest(ascending[image == i][0], sorted_found[image == i].mean(axis=0)) for i in np.unique(image)]
        error = float(np.sqrt(np.mean(np.square(off))))
        if best is None or error < best[0]:
            near = np.abs(octaves) <= NEAR
            bend = float(np.polyfit(octaves[near], found[near], 2)[0])
            best = (error, rank, bend, float(found[own].mean()))
    assert best is not None
    error, rank, bend, floor = best
    return rank, max(bend, 1e-3), floor, error


def _lowest(octaves: NDArray[np.float64], curve: NDArray[np.float64]) -> float:
    """Where a curve (V,) over ascending octaves is lowest, by a parabola through that point and its neighbours."""
    low = int(curve.argmin())
    if low in (0, len(curve) - 1):
        return float(octaves[low])
    around = slice(low - 1, low + 2)
    bend, slope, _ = np.polyfit(octaves[around], curve[around], 2)
    return float(np.clip(-slope / (2 * bend), octaves[low - 1], octaves[low + 1])) if bend > 0 else float(octaves[low])


# --- in the card ------------------------------------------------------------------------------------------------------------

_HALF = ("basis",)
_ARRAYS = (*_HALF, "channels", "specks", "center", "slopes", "mean", "unit", "variances")
_NUMBERS = ("intercept", "rest", "ridge_error", "distance_error", "distance_bend", "distance_floor")


def to_record(reference: Reference) -> dict[str, Any]:
    """The reference as JSON: numbers in the open where people read them, arrays as npz in base64."""
    arrays = {name: getattr(reference, name) for name in _ARRAYS}
    arrays |= {name: arrays[name].astype(np.float16) for name in _HALF}
    return {
        "version": VERSION,
        "tiles": reference.tiles,
        "images": reference.images,
        "mpp": reference.mpp,
        "object_px": reference.object_px,
        **{name: getattr(reference, name) for name in _NUMBERS},
        "layers": [list(layer) for layer in reference.layers],
        "arrays": packed(arrays),
    }


def from_record(record: Mapping[str, Any]) -> Reference:
    """What `to_record` wrote. Raises ModelError where it is damaged or of another version. Runs no code from it."""
    if record.get("version") != VERSION:
        raise ModelError(
            f"the reference is of version {record.get('version')!r}, this wsiscale reads {VERSION}; calibrate again"
        )
    try:
        arrays: dict[str, Any] = unpacked(record["arrays"], _ARRAYS)
        numbers: dict[str, Any] = {name: float(record[name]) for name in _NUMBERS}
        kinds = {name: np.int32 if name == "channels" else np.float32 for name in _ARRAYS}
        reference = Reference(
            layers=tuple((str(name), int(count)) for name, count in record["layers"]),
            tiles=int(record["tiles"]),
            images=int(record["images"]),
            mpp=None if record["mpp"] is None else float(record["mpp"]),
            object_px=None if record["object_px"] is None else float(record["object_px"]),
            **numbers,
            **{name: values.astype(kinds[name]) for name, values in arrays.items()},
        )
    except (LookupError, ValueError, TypeError) as error:
        raise ModelError(f"the reference is damaged ({type(error).__name__}: {error}); calibrate again") from error
    count = len(reference.channels)
    moments = 2 * sum(size for _, size in reference.layers)
    fits = (
        all(getattr(reference, name).shape == (count,) for name in ("specks", "center", "slopes", "mean", "unit"))
        and reference.basis.shape == (len(reference.variances), count)
        and count > 0
        and bool((reference.channels >= 0).all() and (reference.channels < moments).all())
        and all(np.isfinite(getattr(reference, name)).all() for name in (*_ARRAYS, *_NUMBERS))
    )
    if not fits:
        raise ModelError("the reference is damaged: its arrays do not fit each other; calibrate again")
    return reference


def reference_of(card: Mapping[str, Any]) -> Reference | None:
    """The reference in a model card's fields (`Network.card`), if it has one."""
    record = card.get("reference")
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise ModelError("the card's reference is not an object; calibrate again")
    return from_record(record)


def object_px_of(card: Mapping[str, Any]) -> float | None:
    """The diameter in px of the median object in training tiles, where the card says so."""
    value = card.get("object_px")
    if value is None:
        return None
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"the card's object_px is {value!r}; it has to be px above 0")
    return float(value)


def referring(response: ScaleResponse, card: Mapping[str, Any]) -> ScaleResponse:
    """The same response, its views too, with what the card says of the network's training tiles."""
    reference, object_px = reference_of(card), object_px_of(card)
    if reference is None and object_px is None:
        return response
    views = {name: replace(view, reference=reference, object_px=object_px) for name, view in response.views.items()}
    return replace(response, reference=reference, object_px=object_px, views=views)


def save_reference(reference: Reference, card: str | Path, *, fields: Mapping[str, Any] | None = None) -> None:
    """Puts the reference into a card's file, in place of one there; the card's other fields stay, or become `fields`."""
    changes: dict[str, Any] = {"reference": to_record(reference)}
    if reference.object_px is not None:
        changes["object_px"] = round(reference.object_px, 3)
    update_card(card, changes, fields=fields)
