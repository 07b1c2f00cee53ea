"""Tissue that nobody has to be asked for: procedural H&E in micrometres, and slides and networks with a planted optimum.

Nothing here is random but through a seed, and everything has its place in micrometres: the same seed rendered at 0.25 and at
1 µm/px is the same piece of tissue under two magnifications. The randomness is a hash of lattice positions, so that a larger
window shows the same tissue and more of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage, sparse, spatial, special

from wsiscale.readers.array import ArrayReader

if TYPE_CHECKING:
    from torch import nn

Floats = NDArray[np.float32]

# Coarser pixels than this are rendered finer and averaged, as a sensor with larger pixels would: nuclei keep their area.
FINE = 0.5  # µm/px

# Optical density of red, green, blue; Ruifrok & Johnston 2001 for the first two, the third a brick red between them.
HAEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)
# Where scanners and eosins of other laboratories lie: less magenta, more red; nuclei less blue.
_GREYER = (0.58, 0.72, 0.38)
_REDDER = (0.22, 0.82, 0.52)
RED_CELL = (0.12, 0.82, 0.56)
INKS = ((0.75, 0.30, 0.55), (0.80, 0.55, 0.12), (0.60, 0.60, 0.60))  # green, blue, black


@dataclass(frozen=True)
class Stain:
    """How a laboratory and its scanner turn tissue into colours."""

    haematoxylin: tuple[float, float, float] = (0.63, 0.71, 0.31)  # optical density of red, green, blue, any length
    eosin: tuple[float, float, float] = (0.13, 0.92, 0.28)
    strengths: tuple[float, float] = (1.0, 1.0)  # of haematoxylin and of eosin
    ink: tuple[float, float, float] = INKS[0]
    light: tuple[float, float, float] = (245.0, 244.0, 247.0)  # grey levels of empty glass
    blur: float = 0.2  # µm, standard deviation of the optics
    noise: float = 1.5  # grey levels, standard deviation at every pixel


def random_stain(seed: int) -> Stain:
    """Some other laboratory's colours: vectors turned, stain strengths, glass, focus and sensor noise varied."""
    rng = np.random.default_rng([seed, 7])
    share = rng.uniform(-0.1, 1.1, 2)
    ends = ((HAEMATOXYLIN, _GREYER), (EOSIN, _REDDER))
    vectors = [(1 - t) * np.array(a) + t * np.array(b) for t, (a, b) in zip(share, ends, strict=True)]
    turned = [tuple(float(v) for v in np.clip(vector + rng.normal(0, 0.03, 3), 0.02, 1)) for vector in vectors]
    light = np.clip(rng.normal(243, 5) + rng.normal(0, 2.5, 3), 215, 254)
    return Stain(
        haematoxylin=(turned[0][0], turned[0][1], turned[0][2]),
        eosin=(turned[1][0], turned[1][1], turned[1][2]),
        strengths=(float(np.exp(rng.normal(0, 0.25))), float(np.exp(rng.normal(0, 0.35)))),
        ink=INKS[seed % len(INKS)],
        light=(float(light[0]), float(light[1]), float(light[2])),
        blur=float(rng.uniform(0.1, 0.45)),
        noise=float(rng.uniform(0.5, 3.5)),
    )


