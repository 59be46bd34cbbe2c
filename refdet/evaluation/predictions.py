"""Predictions of a comprehension model: a region of the store, a box or a segmentation for each sentence.

For gRefCOCO, where a sentence may refer to any number of objects, a prediction may also be a list of these; for other
datasets, a ranked list of boxes or regions, best first.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refdet.data.box_format import DEFAULT_FORMAT, FORMATS, BoxFormat, resolve_box_format
from refdet.data.coco import ImageRecord
from refdet.data.segmentations import to_rle
from refdet.errors import InputError
from refdet.evaluation.entries import iter_entries
from refdet.store import Store

log = logging.getLogger(__name__)

# Keys of an entry that hold one answer, a list of answers, or a ranked list; for lists, with the key of one answer.
_SINGLE = ("region", "box", "segmentation")
_LISTS = {"regions": "region", "boxes": "box", "segmentations": "segmentation"}
_RANKED = {"ranked_regions": "region", "ranked_boxes": "box"}
_MAX_COORDINATE = 1e9  # in pixels, which keeps areas from overflowing


@dataclass(frozen=True)
class Prediction:
    """The prediction for a sentence.

    Attributes:
        boxes: (n, 4) float64 half-open xyxy in pixels of the image; n is 1 except for gRefCOCO.
        masks: n COCO RLEs of full-image masks, or None if a region or box has no mask.
        ranked: (k, 4) float64 boxes like ``boxes``, best first; ``boxes`` is the first of them. None without a ranking.
    """

    boxes: np.ndarray
    masks: tuple[dict, ...] | None
    ranked: np.ndarray | None = None


def load_predictions(
    path: Path,
    store: Store,
    images: Mapping[int, ImageRecord],
    generalized: bool = False,
    box_format: str = DEFAULT_FORMAT,
) -> dict[int, Prediction]:
    """Read and check a predictions JSON; log a warning if the boxes seem to be in another format.

    Args:
        path: ``[{"sent_id", "region": row} | {"sent_id", "box": [x, y, w, h]} | {"sent_id", "segmentation"}]``, or
            ``ranked_regions`` or ``ranked_boxes``, a list with the best first.
        store: the store whose rows ``region`` refers to.
        images: sentence id -> its image, for every sentence of the dataset.
        generalized: whether the dataset is gRefCOCO. Entries may then have a list instead, empty for "no such object":
            ``regions``, ``boxes`` or ``segmentations``; an empty segmentation counts as no object, and ranked lists are
            refused.
        box_format: format of the boxes, one of `refdet.data.box_format.NAMES`.

    Returns:
        Sentence id -> prediction.

    Raises:
        InputError: an entry is invalid; the message names the file and the entry.
    """
    entries = list(iter_entries(path, {"sent_id": int}, "sentence", images))
    boxes, sizes = [], []
    for _, sent_id, entry in entries:
        for box in _boxes(entry):
            boxes.append(box)
            sizes.append((images[sent_id].width, images[sent_id].height))
    format_name, warnings = resolve_box_format(box_format, np.array(boxes), np.array(sizes))
    for warning in warnings:
        level, _, text = warning.partition(": ")  # such as "note: ..."
        log.warning("%s: %s: %s", level, path, text)
    reader = _Reader(store, FORMATS[format_name], generalized)
    predictions: dict[int, Prediction] = {}
    for where, sent_id, entry in entries:
        try:
            predictions[sent_id] = reader.prediction(entry, images[sent_id])
        except InputError as error:
            raise InputError(f"{where} (sentence {sent_id}): {error}") from None
    return predictions


def _boxes(entry: Mapping[str, Any]) -> Iterator[list[float]]:
    """The boxes of an entry, in the format of the file, without invalid ones."""
    for boxes in ([entry.get("box")], entry.get("boxes"), entry.get("ranked_boxes")):
        if isinstance(boxes, list):
            yield from (box for box in boxes if _is_box(box))


def _is_box(value: Any) -> bool:
    """Whether a JSON value is a list of four numbers within +-`_MAX_COORDINATE`."""
    is_four_numbers = isinstance(value, list) and len(value) == 4 and all(type(v) in (int, float) for v in value)
    # These comparisons work for integers beyond the range of floats too, and are False for NaN.
    return is_four_numbers and all(-_MAX_COORDINATE <= v <= _MAX_COORDINATE for v in value)


@dataclass(frozen=True)
class _Reader:
    """Converts entries of a predictions JSON to predictions.

    Attributes:
        store: the store whose rows ``region`` refers to.
        box_format: format of the boxes.
        generalized: whether the dataset is gRefCOCO.
    """

    store: Store
    box_format: BoxFormat
    generalized: bool

    def prediction(self, entry: Mapping[str, Any], image: ImageRecord) -> Prediction:
        """The prediction of an entry, whose sentence is about ``image``; InputError if it is invalid."""
        keys = [key for key in (*_SINGLE, *_LISTS, *_RANKED) if key in entry]
        if len(keys) != 1:
            lists = " or a list of them: " + ", ".join(_LISTS if self.generalized else _RANKED)
            raise InputError(f"it must have one of region, box and segmentation{lists}; it has {keys or 'none'}")
        key, value = keys[0], entry[keys[0]]
        if key not in _SINGLE:
            self._check_list(key, value)
        kind = (_LISTS | _RANKED).get(key, key)
        answers = self._read_answers(kind, [value] if key in _SINGLE else value, image)
        if self.generalized and kind == "segmentation":  # but a region whose mask is empty still has its box
            answers = [(box, mask) for box, mask in answers if coco_mask.area(mask)]
        boxes = np.array([box for box, _ in answers], np.float64).reshape(-1, 4)
        if key in _RANKED:
            return Prediction(boxes[:1], _masks(answers[:1]), ranked=boxes)
        return Prediction(boxes, _masks(answers))

    def _check_list(self, key: str, value: Any) -> None:
        """Raise an InputError if the dataset does not allow lists under this key, or the value is not a valid list."""
        if key in _LISTS:
            if not self.generalized:
                raise InputError(
                    f"{key} is for gRefCOCO; a sentence of this dataset means one object: "
                    f"{_LISTS[key]}, or ranked_regions or ranked_boxes, the best first"
                )
            if not isinstance(value, list):
                raise InputError(f"{key} must be a list, [] for no object, not {value!r:.40}")
        elif self.generalized:
            raise InputError(
                f"{key} is not for gRefCOCO, whose answers are all the objects that a sentence refers to, unranked: "
                f"give {key.removeprefix('ranked_')}"
            )
        elif not isinstance(value, list) or not value:
            raise InputError(
                f"{key} must be a list of at least one, the best first, not {value!r:.40}; leave out a "
                "sentence without an answer"
            )

    def _read_answers(self, kind: str, values: list[Any], image: ImageRecord) -> list[tuple[np.ndarray, dict | None]]:
        """Read answers of one kind, a key of `_SINGLE`.

        Returns:
            Box (4,) of each answer, half-open xyxy in pixels of the image, and its RLE, None if it has no mask.
        """
        if kind == "box":
            return [(corners, None) for corners in self._to_corners(values, image)]
        if kind == "region":
            return [self._read_region(row, image) for row in values]
        return [_read_segmentation(segmentation, image) for segmentation in values]

    def _read_region(self, row: Any, image: ImageRecord) -> tuple[np.ndarray, dict | None]:
        """Box and RLE of a row of the store."""
        store = self.store
        if type(row) is not int or not 0 <= row < store.regions:
            rows = f"rows are 0 to {store.regions - 1}" if store.regions else "it has no regions"
            raise InputError(f"region {row!r:.40} is not a row of {store.path}; {rows}")
        image_id, index = store.region(row)
        if image_id != image.id:
            raise InputError(f"region {row} is of image {image_id}, the sentence is of image {image.id}")
        regions = store.read(image_id, features=())
        masks = regions.rles()
        return regions.boxes[index].astype(np.float64), masks[index] if masks else None

    def _to_corners(self, values: list[Any], image: ImageRecord) -> np.ndarray:
        """Convert boxes to (n, 4) float64 xyxy in pixels of the image."""
        invalid = [value for value in values if not _is_box(value)]
        if not invalid:
            sizes = np.full((len(values), 2), (image.width, image.height))
            corners = self.box_format.to_pixels(np.array(values, np.float64).reshape(-1, 4), sizes)
            inverted = (corners[:, 2:] < corners[:, :2]).any(axis=1)
            if not inverted.any():
                return corners
            invalid = [values[int(inverted.argmax())]]
        raise InputError(f"box {reprlib.repr(invalid[0])[:60]} must be four numbers {self.box_format.description}")


def _masks(answers: list[tuple[np.ndarray, dict | None]]) -> tuple[dict, ...] | None:
    """The masks of answers; None if one has no mask."""
    masks = tuple(mask for _, mask in answers if mask is not None)
    return masks if len(masks) == len(answers) else None


def _read_segmentation(value: Any, image: ImageRecord) -> tuple[np.ndarray, dict | None]:
    """The box around an RLE, and the RLE."""
    if not isinstance(value, dict):
        raise InputError('segmentation must be an RLE {"size": [height, width], "counts": ...}')
    mask = to_rle(value, image.height, image.width)
    x, y, width, height = coco_mask.toBbox(mask).tolist()
    return np.array([x, y, x + width, y + height]), mask
