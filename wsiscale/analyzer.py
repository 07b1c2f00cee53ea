"""The analyzer: a network's pooled answers to a scale stack.

Nothing here keeps a feature map: hooks reduce what passes to a mean and a mean square per channel while the network runs.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wsiscale import gpu
from wsiscale.errors import ModelError, OptionError
from wsiscale.layers import (
    Plan,
    Tap,
    as_maps,
    evaluating,
    first_tensor,
    normalised,
    one_line,
    out_of_memory,
    plan_of,
    spatial_axes,
    spatial_mean,
    tensor_of,
)
from wsiscale.networks import Network, choose_device
from wsiscale.objects import objects_of
from wsiscale.scramble import SCRAMBLES
from wsiscale.stacks import read_place
from wsiscale.timing import timed, watching
from wsiscale.training_tiles import referring
from wsiscale.types import LayerMoments, Outputs, ScaleResponse, ScaleStack, Window

log = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16", "float16"]
View = Literal["rot90", "rot180", "rot270", "flip", "phase_scrambled", "pixel_shuffled"]

_READERS = min(4, os.cpu_count() or 1)  # threads that read while the network runs
_READ_AHEAD = 2 * _READERS  # places
_LARGE = 1_000_000_000  # bytes of a response from which on it is announced


def respond(
    network: Network,
    stack: ScaleStack | Sequence[NDArray[np.uint8]],
    *,
    scales: Sequence[float] | NDArray[np.floating] | None = None,
    views: Sequence[str] = (),
    layers: str | Sequence[str] = "auto",
    device: str = "auto",
    batch_size: int | None = None,
    precision: Precision = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ScaleResponse:
    """What `network` answers to each tile of `stack`, pooled over positions while it runs.

    `stack` may also be one (N, H, W, 3) array per scale, whose H and W may differ by scale; `scales` then says which.
    `views` are asked beside the plain tile: rot90, rot180, rot270, flip, and with `seed` phase_scrambled, pixel_shuffled.
    `agreement` with a turned view is one minus the total variation distance of the two softmaxes, mean over pixels mapped
    back to the plain frame.
    `layers` is "auto" (stages and BatchNorm inputs, or the card's), "stages", "batchnorm" (every k-th, so that no more than
    `MOST_BATCHNORM` are watched), "every" (all that have something of their own to say), "none", or names as in
    named_modules(), `name@0` for the first of several passes; a BatchNorm is watched at its input, everything else at its
    output. Values that are not finite stay so.
    `progress` hears of (done, total) tiles, views counted. Raises ModelError before the first tile is read where the network
    cannot take them. The module stays on `device`.
    """
    tiles = _tiles_of(stack, scales)
    for view in views:
        if view not in get_args(View):
            raise OptionError(f"no view {view!r}; there are {', '.join(get_args(View))}")
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"a batch has at least one tile, not {batch_size}")
    target = choose_device(device)
    # channels_last is what tensor cores want, and on a CPU makes convolutions 1.4 to 2 times faster too.
    module = network.module.to(device=target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with evaluating(module), torch.inference_mode():
        plan = plan_of(network, *max(tiles.shapes), layers)
        if min(tiles.shapes) != max(tiles.shapes):
            plan_of(network, *min(tiles.shapes), layers)
        size = plan.bytes_per_tile * len(tiles) * (1 + len(views))
        if size > _LARGE:
            log.warning("the response will take %.1f GB; watch fewer layers (layers=) if that is too much", size / 1e9)
        recorded: dict[str, _Arrays] = {view: {} for view in ("plain", *views)}
        done, total = 0, len(tiles) * (1 + len(views))
        batches = _batches(tiles, views=views, seed=seed, batch_size=batch_size, device=target)
        dtype = _autocast_dtype(precision, target, module)
        with closing(batches), torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
            for batch, answers in _within_memory(batches, lambda batch: _answer(network, plan, batch, views, target)):
                for view, columns in answers.items():
                    _record(recorded[view], columns, batch.index, len(tiles))
                done += len(batch.index) * (1 + len(views))
                if progress is not None:
                    progress(done, total)
    responses = {view: _response(tiles, plan, arrays) for view, arrays in recorded.items()}
    agreement = {view: arrays[_AGREEMENT].reshape(tiles.grid) for view, arrays in recorded.items() if _AGREEMENT in arrays}
    plain = responses.pop("plain")
    return referring(replace(plain, views=responses, agreement=agreement), network.card)


def class_maps(network: Network, tiles: NDArray[np.uint8], *, device: str = "auto") -> NDArray[np.float32] | None:
    """The softmax of each of (B, H, W, 3) tiles, (B, C, h, w): what `respond` pools and does not keep, for looking at.

    h and w are 1 for classifiers; None for networks that give features alone.
    """
    target = choose_device(device)
    module = network.module.to(device=target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = _autocast_dtype("auto", target, module)
    with evaluating(module), torch.inference_mode(), torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
        plan = plan_of(network, tiles.shape[1], tiles.shape[2], "none")
        maps = [_forward(network, plan, torch.from_numpy(tile[None]).to(target))[1] for tile in tiles]
    return None if plan.output == "features" else np.concatenate([m.cpu().numpy() for m in maps if m is not None])


def response_bytes(network: Network, *, places: int, scales: int, views: int = 0, layers: str | Sequence[str] = "auto") -> int:
    """How much memory `respond` will fill. Watching every BatchNorm input of a large network is most of it."""
    with evaluating(network.module), torch.inference_mode():
        plan = plan_of(network, network.tile_size, network.tile_size, layers)
    return plan.bytes_per_tile * places * scales * (1 + views)


# --- the forward pass ----------------------------------------------------------------------------------------------------
_Key = tuple[str, str]  # (what, layer)
_Arrays = dict[_Key, NDArray[np.float32]]
_AGREEMENT: _Key = ("agreement", "")
_FEATURES: _Key = ("features", "")


@dataclass(frozen=True)
class _Batch:
    index: NDArray[np.intp]  # (B,) place * S + scale
    tiles: Tensor  # (B, H, W, 3) uint8, on the device if they were made there
    scrambled: Mapping[str, Tensor]  # by view, (B, H, W, 3) each

    def __getitem__(self, part: slice) -> _Batch:
        return _Batch(self.index[part], self.tiles[part], {view: tiles[part] for view, tiles in self.scrambled.items()})


def _within_memory(
    batches: Iterator[_Batch], answer: Callable[[_Batch], dict[str, _Arrays]]
) -> Iterator[tuple[_Batch, dict[str, _Arrays]]]:
    """Each batch with its answers, in parts half as large wherever memory runs out, and from then on."""
    limits: dict[tuple[int, ...], int] = {}  # tiles, by their shape
    for whole in batches:
        waiting = [whole]
        while waiting:
            batch = waiting.pop()
            shape, count = batch.tiles.shape[1:], len(batch.index)
            answers = None
            if count <= limits.get(shape, count):
                try:
                    answers = answer(batch)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    if count == 1:
                        what = f"one tile of {shape[0]} x {shape[1]} px is too much for the memory"
                        raise ModelError(f"{what}: {one_line(error)}") from error
                    limits[shape] = count // 2
                    log.warning("out of memory with %d tiles of %d x %d px; going on with %d", count, *shape[:2], count // 2)
            if answers is not None:
                yield batch, answers
                continue
            # Here and not in the handler, where the error's frames still hold the tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            half = limits[shape]
            waiting += [batch[half:], batch[:half]]


def _answer(network: Network, plan: Plan, batch: _Batch, views: Sequence[str], device: torch.device) -> dict[str, _Arrays]:
    """What the network answers to a batch, plain and in each view."""
    with timed("copy"):
        tiles = batch.tiles.to(device)
    pooled: dict[str, dict[_Key, Tensor]] = {}
    plain: Tensor | None = None
    for view in ("plain", *views):
        seen = tiles
        if view in batch.scrambled:
            with timed("copy"):
                seen = batch.scrambled[view].to(device)
        elif view != "plain":
            seen = _turned(tiles, view, rows=1)
        pooled[view], probabilities = _forward(network, plan, seen)
        if view == "plain":
            plain = probabilities
            if plan.output == "segmentation" and probabilities is not None:
                pooled[view] |= _objects(probabilities, tile=tiles.shape[1])
        elif view not in batch.scrambled and plain is not None and probabilities is not None:
            distance = (plain - _turned(probabilities, view, rows=2, back=True)).abs().sum(1) / 2  # (B, h, w)
            pooled[view][_AGREEMENT] = 1 - distance.flatten(1).mean(1)
    return {view: _download(columns) for view, columns in pooled.items()}


def _forward(network: Network, plan: Plan, tiles: Tensor) -> tuple[dict[_Key, Tensor], Tensor | None]:
    """One forward pass of (B, H, W, 3) uint8: everything pooled to (B, ...), and the softmax (B, C, h, w) if there is one."""
    taps = plan.taps if plan.head is None else (*plan.taps, plan.head)
    with timed("forward", wall=torch.get_num_threads() > 1 or tiles.is_cuda), _picked_up(network.module, taps) as pooled:
        answer = tensor_of(network, network.module(normalised(network, tiles)))
        if watching() and tiles.is_cuda:
            torch.cuda.synchronize(tiles.device)  # else the time would show where the answers are waited for
    if plan.head is not None:
        pooled[_FEATURES] = pooled.pop(("mean", ""))
        del pooled[("square", "")]
    answer = as_maps(answer, plan.output).float()
    if plan.output == "features":
        pooled[_FEATURES] = spatial_mean(answer, 1)
        return pooled, None
    if plan.softmaxed:
        answer = answer.clamp_min(torch.finfo(torch.float32).tiny).log()
    if answer.shape[1] == 1:
        # The two classes whose softmax is the sigmoid of the one logit, neither preferred.
        answer = torch.cat([-answer / 2, answer / 2], dim=1)
    probabilities = answer.softmax(1)  # (B, C, h, w)
    top = answer.topk(2, dim=1).values
    pooled["logits", ""] = spatial_mean(answer, 1)
    pooled["probabilities", ""] = spatial_mean(probabilities, 1)
    per_pixel = {
        "confidence": probabilities.amax(1),
        "margin": top[:, 0] - top[:, 1],
        "entropy": torch.special.entr(probabilities).sum(1),
        "energy": answer.logsumexp(1),
    }
    pooled |= {(name, ""): values.flatten(1).mean(1) for name, values in per_pixel.items()}
    return pooled, probabilities


def _objects(probabilities: Tensor, *, tile: int) -> dict[_Key, Tensor]:
    """Diameter in px of the tile, and share, (B,) each, of what is likelier another class than 0, from (B, C, h, w)."""
    found = (probabilities.argmax(1) != 0).cpu().numpy()
    measured = torch.tensor([objects_of(mask) for mask in found], dtype=torch.float32, device=probabilities.device)  # (B, 2)
    return {("object_px", ""): measured[:, 0] * (tile / found.shape[1]), ("object_share", ""): measured[:, 1]}


@contextmanager
def _picked_up(module: nn.Module, taps: Sequence[Tap]) -> Iterator[dict[_Key, Tensor]]:
    """What the taps pick up in the forward pass inside: (B, K) means and mean squares."""
    pooled: dict[_Key, Tensor] = {}
    passes: Counter[Tap] = Counter()

    def pick_up(tap: Tap, tensor: Any) -> None:
        if passes[tap] == tap.count and isinstance(tensor, Tensor):
            pooled["mean", tap.name], pooled["square", tap.name] = _moments(tensor, tap.axis)
        passes[tap] += 1

    def before(tap: Tap, _: nn.Module, args: Any, kwargs: Any) -> None:
        pick_up(tap, first_tensor(args, kwargs))

    def after(tap: Tap, _: nn.Module, __: Any, result: Any) -> None:
        pick_up(tap, result)

    handles: list[RemovableHandle] = []
    for tap in taps:
        layer = module.get_submodule(tap.module)
        if tap.at_input:
            handles.append(layer.register_forward_pre_hook(partial(before, tap), with_kwargs=True))
        else:
            handles.append(layer.register_forward_hook(partial(after, tap)))
    try:
        yield pooled
    finally:
        for handle in handles:
            handle.remove()


def _moments(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and mean square over all axes but the first and the channels': (B, K) each, in float32."""
    positions = spatial_axes(values, axis)
    if not positions:
        return values.float(), values.float().square()
    dtype = torch.promote_types(values.dtype, torch.float32)
    if values.device.type == "cpu":
        # Squares of one tile at a time stay in the cache: 4 to 50 times faster than values.square().mean() or the norm.
        squares, inner = torch.empty_like(values[0], dtype=dtype), tuple(i - 1 for i in positions)
        return spatial_mean(values, axis), torch.stack(
            [torch.square(tile.to(dtype), out=squares).mean(inner) for tile in values]
        )
    # The norm makes no copy of the map.
    norm = torch.linalg.vector_norm(values, dim=positions, dtype=dtype)
    return spatial_mean(values, axis), norm.square() / math.prod(values.shape[i] for i in positions)


