"""Check that an instances file that is read entry by entry is one that `CocoIndex` accepts."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from refdet.data.coco_validation import (
    parse_annotation_ids,
    parse_area,
    parse_box,
    parse_category,
    parse_image,
    parse_iscrowd,
    parse_segmentation,
)
from refdet.data.polygons import can_be_drawn_in_any_image, check_outlines
from refdet.errors import InputError
from refdet.splits.image_list import ImageListFile
from refdet.splits.json_stream import JsonValue


class InstancesCheck:
    """Checks every entry as it is read, and the references between entries at the end.

    In files without any category (captions) or with panoptic segments, which are not instances files, only the image
    ids of annotations are checked. This is known only at the end of the file, so the first error is held back until
    then.

    Args:
        path: the file, for error messages.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._error: InputError | None = None
        self._has_categories = self._panoptic = False
        self._sizes: dict[int, tuple[int, int]] = {}
        self._categories: set[int] = set()
        self._annotations: set[int] = set()
        self._first_annotation: dict[int, int] = {}  # category id -> its first annotation
        self._rle_sizes: list[tuple[int, int, tuple[int, int]]] = []  # annotation id, image id, size
        # annotation id, image id, polygons that may be too far outside the image or too long to be drawn
        self._unchecked_polygons: list[tuple[int, int, list]] = []

    def __call__(self, json_value: JsonValue) -> None:
        """Check an entry of ``images``, ``annotations`` or ``categories``."""
        self._has_categories |= json_value.key == "categories"
        self._panoptic |= json_value.key == "annotations" and "segments_info" in json_value.value
        if self._error is None:
            try:
                self._check(json_value)
            except InputError as error:
                self._error = error

    def _check(self, json_value: JsonValue) -> None:
        position = json_value.position or 0  # entries of a list have one
        path, entry = self._path, json_value.value
        if json_value.key == "images":
            image_id, _, height, width = parse_image(path, position, entry)
            self._sizes[image_id] = (height, width)
        elif json_value.key == "categories":
            category_id, _ = parse_category(path, position, entry)
            if category_id in self._categories:
                raise InputError(f"{path}: duplicate category id {category_id}")
            self._categories.add(category_id)
        elif not self._panoptic:
            self._check_annotation(position, entry)

    def _check_annotation(self, position: int, entry: dict) -> None:
        path = self._path
        annotation_id, image_id, category_id = parse_annotation_ids(path, position, entry)
        what = f"annotation {annotation_id}"
        if annotation_id in self._annotations:
            raise InputError(f"{path}: duplicate annotation id {annotation_id}")
        self._annotations.add(annotation_id)
        self._first_annotation.setdefault(category_id, annotation_id)
        parse_box(path, entry.get("bbox"), what)
        segmentation = entry.get("segmentation")
        polygons, _ = parse_segmentation(path, segmentation, what, None)  # sizes are compared at the end
        if isinstance(segmentation, dict):
            self._rle_sizes.append((annotation_id, image_id, tuple(segmentation["size"])))
        elif isinstance(polygons, list) and not can_be_drawn_in_any_image(polygons):
            self._unchecked_polygons.append((annotation_id, image_id, polygons))
        parse_iscrowd(path, entry, what)
        parse_area(path, entry.get("area", 0), what)

    def finish(self, images: ImageListFile, removed: Set[int] = frozenset()) -> None:
        """Check the references between entries and raise the first error of the file.

        Args:
            images: the list that was read.
            removed: ids of images whose annotations may be left in the file without them.

        Raises:
            InputError: a one-line message with the file and the invalid entry.
        """
        path, ids = self._path, images.ids
        allowed = ids | removed
        orphan = next((entry for entry in images.annotations if entry.image_id not in allowed), None)
        if orphan is not None:
            raise InputError(
                f"{path}: an annotation refers to image {orphan.image_id}, which is not in the file; "
                "remove such annotations first"
            )
        if not self._has_categories or self._panoptic:
            return
        if self._error is not None:
            raise self._error
        if all(member.key != "annotations" for member in images.members):
            raise InputError(f"{path}: no list 'annotations' in it; give a COCO instances JSON")
        for category_id, annotation_id in self._first_annotation.items():
            if category_id not in self._categories:
                raise InputError(
                    f"{path}: annotation {annotation_id} has category {category_id}, which is not in the file"
                )
        for annotation_id, image_id, size in self._rle_sizes:
            if image_id in ids and size != self._sizes[image_id]:
                raise InputError(
                    f"{path}: annotation {annotation_id}: its RLE has size {list(size)}, but its image is "
                    f"{list(self._sizes[image_id])}"
                )
        for annotation_id, image_id, polygons in self._unchecked_polygons:
            if image_id in ids:
                check_outlines(path, polygons, f"annotation {annotation_id}", *self._sizes[image_id])
