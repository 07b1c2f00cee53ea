"""Procedural tissue is the same tissue at every magnification, and a planted optimum is where it was planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
import torch
from numpy.typing import NDArray
from scipy import ndimage

from wsiscale.geometry import centered_view, scale_grid
from wsiscale.testing import planted_network, planted_slide, random_stain, slide_image, tissue, write_svs
from wsiscale.testing.procedural import _noise_at, _recipe, _Window
from wsiscale.testing.slides import area_mean
from wsiscale.views import read_view

SAMPLES = Path(__file__).parents[1] / "sample_slides"


# Hard tissue of seed 44 may hold tumour, torn collagen, keratin, fat and pen; of 7 foam; of 45 a fold.
HARD = [(3, False), (44, True), (7, True), (45, True)]


@pytest.mark.parametrize(("seed", "hard"), HARD)
def test_the_same_seed_is_the_same_tissue_at_every_magnification(seed: int, hard: bool) -> None:
    fine, nuclei = tissue(480, 640, mpp=0.25, seed=seed, hard=hard)
    coarse, coarse_nuclei = tissue(120, 160, mpp=1.0, seed=seed, hard=hard)

    averaged = area_mean(fine, 4).astype(float)

    # What is left is noise and the rendering at 0.5 µm/px that coarse tissue is averaged from.
    assert np.abs(averaged - coarse).mean() < 4
    assert np.corrcoef(averaged.ravel(), coarse.ravel())[0, 1] > 0.97
    assert ((nuclei[2::4, 2::4] > 0) == (coarse_nuclei > 0)).mean() > 0.97


@pytest.mark.parametrize("mpp", [0.1, 0.25, 1.3])
def test_noise_on_pixels_is_the_noise_at_their_centres(mpp: float) -> None:
    window = _Window(50, 70, mpp, seed=9)
    y, x = np.meshgrid((np.arange(50) + 0.5) * mpp, (np.arange(70) + 0.5) * mpp, indexing="ij")

    assert window.noise(123, 2.5) == pytest.approx(_noise_at(9, 123, 2.5, y, x), abs=1e-4)


@pytest.mark.parametrize(("seed", "hard"), HARD)
def test_a_larger_window_shows_the_same_tissue_and_more_of_it(seed: int, hard: bool) -> None:
    small, _ = tissue(200, 260, mpp=0.5, seed=seed, hard=hard)
    large, _ = tissue(300, 310, mpp=0.5, seed=seed, hard=hard)

    # Away from the edge, where the optics blur in what lies outside; the sensor's noise is drawn anew.
    assert np.abs(small[:190, :250].astype(int) - large[:190, :250]).mean() < 2.5


def test_hard_tissue_has_what_plain_tissue_lacks() -> None:
    recipes = [_recipe(seed, hard=True) for seed in range(60)]

    # Each difficulty in some fields and not in others; none in plain tissue.
    for name in ("atypia", "foam", "torn", "fold", "ink", "keratin", "fat"):
        nothing = getattr(_recipe(1), name)
        share = np.mean([getattr(recipe, name) != nothing for recipe in recipes])
        assert 0.02 < share < 0.9, name
    assert largest_nuclei(hard=True) > 1.15 * largest_nuclei(hard=False)  # tumours


def largest_nuclei(*, hard: bool) -> float:
    """The 95th percentile of their areas in px."""
    labels = [tissue(500, 500, mpp=0.5, seed=seed, hard=hard)[1] for seed in range(6)]
    areas = np.concatenate([np.bincount(nuclei.ravel())[1:] for nuclei in labels])
    return float(np.percentile(areas[areas > 0], 95))


def test_tissue_is_seeded() -> None:
    once, nuclei = tissue(96, 128, mpp=0.5, seed=1, stain=random_stain(4))
    again, same = tissue(96, 128, mpp=0.5, seed=1, stain=random_stain(4))
    other, _ = tissue(96, 128, mpp=0.5, seed=2, stain=random_stain(4))

    assert once.shape == (96, 128, 3)
    assert once.dtype == np.uint8
    assert np.array_equal(once, again)
    assert np.array_equal(nuclei, same)
    assert not np.array_equal(once, other)


@pytest.mark.parametrize("seed", range(4))
def test_nuclei_have_the_size_of_nuclei(seed: int) -> None:
    image, nuclei = tissue(700, 900, mpp=0.25, seed=seed)

    inside = nuclei[1:-1, 1:-1]
    whole = np.setdiff1d(np.unique(inside), np.concatenate([nuclei[0], nuclei[-1], nuclei[:, 0], nuclei[:, -1]]))
    diameters = 2 * np.sqrt(np.bincount(nuclei.ravel())[whole] * 0.25**2 / np.pi)  # µm

    assert len(whole) > 40
    assert 5 < np.median(diameters) < 10
    assert np.percentile(diameters, 99) < 14
    red = image[..., 0]
    assert red[nuclei > 0].mean() < red[nuclei == 0].mean() - 30


def test_a_slide_is_tissue_within_glass() -> None:
    slide = slide_image(360, 480, 1.0, 2)

    stained = (slide.max(axis=2).astype(int) - slide.min(axis=2)) > 25
    assert 0.2 < stained.mean() < 0.7
    edge = np.concatenate([slide[0], slide[-1], slide[:, 0], slide[:, -1]])
    assert edge.min() > 225


def confidences(
    blob: float, seed: int, scales: NDArray[np.float64], *, tuned: float = 8.0, places: int = 8
) -> NDArray[np.float64]:
    slide, network, size = planted_slide(blob, seed), planted_network(tuned), 96
    rng = np.random.default_rng(seed)
    margin = min(size * scales[-1] / 2, 1536)
    curves = []
    for y, x in rng.uniform(margin, 3072 - margin, (places, 2)):
        tiles = np.stack([read_view(slide, centered_view((y, x), size=size, scale=scale)) for scale in scales])
        with torch.inference_mode():
            logits = network(torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255)
        curves.append(logits.softmax(dim=1).amax(dim=1).numpy())
    return np.mean(curves, axis=0)


def refined(scales: NDArray[np.float64], curve: NDArray[np.float64]) -> float:
    """The peak of a parabola through the largest value and its neighbours."""
    k = int(curve.argmax())
    left, top, right = curve[k - 1 : k + 2]
    return float(scales[k] * (scales[1] / scales[0]) ** (0.5 * (left - right) / (left - 2 * top + right)))


@pytest.mark.parametrize("true", [0.5, 1.7, 5.5])
def test_the_planted_network_is_most_confident_at_the_planted_scale(true: float) -> None:
    scales = scale_grid(true / 2.7, true * 2.2)  # off centre, so that the middle of the range is no answer

    curve = confidences(true * 8, seed=int(10 * true), scales=scales)

    assert np.log2(refined(scales, curve) / true) == pytest.approx(0, abs=0.07)
    # One smooth maximum: up to it and down from it.
    smooth = ndimage.uniform_filter1d(curve, 3)[1:-1]
    assert (np.diff(np.sign(np.diff(smooth))) != 0).sum() == 1
    assert curve.max() > 0.85
    assert max(curve[0], curve[-1]) < curve.max() - 0.1


@pytest.mark.slow
def test_the_planted_optimum_is_exact_on_twenty_slides() -> None:
    rng = np.random.default_rng(0)
    for seed, true in enumerate(np.exp2(np.linspace(-1, 3, 20))):
        scales = scale_grid(true / 4 * 2 ** rng.uniform(-0.5, 0.5), true * 2 ** rng.uniform(1, 1.5))

        assert np.log2(refined(scales, confidences(true * 8, seed, scales, places=24)) / true) == pytest.approx(0, abs=0.05), (
            true
        )


def test_another_tuning_moves_the_planted_optimum() -> None:
    scales = scale_grid(0.7, 6.0)

    curve = confidences(20.0, 1, scales, tuned=10.0)

    assert refined(scales, curve) == pytest.approx(2.0, rel=0.05)


def test_the_levels_of_a_written_slide_are_exact_means(tmp_path: Path) -> None:
    image, _ = tissue(301, 523, mpp=0.5, seed=1)
    exact = image[:300, :520].reshape(75, 4, 130, 4, 3).mean(axis=(1, 3))

    write_svs(tmp_path / "slide.svs", image, mpp=0.5, power=20, levels=(1, 4), quality=100)

    assert np.abs(area_mean(image, 4) - exact).max() <= 0.5
    with tifffile.TiffFile(tmp_path / "slide.svs") as file:
        level = file.series[0].levels[1].asarray().astype(float)
    assert level.shape == (75, 130, 3)
    luma = np.array([0.299, 0.587, 0.114])  # JPEG halves the resolution of colour, and of colour alone
    assert np.abs(level @ luma - exact @ luma).mean() < 1.5


@pytest.mark.parametrize("library", [openslide.OpenSlide, tiffslide.TiffSlide])
def test_both_libraries_read_the_claims_of_a_written_slide(tmp_path: Path, library: type) -> None:
    image, _ = tissue(520, 640, mpp=0.5, seed=1)
    write_svs(tmp_path / "slide.svs", image, mpp=0.4995, power=20, levels=(1, 2, 4))

    with library(tmp_path / "slide.svs") as slide:
        prefix = library.__module__.split(".")[0]
        assert slide.properties[f"{prefix}.vendor"] == "aperio"
        assert float(slide.properties[f"{prefix}.mpp-x"]) == pytest.approx(0.4995)
        assert float(slide.properties[f"{prefix}.objective-power"]) == 20
        assert slide.level_dimensions == ((640, 520), (320, 260), (160, 130))
        pixels = np.asarray(slide.read_region((64, 32), 0, (200, 100)).convert("RGB")).astype(int)
    assert np.abs(pixels - image[32:132, 64:264]).mean() < 8


@pytest.mark.parametrize(
    ("name", "mpp", "levels", "limit"),
    [
        ("tissue_mpp0.25.svs", "0.25", [1, 4, 16], 2_000_000),
        ("no_mpp.svs", None, [1, 4], 700_000),
        ("wrong_mpp.svs", "0.0025", [1, 4], 700_000),
    ],
)
def test_the_sample_slides_are_what_their_readme_says(name: str, mpp: str | None, levels: list[int], limit: int) -> None:
    assert (SAMPLES / name).stat().st_size < limit
    with openslide.OpenSlide(SAMPLES / name) as slide:
        claimed = slide.properties.get("openslide.mpp-x")
        assert slide.level_downsamples == pytest.approx(levels)
    assert (None if claimed is None else float(claimed)) == (None if mpp is None else float(mpp))
