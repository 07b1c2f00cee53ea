"""One network on one slide over one range of scales, and how good the network really is there: what methods are judged on.

A family is a function `cases(setting) -> Iterator[Case]`. It asks the network once per network and slide over the widest
range (`setting.cached_response`), measures quality with labels once (`setting.cached_oracle`), and yields a case for each
range that it cuts out of them with `over_ranges`. Labels serve the oracle alone; no method sees them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsiscale.criteria import peak
from wsiscale.responses import at_scales, merge_responses
from wsiscale.types import BatchNormStatistics, LayerMoments, Outputs, ScaleResponse

Half = Literal["develop", "report"]

SPLIT_FILE = Path(__file__).parent / "split.json"
SPLIT_SEED = 20261121

# What makes a case clear, see there: octaves, and quality 0..1.
CLEAR_INSIDE, CLEAR_QUALITY, CLEAR_LOSS = 0.25, 0.7, 0.1

# A scale is this far inside a range or outside of it: float slack, in octaves.
_SLACK = 1e-6


class MissingDataError(Exception):
    """Why a family cannot run here, or not to its end: data that is not there."""


@dataclass(frozen=True)
class Oracle:
    """Quality against scale, measured with labels: accuracy, AUC or Dice, 0..1. Higher is better."""

    scales: NDArray[np.float64]  # (S',) ascending, level-0 px per px
    quality: NDArray[np.float64]  # (S',)
    lo: NDArray[np.float64]  # (S',) 90 % bootstrap band over images, tiles or pixels
    hi: NDArray[np.float64]  # (S',)
    measure: str = "accuracy"

    @property
    def best(self) -> float:
        """The scale of the highest quality; of a plateau its middle, at an end of the range that end."""
        found = peak(self.scales, self.quality)
        return float(np.sqrt(self.scales[0] * self.scales[-1])) if np.isnan(found) else found

    @property
    def highest(self) -> float:
        return float(self.quality.max())

    def at(self, scale: float) -> float:
        """The quality at `scale`, between the measured scales linear in octaves, beyond them that of the end."""
        return float(np.interp(np.log2(scale), np.log2(self.scales), self.quality))

    def regret(self, scale: float) -> float:
        """What is lost at `scale` against the best measured scale, 0 or more."""
        return self.highest - self.at(scale)

    @property
    def plateau(self) -> tuple[float, float]:
        """The finest and the coarsest scale that labels cannot tell from the best: `hi` reaches the best one's `lo`."""
        good = np.flatnonzero(self.hi >= self.lo[int(self.quality.argmax())])
        return float(self.scales[good[0]]), float(self.scales[good[-1]])


@dataclass(frozen=True)
class Case:
    """A network, a slide and a range. `response` covers exactly the range, `oracle` too."""

    name: str  # unique over all families
    family: str  # "thesis", "nuclei32", "crc", "embedded", ...
    network: str
    slide: str
    half: Half
    response: ScaleResponse
    oracle: Oracle
    train_scale: float | None  # level-0 px per px at which the network was trained; None where unknown
    range: str  # which of the family's ranges: "A", "B" (off-centre to either side), "native", ...
    upsampled: bool  # whether the range holds scales finer than level 0
    tags: frozenset[str] = frozenset()  # "mixed" or "single-class"; a stressor's name: "jpeg", "blur", "16 places", ...

    @property
    def clear(self) -> bool:
        """Whether labels show a scale to be found, so that "no estimate" is a failure.

        The slide is of several tissues, the network good at its best scale and a tenth worse elsewhere, and the best scale a
        quarter of an octave inside of the range, or at its fine end where the slide has no finer.
        """
        quality, scales = self.oracle.quality, self.oracle.scales
        low, best, high = np.log2([scales[0], self.oracle.best, scales[-1]])
        inside = best <= high - CLEAR_INSIDE and (low <= _SLACK or best >= low + CLEAR_INSIDE)
        good = quality.max() >= CLEAR_QUALITY and np.ptp(quality) >= CLEAR_LOSS
        return bool(inside and good and "single-class" not in self.tags)


