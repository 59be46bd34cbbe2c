"""Masks of a store are RLEs of their images, or nobody gets them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from evaluate_examples import regions, write_refer, write_store
from pycocotools import mask as coco_mask

from refdet import store
from refdet.errors import InputError
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refdet.store import Store

pytestmark = pytest.mark.slow

BOXES = {1: [[10, 10, 30, 30], [50, 50, 60, 60]], 2: [[0, 0, 40, 20]], 3: []}
Change = Callable[[np.random.Generator, list[bytes]], list[bytes]]


def whole(size: tuple[int, int]) -> bytes:
    counts: bytes = coco_mask.frPyObjects({"size": list(size), "counts": [0, size[0] * size[1]]}, *size)["counts"]
    return counts


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "a.h5"
    images = [regions(i, boxes, masks=(whole((100, 120)),) * len(boxes)) for i, boxes in BOXES.items()]
    write_store(path, images, masks=True)
    return path


def with_masks(good: Path, path: Path, change: Change, seed: int = 0) -> Path:
    """The store with its masks replaced by what ``change`` makes of them."""
    shutil.copy(good, path)
    with h5py.File(path, "r+") as file:
        starts, text = file["regions/mask_start"][:], file["regions/mask_counts"][:].tobytes()
        masks = [text[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
        masks = change(np.random.default_rng(seed), masks)
        del file["regions/mask_counts"], file["regions/mask_start"]
        file["regions/mask_counts"] = np.frombuffer(b"".join(masks), np.uint8)
        file["regions/mask_start"] = np.cumsum([0, *map(len, masks)]).astype(np.int64)
    return path


def noise(random: np.random.Generator, masks: list[bytes]) -> list[bytes]:
    return [random.bytes(int(random.integers(1, 60))) for _ in masks]


def letters(random: np.random.Generator, masks: list[bytes]) -> list[bytes]:
    return [bytes(random.integers(48, 112, int(random.integers(1, 60))).tolist()) for _ in masks]


CHANGES: dict[str, Change] = {
    "noise": noise,
    "letters": letters,
    "of another size": lambda random, masks: [whole((100, 121)) for _ in masks],
    "one pixel less": lambda random, masks: [masks[0], whole((11_999, 1)), masks[2]],
    "none": lambda random, masks: [b"" for _ in masks],
    "cut": lambda random, masks: [mask[:-1] for mask in masks],
    "longer": lambda random, masks: [mask + b"1" for mask in masks],
    "of a neighbor": lambda random, masks: [masks[0] + masks[1][:2], masks[1][2:], masks[2]],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_no_mask_of_its_image_is_damage(good: Path, tmp_path: Path, change: str, seed: int) -> None:
    path = with_masks(good, tmp_path / "b.h5", CHANGES[change], seed)
    with store.open(path) as found:
        with pytest.raises(InputError, match=r"b\.h5: damaged: .*mask.*image 1 .*120x100.*; extract it again"):
            found.read(1)
        assert len(found.read(3)) == 0


def test_good_masks_come_back(good: Path, tmp_path: Path) -> None:
    path = with_masks(good, tmp_path / "b.h5", lambda random, masks: masks)
    with store.open(path) as found:
        assert found.read(1).masks == (whole((100, 120)),) * 2 and found.read(3).masks == ()


def test_evaluation_refuses_them_before_pycocotools(good: Path, tmp_path: Path) -> None:
    objects = [{"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1, "split": "val"}]
    root = write_refer(tmp_path / "refer", objects)
    assert evaluate_on_refer(good, root, "toy", "me")["splits"]["val"]["detection"]["segm"]["AP"] == 0
    with pytest.raises(InputError, match="damaged: .*mask"):
        evaluate_on_refer(with_masks(good, tmp_path / "b.h5", noise), root, "toy", "me")


def test_no_way_into_a_store_goes_round_the_check(good: Path, tmp_path: Path) -> None:
    path = with_masks(good, tmp_path / "b.h5", letters)
    ways: list[Callable[[Store], object]] = [
        lambda s: s[1], lambda s: s[:1], lambda s: s.read(1, features=()), lambda s: s.read(2).rles()
    ]  # fmt: skip
    for way in ways:
        with store.open(path) as found, pytest.raises(InputError, match="damaged"):
            way(found)
