"""Looking into a network: what its layers answer over scale, computed and drawn. Figures are matplotlib's, made when asked for.

Each figure is of one function's values, and each of those analyses is somebody's: Graziani et al., MAKE 2021 (`probe_figure`,
`noise_figure`); Penkin, Khvostikov & Krylov, GraphiCon 2022 (`prediction_figure`, their figure 2; `gradcam_figure`, figure 3;
`passing_figure`, figure 9). `figure.savefig("name.png")` writes one; a notebook shows what a cell ends with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsiscale.criteria.penkin2022 import kept_channels
from wsiscale.errors import OptionError
from wsiscale.types import ScaleResponse

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from wsiscale.gradcam import Attention
    from wsiscale.networks import Network
    from wsiscale.probe import Probe

INK, PALE, MARK = "#1f2937", "#9ca3af", "#c2410c"
SCALES: NDArray[np.float64] = np.exp2(np.arange(-1, 3.01, 0.25))


# --- where scale lives ------------------------------------------------------------------------------------------------------


def probe_figure(probe: Probe, *, title: str | None = None) -> Figure:
    """R2 of log2 µm/px against depth, its interval, the controls, and where to cut."""
    figure, (axes,) = _figure(1, width=7, height=3.6)
    depth = np.array([layer.depth for layer in probe.layers])
    r2 = np.array([layer.r2 for layer in probe.layers])
    # Least squares go far below zero, where there is nothing to read.
    shuffled = np.array([layer.shuffled for layer in probe.layers])
    floor = max(-1.0, min(float(r2.min()), float(shuffled.min())) - 0.1)
    random = [layer.random for layer in probe.layers if layer.random is not None]
    if random:
        axes.fill_between(depth, floor, np.maximum(random, floor), color=PALE, alpha=0.35, lw=0, label="random weights")
    axes.fill_between(depth, floor, np.clip(shuffled, floor, 1), color=PALE, alpha=0.8, lw=0, label="shuffled targets")
    lo, hi = ([getattr(layer, name) for layer in probe.layers] for name in ("lo", "hi"))
    axes.fill_between(depth, np.maximum(lo, floor), np.maximum(hi, floor), color=INK, alpha=0.2, lw=0)
    axes.plot(depth, np.maximum(r2, floor), color=INK, lw=1.2, label="as trained")
    cut = probe.layer(probe.prune_at)
    axes.axvline(cut.depth, color=MARK, lw=1)
    axes.annotate(
        f"cut at {cut.name}",
        (cut.depth, floor),
        xytext=(4 if cut.depth < 0.6 else -4, 4),
        textcoords="offset points",
        ha="left" if cut.depth < 0.6 else "right",
        color=MARK,
        fontsize=8,
    )
    axes.set(xlim=(0, 1), ylim=(floor, 1.02), xlabel="depth: first layer to last", ylabel="held-out R² of scale")
    axes.set_title(probe.model if title is None else title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right" if cut.depth < 0.6 else "lower left")
    return figure


# --- prediction over scale --------------------------------------------------------------------------------------------------


def response_to_image(
    network: Network,
    image: NDArray[np.uint8],
    *,
    scales: Sequence[float] | NDArray[np.floating] = SCALES,
    center: tuple[float, float] | None = None,
    layers: str | Sequence[str] = "none",
) -> ScaleResponse:
    """What the network answers to one image (H, W, 3) at `scales`, image px per px of its tile, around `center` (y, x).

    Beyond its edges the image is mirrored. Scales below 1 are interpolated.
    """
    from wsiscale.analyzer import respond

    tiles = tiles_of(image, size=network.tile_size, scales=scales, center=center)
    return respond(network, [tile[None] for tile in tiles], scales=np.asarray(scales, float), layers=layers)


def tiles_of(
    image: NDArray[np.uint8],
    *,
    size: int,
    scales: Sequence[float] | NDArray[np.floating],
    center: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """(S, size, size, 3) around `center` (y, x) of an image (H, W, 3), through the package's kernel."""
    from wsiscale.readers.array import ArrayReader
    from wsiscale.stacks import scale_stack

    at = np.asarray(scales, float)
    pad = math.ceil(size * at.max() / 2)
    slide = ArrayReader(np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric"))
    middle = np.array(image.shape[:2]) / 2 if center is None else np.asarray(center, float)
    stack = scale_stack(slide, middle[None] + pad, scales=at, size=size, max_upsample=max(1.0, 1.01 / float(at.min())))
    return np.asarray(stack.images[0].compute(scheduler="synchronous"))


def prediction_figure(response: ScaleResponse, *, classes: Sequence[str] | None = None, place: int = 0) -> Figure:
    """Which class is predicted at each scale, and how surely: one place of a response."""
    if response.outputs is None:
        raise OptionError("the network answers features and no classes; there is no prediction to draw")
    probabilities = response.outputs.probabilities[place]  # (S, C)
    shown = np.unique(probabilities.argmax(axis=1))  # those that win anywhere
    figure, (axes,) = _figure(1, width=7, height=3.2)
    at, label = _scale_axis(response)
    if len(shown) > len(_COLOURS):
        shown = shown[np.argsort(-probabilities[:, shown].max(axis=0))][: len(_COLOURS)]
    for number, which in enumerate(shown):
        colour = _COLOURS[number]
        axes.plot(at, probabilities[:, which], color=colour, lw=1.2)
        wins = probabilities.argmax(axis=1) == which
        name = f"class {which}" if classes is None else classes[which]
        axes.plot(at[wins], probabilities[wins, which], "o", color=colour, ms=4, label=name)
    axes.set(xlabel=label, ylabel="probability", ylim=(0, 1.02))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_plain)
    axes.legend(frameon=False, fontsize=8, title="predicted", title_fontsize=8)
    return figure


