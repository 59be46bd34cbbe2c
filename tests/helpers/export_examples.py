"""Stores and a REFER folder for the tests of exports: two images with regions, and an unreadable one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from evaluate_examples import PROVENANCE
from pycocotools import mask as coco_mask
from refer_examples import INSTANCES, ref, write
from store_examples import write_regions

from refdet import store
from refdet.structures.regions import Regions

CLASSES = [{"id": 2, "name": "cat"}, {"id": 1, "name": "dog"}]
HEIGHT, WIDTH = 6, 8
REFS = [ref(0, 7, 3, "train"), ref(1, 8, 3, "train", 2), ref(2, 9, 4, "testB"), ref(3, 6, 4, "testB"),
        ref(4, 11, 5, "val")]  # fmt: skip
# a crowd, which extraction ignores, and an image without refs
CROWD = {
    "id": 12,
    "image_id": 4,
    "category_id": 1,
    "bbox": [0, 0, 8, 6],
    "iscrowd": 1,
    "segmentation": [[0, 0, 8, 0, 8, 6]],
}
ALONE = {"id": 6, "file_name": "6.jpg", "height": HEIGHT, "width": WIDTH}
DATASET = INSTANCES | {
    "images": [ALONE, *INSTANCES["images"]],
    "annotations": [INSTANCES["annotations"][0], CROWD, *INSTANCES["annotations"][1:]],
}


def boxes_to_masks(boxes: np.ndarray) -> tuple[bytes, ...]:
    """A mask of the pixels in each box (N, 4) xyxy, as counts of a compressed RLE."""
    masks = []
    for x1, y1, x2, y2 in np.round(boxes).astype(int).tolist():
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        pixels[y1:y2, x1:x2] = 1
        masks.append(coco_mask.encode(pixels)["counts"])
    return tuple(masks)


def regions(image_id: int, categories: list[int], scores: list[float], ann_ids: list[int] | None = None) -> Regions:
    n, random = len(categories), np.random.default_rng(image_id)
    low = random.uniform(0, 3, (n, 2))
    boxes = np.concatenate([low, low + random.uniform(1, 3, (n, 2))], axis=1).astype(np.float32)
    return Regions(
        image_id, f"COCO_train2014_{image_id:012}.jpg", HEIGHT, WIDTH, boxes,
        np.array(scores, np.float32), np.array(categories, np.int64),
        ann_ids=None if ann_ids is None else np.array(ann_ids, np.int64), masks=boxes_to_masks(boxes),
        features={"pool5": random.random((n, 1024), np.float32), "fc7": random.random((n, 2048), np.float32)},
    )  # fmt: skip


BROKEN = Regions.empty(5, "COCO_train2014_000000000005.jpg", HEIGHT, WIDTH, "cannot be read")
DETECTIONS = [regions(4, [1, 2, 1, 2], [0.9, 0.8, 0.95, 0.85]), regions(3, [1], [0.7]), BROKEN]
ANNOTATIONS = [regions(3, [1, 2], [1, 1], [7, 8]), regions(4, [1, 1], [1, 1], [9, 6]), BROKEN]


def write_store(path: Path, images: list[Regions], dtype: str = "float32", **changes: Any) -> Path:
    """Write a store of these images; ``changes`` are fields of `refdet.store.Columns`."""
    first = images[0]
    columns = {
        "features": {name: values.shape[1:] for name, values in first.features.items()}, "dtype": dtype,
        "masks": first.masks is not None, "ann_ids": first.ann_ids is not None,
    } | changes  # fmt: skip
    header = store.Header(CLASSES, "name: test", PROVENANCE, {"dtype": dtype})
    return write_regions(path, images, header, store.Columns(**columns))


def add_heads(path: Path, heads: list[np.ndarray | None], infos: list[tuple[float, float, float]]) -> None:
    """Add the feature map ``head`` of each image to a store, as extraction writes it."""
    shapes = [(0, 0, 0) if head is None else head.shape for head in heads]
    flat = [np.zeros(0, np.float32) if head is None else head.ravel() for head in heads]
    with h5py.File(path, "a") as file:
        maps = file.create_group("maps")
        maps["head"] = np.concatenate(flat).astype(np.float32)
        maps["head_start"] = np.cumsum([0, *map(len, flat)])
        maps["head_shape"] = np.array(shapes, np.int64)
        maps["im_info"] = np.array(infos, np.float32)


def write_dataset(root: Path) -> Path:
    """Write the REFER folder below ``root``, which is returned."""
    return write(root, REFS, instances=DATASET)
