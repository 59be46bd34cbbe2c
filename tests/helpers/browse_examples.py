"""Stores with random regions near annotated objects, to browse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from store_examples import write_regions

from refdet import store
from refdet.data.coco import CocoIndex, ImageRecord
from refdet.structures.regions import Regions


def write_random_store(
    path: Path, instances: Path, *, seed: int = 0, masks: bool = True, failed: int | None = None
) -> Path:
    """Write a store with a region near each annotated object of an instances file, and three random ones per image.

    Args:
        path: the store to write.
        instances: the instances file.
        seed: seed of the random regions.
        masks: whether regions have masks, which are ellipses in their boxes.
        failed: id of an image to store as unreadable.
    """
    index = CocoIndex.load(instances)
    random = np.random.default_rng(seed)
    images = [
        Regions.empty(record.id, record.file_name, record.height, record.width, "not a readable <b>image</b>")
        if record.id == failed
        else _random_regions(record, index, random, masks)
        for record in index.images.values()
    ]
    classes = [{"id": i, "name": name} for i, name in index.categories.items()]
    return write_regions(path, images, store.Header(classes, "", {}, {}), store.Columns(masks=masks))


def _random_regions(record: ImageRecord, index: CocoIndex, random: np.random.Generator, masks: bool) -> Regions:
    objects = index.annotations[record.id]
    size = np.array([record.width, record.height] * 2, np.float64)
    near = np.array([o.box for o in objects], np.float64).reshape(-1, 4)
    sides = np.tile(near[:, 2:] - near[:, :2], 2)
    near = near + random.normal(0, 0.12, near.shape) * sides
    corners = np.sort(random.uniform(0, 1, (3, 2, 2)), axis=1).reshape(3, 4) * size
    boxes = np.concatenate([near, corners]).clip(0, size)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    annotated = [o.category_id for o in objects]
    categories = np.array([*annotated, *random.choice(list(index.categories), 3)], np.int64)
    scores = np.round(random.uniform(0.05, 1, len(boxes)), 3).astype(np.float32)
    ellipses = tuple(_ellipse_mask(box, record.height, record.width) for box in boxes) if masks else None
    return Regions(
        record.id,
        record.file_name,
        record.height,
        record.width,
        boxes.astype(np.float32),
        scores,
        categories,
        masks=ellipses,
    )


def _ellipse_mask(box: np.ndarray, height: int, width: int) -> bytes:
    x1, y1, x2, y2 = box
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((x - (x1 + x2) / 2) / (x2 - x1)) ** 2 + ((y - (y1 + y2) / 2) / (y2 - y1)) ** 2 <= 0.25
    counts: bytes = coco_mask.encode(np.asfortranarray(inside, np.uint8))["counts"]
    return counts