def gradcam_figure(image: NDArray[np.uint8], attention: Attention, *, classes: Sequence[str] | None = None) -> Figure:
    """Tiles of one image at several scales, and over each where the network looked (`wsiscale.gradcam.gradcam`)."""
    count = len(attention.scales)
    figure, axes = _figure(count, rows=2, width=1.7 * count, height=3.9)
    tiles = tiles_of(image, size=attention.maps.shape[1], scales=attention.scales, center=attention.center)
    top = max(float(attention.maps.max()), 1e-12)
    for i, scale in enumerate(attention.scales):
        upper, lower = axes[i], axes[count + i]
        upper.imshow(tiles[i])
        lower.imshow(tiles[i].mean(axis=2), cmap="gray", vmin=0, vmax=255)
        lower.imshow(attention.maps[i], cmap="inferno", alpha=0.6, vmin=0, vmax=top)
        which = int(attention.targets[i])
        upper.set_title(f"scale {scale:.3g}", fontsize=9)
        lower.set_title(f"class {which}" if classes is None else classes[which], fontsize=9)
        for ax in (upper, lower):
            ax.set(xticks=[], yticks=[])
    return figure


# --- channels and noise -----------------------------------------------------------------------------------------------------


def passing_channels(response: ScaleResponse) -> dict[str, float]:
    """For each watched layer the share of its channels that pass Penkin et al.'s filter, mean over places, in forward order.

    A channel passes unless it is constant or has both of its extrema at the ends of the range; noise passes nearly always.
    Respond with layers="every".
    """
    if not response.layers:
        raise OptionError("no layer was watched; respond with layers='every'")
    return {
        name: float(kept_channels(moments.mean[:, ::-1].astype(np.float64)).mean()) for name, moments in response.layers.items()
    }


def passing_by_chance(scales: int) -> float:
    """The share of channels of white noise that pass, of `scales` values each: all but those with both extrema at the ends."""
    return 1 - 2 / (scales * (scales - 1))