@dataclass(frozen=True)
class Range:
    """What a case may choose from, in level-0 px per px."""

    tag: str
    lo: float
    hi: float

    @property
    def upsampled(self) -> bool:
        return self.lo < 1 - 0.01


@dataclass(frozen=True)
class Setting:
    """Where a family finds its data and keeps its answers."""

    cache: Path
    data: Path | None = None  # third-party images and weights; None where they are absent
    quick: bool = False  # a small part of each family, for a look
    cached: bool = False  # nothing but what the cache has; a family ends where that ends
    log: Callable[[str], None] = field(default=lambda line: print(line, file=sys.stderr, flush=True))

    def needs_data(self) -> Path:
        """The folder of third-party data. Raises MissingDataError."""
        if self.data is None or not self.data.is_dir():
            raise MissingDataError("its images and weights are not here; name their folder with --data")
        return self.data

    def cached_response(self, key: str, make: Callable[[], ScaleResponse]) -> ScaleResponse:
        """`make()`, or what it gave an earlier run under the same `key` ("family/network/slide")."""
        return _unpack_response(self._cached(f"{key}.response", lambda: _pack_response(make())))

    def cached_oracle(self, key: str, make: Callable[[], Oracle]) -> Oracle:
        """`make()`, or what it gave an earlier run under the same `key`."""
        found = self._cached(f"{key}.oracle", lambda: {name: np.asarray(v) for name, v in vars(make()).items()})
        return Oracle(**{name: str(v) if v.dtype.kind == "U" else v for name, v in found.items()})

    def _cached(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.cache / f"{key}.npz"
        if not path.exists():
            if self.cached:
                raise MissingDataError(f"it ends where the cache does, before {key}")
            made = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when it is whole, so that an interrupted run leaves nothing half-written behind.
            unfinished = path.with_name(f".{path.name}.{os.getpid()}.npz")
            np.savez(unfinished, **made)
            unfinished.replace(path)
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}


Family = Callable[[Setting], Iterator[Case]]


def over_ranges(whole: Case, ranges: tuple[Range, ...]) -> Iterator[Case]:
    """`whole` cut to each range; of its name, and of its response and oracle, only what lies in the range."""
    for cut in ranges:
        yield replace(
            whole,
            name=f"{whole.name}/{cut.tag}",
            range=cut.tag,
            upsampled=cut.upsampled,
            response=at_scales(whole.response, _inside(whole.response.scales, cut)),
            oracle=cut_oracle(whole.oracle, _inside(whole.oracle.scales, cut)),
        )


def joined(responses: list[ScaleResponse]) -> ScaleResponse:
    """One response with the places of all, in order: one slide out of several images."""
    return reduce(partial(merge_responses, along="places"), responses)


# --- the split -----------------------------------------------------------------------------------------------------------


def half_of(family: str, *, network: str, slide: str, file: Path = SPLIT_FILE) -> Half | None:
    """The half that a case belongs to: that of its network and its slide, where they agree.

    None where they do not: such a case would carry what was learned on one half into the other, and is left out. A network
    that is its family's only one stands in both halves, and its slides decide. KeyError for what the file does not list: a
    case is assigned before anything is measured on it.
    """
    listed = json.loads(file.read_text())["families"][family]

    def halves(kind: str, name: str) -> set[str]:
        found = {half for half in ("develop", "report") if name in listed[kind][half]}
        if not found:
            raise KeyError(f"{file.name} does not list {kind[:-1]} {name!r} of {family}")
        return found

    both = halves("networks", network) & halves("slides", slide)
    for half in ("develop", "report"):
        if both == {half}:
            return half
    return None


