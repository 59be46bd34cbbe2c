"""`CocoAnnotations`: COCO's instances, to recover the ids that a format of REFER lacks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from refdet.data.fetch.hints import check_fetched
from refdet.data.refer_formats.layouts import LAYOUTS, agreement, rounding_unit
from refdet.data.refer_formats.records import Row, SourceInstances, SourceRef
from refdet.errors import InputError
from refdet.structures.coco_ids import bare_number, numbers_in_name
from refer import plain_files


class CocoAnnotations:
    """Images and annotations by id, from an instances file or from what a source includes.

    Args:
        name: the file, for error messages.
        instances: its images and annotations; integers in strings are converted in place.

    Raises:
        InputError: an annotation has no valid ``image_id`` or box, or a string that should be an integer is not.
    """

    def __init__(self, name: str, instances: SourceInstances) -> None:
        self.name, self.instances = name, instances
        self._by_image: dict[int, list[Row]] = {}
        for image_id, image in instances.images.items():
            Row(f"{name}: image {image_id}", image).parse_integers("id", "width", "height")
        for annotation in instances.annotations.values():
            row = Row(f"{name}: annotation {annotation.get('id')}", annotation)
            row.parse_integers("id", "image_id", "category_id", "iscrowd")
            row.box("bbox")
            self._by_image.setdefault(row.integer("image_id"), []).append(row)

    def image(self, image_id: int | None) -> dict[str, Any] | None:
        """Return the entry of the image with an id, None if there is none."""
        return None if image_id is None else self.instances.images.get(image_id)

    def annotation(self, ann_id: int | None) -> dict[str, Any] | None:
        """Return the entry of the annotation with an id, None if there is none."""
        return None if ann_id is None else self.instances.annotations.get(ann_id)

    def find_by_box(self, refs: Iterable[SourceRef], layouts: Iterable[str]) -> list[dict[str, Any] | None]:
        """Find the annotation of each ref by its image and box.

        Args:
            refs: refs with ``image_id`` and ``box``.
            layouts: names of the `LAYOUTS` that the boxes may have; the one that finds the most annotations is used.

        Returns:
            For each ref, the annotation of its image, and of its category if known, whose box agrees with the ref's in
            every digit that the source has; the closest ones are preferred, and of these the ref's ``likely_ann_id``.
            None if there is no such annotation, or several are as good.

        Raises:
            InputError: the size of an image is missing or invalid.
        """
        refs = list(refs)
        unit = rounding_unit(number for ref in refs for number in ref.box or ())
        by_layout = [[self._find_by_box(ref, layout, unit) for ref in refs] for layout in layouts]
        return max(by_layout, key=lambda annotations: sum(map(bool, annotations)), default=[None] * len(refs))

    def _find_by_box(self, ref: SourceRef, layout: str, unit: float) -> dict[str, Any] | None:
        """`find_by_box` for one ref and one layout, with the unit of the last decimal place of the source's boxes."""
        image = self.image(ref.image_id)
        if image is None or ref.image_id is None or ref.box is None:
            return None
        size = Row(f"{self.name}: image {ref.image_id}", image)
        width, height = size.integer("width"), size.integer("height")
        if width <= 0 or height <= 0:
            raise InputError(f"{size.where}: its size is {width}x{height}, it must be at least 1x1")
        candidates: dict[int, list[dict[str, Any]]] = {}  # `agreement`, lower is closer -> annotations
        for row in self._by_image.get(ref.image_id, ()):
            x, y, w, h = row.value["bbox"]
            level = agreement(ref.box, LAYOUTS[layout](x, y, w, h, width, height), unit)
            if level is not None and ref.category_id in (None, row.value.get("category_id")):
                candidates.setdefault(level, []).append(row.value)
        closest = candidates[min(candidates)] if candidates else []
        closest = [annotation for annotation in closest if annotation["id"] == ref.likely_ann_id] or closest
        return closest[0] if len(closest) == 1 else None


def read_coco(path: Path) -> CocoAnnotations:
    """Read a COCO instances file.

    Args:
        path: such as ``instances_train2014.json``.

    Returns:
        Its images and annotations.

    Raises:
        InputError: the file is not an instances file, or an entry has an invalid id or box.
        refer.ReferError: the file cannot be read or is malformed JSON.
    """
    check_fetched(path)
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
    """Return the COCO id in the file name of an image or in REFER's of a ref, None if it has none or several."""
    numbers = numbers_in_name(file_name)
    if len(numbers) == 1:
        return next(iter(numbers))
    return bare_number(file_name) if not numbers else None
