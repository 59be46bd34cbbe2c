"""Types of the records in REFER and COCO files."""

from __future__ import annotations

from typing import Any, TypedDict

# Annotation id and category id of a gRefCOCO ref that has no target.
NO_TARGET = -1


class Sentence(TypedDict):
    """A referring expression: as the annotator wrote it (``raw``), cleaned (``sent``) and in words (``tokens``)."""

    sent_id: int
    sent: str
    raw: str
    tokens: list[str]


class Ref(TypedDict):
    """A referred object: the annotation ``ann_id`` in image ``image_id``.

    In gRefCOCO, ``ann_id`` and ``category_id`` are lists of integers, [-1] without a target. In RefClef, ``ann_id`` may
    be a string.
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
    """A COCO annotation; ``bbox`` is ``[x, y, width, height]`` and ``area`` that of the mask, in pixels.

    In RefClef, ``id`` may be a string.
    """

    id: Any
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int
    segmentation: Any


class Image(TypedDict, total=False):
    """A COCO image; ``height`` and ``width`` are in pixels."""

    id: int
    file_name: str
    height: int
    width: int


class Category(TypedDict, total=False):
    """A COCO category."""

    id: int
    name: str
    supercategory: str


class Instances(TypedDict):
    """Contents of an ``instances.json``."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


def target_ids(ref: Ref) -> list[Any]:
    """Annotation ids of a ref's targets: one, but any number, also none, in gRefCOCO."""
    ids = ref["ann_id"]
    return [ids] if not isinstance(ids, list) else [ann_id for ann_id in ids if ann_id != NO_TARGET]