def tissue(
    height: int, width: int, *, mpp: float, seed: int, stain: Stain | None = None, hard: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Tissue at `mpp`: RGB (height, width, 3), and which nucleus each pixel belongs to, 0 for none: (height, width).

    `hard` tissue may also hold what makes real slides so: tumours, dark or foamy cytoplasm, fat, keratin, torn collagen, folds
    and pen.
    """
    times = max(1, math.ceil(mpp / FINE - 1e-9))
    pigments = render(height * times, width * times, mpp=mpp / times, seed=seed, hard=hard)
    image = colour(pigments, stain or Stain(), mpp=mpp / times, times=times, seed=seed)
    return image, pigments.nuclei[times // 2 :: times, times // 2 :: times].copy()


def slide_image(
    height: int, width: int, mpp: float, seed: int, *, stain: Stain | None = None, hard: bool = False
) -> NDArray[np.uint8]:
    """A slide: two pieces of tissue with irregular outlines on glass, (height, width, 3). The outline scales with the slide."""
    times = max(1, math.ceil(mpp / FINE - 1e-9))
    fine, h, w = mpp / times, height * times, width * times
    there = _outline(h, w, mpp=fine, seed=seed)
    full = render(h, w, mpp=fine, seed=seed, hard=hard)
    pigments = replace(
        full,
        haematoxylin=full.haematoxylin * there,
        eosin=full.eosin * there,
        blood=full.blood * there,
        nuclei=full.nuclei * (there > 0.5),
    )
    return colour(pigments, stain or Stain(), mpp=fine, times=times, seed=seed)


# --- tissue ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pigments:
    """What light has to pass: amounts of each stain before any colour is chosen."""

    haematoxylin: Floats  # (H, W) optical density along its vector
    eosin: Floats  # (H, W)
    blood: Floats  # (H, W)
    nuclei: NDArray[np.int32]  # (H, W) which nucleus, 0 for none
    ink: Floats | None = None  # (H, W) of a pen on the cover slip


@dataclass(frozen=True)
class _Recipe:
    """What kind of tissue a seed makes."""

    glands: float  # share of the gland positions that hold one
    sheets: float  # noise level above which tissue is solid epithelium; large means none
    lymphocytes: float  # noise level above which lymphocytes crowd
    vessels: float  # noise level above which red cells lie
    clefts: float  # noise level above which stroma has torn open
    crowding: float  # share of the epithelial nucleus positions in use
    stromal: float  # share of the stromal ones
    border: float  # between cells: below 0 white gaps, above 0 eosin membranes
    clear: float  # 0 full cytoplasm .. 1 empty around the nuclei
    basophilia: float  # haematoxylin in the cytoplasm of epithelium
    fibrous: float  # contrast of the stroma's fibres
    granular: float  # contrast of the fine texture
    size: float  # of all nuclei, relative
    vesicular: float  # 0 dense chromatin .. 1 pale nuclei with a membrane
    # What only hard tissue has: 0 is none of it.
    atypia: float = 0.0  # larger, more varied, more irregular epithelial nuclei with coarse chromatin and several nucleoli
    foam: float = 0.0  # how empty the vacuoles of the cytoplasm are
    keratin: float = math.inf  # noise level above which the stroma is one dense mass
    torn: float = 0.0  # share of the stroma between its bundles that is missing
    fat: float = math.inf  # noise level above which fat cells replace all else
    fold: float = 0.0  # how much denser tissue is where it lies double
    ink: float = 0.0  # optical density of a pen's stroke


def _recipe(seed: int, *, hard: bool = False) -> _Recipe:
    recipe = _plain_recipe(seed)
    if not hard:
        return recipe
    rng = np.random.default_rng([seed, 13])
    has = rng.random(8) < (0.65, 0.25, 0.3, 0.5, 0.15, 0.2, 0.12, 0.4)
    return replace(
        recipe,
        atypia=has[0] * rng.uniform(0.2, 1.0),
        foam=has[1] * rng.uniform(0.4, 1.0),
        keratin=rng.uniform(0.4, 1.3) if has[2] else math.inf,
        torn=has[3] * rng.uniform(0.3, 1.0),
        fat=rng.uniform(0.0, 0.8) if has[4] else math.inf,
        fold=has[5] * rng.uniform(0.5, 1.2),
        ink=has[6] * rng.uniform(0.2, 1.0),
        basophilia=recipe.basophilia + has[7] * rng.uniform(0.05, 0.30),
        stromal=recipe.stromal * rng.uniform(0.6, 2.5),
    )


def _plain_recipe(seed: int) -> _Recipe:
    rng = np.random.default_rng([seed, 3])
    return _Recipe(
        glands=rng.uniform(0.3, 0.95),
        sheets=rng.uniform(0.2, 1.6),
        lymphocytes=rng.uniform(0.8, 2.2),
        vessels=rng.uniform(1.2, 2.0),
        clefts=rng.uniform(1.3, 2.2),
        crowding=rng.uniform(0.45, 0.95),
        stromal=rng.uniform(0.04, 0.18),
        border=rng.uniform(-0.8, 0.8),
        clear=max(0.0, rng.uniform(-0.8, 0.9)),
        basophilia=rng.uniform(0.03, 0.16) + max(0.0, rng.uniform(-0.4, 0.25)),
        fibrous=rng.uniform(0.07, 0.18),
        granular=rng.uniform(0.03, 0.08),
        size=float(0.92 * np.exp(np.clip(rng.normal(0, 0.10), -0.25, 0.25))),
        vesicular=rng.uniform(0.1, 0.9),
    )


# Every noise field of a tissue has its own layer, so that no two share their randomness.
(_SHEETS, _LYMPH, _VESSEL, _CLEFT, _WAVE, _WALL, _FLOW, _GRAIN, _CHROMATIN, _CLOUD, _GLAND, _NUCLEUS, _RED, _HARD) = (
    1000 * i for i in range(1, 15)
)


def render(height: int, width: int, *, mpp: float, seed: int, hard: bool = False) -> Pigments:
    """The stains in a window of tissue, (height, width), rendered at `mpp` as it is: alias-free up to 0.5 µm/px."""
    recipe = _recipe(seed, hard=hard)
    window = _Window(height, width, mpp, seed)
    nuclei = _nuclei(window, recipe)

    parts = [window.upsampled(field) for field in _compartments(seed, recipe, *window.coarse())]
    depth, lumen, sheet, lymph, vessel, cleft = parts  # (H, W) each
    epithelium = np.maximum(_step(depth, 2.0) * _step(lumen, 1.5), _step(sheet, 0.08) * (1 - _step(depth, 2.0)))
    hole = _step(depth, 2.0) * (1 - _step(lumen, 1.5))
    stroma = np.clip(1 - epithelium - hole, 0, 1)

    grain = 0.5 * window.noise(_GRAIN, 1.1) + 0.35 * window.noise(_GRAIN + 1, 2.6) + 0.35 * window.noise(_GRAIN + 2, 7.0)
    cloud = window.noise(_CLOUD, 40.0)
    # Level lines of a smooth field run in parallel and bend together, as collagen does.
    flow = 8.0 * window.noise(_FLOW, 70.0) + 1.3 * window.noise(_FLOW + 1, 11.0)
    fibre = 0.6 * np.sin(2.2 * flow) + 0.4 * np.sin(5.1 * flow + 1.5 * window.noise(_FLOW + 2, 5.0))
    torn = _step(cleft + 0.35 * fibre, 0.25)

    apical = np.exp(-((lumen / 1.6) ** 2)) * _step(depth, 2.0)
    eosin = stroma * (0.34 + recipe.fibrous * fibre + recipe.granular * grain + 0.05 * cloud) * (1 - 0.93 * torn)
    cytoplasm, membrane = _cells(window, nuclei, recipe)
    body = (0.27 + recipe.granular * grain + 0.03 * cloud) * cytoplasm + 0.22 * membrane
    eosin += epithelium * body + hole * (0.02 + 0.012 * cloud) + 0.12 * apical
    # Looser, watery matrix among crowded lymphocytes; cytoplasm of epithelium takes up some of the nuclear stain.
    eosin *= 1 - 0.35 * stroma * _step(lymph, 0.2)
    haematoxylin = epithelium * cytoplasm * recipe.basophilia * (1 + 0.3 * grain + 0.15 * cloud)
    haematoxylin += stroma * (0.03 + 0.01 * grain) * (1 - torn)
    blood = np.zeros((height, width), np.float32)
    if hard:
        eosin, haematoxylin = _degraded(eosin, haematoxylin, stroma, epithelium, fibre, window, recipe)
    del depth, lumen, sheet, lymph, vessel, cleft, parts

    _paint_red_cells(blood, window, recipe)
    labels = _paint_nuclei(haematoxylin, eosin, blood, window, nuclei)
    pigments = Pigments(np.maximum(haematoxylin, 0), np.maximum(eosin, 0), blood, labels)
    return _covered(pigments, window, recipe) if hard else pigments


def _degraded(
    eosin: Floats,
    haematoxylin: Floats,
    stroma: Floats,
    epithelium: Floats,
    fibre: NDArray[np.floating],
    window: _Window,
    recipe: _Recipe,
) -> tuple[Floats, Floats]:
    """Eosin and haematoxylin between the nuclei of hard tissue: keratin, torn collagen, foam, fat."""
    if recipe.keratin < math.inf:
        mass = stroma * _step(window.noise(_HARD, 80.0) - recipe.keratin, 0.1)
        streaks = 1 + 0.15 * window.noise(_HARD + 1, 3.0) + 0.2 * fibre
        eosin = eosin * (1 - mass) + 0.75 * mass * streaks
        haematoxylin = haematoxylin + 0.1 * mass
    if recipe.torn:
        # Gaps run along the fibres, where these are thinnest.
        loose = window.noise(_HARD + 2, 45.0) + 0.5 * window.noise(_HARD + 3, 12.0)
        gap = stroma * _step(recipe.torn * (1 + loose) - 1 - 0.8 * fibre, 0.3)
        eosin, haematoxylin = eosin * (1 - 0.95 * gap), haematoxylin * (1 - gap)
    if recipe.foam:
        bubble = _step(window.noise(_HARD + 4, 2.6) + 0.5 * window.noise(_HARD + 5, 1.5) - 0.1, 0.8)
        hollow = 1 - recipe.foam * epithelium * bubble
        eosin, haematoxylin = eosin * hollow, haematoxylin * hollow
    if recipe.fat < math.inf:
        inside, wall = _fat(window, recipe)
        eosin = eosin * (1 - inside) + inside * 0.35 * wall
        haematoxylin = haematoxylin * (1 - inside)
    return eosin, haematoxylin


def _fat(window: _Window, recipe: _Recipe) -> tuple[Floats, Floats]:
    """Where fat cells are, and their walls, both (H, W)."""
    y, x = window.coarse()
    inside = window.upsampled(_step(_fat_field(window.seed, y, x) - recipe.fat, 0.06).astype(np.float64))
    lattice = window.coarse(_CELL_STEP)
    spacing = 62.0  # µm
    rows, columns = (np.arange(-2, math.ceil(e / spacing) + 3) for e in window.extent)
    iy, ix = (i.ravel() for i in np.meshgrid(rows, columns, indexing="ij"))
    jitter = [_uniform(window.seed, _HARD + 20 + k, iy, ix) for k in range(2)]
    cells = np.stack([(iy + 0.8 * jitter[0]) * spacing, (ix + 0.8 * jitter[1]) * spacing], axis=1)
    points = np.stack([lattice[0].ravel(), lattice[1].ravel()], axis=1)
    near, second = np.asarray(spatial.cKDTree(cells).query(points, k=2)[0]).T.reshape(2, *lattice[0].shape)
    border = window.upsampled((second - near) / 2, _CELL_STEP)
    return inside, np.asarray(np.exp(-((border / 1.2) ** 2)), np.float32)


def _fat_field(seed: int, y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    return _noise_at(seed, _HARD + 6, 150.0, y, x)


def _covered(pigments: Pigments, window: _Window, recipe: _Recipe) -> Pigments:
    """Tissue that lies double in folds, and a pen's strokes over it."""
    if recipe.fold:
        ridge = np.exp(-((window.noise(_HARD + 7, 160.0) / 0.12) ** 2))  # bands along the level 0 of a slow field
        denser = 1 + recipe.fold * ridge
        pigments = replace(pigments, haematoxylin=pigments.haematoxylin * denser, eosin=pigments.eosin * denser)
    if recipe.ink:
        stroke = _step(0.5 - np.abs(window.noise(_HARD + 8, 300.0) - 0.6), 0.08) * (0.8 + 0.2 * window.noise(_HARD + 9, 5.0))
        pigments = replace(pigments, ink=np.asarray(recipe.ink * np.maximum(stroke, 0), np.float32))
    return pigments


def colour(pigments: Pigments, stain: Stain, *, mpp: float, times: int = 1, seed: int = 0) -> NDArray[np.uint8]:
    """Light through the stains (Beer-Lambert), blurred, averaged over `times` x `times` pixels, with sensor noise: RGB."""
    vectors = [np.array(v) / np.linalg.norm(v) for v in (stain.haematoxylin, stain.eosin, RED_CELL, stain.ink)]
    amounts = [pigments.haematoxylin * stain.strengths[0], pigments.eosin * stain.strengths[1], pigments.blood]
    if pigments.ink is not None:
        amounts.append(pigments.ink)
    height, width = (n // times for n in pigments.eosin.shape)
    rng = np.random.default_rng([seed, 11])
    image = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        density = sum(float(v[channel]) * a for v, a in zip(vectors, amounts, strict=False))
        light = stain.light[channel] * np.exp(-math.log(10) * np.asarray(density, np.float32))
        if stain.blur / mpp > 0.2:
            light = ndimage.gaussian_filter(light, stain.blur / mpp, truncate=3)
        light = light.reshape(height, times, width, times).mean(axis=(1, 3))
        light += stain.noise * rng.standard_normal(light.shape, np.float32)
        image[..., channel] = np.clip(light + 0.5, 0, 255)
    return image


@dataclass(frozen=True)
class _Window:
    """A rectangle from the origin of the tissue's endless plane, at one µm/px."""

    height: int
    width: int
    mpp: float
    seed: int

    @property
    def extent(self) -> tuple[float, float]:
        return self.height * self.mpp, self.width * self.mpp

    def noise(self, layer: int, spacing: float) -> Floats:
        """Smooth noise of unit variance with features of about `spacing` µm: (H, W)."""
        y = (np.arange(self.height) + 0.5) * self.mpp / spacing
        x = (np.arange(self.width) + 0.5) * self.mpp / spacing
        rows, first_y, count_y = _spline(y)
        columns, first_x, count_x = _spline(x)
        iy, ix = np.meshgrid(first_y + np.arange(count_y), first_x + np.arange(count_x), indexing="ij")
        lattice = _white(self.seed, layer, iy, ix)
        return np.asarray((columns @ (rows @ lattice).T).T / _SPLINE_SD, np.float32)

    def coarse(self, step: float = 2.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """µm (y, x) of a lattice of `step` µm that covers the window: where slow fields are evaluated."""
        axes = [np.arange(math.floor(e / step) + 2) * step for e in self.extent]
        y, x = np.meshgrid(axes[0], axes[1], indexing="ij")
        return y, x

    def upsampled(self, field: NDArray[np.float64], step: float = 2.0) -> Floats:
        """A field on the lattice of `coarse`, interpolated to the pixels."""
        rows = _linear((np.arange(self.height) + 0.5) * self.mpp / step, field.shape[0])
        columns = _linear((np.arange(self.width) + 0.5) * self.mpp / step, field.shape[1])
        return np.asarray((columns @ (rows @ field.astype(np.float32)).T).T, np.float32)


def _compartments(
    seed: int, recipe: _Recipe, y: NDArray[np.float64], x: NDArray[np.float64]
) -> tuple[NDArray[np.float64], ...]:
    """At points in µm: depth in a gland and distance from its lumen, in µm; how far above its level each field is."""
    depth, lumen = _glands(seed, recipe, y, x)
    fields = (
        _noise_at(seed, _SHEETS, 130.0, y, x) - recipe.sheets,
        _noise_at(seed, _LYMPH, 60.0, y, x) + 0.4 * _noise_at(seed, _LYMPH + 1, 18.0, y, x) - recipe.lymphocytes,
        _noise_at(seed, _VESSEL, 35.0, y, x) - recipe.vessels,
        _noise_at(seed, _CLEFT, 28.0, y, x) - recipe.clefts,
    )
    return depth, lumen, *fields


def _glands(
    seed: int, recipe: _Recipe, y: NDArray[np.float64], x: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Depth below the outer wall of the nearest gland, and distance outwards from its lumen, both in µm."""
    spacing = 105.0
    rows = np.arange(math.floor(y.min() / spacing) - 1, math.floor(y.max() / spacing) + 3)
    columns = np.arange(math.floor(x.min() / spacing) - 1, math.floor(x.max() / spacing) + 3)
    iy, ix = (i.ravel() for i in np.meshgrid(rows, columns, indexing="ij"))
    draw = [_uniform(seed, _GLAND + k, iy, ix) for k in range(7)]
    used = draw[0] < recipe.glands
    centre_y = ((iy + 0.5 + 0.55 * (draw[1] - 0.5)) * spacing)[used]
    centre_x = ((ix + 0.5 + 0.55 * (draw[2] - 0.5)) * spacing)[used]
    radius = (26 + 30 * draw[3])[used]
    stretch = np.exp(0.7 * (draw[4] - 0.5))[used]
    angle = (math.pi * draw[5])[used]
    hollow = (0.15 + 0.45 * draw[6])[used]

    wall = 0.10 * _noise_at(seed, _WALL, 30.0, y, x) + 0.05 * _noise_at(seed, _WALL + 1, 11.0, y, x)
    best = np.full(y.shape, 9.0)
    depth, lumen = np.full(y.shape, -200.0), np.full(y.shape, 200.0)
    for cy, cx, r, s, a, h in zip(centre_y, centre_x, radius, stretch, angle, hollow, strict=True):
        # In slices: a gland reaches less than 2 radii, and most points are far from it.
        near = (np.abs(y - cy) < 2 * r) & (np.abs(x - cx) < 2 * r)
        dy, dx = y[near] - cy, x[near] - cx
        along, across = dy * math.sin(a) + dx * math.cos(a), dy * math.cos(a) - dx * math.sin(a)
        rho = np.hypot(along / (r * s), across * s / r) + wall[near]
        nearer = rho < best[near]
        index = np.flatnonzero(near.ravel())[nearer]
        best.ravel()[index] = rho[nearer]
        depth.ravel()[index] = (1 - rho[nearer]) * r
        lumen.ravel()[index] = (rho[nearer] - h) * r
    return depth, lumen


@dataclass(frozen=True)
class _Nuclei:
    """Columns, one row a nucleus."""

    y: NDArray[np.float64]  # µm
    x: NDArray[np.float64]
    long: NDArray[np.float64]  # half axes, µm
    short: NDArray[np.float64]
    angle: NDArray[np.float64]
    density: NDArray[np.float64]  # of haematoxylin
    membrane: NDArray[np.float64]  # extra density at the rim
    clumping: NDArray[np.float64]  # of chromatin
    nucleolus: NDArray[np.float64]  # its density, 0 for none
    nucleoli: NDArray[np.int64]  # how many
    ragged: NDArray[np.float64]  # irregularity of the outline, relative
    coarse: NDArray[np.float64]  # 0 fine chromatin .. 1 coarse
    shape: NDArray[np.float64]  # (N, 2) phases of the outline's irregularity
    number: NDArray[np.int64]


def _nuclei(window: _Window, recipe: _Recipe) -> _Nuclei:
    """Every nucleus that reaches into the window: a jittered lattice, thinned by compartment and by elbow room."""
    spacing, reach = 4.6, 60.0  # µm
    seed = window.seed
    rows, columns = (np.arange(math.floor(-reach / spacing), math.ceil((e + reach) / spacing)) for e in window.extent)
    iy, ix = (i.ravel() for i in np.meshgrid(rows, columns, indexing="ij"))
    u = [_uniform(seed, _NUCLEUS + k, iy, ix) for k in range(12)]
    y, x = (iy + u[0]) * spacing, (ix + u[1]) * spacing

    depth, lumen, sheet, lymph, _, cleft = _compartments(seed, recipe, y, x)
    in_gland = (depth > 3.5) & (lumen > 5.0)
    in_sheet = (depth < -1) & (sheet > 0)
    in_stroma = (depth < -3) & (sheet < -0.03) & (cleft < 0)
    if recipe.keratin < math.inf:
        in_stroma &= _noise_at(seed, _HARD, 80.0, y, x) < recipe.keratin
    if recipe.fat < math.inf:
        lean = _fat_field(seed, y, x) < recipe.fat
        in_gland, in_sheet, in_stroma = in_gland & lean, in_sheet & lean, in_stroma & lean
    crowd = (lymph > 0) & (in_stroma | in_sheet) & (u[2] < 0.9)
    epithelial = (in_gland | in_sheet) & ~crowd
    used = crowd | (epithelial & (u[3] < recipe.crowding)) | (in_stroma & ~crowd & (u[3] < recipe.stromal))

    keep = np.flatnonzero(used)
    crowd, epithelial, u = crowd[keep], epithelial[keep], [v[keep] for v in u]
    y, x, sheet, depth = y[keep], x[keep], sheet[keep], depth[keep]
    normal = special.ndtri(np.clip(u[4], 1e-9, 1 - 1e-9))
    kind = np.where(crowd, 0, np.where(epithelial, np.where(depth > 0, 1, 2), 3))
    mean, spread = np.array([3.2, 4.5, 4.9, 5.3])[kind], np.array([0.07, 0.13, 0.2, 0.2])[kind]
    low, high = np.array([0.82, 0.58, 0.65, 0.24])[kind], np.array([1.0, 0.85, 0.95, 0.48])[kind]
    tumour = recipe.atypia * np.array([0.0, 1.0, 1.0, 0.2])[kind]
    mean, spread = mean * (1 + 0.35 * tumour), spread + 0.1 * tumour
    long = np.clip(mean * np.exp(spread * normal), 2.6, 8.5 + 3 * recipe.atypia) * recipe.size
    short = long * (low + (high - low) * u[5])

    toward = _gradient_angle(seed, _FLOW, 70.0, y, x)
    radial = _gland_angle(seed, recipe, y, x)
    wobble = np.array([3.1, 0.5, 3.1, 0.35])[kind] * (2 * u[6] - 1)
    angle = np.where(kind == 1, radial, toward + math.pi / 2) + wobble

    pale = np.clip(recipe.vesicular + 0.3 * (u[7] - 0.5), 0, 1) * np.array([0.15, 1.0, 1.1, 0.3])[kind]
    nuclei = _Nuclei(
        y=y,
        x=x,
        long=long,
        short=short,
        angle=angle,
        density=(np.array([0.95, 0.72, 0.68, 0.82])[kind] - 0.36 * pale) * (0.85 + 0.3 * u[8]),
        membrane=0.30 * pale + 0.05,
        clumping=np.array([0.30, 0.24, 0.30, 0.14])[kind] * (0.7 + 0.6 * u[9]) * (1 + 0.6 * tumour),
        nucleolus=np.where((kind != 0) & (u[10] < np.maximum(0.75 * pale, 0.8 * tumour)), 0.35 + 0.25 * tumour, 0.0),
        nucleoli=1 + np.floor(2.99 * tumour * u[9]).astype(np.int64),
        ragged=1 + 0.8 * tumour,
        coarse=tumour * (0.3 + 0.7 * u[8]),
        shape=2 * math.pi * np.stack([u[11], u[6]], axis=1),
        number=np.arange(1, len(keep) + 1),
    )
    return _with_elbow_room(nuclei, priority=u[2] + 0.5 * crowd, window=window)


def _with_elbow_room(nuclei: _Nuclei, *, priority: NDArray[np.float64], window: _Window) -> _Nuclei:
    """The nuclei that stay where none may overlap one of higher priority. Local: the window's size changes nothing inside."""
    touching = np.zeros((0, 2), np.intp)
    radius = np.sqrt(nuclei.long * nuclei.short)
    if len(radius) > 1:
        tree = spatial.cKDTree(np.stack([nuclei.y, nuclei.x], axis=1))
        pairs = tree.query_pairs(2 * float(radius.max()), output_type="ndarray")
        a, b = pairs[:, 0], pairs[:, 1]
        distance = np.hypot(nuclei.y[a] - nuclei.y[b], nuclei.x[a] - nuclei.x[b])
        touching = pairs[distance < 0.93 * (radius[a] + radius[b])]
    kept = np.zeros(len(radius), np.bool_)
    open_ = np.ones(len(radius), np.bool_)
    # Once, a nucleus that loses to a loser is lost too, which leaves gaps; three rounds fill them.
    for _ in range(3):
        a, b = touching[open_[touching].all(axis=1)].T
        beaten = np.zeros(len(radius), np.bool_)
        beaten[np.where(priority[a] < priority[b], a, b)] = True
        kept |= open_ & ~beaten
        a, b = touching.T
        blocked = np.zeros(len(radius), np.bool_)
        blocked[a[kept[b]]] = True
        blocked[b[kept[a]]] = True
        open_ = ~kept & ~blocked
    far = 25.0  # µm: what lies outside still has a cell that reaches in
    height, width = window.extent
    inside = (nuclei.y > -far) & (nuclei.y < height + far) & (nuclei.x > -far) & (nuclei.x < width + far)
    index = np.flatnonzero(kept & inside)
    taken = {name: value[index] for name, value in vars(nuclei).items()}
    return replace(_Nuclei(**taken), number=np.arange(1, len(index) + 1))


def _cells(window: _Window, nuclei: _Nuclei, recipe: _Recipe) -> tuple[Floats, Floats]:
    """How full of cytoplasm each pixel is, and how much of a membrane. A cell is what lies nearest to its nucleus."""
    lattice = window.coarse(_CELL_STEP)
    points = np.stack([lattice[0].ravel(), lattice[1].ravel()], axis=1)
    if len(nuclei.y) < 2:
        return np.ones((window.height, window.width), np.float32), np.zeros((window.height, window.width), np.float32)
    tree = spatial.cKDTree(np.stack([nuclei.y, nuclei.x], axis=1))
    near, second = np.asarray(tree.query(points, k=2)[0]).T.reshape(2, *lattice[0].shape)
    ragged = 0.8 * _noise_at(window.seed, _WAVE + 3, 6.0, *lattice)
    edge = window.upsampled((second - near) / 2 + ragged, _CELL_STEP)  # µm to the border with the next cell, roughly
    outwards = window.upsampled(near, _CELL_STEP)
    cytoplasm = 1 - recipe.clear * _step(outwards - 4.5, 2.0) * _step(edge - 0.8, 1.0)
    if recipe.border < 0:
        return cytoplasm * (1 + recipe.border * np.exp(-((edge / 0.9) ** 2))), np.zeros_like(edge)
    return cytoplasm, recipe.border * np.exp(-((edge / 0.7) ** 2))


_CELL_STEP = 1.0  # µm


def _paint_nuclei(haematoxylin: Floats, eosin: Floats, blood: Floats, window: _Window, nuclei: _Nuclei) -> NDArray[np.int32]:
    """Add the nuclei to the stains, in place; which nucleus each pixel belongs to: (H, W)."""
    mpp = window.mpp
    labels = np.zeros(haematoxylin.shape, np.int32)
    fine = window.noise(_CHROMATIN, 0.75) * min(1.0, 0.75 / mpp)
    texture = 0.55 * fine + 0.75 * window.noise(_CHROMATIN + 1, 1.7)  # (H, W)
    soft = max(mpp, 0.45)  # µm over which an edge rises
    clods = window.noise(_CHROMATIN + 2, 2.6) if nuclei.coarse.any() else None
    columns = zip(*(getattr(nuclei, name) for name in _Nuclei.__dataclass_fields__), strict=True)
    for y, x, long, short, angle, density, membrane, clumping, nucleolus, nucleoli, ragged, coarse, shape, number in columns:
        top, left = max(0, math.floor((y - 1.25 * long) / mpp)), max(0, math.floor((x - 1.25 * long) / mpp))
        bottom, right = max(0, math.ceil((y + 1.25 * long) / mpp)), max(0, math.ceil((x + 1.25 * long) / mpp))
        box = np.s_[top:bottom, left:right]
        if labels[box].size == 0:
            continue
        h, w = labels[box].shape
        dy = ((top + 0.5 + np.arange(h, dtype=np.float32)) * mpp - y)[:, None]
        dx = ((left + 0.5 + np.arange(w, dtype=np.float32)) * mpp - x)[None, :]
        along, across = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
        around = np.arctan2(across / short, along / long)
        outline = 1 + ragged * (0.06 * np.cos(2 * around + shape[0]) + 0.045 * np.cos(3 * around + shape[1]))
        inwards = (1 - np.hypot(along / long, across / short) / outline) * short  # µm below the membrane
        there = np.clip(inwards / soft + 0.5, 0, 1)
        rim = np.exp(-(((inwards - 0.4) / max(0.45, mpp)) ** 2))
        chromatin = texture[box] if clods is None else texture[box] + 0.8 * coarse * clods[box]
        amount = density * (1 + clumping * chromatin) + membrane * rim
        for k in range(nucleoli if nucleolus else 0):
            phase = shape[0] + 2.1 * k
            spot = (along - 0.35 * long * math.cos(phase)) ** 2 + (across - 0.35 * short * math.sin(phase)) ** 2
            amount = amount + nucleolus * np.exp(-spot / (0.55 + 0.4 * coarse) ** 2)
        haematoxylin[box] = np.maximum(haematoxylin[box], there * np.maximum(amount, 0.15))
        # A section is thicker than a nucleus: some cytoplasm always lies above or below it.
        eosin[box] *= 1 - 0.55 * there
        blood[box] *= 1 - there
        labels[box][there > 0.5] = number
    return labels


def _paint_red_cells(blood: Floats, window: _Window, recipe: _Recipe) -> None:
    """Red cells where the vessels are, in place."""
    spacing, mpp = 6.2, window.mpp
    rows, columns = (np.arange(-1, math.ceil(e / spacing) + 1) for e in window.extent)
    iy, ix = (i.ravel() for i in np.meshgrid(rows, columns, indexing="ij"))
    u = [_uniform(window.seed, _RED + k, iy, ix) for k in range(4)]
    y, x = (iy + 0.5 + 0.7 * (u[0] - 0.5)) * spacing, (ix + 0.5 + 0.7 * (u[1] - 0.5)) * spacing
    depth, _, sheet, _, vessel, _ = _compartments(window.seed, recipe, y, x)
    used = (vessel > 0) & (depth < -4) & (sheet < -0.05) & (u[2] < 0.85)
    if recipe.fat < math.inf:
        used &= _fat_field(window.seed, y, x) < recipe.fat
    soft = max(mpp, 0.4)
    for cy, cx, r in zip(y[used], x[used], 2.8 + 0.7 * u[3][used], strict=True):
        top, left = max(0, math.floor((cy - r - 1) / mpp)), max(0, math.floor((cx - r - 1) / mpp))
        box = np.s_[top : max(0, math.ceil((cy + r + 1) / mpp)), left : max(0, math.ceil((cx + r + 1) / mpp))]
        h, w = blood[box].shape
        dy = ((top + 0.5 + np.arange(h, dtype=np.float32)) * mpp - cy)[:, None]
        dx = ((left + 0.5 + np.arange(w, dtype=np.float32)) * mpp - cx)[None, :]
        inwards = r - np.hypot(dy, dx)
        dimple = 1 - 0.35 * np.clip(inwards / r, 0, 1) ** 2
        blood[box] = np.maximum(blood[box], 0.5 * np.clip(inwards / soft + 0.5, 0, 1) * dimple)


def _outline(height: int, width: int, *, mpp: float, seed: int) -> Floats:
    """How much of each pixel is tissue: a large and a small piece, well inside the slide: (H, W)."""
    rng = np.random.default_rng([seed, 5])
    window = _Window(height, width, mpp, seed)
    y, x = window.coarse()
    extent_y, extent_x = window.extent
    size = math.sqrt(extent_y * extent_x)  # µm
    v, u = y / extent_y, x / extent_x  # 0..1 over the slide
    ragged = 0.10 * _noise_at(seed, _WAVE, size / 5, y, x) + 0.05 * _noise_at(seed, _WAVE + 1, size / 14, y, x)
    ragged += 0.02 * _noise_at(seed, _WAVE + 2, size / 50, y, x)
    side = rng.choice([-1, 1])
    big = np.hypot((v - 0.5 - rng.uniform(-0.04, 0.04)) / 0.40, (u - 0.5 - 0.13 * side) / 0.31)
    small = np.hypot((v - 0.5 - rng.uniform(-0.2, 0.2)) / 0.22, (u - 0.5 + 0.35 * side) / 0.10)
    inwards = (1 - np.minimum(big, small) + ragged) * 0.3 * size  # µm, roughly
    return _step(window.upsampled(inwards), 4.0)


# --- planted optima ------------------------------------------------------------------------------------------------------

# How far the planted pattern's wavelengths scatter around twice the blob's diameter: octaves, standard deviation of power.
RING = 0.2

# The filter's standard deviation per blob diameter at which its mean answer over that ring is largest at no change of scale.
# For a ring without width it is sqrt(2) / pi; the width moves it by a little, found by solving for a slope of 0.
_SIGMA = 0.44274


def planted_slide(blob_px: float, seed: int, *, size: int = 3072, mpp: float | None = None) -> ArrayReader:
    """A slide of one level, size x size px, full of purple blobs `blob_px` level-0 px in diameter on pink.

    The pattern is noise in a narrow ring of wavelengths around 2 * `blob_px`, which looks the same at every scale but for
    its size. So whatever `planted_network(d)` answers depends on the scale only through blob_px / d.
    """
    rng = np.random.default_rng(seed)
    across = fft.next_fast_len(size, real=True)
    spectrum = fft.rfft2(rng.standard_normal((across, across), np.float32), workers=1)
    frequency = np.hypot(fft.fftfreq(across)[:, None], fft.rfftfreq(across)[None, :]).astype(np.float32)
    frequency[0, 0] = 1.0
    octaves = np.log2(frequency * 2 * blob_px)
    # Divided by frequency, since a ring of an octave holds the more waves the higher it lies: symmetric in octaves.
    spectrum *= np.exp(-0.25 * (octaves / RING) ** 2) / frequency
    spectrum[0, 0] = 0
    pattern = fft.irfft2(spectrum, s=(across, across), workers=1)[:size, :size]
    blend = np.clip(0.5 + 0.18 * pattern / pattern.std(), 0, 1)[..., None]
    return ArrayReader(np.asarray(_PINK + blend * (_PURPLE - _PINK) + 0.5, np.uint8), mpp=mpp, name="planted")


_PINK, _PURPLE = np.array([235, 165, 205], np.float32), np.array([105, 60, 150], np.float32)


def planted_network(blob_px: float = 8.0) -> nn.Module:
    """A classifier without training, most confident where the blobs of `planted_slide` are `blob_px` px of its tile.

    Takes (B, 3, H, W) RGB in 0..1, H and W above 4 * `blob_px`; gives two logits, blobs and none. Two ring filters
    (Laplacians of Gaussians, blobs darker and brighter than around them), rectified, averaged, and a linear head: so on a slide
    with blobs of D level-0 px its mean maximum softmax has one maximum, at scale D / `blob_px`, by construction.
    """
    import torch
    from torch import nn

    sigma = _SIGMA * blob_px
    reach = math.ceil(4 * sigma)
    r = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) / sigma
    ring = (r**2 / 2 - 1) * np.exp(-(r**2) / 2)
    ring -= ring.mean()  # constant colour gets no answer
    # What a wave of the blobs' own wavelength is multiplied by becomes 1, whatever `blob_px`.
    wave = np.cos(math.pi * np.arange(-reach, reach + 1) / blob_px)
    ring /= abs((ring @ wave).sum())
    change = (_PURPLE - _PINK) / 255
    colour_axis = change / (change**2).sum()  # 1 from pink to purple
    kernel = torch.tensor(ring[None], dtype=torch.float32)

    class Planted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.purple = nn.Conv2d(3, 1, 1, bias=False)
            self.rings = nn.Conv2d(1, 2, 2 * reach + 1, padding=reach, padding_mode="reflect", bias=False)
            self.relu = nn.ReLU()
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.head = nn.Linear(2, 2)
            with torch.no_grad():
                self.purple.weight.copy_(torch.tensor(colour_axis[None, :, None, None]))
                self.rings.weight.copy_(torch.stack([kernel, -kernel]))
                # The mean answers at the planted scale are 0.07 each or somewhat below: a logit near 2.
                self.head.weight.copy_(torch.tensor([[15.0, 15.0], [0.0, 0.0]]))
                self.head.bias.zero_()

        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            pooled = self.pool(self.relu(self.rings(self.purple(tiles)))).flatten(1)  # (B, 2)
            logits: torch.Tensor = self.head(pooled)
            return logits

    return Planted().eval()


# --- noise -------------------------------------------------------------------------------------------------------------

# A cubic B-spline lowers the variance of a white lattice by 151/315 along each axis.
_SPLINE_SD = 151 / 315


def _mixed(seed: int, layer: int, iy: NDArray[np.int64], ix: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 well-mixed bits for a lattice position: multiply and shift, until every input bit has reached every output bit."""
    bits = iy.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ (ix.astype(np.uint64) + np.uint64(0x632BE59BD9B4E019))
    for word in (seed, layer):
        bits = (bits + np.uint64(word % 2**64)) * np.uint64(0xD1342543DE82EF95)
        bits ^= bits >> np.uint64(31)
        bits *= np.uint64(0xBF58476D1CE4E5B9)
        bits ^= bits >> np.uint64(29)
    return bits


def _uniform(seed: int, layer: int, iy: NDArray[np.int64], ix: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform in 0..1 at each lattice position, the same whoever asks."""
    return (_mixed(seed, layer, iy, ix) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _white(seed: int, layer: int, iy: NDArray[np.int64], ix: NDArray[np.int64]) -> Floats:
    """Uniform of zero mean and unit variance at each lattice position."""
    return ((_uniform(seed, layer, iy, ix) - 0.5) * math.sqrt(12)).astype(np.float32)


def _noise_at(seed: int, layer: int, spacing: float, y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The noise of `_Window.noise` at any points, in µm."""
    first_y, weight_y = _taps(y / spacing)
    first_x, weight_x = _taps(x / spacing)
    total = np.zeros(y.shape)
    for i in range(4):
        for j in range(4):
            total += weight_y[i] * weight_x[j] * _white(seed, layer, first_y + i, first_x + j)
    return total / _SPLINE_SD


def _taps(position: NDArray[np.floating]) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """First of four lattice points around each position, and the weights of a cubic B-spline."""
    base = np.floor(position)
    t = position - base
    weights = [(1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6]
    return base.astype(np.int64) - 1, weights


def _spline(position: NDArray[np.floating]) -> tuple[sparse.csr_array, int, int]:
    """(positions, lattice points) B-spline weights, the first lattice point, and their number."""
    first, weights = _taps(position)
    start, count = int(first[0]), int(first[-1] - first[0]) + 4
    index = first[:, None] - start + np.arange(4)
    row = np.broadcast_to(np.arange(len(position))[:, None], index.shape)
    values = np.stack(weights, axis=1).astype(np.float32)
    return sparse.csr_array((values.ravel(), (row.ravel(), index.ravel())), shape=(len(position), count)), start, count


def _linear(position: NDArray[np.floating], count: int) -> sparse.csr_array:
    """(positions, count) weights of linear interpolation."""
    first = np.minimum(np.floor(position).astype(np.int64), count - 2)
    index = first[:, None] + np.arange(2)
    values = (1 - np.abs(index - position[:, None])).astype(np.float32)
    row = np.broadcast_to(np.arange(len(position))[:, None], index.shape)
    return sparse.csr_array((values.ravel(), (row.ravel(), index.ravel())), shape=(len(position), count))


def _gradient_angle(
    seed: int, layer: int, spacing: float, y: NDArray[np.float64], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Direction in which a noise field rises, radians from the x axis."""
    rise_y = _noise_at(seed, layer, spacing, y + 1, x) - _noise_at(seed, layer, spacing, y - 1, x)
    rise_x = _noise_at(seed, layer, spacing, y, x + 1) - _noise_at(seed, layer, spacing, y, x - 1)
    return np.arctan2(rise_y, rise_x)


def _gland_angle(seed: int, recipe: _Recipe, y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Direction from the wall of the nearest gland to its lumen, radians from the x axis."""
    if y.size == 0:
        return np.zeros(0)
    rise_y = _glands(seed, recipe, y + 1, x)[0] - _glands(seed, recipe, y - 1, x)[0]
    rise_x = _glands(seed, recipe, y, x + 1)[0] - _glands(seed, recipe, y, x - 1)[0]
    return np.arctan2(rise_y, rise_x)


def _step(value: NDArray[np.floating], softness: float) -> Floats:
    """0 below zero, 1 above, over about `softness`."""
    return np.asarray(np.clip(value / softness + 0.5, 0, 1), np.float32)
