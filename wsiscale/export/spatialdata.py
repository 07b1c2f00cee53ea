"""A store as a SpatialData object, as scverse, sopa and LazySlide read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiscale.errors import StoreError
from wsiscale.store import Store

if TYPE_CHECKING:
    from spatialdata import SpatialData


def write_spatialdata(store: Store, path: Path) -> list[str]:
    to_spatialdata(store).write(path)
    return []


def to_spatialdata(store: Store) -> SpatialData:
    """The store's image, labels and tiles, lazily: images["image"], labels[NAME], shapes["tiles"], attrs["tile_spec"].

    All are in px of level 0 of the store, which "global" is too; "slide" are level-0 px of the slide. Tiles carry what those
    of LazySlide do: tile_id, tissue_id (all 0: pieces are not told apart), a specification. Needs the extra `spatialdata`.
    """
    try:
        import dask.array as da
        import geopandas
        import shapely
        import xarray
        from spatialdata import SpatialData
        from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
        from spatialdata.transformations import Identity, Scale, Sequence
    except ImportError as error:
        raise StoreError(
            "SpatialData needs the package spatialdata; install it with pip install 'wsiscale[spatialdata]'",
            code="MISSING_EXTRA",
        ) from error
    if not store.levels:
        raise StoreError(f"{store.path} has a tile table alone, no pixels; write it with --pixels tissue", code="NO_PIXELS")
    to_slide = Scale([store.scale, store.scale], axes=("y", "x"))

    def levels(arrays: Any, model: Any, axes: tuple[str, ...], **settings: Any) -> Any:
        tree = {}
        for k, array in enumerate(arrays):
            to_image = Identity() if k == 0 else Scale([2.0**k, 2.0**k], axes=("y", "x"))
            transformations = {"global": to_image, "slide": Sequence([to_image, to_slide]) if k else to_slide}
            pixels = da.from_array(array, chunks=array.chunks)
            middles = {axis: (np.arange(n) + 0.5) for axis, n in zip(axes[-2:], array.shape[-2:], strict=True)}
            lazy = xarray.DataArray(pixels, dims=axes, coords=settings | middles)
            tree[f"scale{k}"] = xarray.Dataset({"image": model.parse(lazy, transformations=transformations)})
        return xarray.DataTree.from_dict(tree)

    grid = store.grid()
    boxes = shapely.box(grid.cols, grid.rows, grid.cols + grid.size, grid.rows + grid.size)
    columns = {"tile_id": np.arange(len(grid)), "x": grid.cols, "y": grid.rows, "tissue_id": np.zeros(len(grid), int)}
    tiles = geopandas.GeoDataFrame({**columns, "tissue": grid.tissue, "failed": grid.failed, "geometry": boxes})
    stride = grid.size - grid.overlap
    return SpatialData(
        images={"image": levels(store.levels, Image2DModel, ("c", "y", "x"), c=["r", "g", "b"])},
        labels={name: levels(store.label(name), Labels2DModel, ("y", "x")) for name in store.labels},
        shapes={"tiles": ShapesModel.parse(tiles, transformations={"global": Identity(), "slide": to_slide})},
        attrs={
            "tile_spec": {
                "tiles": {
                    "height": grid.size,
                    "width": grid.size,
                    "stride_height": stride,
                    "stride_width": stride,
                    "mpp": store.mpp,
                    "ops_level": 0,
                    "ops_downsample": 1.0,
                    "base_level": 0,
                    "base_downsample": 1.0,
                    "tissue_name": None,
                }
            },
            "slide_properties": {"mpp": store.mpp},
            "wsiscale": {name: store.attributes[name] for name in ("slide", "slide_mpp", "mpp_source", "estimate", "versions")},
        },
    )