def _turned(images: Tensor, view: str, *, rows: int, back: bool = False) -> Tensor:
    """The view of images whose rows are axis `rows` and columns the next, or back from it."""
    if view == "flip":
        return images.flip(rows + 1)
    quarters = {"rot90": 1, "rot180": 2, "rot270": 3}[view]
    return torch.rot90(images, -quarters if back else quarters, (rows, rows + 1))


@timed("reduce")
def _download(columns: dict[_Key, Tensor]) -> _Arrays:
    """All to the host in one copy."""
    flat = [tensor.float().reshape(len(tensor), -1) for tensor in columns.values()]
    together = torch.cat(flat, dim=1).cpu().numpy()
    ends = np.cumsum([tensor.shape[1] for tensor in flat])
    return dict(zip(columns, np.split(together, ends[:-1], axis=1), strict=True))


def _record(arrays: _Arrays, columns: _Arrays, index: NDArray[np.intp], tiles: int) -> None:
    for key, values in columns.items():
        if key not in arrays:
            arrays[key] = np.empty((tiles, values.shape[1]), np.float32)
        arrays[key][index] = values


def _response(tiles: _Tiles, plan: Plan, arrays: _Arrays) -> ScaleResponse:
    shaped = {key: values.reshape(*tiles.grid, -1) for key, values in arrays.items()}  # (N, S, K)
    outputs = None
    if plan.output != "features":
        outputs = Outputs(
            logits=shaped["logits", ""],
            probabilities=shaped["probabilities", ""],
            **{name: shaped[name, ""][..., 0] for name in ("confidence", "margin", "entropy", "energy")},
            **{name: shaped[name, ""][..., 0] for name in ("object_px", "object_share") if (name, "") in shaped},
        )
    return ScaleResponse(
        scales=tiles.scales,
        slide_mpp=tiles.slide_mpp,
        outputs=outputs,
        features=shaped.get(_FEATURES),
        layers={tap.name: LayerMoments(shaped["mean", tap.name], shaped["square", tap.name]) for tap in plan.taps},
        stages=plan.stages,
        batchnorm=plan.batchnorm,
        head_weight=plan.head_weight,
        head_bias=plan.head_bias,
    )


