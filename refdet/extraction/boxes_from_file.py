"""Read the boxes to extract features for, from COCO results or another store."""

from __future__ import annotations

import logging
import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refdet import store
from refdet.data.box_format import DEFAULT_FORMAT, FORMATS, resolve_box_format
from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.segmentations import to_rle
from refdet.errors import InputError
from refdet.extraction.given_regions import GivenRegions
from refdet.extraction.image_list import ImageList
from refdet.files.json_files import read_json
from refdet.files.short_text import agree, format_count, format_share
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1 << 16  # boxes of a store to check at once, to limit memory
_MAX_NUMBER = 1e9  # larger coordinates and scores are refused as mistakes


def load_boxes(path: Path, index: CocoIndex, box_format: str = DEFAULT_FORMAT, exif: str = "ignore") -> GivenRegions:
    """Read and check the boxes of a file.

    Boxes are clipped to their image, as annotations are. A warning is logged if many boxes exceed their image, as they
    do in a wrong ``box_format``. All other problems are errors, since features of wrong boxes are worse than none.

    Args:
        path: COCO results ``[{"image_id", "category_id", "bbox": [x, y, w, h], "score", "segmentation"}, ...]``, with
            optional score (1 by default) and with segmentation in all entries or none; or a store (.h5), of which
            boxes, scores, categories, masks and annotation ids are used.
        index: the instances file with the images.
        box_format: format of the boxes in COCO results, one of `refdet.data.box_format.NAMES`.
        exif: "ignore" or "apply" the EXIF orientation of the images; must be the same as for the images of a store.

    Returns:
        The regions, with clipped half-open boxes ``x1 y1 x2 y2`` in pixels. The regions of a store, which stays open,
        are read when they are requested.

    Raises:
        InputError: an image or category is not in the instances file; a box is not finite, has no area in float32 or is
            outside its image; a mask is invalid; or the images of a store have another size or orientation. The
            message names the file and the entry.
    """
    if path.suffix in (".h5", ".hdf5"):
        if box_format != DEFAULT_FORMAT:
            raise InputError(f"`boxes` {path}: a store has its own box format; omit `box_format='{box_format}'`")
        return _load_store(path, index, exif)
    entries = read_json(path)
    if not isinstance(entries, list):
        raise InputError(f"`boxes` {path}: not a list of entries; give COCO results or a store (.h5)")
    records: list[ImageRecord] = []
    numbers: dict[int, list[int]] = {}  # image id -> positions of its entries in the list
    masks: dict[int, list[bytes]] = {}  # image id -> RLE counts of each of its entries
    has_masks = bool(entries) and isinstance(entries[0], dict) and "segmentation" in entries[0]
    for number, entry in enumerate(entries):
        with _add_entry_to_errors(path, number):
            record = _parse_entry(entry, index)
            if ("segmentation" in entry) != has_masks:
                raise InputError("segmentation missing in some entries; give it in all or none")
            if has_masks:
                rle = to_rle(entry["segmentation"], record.height, record.width)
                masks.setdefault(record.id, []).append(rle["counts"])
        records.append(record)
        numbers.setdefault(record.id, []).append(number)
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    sizes = np.array([(record.width, record.height) for record in records], np.float64).reshape(-1, 2)
    format_name, warnings = resolve_box_format(box_format, boxes, sizes)
    for warning in warnings:
        level, _, text = warning.partition(": ")
        log.warning("%s: `boxes` %s: %s", level, path, text)
    corners = FORMATS[format_name].to_pixels(boxes, sizes).astype(np.float32)  # as in the store, where area may vanish
    for number in np.flatnonzero(~_has_area_inside(corners, sizes)).tolist():
        with _add_entry_to_errors(path, number):
            raise InputError(_describe_misplaced(corners[number], records[number], FORMATS[format_name].description))
    clipped = corners.clip(0, np.tile(sizes, 2)).astype(np.float32)
    without_score = sum("score" not in entry for entry in entries)
    if 0 < without_score < len(entries):
        is_highest = max(entry["score"] for entry in entries if "score" in entry) <= 1
        log.warning(
            "note: `boxes` %s: %s no score and so %s 1%s",
            path,
            format_share(without_score, len(entries), "box", verb="has"),
            agree(without_score, "gets"),
            ", the highest rank in an evaluation" if is_highest else "",
        )
    scores = np.array([entry.get("score", 1.0) for entry in entries], np.float32)
    categories = np.array([entry["category_id"] for entry in entries], np.int64)

    def for_image(record: ImageRecord) -> Regions:
        image_numbers = numbers.get(record.id, [])
        return Regions(
            record.id,
            record.file_name,
            record.height,
            record.width,
            boxes=clipped[image_numbers],
            scores=scores[image_numbers],
            category_ids=categories[image_numbers],
            masks=tuple(masks.get(record.id, ())) if has_masks else None,
        )

    return GivenRegions(
        for_image=for_image,
        count=lambda image_id: len(numbers.get(image_id, ())),
        categories=index.categories,
        categories_from=index.path,
        has_masks=has_masks,
        has_ann_ids=False,
        box_format=format_name,
    )


def report_images_without_boxes(
    path: Path, count: Callable[[int], int], records: Sequence[ImageRecord], say: Callable[[str], object]
) -> None:
    """Report the number of images that have no boxes in a file.

    Args:
        path: the file.
        count: returns the number of boxes of an image, given its id.
        records: the images.
        say: called with a line if there are such images.
    """
    total, without_boxes = len(records), sum(not count(record.id) for record in records)
    if without_boxes == total:
        say(f"note: `boxes` {path}: no boxes of the {format_count(total, 'image')}, so the store has no regions")
    elif without_boxes:
        say(
            f"note: `boxes` {path}: {format_share(without_boxes, total, 'image', verb='has')} no boxes and so "
            f"{agree(without_boxes, 'gets')} no regions"
        )


