"""Regions that are given instead of detected: annotated objects or boxes from a file."""

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
    """Regions that are not detected.

    Attributes:
        for_image: returns the regions of an image, without features.
        count: returns the number of regions of an image; None if they must be read to know.
        categories: category id -> name.
        masks: whether all regions have masks.
        ann_ids: whether all regions have annotation ids.
        box_format: format of the boxes in the file, a key of `refdet.data.box_format.FORMATS`.
    """

    for_image: Callable[[ImageRecord], Regions]
    count: Callable[[ImageRecord], int] | None
    categories: Mapping[int, str]
    masks: bool
    ann_ids: bool
    box_format: str = "xywh"


def _check_crowds(image_list: ImageList, say: Callable[[str], object]) -> None:
    """Report the number of crowds, which are not used as regions; raise an InputError if all annotations are crowds."""
    annotations = [a for record in image_list.records for a in image_list.index.annotations[record.id]]
    crowds, path = sum(a.iscrowd for a in annotations), image_list.index.path
    if not annotations:
        images = format_count(len(image_list.records), "image")
        say(f"{path}: no annotations on the {images}, so the store has no regions")
    elif crowds == len(annotations):
        subject = f"all {crowds} annotations" if crowds > 1 else "the only annotation"
        raise InputError(
            f"{path}: no regions, iscrowd is 1 on {subject} of the images (CVAT writes this for masks); "
            "add `crowd_as_object=True` to use them as objects"
        )
    elif crowds:
        say(
            f"{path}: {format_share(crowds, len(annotations), 'annotation')} of the images {agree(crowds, 'has')} "
            f"iscrowd 1 and {agree(crowds, 'is')} not used as regions; add `crowd_as_object=True` to use crowds as "
            "objects"
        )


def _check_boxes(path: Path, count: Callable[[int], int], image_list: ImageList, say: Callable[[str], object]) -> None:
    """Report the number of images of the list that a file of boxes has none of."""
    images, empty = len(image_list.records), sum(not count(record.id) for record in image_list.records)
    if empty == images:
        say(f"`boxes` {path}: no boxes of the {format_count(images, 'image')}, so the store has no regions")
    elif empty:
        say(
            f"note: `boxes` {path}: {format_share(empty, images, 'image', 'has')} no boxes and so "
            f"{agree(empty, 'gets')} no regions"
        )


def load_given_regions(
    image_list: ImageList,
    regions: str,
    boxes: Path | None,
    box_format: str,
    exif: str,
    say: Callable[[str], object],
) -> GivenRegions | None:
    """Select the regions to extract features for, unless they are to be detected.

    Args:
        image_list: the images.
        regions: "annotations" for the annotated objects of the images.
        boxes: COCO results or a store with the boxes, None for none.
        box_format: format of the boxes in COCO results, one of `refdet.data.box_format.NAMES`.
        exif: "ignore" or "apply" the EXIF orientation of the images.
        say: called with a line about annotations that are not used, or images without boxes.

    Returns:
        The regions, None if they are to be detected.

    Raises:
        InputError: the file is invalid, or all annotations are crowds.
    """
    index = image_list.index
    if boxes is not None:
        from refdet.extraction.boxes_from_file import load_boxes

        file = load_boxes(boxes, index, box_format, exif)
        _check_boxes(boxes, file.count, image_list, say)
        return GivenRegions(file.for_image, None, file.categories, file.masks, file.ann_ids, file.box_format)
    if regions == "annotations":
        _check_crowds(image_list, say)
        return GivenRegions(
            lambda record: regions_from_annotations(record, index.annotations[record.id]),
            lambda record: sum(not annotation.iscrowd for annotation in index.annotations[record.id]),
            index.categories,
            masks=True,
            ann_ids=True,
        )
    return None


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
        outline = annotation.segmentation or [[x1, y1, x1, y2, x2, y2, x2, y1]]
        masks.append(coco_mask.merge([to_rle(outline, *size)])["counts"])
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
