"""RegionsDataset: the same items in the parent process and in forked and spawned workers, and its arguments."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from refdet import store
from refdet.errors import InputError
from refdet.store.dataset import RegionsDataset
from refdet.structures.regions import Regions

pytestmark = pytest.mark.slow

IDS = [9, 4, 7, 30, 2, 11]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dataset") / "a.h5"
    random = np.random.default_rng(0)
    # i % 4 regions, each with a mask of 3 bytes
    rows = [store.ImageRow(i, f"{i}.jpg", 40, 50, "", i % 4, 3 * (i % 4), map_shape=(2, 3, 4)) for i in IDS]
    columns = store.Columns({"pool5": (8,)}, "float16", masks=True, ann_ids=True, maps=("head",))
    with store.create(path, store.Header([], "", {}, {}), columns, rows) as writer:
        for i in IDS:
            n = i % 4
            writer.put(
                Regions(
                    i, f"{i}.jpg", 40, 50, random.random((n, 4), np.float32), random.random(n, np.float32),
                    np.arange(n), np.arange(n) + i,
                    masks=(b"`n1",) * n,  # an RLE of 2000 background pixels
                    features={"pool5": random.random((n, 8)).astype(np.float16)},
                    maps={"head": random.random((2, 3, 4)).astype(np.float16)},
                    im_info=np.array([48, 64, 1.2], np.float32),
                )
            )  # fmt: skip
    return path


def assert_all_items(items: list[dict], path: Path) -> None:
    """Check that items are the images of a store, in its order."""
    with store.open(path) as found:
        assert [item["image_id"] for item in items] == list(found)
        for item, regions in zip(items, (found[i] for i in found), strict=True):
            assert item["size"] == (40, 50) and item["file_name"] == regions.file_name
            assert item["masks"] == regions.rles()
            for values, expected in (
                (item["boxes"], regions.boxes), (item["scores"], regions.scores),
                (item["category_ids"], regions.category_ids), (item["ann_ids"], regions.ann_ids),
                (item["features"]["pool5"], regions.features["pool5"]), (item["maps"]["head"], regions.maps["head"]),
                (item["im_info"], regions.im_info),
            ):  # fmt: skip
                assert torch.equal(values, torch.from_numpy(expected))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_and_the_parent_read_the_same_items(path: Path, method: str) -> None:
    dataset = RegionsDataset(path, masks=True)
    with store.open(path) as parent_store:  # it stays open while the workers read
        assert_all_items([dataset[k] for k in range(len(dataset))], path)
        spawned = method == "spawn"  # such a worker imports torch, which takes seconds, so there is one for both epochs
        loader = DataLoader(dataset, batch_size=2, collate_fn=list, num_workers=1 if spawned else 2,
                            multiprocessing_context=method, persistent_workers=spawned)  # fmt: skip
        for _ in range(2):
            assert_all_items([item for batch in loader for item in batch], path)
            assert_all_items([dataset[k] for k in range(len(dataset))], path)
            assert len(parent_store[30]) == 30 % 4


def test_a_pickled_dataset_opens_the_file_again(path: Path) -> None:
    dataset = RegionsDataset(path, features=("pool5",), image_ids=[30, 9])
    assert [dataset[k]["image_id"] for k in range(len(dataset))] == [30, 9]
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy) == 2 and set(copy[0]) == set(dataset[0])
    assert "masks" not in copy[0] and not copy[0]["maps"] and torch.equal(copy[0]["boxes"], dataset[0]["boxes"])


def test_missing_features_images_and_files_are_named(path: Path) -> None:
    with pytest.raises(InputError, match="a.h5: no fc7"):
        RegionsDataset(path, features=("fc7", "pool5"))
    with pytest.raises(InputError, match="1 requested image missing, first: 5"):
        RegionsDataset(path, image_ids=[9, 5])
    with pytest.raises(InputError, match="no such file"):
        RegionsDataset(path.with_name("b.h5"))


def test_a_string_instead_of_a_list_of_names_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="^features: a list of names is needed, not 'pool5'"):
        RegionsDataset(path, features="pool5")
    with store.open(path) as found, pytest.raises(ValueError, match="^features: a list of names is needed"):
        found.read(9, "pool5")


def test_image_ids_may_be_integers_of_any_library(path: Path) -> None:
    for ids in (np.array([30, 9]), torch.tensor([30, 9]), (30, np.int32(9))):
        assert RegionsDataset(path, image_ids=ids).image_ids == [30, 9]  # type: ignore[arg-type]
    for ids in ([9.0], np.array([30.7]), torch.tensor([9.5]), ["9"], [None]):
        with pytest.raises(ValueError, match="^image_ids: integers are needed, not "):
            RegionsDataset(path, image_ids=ids)  # type: ignore[arg-type]