def passing_figure(shares: Mapping[str, float], *, scales: int, noise: Mapping[str, float] | None = None) -> Figure:
    """`passing_channels` against depth; `noise` are those of an image that is none."""
    figure, (axes,) = _figure(1, width=7, height=3.2)
    depth = np.linspace(0, 1, len(shares))
    axes.plot(depth, list(shares.values()), "o-", color=INK, ms=3, lw=1, label="tissue")
    if noise is not None:
        axes.plot(depth, list(noise.values()), "o-", color=PALE, ms=3, lw=1, label="noise")
    axes.axhline(passing_by_chance(scales), color=MARK, lw=1, ls="--", label="white noise instead of answers")
    axes.set(xlabel="depth: first layer to last", ylabel="share of channels that pass", ylim=(0, 1.03))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def noise_answers(
    network: Network,
    *,
    grains: Sequence[float] = (1, 2, 4, 8, 16),
    sides: Sequence[int] | None = None,
    images: int = 4,
    layers: str | Sequence[str] = "every",
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """What each layer answers to noise: (n,) for each, relative to its own mean, root mean square over channels.

    Noise of a `grain`, px, on tiles of one size: the scale of what is seen, and nothing else. Or, with `sides`, white noise on
    images of that many px a side: their size and nothing else, which a layer can only tell by its padding.
    """
    from wsiscale.analyzer import respond

    rng = np.random.default_rng(seed)
    if sides is None:
        tiles = [
            np.stack([_noise(rng, network.tile_size, grain) for _ in range(images)]) for grain in sorted(map(float, grains))
        ]
        at = np.array(sorted(map(float, grains)))
    else:
        tiles = [np.stack([_noise(rng, side, 1.0) for _ in range(images)]) for side in sorted(sides)]
        at = np.array(sorted(map(float, sides)))
    response = respond(network, tiles, scales=at, layers=layers)
    found = {}
    for name, moments in response.layers.items():
        # A layer's channels have offsets of their own, which no input moves.
        rms = np.sqrt(np.square(moments.mean.astype(np.float64)).mean(axis=(0, 2)))  # (n,)
        found[name] = rms / rms.mean() if rms.mean() > 0 else np.ones(len(at))
    return found


def _noise(rng: np.random.Generator, side: int, grain: float) -> NDArray[np.uint8]:
    """(side, side, 3) of the same mean and spread whatever its grain."""
    field = rng.normal(size=(side, side, 3))
    if grain > 1:
        field = ndimage.gaussian_filter(field, (grain / 2, grain / 2, 0), mode="wrap")
        field /= field.std()
    return np.asarray(np.clip(127.5 + 40 * field, 0, 255), np.uint8)


def noise_figure(
    answers: Mapping[str, NDArray[np.float64]], at: Sequence[float], *, label: str = "grain of the noise, px"
) -> Figure:
    """`noise_answers` as a map: depth down, grain or side across; white is the layer's own mean, in octaves of it."""
    figure, (axes,) = _figure(1, width=5, height=4)
    octaves = np.log2(np.maximum(np.stack(list(answers.values())), 1e-6))  # (L, n)
    reach = max(0.25, float(np.abs(octaves).max()))
    image = axes.imshow(octaves, aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
    axes.set_xticks(range(len(at)), [f"{value:g}" for value in sorted(at)])
    axes.set_yticks([0, len(octaves) - 1], ["first layer", "last"])
    axes.set_xlabel(label)
    figure.colorbar(image, label="answer, octaves from the layer's mean")
    return figure


# --- drawing ----------------------------------------------------------------------------------------------------------------

_COLOURS = ("#1f2937", "#c2410c", "#0f766e", "#7c3aed", "#a16207", "#be185d", "#2563eb", "#4d7c0f")


def _figure(columns: int, *, rows: int = 1, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def _scale_axis(response: ScaleResponse) -> tuple[NDArray[np.float64], str]:
    if response.slide_mpp is None:
        return response.scales, "scale, image px per px"
    return response.scales * response.slide_mpp, "µm/px"


def _plain(value: float, _: object) -> str:
    return f"{value:g}"
