"""A small REFER dataset, which tests can write with valid or invalid contents."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def ref(ref_id: int, ann_id: Any, image_id: int, split: str, category_id: Any = 1) -> dict[str, Any]:
    sentence = {"sent_id": 10 * ref_id, "sent": "red dog", "raw": "Red dog", "tokens": ["red", "dog"]}
    return {
        "ref_id": ref_id, "ann_id": ann_id, "category_id": category_id, "image_id": image_id, "split": split,
        "file_name": "x.jpg", "sent_ids": [10 * ref_id], "sentences": [sentence],
    }  # fmt: skip


REFS = [ref(0, 7, 3, "train"), ref(1, 8, 3, "testA", 2), ref(2, 9, 4, "testB"), ref(3, 6, 4, "val")]
GREFS = [
    ref(0, [7, 8], 3, "train", [1, 2]),
    ref(1, [-1], 3, "train", [-1]),
    ref(2, [9], 4, "val", [1]),
    ref(3, [6, 9], 4, "val", [1, 1]),
]
INSTANCES: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "height": 6, "width": 8} for i in (3, 4, 5)],
    "annotations": [
        {"id": i, "image_id": image, "category_id": 2 if i == 8 else 1, "bbox": [i - 6, 0, 4, 2], "iscrowd": 0,
         "segmentation": [[0, 0, 4, 0, 4, 2, 0, 2], [0, 0, i - 5, 0, i - 5, 4, 0, 4]]}
        for i, image in ((6, 4), (7, 3), (8, 3), (9, 4), (11, 5))
    ],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
}  # fmt: skip


def write(
    root: Path, refs: Any = REFS, name: str = "refs(unc).p", dataset: str = "refcoco", protocol: int = 2,
    instances: Any = INSTANCES,
) -> Path:  # fmt: skip
    """Write refs and instances below a root, and return the root; bytes are written unchanged."""
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(refs, bytes):
        refs = json.dumps(refs).encode() if name.endswith(".json") else pickle.dumps(refs, protocol=protocol)
    (folder / name).write_bytes(refs)
    if not isinstance(instances, bytes):
        instances = json.dumps(instances).encode()
    (folder / "instances.json").write_bytes(instances)
    return root


def refclef(root: Path) -> Path:
    """Write a dataset like RefClef, where a mask is a list of RLEs: here three rows, and a column."""
    rows, column = np.zeros((2, 6, 8), np.uint8, order="C")
    rows[:3], column[:, 7] = 1, 1
    parts = [coco_mask.encode(np.asfortranarray(part)) for part in (rows, column)]
    written = [part | {"counts": part["counts"].decode()} for part in parts]
    instances = INSTANCES | {"annotations": [a | {"segmentation": written} for a in INSTANCES["annotations"]]}
    for by in ("unc", "berkeley"):
        write(root, [*REFS, ref(4, 6, 4, "testAB")], f"refs({by}).p", "refclef", instances=instances)
    return root
