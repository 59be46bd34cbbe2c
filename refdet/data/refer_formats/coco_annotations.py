"""COCO's instances, to recover the ids that a format of REFER lacks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from refdet.data.fetch.hints import check_exists
from refdet.data.refer_formats.layouts import LAYOUTS, agreement, last_digit
from refdet.data.refer_formats.records import Row, SourceInstances, SourceRef
from refdet.errors import InputError
from refdet.structures.coco_ids import bare_number, numbers_in_name
from refer import plain_files


class CocoAnnotations:
    """Images and annotations by id, from an instances file or from what a source includes.

    Args:
        name: the file, for error messages.
        instances: its images and annotations; integers that are given as text become integers.

    Raises:
        InputError: an entry has no or an invalid id, size or box.
    """

    def __init__(self, name: str, instances: SourceInstances) -> None:
        self.name, self.instances = name, instances
        self._by_image: dict[int, list[Row]] = {}
        for image_id, image in instances.images.items():
            Row(f"{name}: image {image_id}", image).replace_text("id", "width", "height")
        for annotation in instances.annotations.values():
            row = Row(f"{name}: annotation {annotation.get('id')}", annotation)
            row.replace_text("id", "image_id", "category_id", "iscrowd")
            row.box("bbox")
            self._by_image.setdefault(row.integer("image_id"), []).append(row)

    def image(self, image_id: int) -> dict[str, Any] | None:
        """The entry of an image, None if there is none."""
        return self.instances.images.get(image_id)

    def annotation(self, ann_id: int) -> dict[str, Any] | None:
        """An annotation, None if there is none of this id."""
        return self.instances.annotations.get(ann_id)

    def find(self, refs: Iterable[SourceRef], layouts: Iterable[str]) -> list[dict[str, Any] | None]:
        """Find the annotation of each ref by its image and box.

        Args:
            refs: refs with ``image_id`` and ``box``.
            layouts: layouts that the boxes may have; the one that finds the most annotations is used.

        Returns:
            The only annotation of the image whose box agrees in every digit that the source has, None where there is
            none or several.
        """
        refs = list(refs)
        unit = last_digit(number for ref in refs for number in ref.box or ())
        best: list[dict[str, Any] | None] = [None] * len(refs)
        for layout in layouts:
            annotations = [self._find(ref, layout, unit) for ref in refs]
            if sum(annotation is not None for annotation in annotations) > sum(
                annotation is not None for annotation in best
            ):
                best = annotations
        return best

    def _find(self, ref: SourceRef, layout: str, unit: float) -> dict[str, Any] | None:
        image = None if ref.image_id is None else self.image(ref.image_id)
        if image is None or ref.image_id is None or ref.box is None:
            return None
        size = Row(f"{self.name}: image {ref.image_id}", image)
        width, height = size.integer("width"), size.integer("height")
        if width <= 0 or height <= 0:
            raise InputError(f"{size.where}: its size is {width} x {height}")
        levels: dict[int, list[dict[str, Any]]] = {}
        for row in self._by_image.get(ref.image_id, ()):
            x, y, w, h = row.value["bbox"]
            level = agreement(ref.box, LAYOUTS[layout](x, y, w, h, width, height), unit)
            if level is not None and ref.category_id in (None, row.value.get("category_id")):
                levels.setdefault(level, []).append(row.value)
        candidates = levels[min(levels)] if levels else []
        likely = [candidate for candidate in candidates if candidate["id"] == ref.likely_ann_id]
        remaining = likely or candidates
        return remaining[0] if len(remaining) == 1 else None


def read_coco(path: Path) -> CocoAnnotations:
    """Read a COCO instances file.

    Args:
        path: such as ``instances_train2014.json``.

    Returns:
        Its images and annotations.

    Raises:
        InputError: it is not an instances file, or an entry has an invalid id or box.
        refer.ReferError: it cannot be read or is malformed JSON.
    """
    check_exists(path)
    with plain_files.no_garbage_collection():
        value = plain_files.read_json(path)
        if not isinstance(value, dict) or not {"images", "annotations", "categories"} <= value.keys():
            raise InputError(f"{path}: not a COCO instances file; give instances_train2014.json")
        file = Row(str(path), value)
        instances = SourceInstances(complete=True)
        for key, entries in (("images", instances.images), ("annotations", instances.annotations)):
            for number, entry in enumerate(file.items(key)):
                row = Row(f"{path}: {key}[{number}]", entry)
                if entries.setdefault(row.integer("id"), row.value) is not row.value:
                    raise InputError(f"{row.where}: duplicate id {row.integer('id')}")
        instances.header = {key: entry for key, entry in value.items() if key not in ("images", "annotations")}
        return CocoAnnotations(str(path), instances)


def image_id_of(file_name: str) -> int | None:
    """The COCO id in the name of an image or of a ref's crop, None if there is none or several."""
    numbers = numbers_in_name(file_name)
    if len(numbers) == 1:
        return next(iter(numbers))
    return bare_number(file_name) if not numbers else None
