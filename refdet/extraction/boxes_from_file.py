"""Read boxes to extract features for from COCO results or another store."""

from __future__ import annotations

import logging
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refdet import store
from refdet.data.box_format import DEFAULT_FORMAT, FORMATS, resolve_box_format
from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.segmentations import to_rle
from refdet.errors import InputError
from refdet.files.json_files import read_json
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1 << 16  # boxes to check at once


@dataclass(frozen=True)
class BoxFile:
    """Boxes of a file.

    Attributes:
        regions: image id -> regions without features, in file order; read lazily from a store.
        count: returns the number of boxes of an image id, 0 if the file does not have it.
        categories: category id -> name.
        masks: whether all regions have masks.
        ann_ids: whether all regions have annotation ids.
        box_format: format of the boxes, a key of `refdet.data.box_format.FORMATS`.
    """

    regions: Mapping[int, Regions]
    count: Callable[[int], int]
    categories: Mapping[int, str]
    masks: bool
    ann_ids: bool
    box_format: str = DEFAULT_FORMAT

    def for_image(self, record: ImageRecord) -> Regions:
        """Regions of an image, empty if the file has none."""
        regions = self.regions.get(record.id)
        if regions is not None:
            return regions
        empty = Regions.empty(record.id, record.file_name, record.height, record.width)
        return replace(empty, masks=() if self.masks else None, ann_ids=np.zeros(0, np.int64) if self.ann_ids else None)


def load_boxes(path: Path, index: CocoIndex, box_format: str = DEFAULT_FORMAT, exif: str = "ignore") -> BoxFile:
    """Read and check the boxes of a file.

    Boxes are clipped to their image, as annotations are. A warning is logged if many boxes exceed their image, as they
    do in a wrong format. Anything else is an error, since features of wrong boxes are worse than none.

    Args:
        path: COCO results ``[{"image_id", "category_id", "bbox": [x, y, w, h], "score", "segmentation"}, ...]``, with
            optional score (1 by default) and with segmentation in all entries or none; or a store (.h5), of which
            boxes, scores, categories, masks and annotation ids are used.
        index: the instances file with the images.
        box_format: format of the boxes in COCO results, one of `refdet.data.box_format.NAMES`.
        exif: "ignore" or "apply" the EXIF orientation of the images, as was done for those of a store.

    Returns:
        The boxes, clipped, as half-open ``x1 y1 x2 y2`` in pixels.

    Raises:
        InputError: an image or category that is not in the instances file; a box that is not finite, has no area or is
            outside its image; another image size; images of a store in another orientation; or an invalid mask. The
            message has the file and the entry.
    """
    if path.suffix in (".h5", ".hdf5"):
        if box_format != DEFAULT_FORMAT:
            raise InputError(f"`boxes` {path}: a store has its own box format; omit `box_format='{box_format}'`")
        return _load_store(path, index, exif)
    entries = read_json(path)
    if not isinstance(entries, list):
        raise InputError(f"`boxes` {path}: not a list of entries; give COCO results or a store (.h5)")
    records: list[ImageRecord] = []
    rows: dict[int, list[int]] = {}  # image id -> its entries
    masks: dict[int, list[bytes]] = {}
    with_masks = bool(entries) and isinstance(entries[0], dict) and "segmentation" in entries[0]
    for number, entry in enumerate(entries):
        with _add_entry_to_errors(path, number):
            record = _parse_entry(entry, index)
            if ("segmentation" in entry) != with_masks:
                raise InputError("segmentation missing in some entries; give it in all or none")
            if with_masks:
                rle = to_rle(entry["segmentation"], record.height, record.width)
                masks.setdefault(record.id, []).append(rle["counts"])
        records.append(record)
        rows.setdefault(record.id, []).append(number)
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    sizes = np.array([(record.width, record.height) for record in records], np.float64).reshape(-1, 2)
    format_name, warnings = resolve_box_format(box_format, boxes, sizes)
    for warning in warnings:
        level, _, text = warning.partition(": ")
        log.warning("%s: `boxes` %s: %s", level, path, text)
    corners = FORMATS[format_name].to_pixels(boxes, sizes)
    for number in np.flatnonzero(~_inside(corners, sizes)).tolist():
        with _add_entry_to_errors(path, number):
            _check_inside(corners[number].tolist(), records[number], FORMATS[format_name].description)
    clipped = corners.clip(0, np.tile(sizes, 2)).astype(np.float32)
    scores = np.array([entry.get("score", 1.0) for entry in entries], np.float32)
    categories = np.array([entry["category_id"] for entry in entries], np.int64)
    regions = {}
    for image_id, indices in rows.items():
        record = index.images[image_id]
        regions[image_id] = Regions(
            image_id,
            record.file_name,
            record.height,
            record.width,
            boxes=clipped[indices],
            scores=scores[indices],
            category_ids=categories[indices],
            masks=tuple(masks[image_id]) if with_masks else None,
        )
    return BoxFile(
        regions, lambda i: len(rows.get(i, ())), index.categories, with_masks, ann_ids=False, box_format=format_name
    )


@contextmanager
def _add_entry_to_errors(path: Path, number: int) -> Iterator[None]:
    """Add the file and the entry to error messages."""
    try:
        yield
    except InputError as error:
        raise InputError(f"`boxes` {path}: entry {number}: {error}") from None


