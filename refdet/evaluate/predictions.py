"""Predictions of a comprehension model: for a sentence a region of the store, a box or a segmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refdet.data.coco import ImageRecord, read_json
from refdet.data.segmentations import to_rle
from refdet.errors import InputError
from refdet.store import Store


@dataclass(frozen=True)
class Prediction:
    """What a model says a sentence refers to.

    Attributes:
        box: (4,) float64 half-open xyxy in pixels.
        mask: RLE of the whole image, None where only a box is known.
    """

    box: np.ndarray
    mask: dict | None


def load_predictions(path: Path, store: Store, images: Mapping[int, ImageRecord]) -> dict[int, Prediction]:
    """Read and check a predictions JSON.

    Arguments:
        path: ``[{"sent_id", "region": row} | {"sent_id", "box": [x, y, w, h]} | {"sent_id", "segmentation"}]``.
        store: the store whose rows are meant.
        images: sentence id -> its image, for every sentence of the dataset.

    Returns:
        sentence id -> prediction.

    Raises:
        InputError: names the file and the entry that is wrong.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise InputError(f"{path}: predictions are a list of objects with sent_id, this is a {type(entries).__name__}")
    found: dict[int, Prediction] = {}
    for position, entry in enumerate(entries):
        where = f"{path}: entry {position}"
        if not isinstance(entry, dict) or type(entry.get("sent_id")) is not int:
            raise InputError(f"{where}: it must be an object with an integer sent_id")
        sent_id = entry["sent_id"]
        if sent_id not in images:
            raise InputError(f"{where}: sentence {sent_id} is not in this dataset and split_by")
        if sent_id in found:
            raise InputError(f"{where}: sentence {sent_id} has a prediction already")
        kinds = [kind for kind in ("region", "box", "segmentation") if kind in entry]
        if len(kinds) != 1:
            raise InputError(f"{where}: it must have one of region, box and segmentation, it has {kinds or 'none'}")
        read = {"region": _region, "box": _box, "segmentation": _segmentation}[kinds[0]]
        try:
            found[sent_id] = read(entry[kinds[0]], images[sent_id], store)
        except InputError as error:
            raise InputError(f"{where} (sentence {sent_id}): {error}") from None
    return found


def _region(row: Any, image: ImageRecord, store: Store) -> Prediction:
    if type(row) is not int or not 0 <= row < store.regions:
        raise InputError(f"region {row!r:.40} is no row of {store.path}, which has rows 0 to {store.regions - 1}")
    image_id, place = store.region(row)
    if image_id != image.id:
        raise InputError(f"region {row} is of image {image_id}, the sentence is of image {image.id}")
    regions = store.read(image_id, features=())
    masks = regions.rles()
    return Prediction(regions.boxes[place].astype(np.float64), masks[place] if masks else None)


def _box(value: Any, image: ImageRecord, store: Store) -> Prediction:
    numbers = isinstance(value, list) and len(value) == 4 and all(type(v) in (int, float) for v in value)
    if not numbers or not all(map(math.isfinite, value)) or value[2] < 0 or value[3] < 0:
        raise InputError(f"box {value!r:.60} must be four numbers [x, y, width, height]")
    x, y, width, height = value
    return Prediction(np.array([x, y, x + width, y + height], np.float64), None)


def _segmentation(value: Any, image: ImageRecord, store: Store) -> Prediction:
    if not isinstance(value, dict):
        raise InputError('segmentation must be an RLE {"size": [height, width], "counts": ...}')
    mask = to_rle(value, image.height, image.width)
    try:
        x, y, width, height = coco_mask.toBbox(mask).tolist()
    except Exception as error:  # pycocotools raises plain Exception
        raise InputError(f"segmentation cannot be decoded ({error})") from None
    return Prediction(np.array([x, y, x + width, y + height]), mask)
