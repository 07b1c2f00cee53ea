"""Responses put together from parts, and taken apart. Pure numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import OptionError
from wsiscale.types import LayerMoments, Outputs, ScaleResponse


@dataclass(frozen=True)
class SavedResponse:
    """What a search asked of a network, and enough to know it again."""

    response: ScaleResponse
    centers: NDArray[np.float64]  # (P, 2) level-0 (y, x) of the places it could look at; the response is of the first of them
    guard: ScaleResponse | None = None  # fewer places and scales, with a view of tiles without structure
    about: dict[str, Any] = field(default_factory=dict)  # plain: which slide, network and options


def merge_responses(first: ScaleResponse, second: ScaleResponse, *, along: Literal["places", "scales"]) -> ScaleResponse:
    """One response of two parts that one network gave: more places at the same scales, or more scales at the same places.

    Scales come out ascending. Raises OptionError where the parts do not fit together.
    """
    if along == "places":
        if not np.array_equal(first.scales, second.scales):
            raise OptionError("responses of different scales cannot be joined along places; take the same scales of both")
        return _joined([first, second], first.scales, np.concatenate)
    if first.places != second.places:
        raise OptionError(f"responses of {first.places} and {second.places} places cannot be joined along scales")
    scales = np.concatenate([first.scales, second.scales])
    order = np.argsort(scales)
    if np.any(np.diff(scales[order]) == 0):
        raise OptionError("both responses hold the same scale; join along places, or leave it out of one")
    return _joined([first, second], scales[order], lambda arrays: np.concatenate(arrays, axis=1)[:, order])


def at_scales(response: ScaleResponse, index: NDArray[np.intp]) -> ScaleResponse:
    """The same response at some of its scales, `index` ascending."""
    return _joined([response], response.scales[index], lambda arrays: arrays[0][:, index])


def without_view(response: ScaleResponse, name: str) -> ScaleResponse:
    """The same response without one of its views."""
    views = {view: answer for view, answer in response.views.items() if view != name}
    return replace(response, views=views, agreement={view: a for view, a in response.agreement.items() if view != name})


_Join = Callable[[list[NDArray[np.float32]]], NDArray[np.float32]]


def _joined(parts: Sequence[ScaleResponse], scales: NDArray[np.float64], join: _Join) -> ScaleResponse:
    """`join` on every array (N, S, ...) of the parts; what belongs to the network is taken from the first of them."""
    first = parts[0]
    for part in parts[1:]:
        for name in ("layers", "views", "agreement"):
            if list(getattr(part, name)) != list(getattr(first, name)):
                raise OptionError(f"the responses hold different {name} and cannot be joined")
        if (part.outputs is None, part.features is None) != (first.outputs is None, first.features is None):
            raise OptionError("the responses hold different outputs or features and cannot be joined")
    outputs = None
    if first.outputs is not None:
        names = list(vars(first.outputs))
        outputs = Outputs(**{name: join([vars(part.outputs)[name] for part in parts]) for name in names})
    layers = {
        name: LayerMoments(join([p.layers[name].mean for p in parts]), join([p.layers[name].square for p in parts]))
        for name in first.layers
    }
    return replace(
        first,
        scales=scales,
        outputs=outputs,
        features=None if first.features is None else join([p.features for p in parts if p.features is not None]),
        layers=layers,
        views={name: _joined([p.views[name] for p in parts], scales, join) for name in first.views},
        agreement={name: join([p.agreement[name] for p in parts]) for name in first.agreement},
    )
