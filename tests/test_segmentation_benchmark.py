"""benchmarks/segmentation: its measures, and its segmenters on tissue whose nuclei are known."""

# ruff: noqa: E402

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.segmentation import run, segmenters
from benchmarks.segmentation.quality import Quality, area_under_curve, dice, objects, quality
from wsiscale.networks import load_network
from wsiscale.testing.procedural import tissue


def discs(*middles: tuple[int, int], radius: float = 6.0) -> np.ndarray:
    y, x = np.mgrid[:64, :64]
    return np.any([np.hypot(y - cy, x - cx) < radius for cy, cx in middles], axis=0)


def test_dice_and_auc_are_what_they_are_called() -> None:
    truth = discs((20, 20), (44, 44))

    assert dice(truth, truth) == 1
    assert dice(~truth, truth) == 0
    assert dice(discs((20, 20)), truth) == pytest.approx(2 / 3, abs=0.01)
    assert area_under_curve(truth.astype(np.float32), truth) == 1
    assert area_under_curve(np.ones(truth.shape, np.float32), truth) == 0.5
    assert area_under_curve(1 - truth.astype(np.float32), truth) == 0


def test_objects_count_where_they_overlap_by_more_than_half() -> None:
    truth = discs((20, 20), (44, 44))

    assert objects(truth, truth, mpp=0.5) == (1, 1)
    assert objects(discs((20, 20)), truth, mpp=0.5) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    f1, pq = objects(discs((20, 20), (44, 46)), truth, mpp=0.5)
    assert f1 == 1
    assert 0.5 < pq < 1
    assert objects(discs((26, 26), (50, 50)), truth, mpp=0.5) == (0, 0)  # less than half
    assert objects(np.zeros_like(truth), truth, mpp=0.5) == (0, 0)


def test_crumbs_are_no_objects() -> None:
    truth = discs((20, 20))

    assert objects(truth | discs((50, 50), radius=1.5), truth, mpp=0.5) == (1, 1)
    assert objects(truth | discs((50, 50), radius=3.5), truth, mpp=0.5)[0] == pytest.approx(2 / 3)


def test_the_bundled_network_is_best_near_its_own_scale() -> None:
    image, nuclei = tissue(512, 512, mpp=0.25, seed=90_001)
    segmenter = segmenters.bundled()

    at = {}
    for mpp in (0.25, 0.5, 1.5):
        nucleus = segmenter.probability(image, mpp / 0.25)
        assert nucleus.shape == nuclei.shape
        at[mpp] = quality(nucleus, nuclei > 0, threshold=segmenter.threshold, mpp=0.25)

    assert at[0.5].dice > 0.8
    assert at[0.5].auc > 0.99
    assert at[0.5].auc > max(at[0.25].auc, at[1.5].auc)


class Dark(nn.Module):
    """Two logits: how dark the middle of a window is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = x.mean(dim=1)[:, 14:18, 14:18].mean(dim=(1, 2))
        return torch.stack([middle * 40, 20 - middle * 40 + 20], dim=1)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_windows_are_put_where_they_were_looked_at(scale: float) -> None:
    truth = np.zeros((256, 200), bool)
    truth[64:128, 96:160] = True
    image = np.where(truth, 20, 240).astype(np.uint8)[..., None].repeat(3, axis=2)
    network = load_network(Dark(), name="dark", tile_size=32)

    found = segmenters._by_windows(network, image, scale)

    assert found.shape == truth.shape
    assert dice(found > 0.5, truth) > 0.85


def test_the_tables_have_a_row_for_each_scale() -> None:
    curves = {
        name: {0.25: Quality(0.8, 0.6, 0.4, 0.3), 0.5: Quality(0.9, best, 0.5, 0.4)} for name, best in (("a", 0.7), ("b", 0.8))
    }

    table = run.curve_table(curves).splitlines()

    assert table[2] == "| 0.25 | 0.800 | 0.600 | 0.400 | 0.300 |"
    assert table[3] == "| 0.5 | 0.900 | 0.750 | 0.500 | 0.400 |"
    assert table[-1].endswith("median 0.5 µm/px.")