def report_unused_boxes(
    path: Path, count: Callable[[int], int], image_list: ImageList, say: Callable[[str], object]
) -> None:
    """Report the number of boxes in a file that are of other images than those of a list.

    Args:
        path: the file.
        count: returns the number of boxes of an image, given its id.
        image_list: the images, and the instances file with these and all other images.
        say: called with a line if there are such boxes.
    """
    total = sum(count(image_id) for image_id in image_list.index.images)
    if unused := total - sum(count(record.id) for record in image_list.records):
        say(
            f"note: `boxes` {path}: {format_share(unused, total, 'box', verb='is')} of images outside of "
            f"{image_list.name}, and {agree(unused, 'is')} not used"
        )


@contextmanager
def _add_entry_to_errors(path: Path, number: int) -> Iterator[None]:
    """Add the file and the position of the entry to the messages of InputErrors in the block."""
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
        raise InputError(
            f"bbox must be four finite numbers [x, y, w, h] below {_MAX_NUMBER:g}, not {reprlib.repr(box)}"
        )
    if not _is_number(score):
        raise InputError(f"score must be a finite number below {_MAX_NUMBER:g}, not {reprlib.repr(score)}")
    return record


def _has_area_inside(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Find the boxes that have area inside their images: (N,) bool.

    Args:
        corners: (N, 4) boxes ``x1 y1 x2 y2`` in pixels.
        sizes: (N, 2) widths and heights of their images in pixels.
    """
    low, high = corners[:, :2], corners[:, 2:]
    inside: np.ndarray = (low < high) & (low.clip(0) < np.minimum(high, sizes))
    return np.asarray(inside.all(axis=1))


def _describe_misplaced(corners: np.ndarray, record: ImageRecord, format_description: str = "") -> str:
    """Describe the problem of a box (4,) xyxy in pixels that has no area inside its image.

    Args:
        corners: the box.
        record: the image.
        format_description: the format that the box was read in; "" for the boxes of a store.
    """
    box = ", ".join(f"{value:.7g}" for value in corners.tolist())
    suffix = f", read as {format_description}," if format_description else ""
    if not (corners[:2] < corners[2:]).all():
        return f"box [{box}] (x1, y1, x2, y2){suffix} has no area"
    return f"box [{box}] (x1, y1, x2, y2){suffix} is outside its image of {record.width}x{record.height}"


def _is_number(value: object) -> bool:
    # the limit comes first, as isfinite fails for an integer that is too large for a float
    return type(value) in (int, float) and abs(value) < _MAX_NUMBER and math.isfinite(value)  # type: ignore[arg-type]


def _load_store(path: Path, index: CocoIndex, exif: str) -> GivenRegions:
    """Open and check a store; arguments, result and errors are those of `load_boxes`."""
    source = store.open(path)
    try:
        _check_orientation(path, source, exif)
        _check_store(path, source, index)
    except BaseException as error:
        source.close()
        if isinstance(error, store.CORRUPTION_ERRORS):
            raise InputError(f"`boxes` {path}: damaged: {error}; extract it again") from None
        raise

    def for_image(record: ImageRecord) -> Regions:
        empty = Regions.empty(record.id, record.file_name, record.height, record.width)
        if record.id not in source:  # no regions, but with the columns of the other images
            ann_ids = np.zeros(0, np.int64) if source.has_ann_ids else None
            return replace(empty, masks=() if source.has_masks else None, ann_ids=ann_ids)
        stored = source.read(record.id, features=())
        return replace(
            empty,
            boxes=stored.boxes.clip(0, [record.width, record.height] * 2).astype(np.float32),
            scores=stored.scores,
            category_ids=stored.category_ids,
            ann_ids=stored.ann_ids,
            masks=stored.masks,
        )

    return GivenRegions(
        for_image=for_image,
        count=lambda image_id: len(source.rows(image_id)) if image_id in source else 0,
        categories=source.names,
        categories_from=path,
        has_masks=source.has_masks,
        has_ann_ids=source.has_ann_ids,
    )


def _check_orientation(path: Path, source: store.Store, exif: str) -> None:
    """Check that a store's boxes are of images in the orientation in which the images will be read."""
    stored_exif = source.options.get("exif", "ignore")
    if stored_exif != exif:
        upright = stored_exif == "apply"
        raise InputError(
            f"`boxes` {path}: its boxes are of images {'turned upright by' if upright else 'as stored, regardless of'} "
            f"their EXIF orientation; {'add' if upright else 'omit'} `exif='apply'`"
        )


def _check_store(path: Path, source: store.Store, index: CocoIndex) -> None:
    """Check a store's images, boxes and categories.

    Its images must be in the index with the same size, its boxes must have area inside their images, and their
    categories must be classes of the store.
    """
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
        images = np.searchsorted(source.region_start, rows, side="right") - 1  # position of the image of each box
        for k in np.flatnonzero(~_has_area_inside(boxes, sizes[images])).tolist():
            image_id = int(source.image_ids[images[k]])
            problem = _describe_misplaced(boxes[k], index.images[image_id])
            raise InputError(f"`boxes` {path}: image {image_id}: {problem}")
        categories = source.data["regions/category_id"][first : first + _ROWS_AT_ONCE]
        for k in np.flatnonzero(~np.isin(categories, list(source.names))).tolist():
            image_id = int(source.image_ids[images[k]])
            raise InputError(
                f"`boxes` {path}: image {image_id}: category {categories[k]} is not in the classes of the store; "
                "extract it again"
            )
