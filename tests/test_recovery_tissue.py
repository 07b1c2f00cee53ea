"""The benchmark's own networks: regions are as wide as they say, halves stay apart, what is to learn is learned."""

# ruff: noqa: E402

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recovery import cases, tissue
from benchmarks.recovery.cases import Setting
from benchmarks.recovery.tissue import REGIONS, WIDTHS, Recipe
from wsiscale.testing.procedural import tissue as procedural_tissue

OF_REGIONS = [recipe for recipe in tissue.RECIPES if recipe.of_regions]


@pytest.mark.parametrize("kind", REGIONS)
def test_a_region_is_half_epithelium_and_its_structure_as_wide_as_it_says(kind: str) -> None:
    widths, shares = [], []
    for seed in range(3):
        epithelium = tissue.arrangement(kind, side=768, seed=seed)
        structure = ~epithelium if kind == "cribriform" else epithelium  # holes there, epithelium elsewhere
        depth = ndimage.distance_transform_edt(structure)[structure].mean()
        widths.append(depth * (4 if kind.endswith("cords") else 6))  # of strips, of discs
        shares.append(epithelium.mean())

    assert np.median(widths) == pytest.approx(WIDTHS[kind], rel=0.15)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)


def test_epithelium_and_stroma_look_the_same_in_every_region() -> None:
    purple, pink = np.empty((2, len(REGIONS), 2))
    for i, kind in enumerate(REGIONS):
        stains = tissue.pigments(kind, side=1024, seed=4)
        epithelium = ndimage.uniform_filter(tissue.arrangement(kind, side=1024, seed=4).astype(np.float32), 21)
        for j in (0, 1):
            deep = np.abs(epithelium - j) < 0.001  # away from edges, of which narrow structures have more
            purple[i, j], pink[i, j] = stains.haematoxylin[deep].mean(), stains.eosin[deep].mean()

    assert (purple.max(axis=0) / purple.min(axis=0) < 1.2).all()
    assert (pink.max(axis=0) / pink.min(axis=0) < 1.1).all()
    assert (purple[:, 1] > 3 * purple[:, 0]).all()


def test_the_same_seed_is_the_same_region_and_another_one_is_another() -> None:
    first, again, other = (tissue.region("nests", side=128, seed=seed) for seed in (4, 4, 5))

    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_no_network_is_judged_on_what_it_was_trained_on() -> None:
    listed = json.loads(cases.SPLIT_FILE.read_text())["families"][tissue.FAMILY]

    for recipe in tissue.RECIPES:
        assert recipe.name in listed["networks"][recipe.half]
        assert recipe.name not in listed["networks"][recipe.other]
        seen = set(tissue.monuseg_slides(recipe.other))
        assert not seen & set(listed["slides"][recipe.half])
        assert not any("TCGA-HE" in slide for slide in seen | set(listed["slides"][recipe.half]))
    trained_on = {half: set(tissue.training_seeds(half)) for half in tissue.HALVES}
    judged_on = {tissue.seed_of(slide) for half in tissue.HALVES for slide in tissue.region_slides(half)}
    assert not trained_on["develop"] & trained_on["report"]
    assert not judged_on & (trained_on["develop"] | trained_on["report"])


def test_the_training_scale_is_off_the_middle_of_both_ranges() -> None:
    for scale in {recipe.scale for recipe in tissue.RECIPES}:
        off = {cut.tag: np.log2(np.sqrt(cut.lo * cut.hi) / scale) for cut in tissue.ranges(scale)}

        assert off["A"] == pytest.approx(0.75)
        assert off["B"] == pytest.approx(-0.75)


@pytest.mark.parametrize("kind", ["nuclei-bn", "nuclei-plain", "unet"])
def test_training_on_nuclei_lowers_the_loss(kind: tissue.Kind) -> None:
    recipe = Recipe(kind, 2.0, "develop")
    image, nuclei = procedural_tissue(256, 256, mpp=0.5, seed=3)
    field = (image, nuclei > 0)
    draw = tissue._segments([field], recipe) if kind == "unet" else tissue._centres([field], recipe)

    module, losses = tissue.train(recipe, draw, steps=12)

    assert not module.training
    assert np.mean(losses[-3:]) < 0.95 * losses[0]


def test_a_tile_is_labelled_by_the_pixel_at_its_centre() -> None:
    nuclei = np.zeros((64, 96), bool)
    nuclei[20:40, 50:53] = True
    image = np.repeat(nuclei[..., None] * np.uint8(255), 3, axis=2)

    tiles, classes = tissue._centres([(image, nuclei)], Recipe("nuclei-bn", 1.0, "develop"))(np.random.default_rng(0))

    # A tile of even side has four pixels around its centre; turning decides which of them is the labelled one.
    around = tiles[:, 15:17, 15:17, 0] > 0
    assert set(classes) == {0, 1}
    assert around[classes == 1].any(axis=(1, 2)).all()
    assert not around[classes == 0].all(axis=(1, 2)).any()


@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_the_committed_networks_tell_regions_of_seeds_that_they_never_saw(scale: float) -> None:
    setting = Setting(cache=Path("nowhere"), cached=True)
    side = tissue.TILE["regions-bn"]
    # Two slides of each kind, four tiles of each: (32, side, side, 3), at the training scale.
    views = [
        tissue._view(tissue.region(kind, side=int(2 * scale * side), seed=seed), scale) for kind in REGIONS for seed in (7, 8)
    ]
    tiles = [view[y : y + side, x : x + side] for view in views for y in (0, side) for x in (0, side)]
    shown = tissue.normalised(torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255)
    for recipe in (recipe for recipe in OF_REGIONS if recipe.scale == scale):
        assert tissue.weights_file(recipe, setting).stat().st_size < 100_000

        with torch.inference_mode():
            logits = tissue.trained(recipe, setting)(shown)

        told = (logits.argmax(1).numpy() == np.repeat(range(len(REGIONS)), 8)).mean()
        assert logits.shape == (32, len(REGIONS))
        assert told > 0.5, recipe.name  # 0.25 by chance


def test_a_network_of_regions_makes_cases_of_its_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("regions-plain", 2.0, "develop")
    assert tissue.weights_file(recipe, Setting(cache=tmp_path)).exists()  # or it would be trained here
    monkeypatch.setattr(tissue, "region_slides", lambda half: [f"regions-nests-{half}"])
    monkeypatch.setattr(tissue, "_region_places", lambda slide: 4)
    monkeypatch.setattr(tissue, "SLIDE", 1600)

    made = list(tissue._of_regions(recipe, Setting(cache=tmp_path, log=lambda line: None)))

    assert [case.name.rpartition("/")[2] for case in made] == ["A", "B"]
    for case in made:
        assert (case.half, case.train_scale, case.response.places) == ("develop", 2.0, 4)
        assert case.tags == {"regions", "single-class"}
        assert case.response.slide_mpp == tissue.REGION_MPP
        assert set(case.response.views) == set(tissue.VIEWS)
        np.testing.assert_array_equal(case.response.scales, case.oracle.scales)
        assert case.response.scales[0] < 2 < case.response.scales[-1]
    assert [case.upsampled for case in made] == [False, True]


def test_nothing_is_trained_where_only_the_cache_is_asked(tmp_path: Path) -> None:
    with pytest.raises(cases.MissingDataError, match="nuclei-bn-scale1-develop"):
        tissue.trained(Recipe("nuclei-bn", 1.0, "develop"), Setting(cache=tmp_path, cached=True))
