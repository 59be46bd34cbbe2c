"""Lists of training images: instances files, JSON lists and objects, and lines of JSON or text.

- an object with a list ``images`` (and ``annotations``): COCO 2014 and 2017, minival, LVIS, captions, keypoints,
  panoptic, MDETR, Karpathy;
- a JSON list of ids, of file names or of objects (Visual Genome's ``image_data.json``, Detectron2, LLaVA);
- any other JSON object: lists by split, or entries by image name;
- JSON lines (ODVG), or text with an id or file name per line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from refdet.data.image_evidence import Evidence, ids_are_confirmed
from refdet.splits.object_entries import Node

INSTANCES = "instances"
JSON_LIST = "JSON list"
JSON_OBJECT = "JSON object"
JSON_LINES = "JSON lines"
LINES = "lines of text"


class ImageEntry(NamedTuple):
    """One image of a list.

    Attributes:
        id: its id in the list; without one the smallest of ``coco_ids`` (set by `identify_images`), or None.
        name: its file name or URL, "" if it has none.
        label: human-readable name: its id, its file name or its position in the list.
        evidence: what its entry says about its COCO id.
        id_matches_file_name: whether its id is the number in its file name.
        start: offset of its entry in the text of the list.
        end: offset of the end of its entry.
        coco_ids: COCO ids that it may have; set by `identify_images`.
        unknown: whether its entry identifies it neither as a COCO image nor as an image of another source; set by
            `identify_images`.
    """

    id: int | None
    name: str
    label: int | str
    evidence: Evidence
    id_matches_file_name: bool
    start: int
    end: int
    coco_ids: frozenset[int] = frozenset()
    unknown: bool = True


class ListedAnnotation(NamedTuple):
    """An annotation: its image id and its entry, ``text[start:end]``."""

    image_id: int
    start: int
    end: int


class TopLevelValue(NamedTuple):
    """A top-level key of an instances file and its value, ``text[start:end]``."""

    key: str
    start: int
    end: int


@dataclass(frozen=True)
class ImageListFile:
    """A list of images and its source text.

    Attributes:
        path: the file.
        format: INSTANCES, JSON_LIST, JSON_OBJECT, JSON_LINES or LINES.
        text: contents of the file.
        images: its images, in file order.
        annotations: annotations of an instances file, empty for other formats.
        members: top-level keys of an instances file and their values, empty for other formats.
        info: ``info`` of an instances file, empty for other formats.
        ids_in_other_keys: other top-level keys of an instances file -> COCO ids in the names below them.
        tree: where the entries of a JSON object are, None for other formats.
    """

    path: Path
    format: str
    text: str
    images: list[ImageEntry]
    annotations: list[ListedAnnotation] = field(default_factory=list)
    members: list[TopLevelValue] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    ids_in_other_keys: dict[str, frozenset[int]] = field(default_factory=dict)
    tree: Node | None = None

    @property
    def ids(self) -> set[int]:
        """Ids of the images that have one."""
        return {image.id for image in self.images if image.id is not None}

    def write(self, file: IO[str], keep: Sequence[bool], info: object) -> None:
        """Write the list in its original format, with the exact text of each entry.

        Args:
            file: a text file open for writing.
            keep: whether to keep each image and its annotations.
            info: replaces ``info`` in an instances file.
        """
        images = [image for image, kept in zip(self.images, keep, strict=True) if kept]
        entries = (self.text[image.start : image.end] for image in images)
        if self.format in (LINES, JSON_LINES):
            file.writelines(f"{entry}\n" for entry in entries)
        elif self.format == JSON_LIST:
            _write_entries(file, entries, ",\n")
            file.write("\n")
        elif self.tree is not None:
            file.write(self.tree.render(self.text, keep))
            file.write("\n")
        else:
            self._write_instances(file, images, entries, info)

    def _write_instances(
        self, file: IO[str], images: Sequence[ImageEntry], entries: Iterable[str], info: object
    ) -> None:
        ids = {image.id for image in images}
        kept_annotations = (self.text[entry.start : entry.end] for entry in self.annotations if entry.image_id in ids)
        if all(member.key != "info" for member in self.members):
            file.write(f'{{"info": {json.dumps(info)}, ')
        else:
            file.write("{")
        for index, (key, start, end) in enumerate(self.members):
            file.write(f"{', ' if index else ''}{json.dumps(key)}: ")
            if key == "images":
                _write_entries(file, entries, ", ")
            elif key == "annotations":
                _write_entries(file, kept_annotations, ", ")
            else:
                file.write(json.dumps(info) if key == "info" else self.text[start:end])
        file.write("}\n")


def identify_images(images: Sequence[ImageEntry]) -> list[ImageEntry]:
    """Return the images with ``coco_ids`` and ``unknown`` set, and ``id`` where the list has none.

    Ids that are not names count only if names in the same list confirm them (`ids_are_confirmed`).
    """
    confirmed = ids_are_confirmed(image.evidence for image in images)
    identified = []
    for image in images:
        coco_ids = image.evidence.coco_ids
        id_ = min(coco_ids, default=None) if image.id is None else image.id
        unknown = not image.evidence.is_identified(confirmed)
        identified.append(image._replace(id=id_, coco_ids=coco_ids, unknown=unknown))
    return identified


def _write_entries(file: IO[str], entries: Iterable[str], separator: str) -> None:
    file.write("[")
    for index, entry in enumerate(entries):
        file.write(separator + entry if index else entry)
    file.write("]")