# --- reading ahead -------------------------------------------------------------------------------------------------------
T = TypeVar("T")


@dataclass(frozen=True)
class _Tiles:
    """The tiles of a stack, place by place."""

    places: int
    scales: NDArray[np.float64]  # (S,)
    slide_mpp: float | None
    shapes: tuple[tuple[int, int], ...]  # (S,) (height, width)
    read: Callable[[int], Sequence[NDArray[np.uint8]]]  # place -> S tiles (H, W, 3); from any thread
    window: Callable[[int], Window | None] | None = None  # place -> what its tiles can be made from

    def __len__(self) -> int:
        return self.places * len(self.scales)

    @property
    def grid(self) -> tuple[int, int]:
        return self.places, len(self.scales)


def _tiles_of(stack: ScaleStack | Sequence[NDArray[np.uint8]], scales: Sequence[float] | NDArray[np.floating] | None) -> _Tiles:
    if isinstance(stack, ScaleStack):
        places, _, height, width, _ = stack.images.shape
        tiles = _Tiles(
            places=places,
            scales=stack.scales,
            slide_mpp=stack.slide_mpp,
            shapes=((height, width),) * len(stack.scales),
            read=lambda place: list(read_place(stack, place)),
            window=stack.window,
        )
    else:
        if scales is None or len(scales) != len(stack):
            raise OptionError(f"{len(stack)} arrays need as many scales= (level-0 px per px), finest first; got {scales}")
        for array in stack:
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or len(array) != len(stack[0]):
                raise OptionError(
                    f"an array is {array.dtype} {array.shape}; give uint8 (places, height, width, 3) for each scale"
                )
        tiles = _Tiles(
            places=len(stack[0]) if len(stack) else 0,
            scales=np.asarray(scales, np.float64),
            slide_mpp=None,
            shapes=tuple((array.shape[1], array.shape[2]) for array in stack),
            read=lambda place: [array[place] for array in stack],
        )
    if not len(tiles):
        raise OptionError("the stack is empty: a network has nothing to answer")
    return tiles


