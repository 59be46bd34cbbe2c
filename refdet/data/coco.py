"""COCO instances JSON: `CocoIndex` validates and indexes it, `TrainingObjects` selects what to train on."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from refdet.data.coco_validation import (
    is_finite,
    json_type,
    parse_annotation_ids,
    parse_area,
    parse_box,
    parse_category,
    parse_image,
    parse_iscrowd,
    parse_segmentation,
)
from refdet.data.fetch.hints import check_fetched
from refdet.data.image_evidence import may_be_looked_up_by_id
from refdet.errors import InputError
from refdet.files.json_files import read_json
from refdet.files.short_text import agree, format_count, format_share
from refer.plain_files import no_garbage_collection

log = logging.getLogger(__name__)

Box = tuple[float, float, float, float]
"""Half-open ``x1 y1 x2 y2`` in pixels."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image.

    Attributes:
        id: its id in the instances file.
        file_name: as in the instances file, "" if it has none.
        height: in pixels.
        width: in pixels.
        by_id: whether the image, if it has no file name, may be looked up by its id under COCO's file names.
    """

    id: int
    file_name: str
    height: int
    width: int
    by_id: bool = True


@dataclass(frozen=True, slots=True)
class Annotation:
    """An annotated object.

    Attributes:
        id: its id.
        image_id: id of its image.
        category_id: id of its category.
        box: half-open ``x1 y1 x2 y2`` in pixels of the image; not clipped to the image.
        segmentation: polygons ``[[x, y, x, y, ...], ...]`` in pixels, an RLE ``{"size": [h, w],
            "counts": ...}``, or None.
        area: in square pixels, from the instances file, or else of the box.
        iscrowd: whether it is a crowd.
    """

    id: int
    image_id: int
    category_id: int
    box: Box
    segmentation: list | dict | None
    area: float
    iscrowd: bool


@dataclass(frozen=True, slots=True)
class CocoIndex:
    """Images, annotations and categories of an instances file.

    Attributes:
        path: the file.
        info: its ``info`` object, {} if it has none.
        images: image id -> record, in file order.
        annotations: image id -> annotations in file order; every image has an entry.
        categories: category id -> name, in file order.
        raw: the parsed JSON, in which ``iscrowd`` may have been changed (``crowd_as_object``).
        dropped: what was dropped, human-readable: one line per annotation that is not used, or is used without some of
            its polygons.
    """

    path: Path
    info: dict
    images: dict[int, ImageRecord]
    annotations: dict[int, list[Annotation]]
    categories: dict[int, str]
    raw: dict
    dropped: list[str]

    @classmethod
    def load(cls, path: str | Path, need_segmentation: bool = False, crowd_as_object: bool = False) -> CocoIndex:
        """Read and validate an instances JSON.

        Annotations whose box is empty, not finite or entirely outside the image, and polygons with fewer than three
        points, are dropped and described in ``dropped``. The number of such annotations is logged.

        Args:
            path: the file.
            need_segmentation: refuse a file in which no object has a segmentation.
            crowd_as_object: treat ``iscrowd`` as 0 in every annotation, also in ``raw``.

        Returns:
            The index.

        Raises:
            InputError: a one-line message with the file and the invalid entry.
        """
        path = Path(path)
        check_fetched(path)
        with no_garbage_collection():
            raw = read_json(path)
            if not isinstance(raw, dict):
                raise InputError(f"{path}: a JSON {json_type(raw)}, not an object; give a COCO instances JSON")
            for key in ("images", "annotations", "categories"):
                if not isinstance(raw.get(key), list):
                    raise InputError(f"{path}: no list {key!r} in it; give a COCO instances JSON")
                for position, entry in enumerate(raw[key]):
                    if not isinstance(entry, dict):
                        raise InputError(f"{path}: {key}[{position}] has type {json_type(entry)}; it must be an object")
            if crowd_as_object:
                raw["annotations"] = [{**a, "iscrowd": 0} if a.get("iscrowd") == 1 else a for a in raw["annotations"]]
            info = raw["info"] if isinstance(raw.get("info"), dict) else {}
            categories = _parse_categories(path, raw["categories"])
            images = _parse_images(path, raw["images"])
            annotations, dropped = _parse_annotations(path, raw["annotations"], images, categories)
        index = cls(path, info, images, annotations, categories, raw, dropped)
        if dropped:
            log.warning(
                "note: %s: %s dropped, or used without some polygons (first: %s); refdet inspect lists all",
                path,
                format_count(len(dropped), "annotation"),
                dropped[0],
            )
        if need_segmentation:
            index._check_segmentation()
        log.info(
            "%s: %s, %s, %s",
            path,
            format_count(len(index.images), "image"),
            format_count(sum(map(len, index.annotations.values())), "annotation"),
            format_count(len(index.categories), "category"),
        )
        return index

    def _check_segmentation(self) -> None:
        """Raise an InputError if there are objects and none of them has a segmentation."""
        objects = [a for annotations in self.annotations.values() for a in annotations if not a.iscrowd]
        if objects and all(a.segmentation is None for a in objects):
            raise InputError(
                f"{self.path}: its {format_count(len(objects), 'object', 'has')} no segmentation; train without masks "
                "with `model.masks=false`"
            )


class TrainingObjects:
    """Images and objects of an instances file to train on.

    Objects are annotations that are not crowds. An object without a segmentation is excluded from the mask loss. Images
    without objects are excluded, or used as negatives.

    Args:
        index: the instances file.
        masks: whether masks are trained.
        empty_images: whether to use images without objects as negatives.

    Attributes:
        index: the instances file.
        masks: whether masks are trained.
        records: the images, in file order.
        notes: human-readable notes about exclusions and special cases.

    Raises:
        InputError: there is nothing to train on.
    """

    def __init__(self, index: CocoIndex, masks: bool, empty_images: bool = False) -> None:
        self.index, self.masks = index, masks
        self._objects = {
            id_: [a for a in annotations if not a.iscrowd] for id_, annotations in index.annotations.items()
        }
        crowds = sum(a.iscrowd for annotations in index.annotations.values() for a in annotations)
        objects = sum(map(len, self._objects.values()))
        if not objects:
            raise InputError(_why_empty(index, crowds))
        self.records = [r for r in index.images.values() if empty_images or self._objects[r.id]]
        self.notes: list[str] = []
        if crowds:
            self.notes.append(
                f"{index.path}: {format_share(crowds, crowds + objects, 'annotation', 'has')} iscrowd 1 and "
                f"{agree(crowds, 'is')} neither object nor background; add `crowd_as_object=True` to train on crowds "
                "as objects"
            )
        without_masks = sum(a.segmentation is None for annotations in self._objects.values() for a in annotations)
        if masks and without_masks:
            self.notes.append(
                f"{index.path}: {format_share(without_masks, objects, 'object', 'has')} no segmentation; only "
                "class and box are trained"
            )
        if empty := sum(not annotations for annotations in self._objects.values()):
            treatment = (
                "used as negatives" if empty_images else "excluded (add `train.empty_images=true` to include them)"
            )
            self.notes.append(
                f"{index.path}: {format_share(empty, len(index.images), 'image', 'has')} no objects and "
                f"{agree(empty, 'is')} {treatment}"
            )

    def objects(self, image_id: int) -> list[Annotation]:
        """Objects of an image, without crowds."""
        return self._objects[image_id]

    def crowds(self, image_id: int) -> list[Annotation]:
        """Crowds of an image, which are neither object nor background."""
        return [a for a in self.index.annotations[image_id] if a.iscrowd]

    def sha256(self) -> str:
        """Hash what training reads: categories, and of the ``records`` ids, names, sizes, boxes, masks and crowds.

        The rest of the file, such as areas and licenses, does not affect the hash, nor do masks that are not trained.

        Returns:
            The SHA-256 in hexadecimal.
        """
        digest = hashlib.sha256(_encode_json([list(pair) for pair in self.index.categories.items()]))
        for r in self.records:
            entries = [
                [a.category_id, a.box, a.iscrowd, a.segmentation if self.masks and not a.iscrowd else None]
                for a in self.index.annotations[r.id]
            ]
            digest.update(_encode_json([r.id, r.file_name, r.height, r.width, entries]) + b"\n")
        return digest.hexdigest()


def _parse_categories(path: Path, entries: list[dict]) -> dict[int, str]:
    """Category id -> name."""
    names: dict[int, str] = {}
    for position, entry in enumerate(entries):
        category_id, name = parse_category(path, position, entry)
        if category_id in names:
            raise InputError(f"{path}: duplicate category id {category_id}")
        names[category_id] = name
    return names


def _parse_images(path: Path, entries: list[dict]) -> dict[int, ImageRecord]:
    """Image id -> record."""
    images: dict[int, ImageRecord] = {}
    for position, entry in enumerate(entries):
        image_id, file_name, height, width = parse_image(path, position, entry)
        if image_id in images:
            raise InputError(f"{path}: duplicate image id {image_id}")
        by_id = bool(file_name) or may_be_looked_up_by_id(entry, image_id)
        images[image_id] = ImageRecord(image_id, file_name, height, width, by_id)
    return images


def _parse_annotations(
    path: Path, entries: list[dict], images: dict[int, ImageRecord], categories: dict[int, str]
) -> tuple[dict[int, list[Annotation]], list[str]]:
    """`CocoIndex.annotations` and `CocoIndex.dropped`."""
    by_image: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    dropped: list[str] = []
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        annotation_id, image_id, category_id = parse_annotation_ids(path, position, entry)
        what = f"annotation {annotation_id}"
        if annotation_id in seen:
            raise InputError(f"{path}: duplicate annotation id {annotation_id}")
        seen.add(annotation_id)
        image = images.get(image_id)
        if image is None:
            raise InputError(f"{path}: {what} refers to image {image_id}, which is not in the file")
        if category_id not in categories:
            raise InputError(f"{path}: {what} has category {category_id}, which is not in the file")
        x, y, width, height = parse_box(path, entry.get("bbox"), what)
        segmentation, dropped_polygons = parse_segmentation(
            path, entry.get("segmentation"), what, (image.height, image.width)
        )
        iscrowd = parse_iscrowd(path, entry, what)
        if reason := _box_problem(x, y, width, height, image):
            dropped.append(f"{what}: {reason}")
            continue
        if dropped_polygons:
            dropped.append(f"{what}: {dropped_polygons}")
        area = parse_area(path, entry.get("area", width * height), what)
        box = (float(x), float(y), float(x + width), float(y + height))
        by_image[image.id].append(Annotation(annotation_id, image.id, category_id, box, segmentation, area, iscrowd))
    return by_image, dropped


def _box_problem(x: float, y: float, width: float, height: float, image: ImageRecord) -> str:
    """Why a box cannot be used, "" if it can."""
    # The sums can overflow too; an integer beyond the range of floats raises OverflowError when added to a float.
    if not (all(map(is_finite, (x, y, width, height))) and is_finite(x + width) and is_finite(y + height)):
        return "box is not finite"
    if width <= 0 or height <= 0:
        return "box has no area"
    if x >= image.width or y >= image.height or x + width <= 0 or y + height <= 0:
        return f"box lies outside image {image.id} ({image.width}x{image.height})"
    # Boxes are clipped to the image and rounded to float32 when they are used, which can leave nothing of a box with
    # less than a pixel of width or height in the image. The other boxes need no check with NumPy, which is slow.
    if width < 1 or height < 1 or x + width < 1 or y + height < 1 or x > image.width - 1 or y > image.height - 1:
        start = np.array([max(x, 0), max(y, 0)], np.float32)
        end = np.array([min(x + width, image.width), min(y + height, image.height)], np.float32)
        if (end <= start).any():
            return f"box has no area in image {image.id}, rounded to float32"
    return ""


def _encode_json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (OverflowError, ValueError):  # integers beyond 64 bits
        return json.dumps(value).encode()


def _why_empty(index: CocoIndex, crowds: int) -> str:
    """Why there is nothing to train on: the error message for a file with that many crowds and no objects."""
    if crowds:
        which = f"all {crowds} annotations" if crowds > 1 else "the only annotation"
        return (
            f"{index.path}: no objects to train on: iscrowd is 1 on {which} (CVAT writes this for masks); "
            f"add `crowd_as_object=True` to train on them as objects"
        )
    if index.raw["annotations"]:
        return (
            f"{index.path}: its {format_count(len(index.raw['annotations']), 'annotation')} cannot be used (first: "
            f"{index.dropped[0]}); correct them"
        )
    if not index.images:
        return f"{index.path}: no images to train on; give a file with images"
    return f"{index.path}: no annotations to train on; give a file with annotations"
