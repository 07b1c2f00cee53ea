"""The values that stages hand on: frozen, columnar, numpy.

Units and frames, everywhere in the package: µm per pixel (`mpp`), (y, x) order, "level-0 pixels" for positions.
A *scale* is relative: level-0 pixels per pixel of the view, so that mpp = scale * the slide's level-0 mpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import dask.array as da

    from wsiscale.geometry import ReadPlan
    from wsiscale.profile import Registration
    from wsiscale.training_tiles import Reference

MppSource = Literal["metadata", "override", "estimated", "none"]


@dataclass(frozen=True)
class ScaleTags:
    """What a slide file says about its scale, not yet judged."""

    mpp_x: float | None = None  # µm per level-0 px
    mpp_y: float | None = None
    tag: str | None = None  # where the file says so: "openslide.mpp-x", "tiff.XResolution", "ome.PhysicalSizeX", ...
    objective_power: float | None = None
    resolution_dpi: float | None = None  # the TIFF resolution tag in dots per inch, where that is all there is


@dataclass(frozen=True)
class Calibration:
    """The µm/px of level 0 that the rest works with, where it came from, and whether to believe it."""

    mpp: float | None  # None: missing or refused
    source: MppSource
    claimed: float | None = None  # what the metadata says, believed or not
    tag: str | None = None
    verdict: Literal["trusted", "suspicious", "refused", "missing"] = "missing"
    reasons: tuple[str, ...] = ()  # machine-readable: "out_of_range", "dpi_default", "anisotropic", "power_conflict", ...
    detail: str = ""  # one sentence for people


@dataclass(frozen=True)
class Pyramid:
    """The geometry of a slide's levels, finest first."""

    shapes: tuple[tuple[int, int], ...]  # (height, width) of each level in its own pixels
    downsamples: tuple[float, ...]  # level-0 pixels per pixel of the level; the first is 1.0
    mpp: float | None = None  # µm/px of level 0, None where unknown
    bounds: tuple[int, int, int, int] | None = None  # (y, x, height, width) in level-0 px outside of which is no scan

    @property
    def shape(self) -> tuple[int, int]:
        return self.shapes[0]

    @property
    def scanned(self) -> tuple[int, int, int, int]:
        """(y, x, height, width) of what the scanner covered, in level-0 pixels."""
        return self.bounds if self.bounds is not None else (0, 0, *self.shape)


@dataclass(frozen=True)
class SlideSource:
    """Which file the pixels come from. Nothing here can hold patient data."""

    name: str  # file name without folders
    path: str | None  # None for a slide in memory
    size: int | None  # bytes
    mtime_ns: int | None
    vendor: str
    reader: str  # "openslide", "tiffslide", "array", "dicom"


