"""The records of REFER and COCO files as they stand on disk."""

from __future__ import annotations

from typing import Any, TypedDict

# What gRefCOCO has for the annotation and the category of a ref without a target.
NO_TARGET = -1


class Sentence(TypedDict):
    """One expression for a ref."""

    sent_id: int
    sent: str
    raw: str
    tokens: list[str]


class Ref(TypedDict):
    """One referred object: the annotation ``ann_id`` of image ``image_id``.

    In gRefCOCO ``ann_id`` and ``category_id`` are lists of integers, [-1] where nothing is meant; in RefClef
    ``ann_id`` may be a string.
    """

    ref_id: int
    ann_id: Any
    category_id: Any
    image_id: int
    file_name: str
    split: str
    sent_ids: list[int]
    sentences: list[Sentence]


class Annotation(TypedDict, total=False):
    """One COCO annotation; ``bbox`` is ``[x, y, width, height]`` in pixels. RefClef's ``id`` may be a string."""

    id: Any
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int
    segmentation: Any


class Image(TypedDict, total=False):
    """One COCO image."""

    id: int
    file_name: str
    height: int
    width: int


class Category(TypedDict, total=False):
    """One COCO category."""

    id: int
    name: str
    supercategory: str


class Instances(TypedDict):
    """What is read of ``instances.json``."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


def target_ids(ref: Ref) -> list[Any]:
    """The annotations a ref means: one, or in gRefCOCO any number and none."""
    ids = ref["ann_id"]
    return [ids] if not isinstance(ids, list) else [one for one in ids if one != NO_TARGET]