def drawn(what: str, names: Iterable[str]) -> dict[Half, list[str]]:
    """The rule of the split: names in the order of a seeded hash, the first half of them, rounded down, to develop on.

    `what` is "FAMILY networks" or the like; families on the same slides draw them once. A single name is in both halves.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{SPLIT_SEED} {what} {name}".encode()).hexdigest())
    half = len(ordered) // 2
    return {"develop": sorted(ordered[:half] or ordered), "report": sorted(ordered[half:])}


def write_split(families: Mapping[str, Mapping[str, Mapping[Half, list[str]]]], *, file: Path = SPLIT_FILE) -> None:
    """Adds {family: {"networks": halves, "slides": halves}} to the file. A family that it has already stays as it is."""
    rule = f"drawn() in cases.py: {SPLIT_SEED} seeds a hash, in whose order the first half of the names is to develop on"
    split = json.loads(file.read_text()) if file.exists() else {"rule": rule, "families": {}}
    split["families"] = {**families, **split["families"]}
    file.write_text(json.dumps(split, indent=1) + "\n")


# --- small things --------------------------------------------------------------------------------------------------------


def _inside(scales: NDArray[np.float64], cut: Range) -> NDArray[np.intp]:
    octaves = np.log2(scales)
    return np.flatnonzero((octaves >= np.log2(cut.lo) - _SLACK) & (octaves <= np.log2(cut.hi) + _SLACK))


def cut_oracle(oracle: Oracle, index: NDArray[np.intp]) -> Oracle:
    """The same at some of its scales."""
    return replace(oracle, **{name: value[index] for name, value in vars(oracle).items() if isinstance(value, np.ndarray)})


_PLAIN = ("features", "head_weight", "head_bias")


def _pack_response(response: ScaleResponse) -> dict[str, Any]:
    """Flat, for one .npz; a view's arrays under "view:NAME|"."""
    packed: dict[str, Any] = {"scales": response.scales}
    if response.slide_mpp is not None:
        packed["slide_mpp"] = np.float64(response.slide_mpp)
    packed |= {name: getattr(response, name) for name in _PLAIN if getattr(response, name) is not None}
    if response.outputs is not None:
        packed |= {f"output|{name}": value for name, value in vars(response.outputs).items()}
    packed["layers"] = np.array(list(response.layers), dtype=np.str_)
    packed["stages"] = np.array(response.stages, dtype=np.str_)
    for name, moments in response.layers.items():
        packed |= {f"layer|{name}|mean": moments.mean, f"layer|{name}|square": moments.square}
    for name, norm in response.batchnorm.items():
        packed |= {f"batchnorm|{name}|{key}": np.asarray(value) for key, value in vars(norm).items()}
    for name, value in response.agreement.items():
        packed[f"agreement|{name}"] = value
    for name, view in response.views.items():
        inner = _pack_response(view)
        # The same numbers again: the network's, not the view's.
        kept = {k: v for k, v in inner.items() if k not in ("head_weight", "head_bias") and not k.startswith("batchnorm|")}
        packed |= {f"view:{name}|{key}": value for key, value in kept.items()}
    return packed


def _unpack_response(packed: Mapping[str, Any]) -> ScaleResponse:
    def under(prefix: str) -> dict[str, Any]:
        return {key.removeprefix(prefix): value for key, value in packed.items() if key.startswith(prefix)}

    outputs = under("output|")
    norms: dict[str, dict[str, Any]] = {}
    for key, value in under("batchnorm|").items():
        name, _, part = key.rpartition("|")
        norms.setdefault(name, {})[part] = float(value) if part == "eps" else value
    found = ScaleResponse(
        scales=packed["scales"],
        slide_mpp=float(packed["slide_mpp"]) if "slide_mpp" in packed else None,
        outputs=Outputs(**outputs) if outputs else None,
        features=packed.get("features"),
        layers={n: LayerMoments(packed[f"layer|{n}|mean"], packed[f"layer|{n}|square"]) for n in map(str, packed["layers"])},
        stages=tuple(str(name) for name in packed["stages"]),
        batchnorm={name: BatchNormStatistics(**parts) for name, parts in norms.items()},
        head_weight=packed.get("head_weight"),
        head_bias=packed.get("head_bias"),
        agreement=under("agreement|"),
    )
    views: dict[str, dict[str, Any]] = {}
    for key, value in packed.items():
        if key.startswith("view:"):
            name, _, part = key.removeprefix("view:").partition("|")
            views.setdefault(name, {})[part] = value
    network = {"batchnorm": found.batchnorm, "head_weight": found.head_weight, "head_bias": found.head_bias}
    return replace(found, views={name: replace(_unpack_response(parts), **network) for name, parts in views.items()})
