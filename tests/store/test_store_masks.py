"""Masks are checked when they are read from a store: each must be an RLE of its image's size."""

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


def full_mask(size: tuple[int, int]) -> bytes:
    """Counts of an RLE that covers an image of this (height, width)."""
    counts: bytes = coco_mask.frPyObjects({"size": list(size), "counts": [0, size[0] * size[1]]}, *size)["counts"]
    return counts


@pytest.fixture(scope="module")
def valid_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "a.h5"
    images = [regions(i, boxes, masks=(full_mask((100, 120)),) * len(boxes)) for i, boxes in BOXES.items()]
    write_store(path, images, masks=True)
    return path


def copy_with_masks(valid_store: Path, path: Path, change: Change, seed: int = 0) -> Path:
    """Copy the store, with its masks changed by ``change``."""
    shutil.copy(valid_store, path)
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
    "another size": lambda random, masks: [full_mask((100, 121)) for _ in masks],
    "one pixel less": lambda random, masks: [masks[0], full_mask((11_999, 1)), masks[2]],
    "empty": lambda random, masks: [b"" for _ in masks],
    "truncated": lambda random, masks: [mask[:-1] for mask in masks],
    "longer": lambda random, masks: [mask + b"1" for mask in masks],
    "shifted boundary": lambda random, masks: [masks[0] + masks[1][:2], masks[1][2:], masks[2]],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_invalid_mask_is_reported_as_damage(valid_store: Path, tmp_path: Path, change: str, seed: int) -> None:
    path = copy_with_masks(valid_store, tmp_path / "b.h5", CHANGES[change], seed)
    with store.open(path) as found:
        with pytest.raises(InputError, match=r"b\.h5: damaged: .*mask.*image 1 .*120x100.*; extract it again"):
            found.read(1)
        assert len(found.read(3)) == 0


def test_valid_masks_are_read(valid_store: Path, tmp_path: Path) -> None:
    path = copy_with_masks(valid_store, tmp_path / "b.h5", lambda random, masks: masks)
    with store.open(path) as found:
        assert found.read(1).masks == (full_mask((100, 120)),) * 2 and found.read(3).masks == ()


def test_evaluation_refuses_invalid_masks(valid_store: Path, tmp_path: Path) -> None:
    objects = [{"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1, "split": "val"}]
    root = write_refer(tmp_path / "refer", objects)
    assert evaluate_on_refer(valid_store, root, "toy", "me")["splits"]["val"]["detection"]["segm"]["AP"] == 0
    with pytest.raises(InputError, match="damaged: .*mask"):
        evaluate_on_refer(copy_with_masks(valid_store, tmp_path / "b.h5", noise), root, "toy", "me")


def test_every_way_to_read_masks_checks_them(valid_store: Path, tmp_path: Path) -> None:
    path = copy_with_masks(valid_store, tmp_path / "b.h5", letters)
    ways: list[Callable[[Store], object]] = [
        lambda s: s[1], lambda s: s[:1], lambda s: s.read(1, features=()), lambda s: s.read(2).rles()
    ]  # fmt: skip
    for way in ways:
        with store.open(path) as found, pytest.raises(InputError, match="damaged"):
            way(found)
