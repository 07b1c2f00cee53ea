"""wsiscale finds, slide by slide and without labels, the magnification at which a network works best.

The names below are the public ones. They are imported when first used, so that `import wsiscale` stays quick and needs
neither torch nor openslide.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsiscale.analyzer import respond as respond
    from wsiscale.criteria import CRITERIA as CRITERIA
    from wsiscale.criteria import Criterion as Criterion
    from wsiscale.cutting import cut_network as cut_network
    from wsiscale.datasets import StoreDataset as StoreDataset
    from wsiscale.errors import WsiscaleError as WsiscaleError
    from wsiscale.estimation import estimate as estimate
    from wsiscale.export import export_store as export_store
    from wsiscale.judging import estimate_response as estimate_response
    from wsiscale.labels import write_labels as write_labels
    from wsiscale.networks import Network as Network
    from wsiscale.networks import load_network as load_network
    from wsiscale.places import sample_places as sample_places
    from wsiscale.places import tile_grid as tile_grid
    from wsiscale.probe import Probe as Probe
    from wsiscale.probe import probe_slides as probe_slides
    from wsiscale.profile import Profile as Profile
    from wsiscale.readers import ArrayReader as ArrayReader
    from wsiscale.readers import open_slide as open_slide
    from wsiscale.reference_slides import profile_slides as profile_slides
    from wsiscale.slide_mpp import SlideMpp as SlideMpp
    from wsiscale.slide_mpp import find_mpp as find_mpp
    from wsiscale.stacks import scale_stack as scale_stack
    from wsiscale.store import open_store as open_store
    from wsiscale.store import verify_store as verify_store
    from wsiscale.store import write_stack as write_stack
    from wsiscale.store import write_store as write_store
    from wsiscale.tissue import find_tissue as find_tissue
    from wsiscale.types import Reader as Reader
    from wsiscale.types import ScaleEstimate as ScaleEstimate
    from wsiscale.types import ScaleResponse as ScaleResponse
    from wsiscale.types import ScaleStack as ScaleStack
    from wsiscale.views import read_tiles as read_tiles
    from wsiscale.views import read_view as read_view

_HOMES = {
    "analyzer": ("respond",),
    "criteria": ("CRITERIA", "Criterion"),
    "cutting": ("cut_network",),
    "datasets": ("StoreDataset",),
    "errors": ("WsiscaleError",),
    "estimation": ("estimate",),
    "export": ("export_store",),
    "judging": ("estimate_response",),
    "labels": ("write_labels",),
    "networks": ("Network", "load_network"),
    "places": ("sample_places", "tile_grid"),
    "probe": ("Probe", "probe_slides"),
    "profile": ("Profile",),
    "readers": ("ArrayReader", "open_slide"),
    "reference_slides": ("profile_slides",),
    "slide_mpp": ("SlideMpp", "find_mpp"),
    "stacks": ("scale_stack",),
    "store": ("open_store", "verify_store", "write_stack", "write_store"),
    "tissue": ("find_tissue",),
    "types": ("Reader", "ScaleEstimate", "ScaleResponse", "ScaleStack"),
    "views": ("read_tiles", "read_view"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wsiscale' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"wsiscale.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