def _parse_entry(entry: Any, index: CocoIndex) -> ImageRecord:
    """Check the fields of an entry and return its image."""
    if not isinstance(entry, dict):
        raise InputError(f"must be an object with image_id, category_id and bbox, not {reprlib.repr(entry)}")
    for key in ("image_id", "category_id"):
        if type(entry.get(key)) is not int:
            raise InputError(f"{key} must be an integer, not {reprlib.repr(entry.get(key))}")
    record = index.images.get(entry["image_id"])
    if record is None:
        raise InputError(f"image {entry['image_id']} is not in {index.path}")
    if entry["category_id"] not in index.categories:
        raise InputError(f"category {entry['category_id']} is not in {index.path}")
    box, score = entry.get("bbox"), entry.get("score", 1.0)
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise InputError(f"bbox must be four finite numbers [x, y, w, h], not {reprlib.repr(box)}")
    if not _is_number(score):
        raise InputError(f"score must be a finite number, not {reprlib.repr(score)}")
    return record


def _inside(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether boxes (N, 4) xyxy in pixels have area inside their images of (N, 2) width and height, (N,) bool."""
    low, high = corners[:, :2], corners[:, 2:]
    inside: np.ndarray = (low < high) & (low.clip(0) < np.minimum(high, sizes))
    return np.asarray(inside.all(axis=1))


def _check_inside(corners: list[float], record: ImageRecord, format_text: str = "") -> None:
    """Raise an InputError if a box xyxy in pixels has no area inside its image."""
    x1, y1, x2, y2 = corners
    suffix = f", read as {format_text}," if format_text else ""
    if not (x1 < x2 and y1 < y2):
        raise InputError(f"box {corners} (x1, y1, x2, y2){suffix} has no area")
    if not (max(x1, 0.0) < min(x2, record.width) and max(y1, 0.0) < min(y2, record.height)):
        raise InputError(
            f"box {corners} (x1, y1, x2, y2){suffix} is outside its image of {record.width}x{record.height}"
        )


def _is_number(value: object) -> bool:
    # an integer may be too large for a float
    return type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)  # type: ignore[arg-type]


class _StoreRegions(Mapping[int, Regions]):
    """Regions of an open store, read image by image, as with masks they may not fit in memory."""

    def __init__(self, source: store.Store, index: CocoIndex) -> None:
        self._source, self._index = source, index

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[int]:
        return iter(self._source)

    def __getitem__(self, image_id: int) -> Regions:
        stored, record = self._source.read(image_id, features=()), self._index.images[image_id]
        return replace(
            Regions.empty(image_id, record.file_name, record.height, record.width),
            boxes=stored.boxes.clip(0, [record.width, record.height] * 2).astype(np.float32),
            scores=stored.scores,
            category_ids=stored.category_ids,
            ann_ids=stored.ann_ids,
            masks=stored.masks,
        )


def _load_store(path: Path, index: CocoIndex, exif: str) -> BoxFile:
    source = store.open(path)
    try:
        _check_orientation(path, source, exif)
        _check_store(path, source, index)
    except BaseException as error:
        source.close()
        if isinstance(error, store.CORRUPTION_ERRORS):
            raise InputError(f"`boxes` {path}: damaged: {error}; extract it again") from None
        raise
    categories = {int(entry["id"]): str(entry["name"]) for entry in source.classes}
    return BoxFile(
        _StoreRegions(source, index),
        lambda i: len(source.rows(i)) if i in source else 0,
        categories,
        source.has_masks,
        source.has_ann_ids,
    )


def _check_orientation(path: Path, source: store.Store, exif: str) -> None:
    """Check that a store's boxes are of images in the orientation in which they will be read."""
    of_store = source.options.get("exif", "ignore")
    if of_store != exif:
        turned = of_store == "apply"
        raise InputError(
            f"`boxes` {path}: its boxes are of images {'turned upright by' if turned else 'as stored, regardless of'} "
            f"their EXIF orientation; {'add' if turned else 'omit'} `exif='apply'`"
        )


def _check_store(path: Path, source: store.Store, index: CocoIndex) -> None:
    """Check that a store's images are in the index and that each box has area inside its image."""
    for image_id, height, width in zip(source, source.heights.tolist(), source.widths.tolist(), strict=True):
        record = index.images.get(image_id)
        if record is None:
            raise InputError(f"`boxes` {path}: image {image_id} is not in {index.path}")
        if (height, width) != (record.height, record.width):
            raise InputError(
                f"`boxes` {path}: image {image_id} is {width}x{height} there, but "
                f"{record.width}x{record.height} in {index.path}"
            )
    sizes = np.stack([source.widths, source.heights], axis=1)
    for first in range(0, source.regions, _ROWS_AT_ONCE):
        boxes = source.data["regions/box"][first : first + _ROWS_AT_ONCE]
        rows = np.arange(first, first + len(boxes))
        image_rows = np.searchsorted(source.region_start, rows, side="right") - 1
        for row in np.flatnonzero(~_inside(boxes, sizes[image_rows])).tolist():
            image_id = int(source.image_ids[image_rows[row]])
            try:
                _check_inside(boxes[row].tolist(), index.images[image_id])
            except InputError as error:
                raise InputError(f"`boxes` {path}: image {image_id}: {error}") from None
