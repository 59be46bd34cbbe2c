"""Predictions of a comprehension model: for a sentence a region of the store, a box or a segmentation.

For gRefCOCO, where a sentence may refer to no or several objects, a list of them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refdet.data.coco import ImageRecord
from refdet.data.segmentations import to_rle
from refdet.errors import InputError
from refdet.evaluate.entries import entries_by_id
from refdet.store import Store

_KINDS = ("region", "box", "segmentation")
_FARTHEST = 1e9  # pixels; areas stay far within the range of floats
_LISTS = {"regions": "region", "boxes": "box", "segmentations": "segmentation"}


@dataclass(frozen=True)
class Prediction:
    """What a model says a sentence refers to.

    Attributes:
        boxes: (n, 4) float64 half-open xyxy in pixels; n is 1 but for gRefCOCO.
        masks: n RLEs of the whole image, None where only boxes are known.
    """

    boxes: np.ndarray
    masks: tuple[dict, ...] | None


def load_predictions(
    path: Path, store: Store, images: Mapping[int, ImageRecord], several: bool = False
) -> dict[int, Prediction]:
    """Read and check a predictions JSON.

    Arguments:
        path: ``[{"sent_id", "region": row} | {"sent_id", "box": [x, y, w, h]} | {"sent_id", "segmentation"}]``.
        store: the store whose rows are meant.
        images: sentence id -> its image, for every sentence of the dataset.
        several: an entry may instead have a list, empty for "no such object": ``regions``, ``boxes`` or
            ``segmentations``. A segmentation without a pixel then is no object.

    Returns:
        sentence id -> prediction.

    Raises:
        InputError: names the file and the entry that is wrong.
    """
    found: dict[int, Prediction] = {}
    for where, sent_id, entry in entries_by_id(path, {"sent_id": int}, "sentence", "a prediction", images):
        try:
            found[sent_id] = _prediction(entry, images[sent_id], store, several)
        except InputError as error:
            raise InputError(f"{where} (sentence {sent_id}): {error}") from None
    return found


def _prediction(entry: dict[str, Any], image: ImageRecord, store: Store, several: bool) -> Prediction:
    kinds = [kind for kind in (*_KINDS, *_LISTS) if kind in entry]
    if len(kinds) != 1:
        lists = f" or a list of them: {', '.join(_LISTS)}" if several else ""
        raise InputError(f"it must have one of region, box and segmentation{lists}; it has {kinds or 'none'}")
    kind, value = kinds[0], entry[kinds[0]]
    if kind in _LISTS:
        if not several:
            raise InputError(f"{kind} is for gRefCOCO; a sentence of this dataset means one object: {_LISTS[kind]}")
        if not isinstance(value, list):
            raise InputError(f"{kind} must be a list, [] for no object, not {value!r:.40}")
    read = {"region": _region, "box": _box, "segmentation": _segmentation}[_LISTS.get(kind, kind)]
    parts = [read(one, image, store) for one in (value if kind in _LISTS else [value])]
    if several:
        parts = [(box, mask) for box, mask in parts if mask is None or coco_mask.area(mask)]
    boxes, masks = np.array([box for box, _ in parts], np.float64).reshape(-1, 4), [mask for _, mask in parts]
    known = tuple(mask for mask in masks if mask is not None)
    return Prediction(boxes, known if len(known) == len(masks) else None)


def _region(row: Any, image: ImageRecord, store: Store) -> tuple[np.ndarray, dict | None]:
    if type(row) is not int or not 0 <= row < store.regions:
        raise InputError(f"region {row!r:.40} is no row of {store.path}, which has rows 0 to {store.regions - 1}")
    image_id, place = store.region(row)
    if image_id != image.id:
        raise InputError(f"region {row} is of image {image_id}, the sentence is of image {image.id}")
    regions = store.read(image_id, features=())
    masks = regions.rles()
    return regions.boxes[place].astype(np.float64), masks[place] if masks else None


def _box(value: Any, image: ImageRecord, store: Store) -> tuple[np.ndarray, dict | None]:
    numbers = isinstance(value, list) and len(value) == 4 and all(type(v) in (int, float) for v in value)
    # An integer may be beyond the range of floats, but it can be compared with one; NaN is in no range.
    if not numbers or not all(-_FARTHEST <= v <= _FARTHEST for v in value) or value[2] < 0 or value[3] < 0:
        raise InputError(f"box {reprlib.repr(value)[:60]} must be four numbers [x, y, width, height] of pixels")
    x, y, width, height = value
    return np.array([x, y, x + width, y + height], np.float64), None


def _segmentation(value: Any, image: ImageRecord, store: Store) -> tuple[np.ndarray, dict | None]:
    if not isinstance(value, dict):
        raise InputError('segmentation must be an RLE {"size": [height, width], "counts": ...}')
    mask = to_rle(value, image.height, image.width)
    x, y, width, height = coco_mask.toBbox(mask).tolist()
    return np.array([x, y, x + width, y + height]), mask
