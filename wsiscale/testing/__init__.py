"""What tests of slides, networks and readers need: contracts, slides that say where they are, tissue with a planted optimum.

The names below are imported when first used, so that procedural tissue needs no test library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsiscale.testing.procedural import Stain as Stain
    from wsiscale.testing.procedural import planted_network as planted_network
    from wsiscale.testing.procedural import planted_slide as planted_slide
    from wsiscale.testing.procedural import random_stain as random_stain
    from wsiscale.testing.procedural import slide_image as slide_image
    from wsiscale.testing.procedural import tissue as tissue
    from wsiscale.testing.readers import ReaderContract as ReaderContract
    from wsiscale.testing.readers import where_am_i as where_am_i
    from wsiscale.testing.readers import whereabouts as whereabouts
    from wsiscale.testing.responses import noise_response as noise_response
    from wsiscale.testing.responses import planted_response as planted_response
    from wsiscale.testing.slides import write_svs as write_svs

_HOMES = {
    "procedural": ("Stain", "planted_network", "planted_slide", "random_stain", "slide_image", "tissue"),
    "readers": ("ReaderContract", "where_am_i", "whereabouts"),
    "responses": ("noise_response", "planted_response"),
    "slides": ("write_svs",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wsiscale.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"wsiscale.testing.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
