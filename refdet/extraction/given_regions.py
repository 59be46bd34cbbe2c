"""Regions to extract features for instead of detections: annotated objects or boxes from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pycocotools import mask as coco_mask

from refdet.data.coco import Annotation, ImageRecord
from refdet.data.segmentations import to_rle
from refdet.errors import InputError
from refdet.files.short_text import agree, format_count, format_share
from refdet.structures.regions import Regions

if TYPE_CHECKING:
    from refdet.extraction.image_list import ImageList


@dataclass(frozen=True)
class GivenRegions:
    """Regions of a list of images, to extract features for.

    Attributes:
        for_image: returns the regions of an image, without features.
        count: returns the number of regions of an image, given its id.
        categories: category id -> name.
        categories_from: the file that names the categories.
        has_masks: whether all regions have masks.
        has_ann_ids: whether all regions have annotation ids.
        box_format: format of the boxes in their file, a key of `refdet.data.box_format.FORMATS`.
    """

    for_image: Callable[[ImageRecord], Regions]
    count: Callable[[int], int]
    categories: Mapping[int, str]
    categories_from: Path
    has_masks: bool
    has_ann_ids: bool
    box_format: str = "xywh"


def annotated_regions(image_list: ImageList, say: Callable[[str], object]) -> GivenRegions:
    """The annotated objects of images, without crowds, as regions.

    Args:
        image_list: the images.
        say: called with a line if crowds are left out or there are no annotations.

    Raises:
        InputError: all annotations are crowds.
    """
    _check_crowds(image_list, say)
    index = image_list.index
    return GivenRegions(
        for_image=lambda record: regions_from_annotations(record, index.annotations[record.id]),
        count=lambda image_id: sum(not annotation.iscrowd for annotation in index.annotations[image_id]),
        categories=index.categories,
        categories_from=index.path,
        has_masks=True,
        has_ann_ids=True,
    )


def _check_crowds(image_list: ImageList, say: Callable[[str], object]) -> None:
    """Report the number of crowds, which are left out; raise an InputError if all annotations of the images are."""
    annotations = [a for record in image_list.records for a in image_list.index.annotations[record.id]]
    crowds, path = sum(a.iscrowd for a in annotations), image_list.index.path
    if not annotations:
        images = format_count(len(image_list.records), "image")
        say(f"note: {path}: no annotations on the {images}, so the store has no regions")
    elif crowds == len(annotations):
        subject = f"all {crowds} annotations" if crowds > 1 else "the only annotation"
        raise InputError(
            f"{path}: no regions, iscrowd is 1 on {subject} of the images (CVAT writes this for masks); "
            "add `crowd_as_object=True` to use crowds as objects"
        )
    elif crowds:
        say(
            f"note: {path}: {format_share(crowds, len(annotations), 'annotation')} of the images "
            f"{agree(crowds, 'has')} iscrowd 1 and {agree(crowds, 'is')} not used as regions; "
            "add `crowd_as_object=True` to use crowds as objects"
        )


def regions_from_annotations(record: ImageRecord, annotations: Sequence[Annotation]) -> Regions:
    """Convert annotated objects to regions with score 1 and without features, excluding crowds.

    Boxes are clipped to the image. An object without a segmentation gets its box as mask.

    Args:
        record: the image.
        annotations: its annotations.

    Returns:
        The regions, with half-open boxes ``x1 y1 x2 y2`` in pixels.
    """
    objects = [a for a in annotations if not a.iscrowd]
    size = (record.height, record.width)
    boxes = np.array([a.box for a in objects], np.float64).reshape(-1, 4)
    boxes = boxes.clip(0, [record.width, record.height] * 2)
    masks = []
    for annotation, (x1, y1, x2, y2) in zip(objects, boxes.tolist(), strict=True):
        segmentation = annotation.segmentation or [[x1, y1, x1, y2, x2, y2, x2, y1]]  # polygon around the box
        # merging encodes the counts again, as those in a file need not be encoded in the shortest way
        masks.append(coco_mask.merge([to_rle(segmentation, *size)])["counts"])
    return Regions(
        record.id,
        record.file_name,
        *size,
        boxes=boxes.astype(np.float32),
        scores=np.ones(len(objects), np.float32),
        category_ids=np.array([a.category_id for a in objects], np.int64),
        ann_ids=np.array([a.id for a in objects], np.int64),
        masks=tuple(masks),
    )