class Reader(Protocol):
    """A slide that behaves like one (H, W, 3) uint8 RGB array per level.

    Outside its bounds every level is white, whatever the file says there. Readers pickle as path and options, so that
    dask workers can have them; the native handle is opened lazily, once per process. `testing.ReaderContract` holds a
    reader to this.
    """

    @property
    def pyramid(self) -> Pyramid: ...

    @property
    def calibration(self) -> Calibration: ...

    @property
    def source(self) -> SlideSource: ...

    def read(self, *, level: int, y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
        """Pixels of `level`, counted in that level's own pixels: (height, width, 3). Raises SlideError."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *args: object) -> None: ...


@dataclass(frozen=True)
class Tissue:
    """Where the tissue is, on a coarse grid over the whole level-0 canvas."""

    mask: NDArray[np.bool_]  # (h, w)
    step: float  # level-0 px per mask px, the same in y and x
    shape: tuple[int, int]  # (height, width) of level 0
    mpp: float | None  # of level 0

    @property
    def fraction(self) -> float:
        return float(self.mask.mean())

    @property
    def area_mm2(self) -> float | None:
        return None if self.mpp is None else float(self.mask.sum()) * (self.step * self.mpp / 1000) ** 2


@dataclass(frozen=True)
class TileGrid:
    """Square tiles at one magnification, in reading order."""

    origins: NDArray[np.int64]  # (T, 2) level-0 (y, x) of each tile's top left corner
    tissue: NDArray[np.float32]  # (T,) share of tissue in each tile, 0..1
    scale: float  # level-0 px per tile px
    size: int  # px at that scale
    overlap: int  # px at that scale
    mpp: float | None  # µm/px of the tiles, None where the slide's is unknown

    def __len__(self) -> int:
        return len(self.origins)


@dataclass(frozen=True)
class Window:
    """The part of one level that holds all views of a place."""

    pixels: NDArray[np.uint8]  # (H, W, 3)
    plans: tuple[ReadPlan, ...]  # (S,) of the views, finest first
    y: int  # of the window, in the level's own pixels
    x: int


@dataclass(frozen=True)
class Windows:
    """What the tiles of a stack are made from."""

    images: str  # name of the dask array that is made of them, as they are
    read: Callable[[int], Window | None]  # place -> its window; None where that is too large to hold


@dataclass(frozen=True)
class ScaleStack:
    """Tiles nested on one centre at every scale, equal in pixel size, all from one source level."""

    images: da.Array  # (N, S, H, W, 3) uint8, lazy; one block a place
    scales: NDArray[np.float64]  # (S,) ascending, level-0 px per px
    centers: NDArray[np.float64]  # (N, 2) level-0 (y, x)
    slide_mpp: float | None  # µm/px of level 0
    source_level: int
    upsampled: NDArray[np.bool_]  # (S,) finer than level 0
    windows: Windows | None = None

    @property
    def mpp(self) -> NDArray[np.float64] | None:
        """(S,) µm/px of each scale, None where the slide's is unknown."""
        return None if self.slide_mpp is None else self.scales * self.slide_mpp

    def window(self, place: int) -> Window | None:
        """The pixels that a place's tiles come from; None where they are not known, or somebody has changed the images."""
        return self.windows.read(place) if self.windows is not None and self.windows.images == self.images.name else None


@dataclass(frozen=True)
class LayerMoments:
    """What one layer answers, pooled over the positions of each tile."""

    mean: NDArray[np.float32]  # (N, S, K)
    square: NDArray[np.float32]  # (N, S, K) mean of the squares

    def take(self, places: NDArray[np.intp]) -> LayerMoments:
        return LayerMoments(self.mean[places], self.square[places])


@dataclass(frozen=True)
class BatchNormStatistics:
    """The stored fingerprint of one BatchNorm layer: what its input looked like in training."""

    mean: NDArray[np.float32]  # (K,)
    var: NDArray[np.float32]  # (K,)
    weight: NDArray[np.float32]  # (K,) gamma
    bias: NDArray[np.float32]  # (K,) beta
    eps: float


@dataclass(frozen=True)
class Outputs:
    """A network's answer for each tile; a segmenter's is averaged over its pixels, never kept as a map."""

    logits: NDArray[np.float32]  # (N, S, C) mean over pixels
    probabilities: NDArray[np.float32]  # (N, S, C) mean softmax; a single logit C=1 becomes two classes
    confidence: NDArray[np.float32]  # (N, S) mean over pixels of the largest probability
    margin: NDArray[np.float32]  # (N, S) mean over pixels of the largest logit minus the runner-up
    entropy: NDArray[np.float32]  # (N, S) mean over pixels, in nats
    energy: NDArray[np.float32]  # (N, S) mean over pixels of logsumexp of the logits
    # (N, S) of the objects that are not of class 0: diameter in px of the median one, and their share of the tile. NaN for
    # classifiers and views, and where nothing was measured.
    object_px: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    object_share: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def __post_init__(self) -> None:
        for name in ("object_px", "object_share"):
            if getattr(self, name).shape != self.confidence.shape:
                object.__setattr__(self, name, np.full(self.confidence.shape, np.nan, np.float32))

    def take(self, places: NDArray[np.intp]) -> Outputs:
        return Outputs(**{name: value[places] for name, value in vars(self).items()})


@dataclass(frozen=True)
class ScaleResponse:
    """What a network answers to a scale stack, pooled: the narrow waist. Everything after it is plain numpy."""

    scales: NDArray[np.float64]  # (S,) ascending, level-0 px per px
    slide_mpp: float | None
    outputs: Outputs | None  # None for a pure feature extractor
    features: NDArray[np.float32] | None  # (N, S, F) pooled input of the head; None where no head was found
    layers: Mapping[str, LayerMoments] = field(default_factory=dict)  # in forward order
    stages: tuple[str, ...] = ()  # names among `layers`: the last convolution or activation of each stage
    batchnorm: Mapping[str, BatchNormStatistics] = field(default_factory=dict)  # names among `layers`
    head_weight: NDArray[np.float32] | None = None  # (C, F)
    head_bias: NDArray[np.float32] | None = None  # (C,)
    views: Mapping[str, ScaleResponse] = field(default_factory=dict)  # "rot90", "phase_scrambled": the same places
    agreement: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # view -> (N, S) in 0..1, plain against it
    reference: Reference | None = None  # the network's training tiles, where its card has them
    object_px: float | None = None  # diameter of the median object in them, where the card says so

    @property
    def places(self) -> int:
        """N"""
        if self.outputs is not None:
            return len(self.outputs.confidence)
        if self.features is not None:
            return len(self.features)
        return len(next(iter(self.layers.values())).mean)

    def take(self, places: NDArray[np.intp]) -> ScaleResponse:
        """The same response for some of the places, repeats allowed: what the bootstrap and the votes need."""
        return ScaleResponse(
            scales=self.scales,
            slide_mpp=self.slide_mpp,
            outputs=None if self.outputs is None else self.outputs.take(places),
            features=None if self.features is None else self.features[places],
            layers={name: moments.take(places) for name, moments in self.layers.items()},
            stages=self.stages,
            batchnorm=self.batchnorm,
            head_weight=self.head_weight,
            head_bias=self.head_bias,
            views={name: view.take(places) for name, view in self.views.items()},
            agreement={name: value[places] for name, value in self.agreement.items()},
            reference=self.reference,
            object_px=self.object_px,
        )


@dataclass(frozen=True)
class Abstention:
    """Why there is no estimate."""

    reason: str  # flat_curve, boundary_optimum, bimodal, too_few_places, no_tissue, non_finite, metadata_conflict, ...
    detail: str


@dataclass(frozen=True)
class ScaleCurve:
    """The criterion's score over scale, with a 90 % bootstrap band over places."""

    scales: NDArray[np.float64]  # (S,) level-0 px per px
    score: NDArray[np.float64]  # (S,)
    lo: NDArray[np.float64]  # (S,)
    hi: NDArray[np.float64]  # (S,)


@dataclass(frozen=True)
class ScaleEstimate:
    """At which scale a network works best on a slide, or a named reason why that cannot be said."""

    scale: float | None  # level-0 px per px; None where it abstains
    ci90: tuple[float, float] | None  # of `scale`
    slide_mpp: float | None
    abstained: Abstention | None
    criterion: str
    curve: ScaleCurve | None
    votes: NDArray[np.float64]  # (N,) each place's own best scale
    places: int
    seed: int
    notes: tuple[str, ...] = ()  # what a reader of the number should know: clipped range, suspicious tag, ...
    slide: str | None = None
    mpp_source: MppSource = "none"  # of `slide_mpp`
    model: str | None = None
    layers: tuple[str, ...] = ()  # watched for the criterion
    forwards: int = 0  # tiles that went through the network, views included
    seconds: float = 0.0
    own_share: float = 1.0  # 0..1, weight of the slide's own curve in `scale`; the rest is the network's profile's
    registration: Registration | None = None  # of the slide to the network's profile, where it was asked for

    @property
    def mpp(self) -> float | None:
        """µm/px; None where it abstains or the slide's µm/px is unknown."""
        return None if self.scale is None or self.slide_mpp is None else self.scale * self.slide_mpp

    @property
    def magnification(self) -> float | None:
        """10 / mpp, the field's rule of thumb; never snapped."""
        return None if self.mpp is None else 10 / self.mpp
