"""`TrainingObjects`: images and objects of an instances file to train on, without torch."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec

from refdet.data.coco import Annotation, CocoIndex
from refdet.errors import InputError


class TrainingObjects:
    """Images and objects of an instances file to train on.

    Objects are annotations that are not crowds. An object without a segmentation is excluded from the mask loss. Images
    without objects are excluded unless they are included as negatives.

    Args:
        index: the instances file.
        masks: whether masks are trained.
        empty_images: whether to include images without objects as negatives.

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
                f"{index.path}: {crowds} of {crowds + objects} annotations have iscrowd 1 and are neither object nor "
                f"background; add `crowd_as_object=True` to train on them as objects"
            )
        without_masks = sum(a.segmentation is None for annotations in self._objects.values() for a in annotations)
        if masks and without_masks:
            self.notes.append(
                f"{index.path}: {without_masks} of {objects} objects have no segmentation; only their classes and "
                "boxes are trained"
            )
        if empty := sum(not annotations for annotations in self._objects.values()):
            treatment = (
                "used as negatives" if empty_images else "excluded (add `train.empty_images=true` to include them)"
            )
            self.notes.append(
                f"{index.path}: {empty} of {len(index.images)} images have no objects and are {treatment}"
            )

    def objects(self, image_id: int) -> list[Annotation]:
        """Objects of an image."""
        return self._objects[image_id]

    def crowds(self, image_id: int) -> list[Annotation]:
        """Crowds of an image, which are neither object nor background."""
        return [a for a in self.index.annotations[image_id] if a.iscrowd]

    def sha256(self) -> str:
        """SHA-256 of what training reads from the file: image names and sizes, categories, boxes, masks and crowds.

        Independent of anything else, such as areas, licences and the layout of the JSON.
        """
        digest = hashlib.sha256(_encode([list(pair) for pair in self.index.categories.items()]))
        for r in self.records:
            entries = [
                [a.category_id, a.box, a.iscrowd, a.segmentation if self.masks and not a.iscrowd else None]
                for a in self.index.annotations[r.id]
            ]
            digest.update(_encode([r.id, r.file_name, r.height, r.width, entries]) + b"\n")
        return digest.hexdigest()


def _encode(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (OverflowError, ValueError):  # integers beyond 64 bits
        return json.dumps(value).encode()


def _why_empty(index: CocoIndex, crowds: int) -> str:
    """Why there is nothing to train on."""
    if crowds:
        which = f"all {crowds} annotations" if crowds > 1 else "the one annotation"
        return (
            f"{index.path}: no objects to train on, iscrowd is 1 on {which} (CVAT writes this for masks); "
            f"add `crowd_as_object=True` to train on them as objects"
        )
    if index.raw["annotations"]:
        return (
            f"{index.path}: none of its {len(index.raw['annotations'])} annotations can be used (first: "
            f"{index.dropped[0] if index.dropped else 'no image has it'}); correct them"
        )
    if not index.images:
        return f"{index.path}: no images to train on; give a file with images"
    return f"{index.path}: no annotations to train on; give a file with annotations"