def _batches(
    tiles: _Tiles, *, views: Sequence[str], seed: int, batch_size: int | None, device: torch.device
) -> Generator[_Batch]:
    """Tiles of one shape at a time, in batches. On a GPU a place is uploaded once, and its tiles are made there."""
    scrambles = [view for view in views if view in SCRAMBLES]
    waiting: dict[tuple[int, int], list[tuple[int, Tensor, dict[str, Tensor]]]] = {shape: [] for shape in tiles.shapes}
    there = _makes_tiles(device)

    def read(place: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
        window = tiles.window(place) if there and tiles.window is not None else None
        if window is not None:
            pixels = gpu.upload(window.pixels, device)
            found = list(gpu.resample_stack(window.plans, pixels, y=window.y, x=window.x))
        else:
            found = [torch.from_numpy(np.ascontiguousarray(tile)) for tile in tiles.read(place)]
        if there:
            return [(tile, {}) for tile in found]
        scrambled = ({view: SCRAMBLES[view](tile.numpy()[None], seed)[0] for view in scrambles} for tile in found)
        return [
            (tile, {view: torch.from_numpy(other) for view, other in others.items()})
            for tile, others in zip(found, scrambled, strict=True)
        ]

    def batch(shape: tuple[int, int]) -> _Batch:
        index, plain, scrambled = zip(*waiting[shape], strict=True)
        waiting[shape].clear()
        together = torch.stack(plain)
        if there:
            together = together.to(device)
            others = {view: gpu.SCRAMBLES[view](together, seed + index[0]) for view in scrambles}
        else:
            others = {view: torch.stack([s[view] for s in scrambled]) for view in scrambles}
        return _Batch(np.array(index), together, others)

    for place, found in enumerate(_read_ahead(read, tiles.places)):
        for scale, (tile, scrambled) in enumerate(found):
            shape = tiles.shapes[scale]
            waiting[shape].append((place * len(tiles.scales) + scale, tile, scrambled))
            if len(waiting[shape]) >= (batch_size or _batch_size(shape, device)):
                yield batch(shape)
    for shape in waiting:
        if waiting[shape]:
            yield batch(shape)


def _makes_tiles(device: torch.device) -> bool:
    """Whether tiles are made on the device: where the CPU's cores could not keep it busy."""
    return device.type != "cpu"


def _batch_size(shape: tuple[int, int], device: torch.device) -> int:
    """Tiles: 20 of 224 px on a CPU, where more gain nothing, and eight times as many on a GPU."""
    pixels = 2**20 if device.type == "cpu" else 2**23
    return min(max(pixels // math.prod(shape), 1), 1024)


def _read_ahead(read: Callable[[int], T], count: int) -> Iterator[T]:
    """read(0), read(1), ... in order, a few ahead of the caller in threads of their own."""
    ahead: deque[Future[T]] = deque()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="wsiscale-read") as threads:
        try:
            for n in range(count):
                while len(ahead) < _READ_AHEAD and n + len(ahead) < count:
                    ahead.append(threads.submit(read, n + len(ahead)))
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _autocast_dtype(precision: Precision, device: torch.device, module: nn.Module) -> torch.dtype:
    if precision not in get_args(Precision):
        raise OptionError(f"precision is {precision!r}; give {', '.join(get_args(Precision))}")
    if precision == "auto" and any(p.dtype == torch.float64 for p in module.parameters()):
        precision = "float32"  # which autocast leaves alone: someone wants more precision, not less
    elif precision == "auto" and device.type == "cpu":
        # In half the time on cores that have it; estimates of six real images differed by 0.003 octaves at most.
        precision = "bfloat16" if has_bfloat16() else "float32"
    elif precision == "auto":
        precision = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 itself; elsewhere it would be slower than float32."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
