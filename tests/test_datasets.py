"""The tiles of stores as a torch dataset."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import written
from torch.utils.data import DataLoader

from wsiscale import datasets
from wsiscale.datasets import StoreDataset
from wsiscale.errors import OptionError
from wsiscale.labels import write_labels
from wsiscale.store import open_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("stores")
    return [written(folder / "a.ome.zarr"), written(folder / "b.ome.zarr", mpp=1.0, tile_size=64)]


def halved(image: torch.Tensor) -> torch.Tensor:
    return image.float() / 510


def test_samples_are_the_stores_tiles_one_store_after_another(stores: list[Path]) -> None:
    dataset = StoreDataset(stores, 100, halo=10)

    expected = [(store, pixels, tile) for store in stores for pixels, tile in open_store(store).tiles(100, halo=10)]
    assert len(dataset) == len(expected)
    for n, (store, pixels, tile) in enumerate(expected):
        sample = dataset[n]
        assert sample["image"].shape == (3, 120, 120)
        assert sample["image"].dtype == torch.uint8
        np.testing.assert_array_equal(sample["image"].numpy().transpose(1, 2, 0), pixels)
        assert sample["store"] == str(store)
        assert [sample[name] for name in ("row", "col", "y", "x")] == [tile.row, tile.col, tile.y, tile.x]
        assert sample["index"] == n
        assert dataset.tile(n) == tile


def test_an_index_from_the_end_and_one_beyond_it(stores: list[Path]) -> None:
    dataset = StoreDataset(stores[0])

    assert dataset[-1]["index"] == len(dataset) - 1
    with pytest.raises(IndexError):
        dataset[len(dataset)]


# torch's workers leave queues and sockets to the collector.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(("start", "workers"), [("fork", 2), pytest.param("spawn", 2, marks=pytest.mark.slow), (None, 0)])
def test_any_worker_reads_the_same(stores: list[Path], start: str | None, workers: int) -> None:
    dataset = StoreDataset(stores, 100, transform=halved)
    dataset[0]  # what is open here must not trouble those that are forked

    loader = DataLoader(dataset, batch_size=7, num_workers=workers, multiprocessing_context=start)
    batches = list(loader)

    images = torch.cat([batch["image"] for batch in batches])
    assert [n for batch in batches for n in batch["index"].tolist()] == list(range(len(dataset)))
    torch.testing.assert_close(images, torch.stack([dataset[n]["image"] for n in range(len(dataset))]))
    assert batches[0]["store"] == [str(stores[0])] * 7


def test_a_dataset_pickles_without_what_it_has_open(stores: list[Path]) -> None:
    dataset = StoreDataset(stores, 100)
    dataset[0]

    again = pickle.loads(pickle.dumps(dataset))

    assert not again._opened
    torch.testing.assert_close(again[3]["image"], dataset[3]["image"])


def test_few_stores_are_open_at_a_time(stores: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_OPEN", 1)
    dataset = StoreDataset(stores, 100)

    first, last = dataset[0]["image"], dataset[-1]["image"]

    assert len(dataset._opened) == 1
    torch.testing.assert_close(dataset[0]["image"], first)
    torch.testing.assert_close(dataset[-1]["image"], last)


def test_masks_of_batches_find_their_way_back(stores: list[Path], tmp_path: Path) -> None:
    store = written(tmp_path / "s.ome.zarr")
    dataset = StoreDataset(store, 100, halo=8)

    def masks():  # type: ignore[no-untyped-def]
        for batch in DataLoader(dataset, batch_size=4, shuffle=True):
            for mask, index in zip(batch["image"][:, 0], batch["index"], strict=True):
                yield mask, dataset.tile(index)

    write_labels(store, "red", masks())

    opened = open_store(store)
    for pixels, tile in opened.tiles(100):
        found = opened.label("red")[0][tile.row : tile.row + 100, tile.col : tile.col + 100]
        np.testing.assert_array_equal(found, pixels[: found.shape[0], : found.shape[1], 0])


def test_no_store_is_an_error() -> None:
    with pytest.raises(OptionError, match="at least one store"):
        StoreDataset([])
