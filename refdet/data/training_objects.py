"""`TrainingObjects`: which images and which objects of an instances file are trained on. No torch."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec

from refdet.data.coco import Annotation, CocoIndex
from refdet.errors import InputError

CROWD_OPTION = "--crowd-as-object"


class TrainingObjects:
    """What of an instances file is trained on.

    Objects are annotations that are no crowds, with a segmentation or without: one without is left out of the mask
    loss. Images without an object are left out, unless they are wanted as negatives.

    Attributes:
        index: the instances file.
        masks: whether masks are trained.
        records: the images, in the order of the file.
        notes: what is left out or special, a line for people each.

    Raises:
        InputError: there is nothing to train on.
    """

    def __init__(self, index: CocoIndex, masks: bool, empty_images: bool = False) -> None:
        self.index, self.masks = index, masks
        self._objects = {id_: [a for a in found if not a.iscrowd] for id_, found in index.annotations.items()}
        crowds = sum(a.iscrowd for found in index.annotations.values() for a in found)
        objects = sum(map(len, self._objects.values()))
        if not objects:
            raise InputError(_nothing(index, crowds))
        self.records = [r for r in index.images.values() if empty_images or self._objects[r.id]]
        self.notes: list[str] = []
        if crowds:
            self.notes.append(
                f"{index.path}: iscrowd is 1 on {crowds} of {crowds + objects} annotations: what lies in those is "
                f"neither object nor background; {CROWD_OPTION} trains on them as objects"
            )
        bare = sum(a.segmentation is None for found in self._objects.values() for a in found)
        if masks and bare:
            self.notes.append(
                f"{index.path}: {bare} of {objects} objects have no segmentation: their classes and boxes are trained, "
                "their masks are not"
            )
        if empty := sum(not found for found in self._objects.values()):
            done = (
                "trained on as negatives" if empty_images else "left out (--set train.empty_images=true trains on them)"
            )
            self.notes.append(f"{index.path}: {empty} of {len(index.images)} images have no object: {done}")

    def objects(self, image_id: int) -> list[Annotation]:
        """The objects of an image."""
        return self._objects[image_id]

    def crowds(self, image_id: int) -> list[Annotation]:
        """The crowds of an image, which are neither object nor background."""
        return [a for a in self.index.annotations[image_id] if a.iscrowd]

    def sha256(self) -> str:
        """SHA-256 of all that training reads of the file: names and sizes of images, categories, boxes, masks, crowds.

        Not of what it does not read, such as areas and licences, nor of how the JSON is laid out.
        """
        digest = hashlib.sha256(_encoded([list(pair) for pair in self.index.categories.items()]))
        for r in self.records:
            entries = [
                [a.category_id, a.box, a.iscrowd, a.segmentation if self.masks and not a.iscrowd else None]
                for a in self.index.annotations[r.id]
            ]
            digest.update(_encoded([r.id, r.file_name, r.height, r.width, entries]) + b"\n")
        return digest.hexdigest()


def _encoded(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (OverflowError, ValueError):  # integers beyond 64 bits
        return json.dumps(value).encode()


def _nothing(index: CocoIndex, crowds: int) -> str:
    """Why there is nothing to train on."""
    if crowds:
        which = f"all {crowds} annotations" if crowds > 1 else "the one annotation"
        return (
            f"{index.path}: iscrowd is 1 on {which} (CVAT writes that for masks), so that there is no object to train "
            f"on; {CROWD_OPTION} trains on them as objects"
        )
    if index.raw["annotations"]:
        return (
            f"{index.path}: none of its {len(index.raw['annotations'])} annotations can be used (the first: "
            f"{index.dropped[0] if index.dropped else 'no image has it'}); mend them"
        )
    if not index.images:
        return f"{index.path}: no image in it to train on"
    return f"{index.path}: no annotation in it, so that there is no object to train on; give a file with annotations"
