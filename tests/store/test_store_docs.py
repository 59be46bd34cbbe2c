"""The examples in docs/features.md run, and the page names all HDF5 datasets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from refdet import store
from refdet.structures.regions import Regions

PAGE = Path(__file__).resolve().parents[2] / "docs" / "features.md"


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    columns = store.Columns({"pool5": (4,), "fc7": (8,)}, masks=True, maps=("head",))
    pixels = np.asfortranarray(random.random((6, 9, 7)) < 0.5, np.uint8)
    masks = tuple(coco_mask.encode(np.asfortranarray(mask))["counts"] for mask in pixels)
    head = random.random((2, 3, 4)).astype(np.float32)
    ids = (7, 5, 9)
    rows = [store.ImageRow(i, f"{i}.jpg", 9, 7, "", 6, sum(map(len, masks)), (2, 3, 4)) for i in ids]
    header = store.Header([{"id": 1, "name": "person"}], "{}", {"excluded": {}}, {})
    with store.create(tmp_path / "features.h5", header, columns, rows) as writer:
        for i in ids:
            writer.put(
                Regions(
                    i, f"{i}.jpg", 9, 7, np.tile(np.float32([1, 1, 4, 5]), (6, 1)), random.random(6, np.float32),
                    np.ones(6, np.int64), masks=masks,
                    features={"pool5": np.ones((6, 4), np.float32), "fc7": np.ones((6, 8), np.float32)},
                    maps={"head": head}, im_info=np.array([48, 64, 1.2], np.float32),
                )
            )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)  # a later example uses variables of those before
    np.testing.assert_array_equal(np.stack(names["masks"]), pixels)
    np.testing.assert_array_equal(names["head"], head)
    assert len(names["first_ten"]) == 3 and len(names["frame"]) == 18 and names["index"] == 0
    assert names["fc7"].shape == (6, 8) and names["item"]["boxes"].shape == (6, 4)


def test_the_page_names_all_datasets() -> None:
    text = PAGE.read_text(encoding="utf-8")
    # the first name is "images", the group
    for name in store.Columns({}, masks=True, ann_ids=True, maps=("head",)).checksum_names()[1:]:
        assert f"`/{name}`" in text
