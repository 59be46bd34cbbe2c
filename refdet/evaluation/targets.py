"""The objects that the sentences of a ref refer to: one annotation, or in gRefCOCO any number of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from refdet.data.coco import ImageRecord
from refdet.data.segmentations import to_rle
from refdet.errors import InputError
from refer import REFER
from refer.types import target_ids
from refer.validation import box_of


def is_generalized(refs: Iterable[Any]) -> bool:
    """Whether refs may have any number of objects, as in gRefCOCO, where ``ann_id`` is a list."""
    return any(isinstance(ref["ann_id"], list) for ref in refs)


def objects_of(refer: REFER, ref: Any) -> list[Any]:
    """The annotations of the objects of a ref."""
    return [refer.Anns[ann_id] for ann_id in target_ids(ref)]


def boxes(refer: REFER, annotations: Sequence[Any]) -> np.ndarray:
    """Boxes (n, 4) float64 of annotations, half-open xyxy in pixels, not clipped to the image.

    Raises:
        refer.ReferError: an annotation has no box, or one that is not finite.
    """
    xywh = np.array([box_of(refer.DATA_DIR, annotation) for annotation in annotations], np.float64).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def mask(refer: REFER, annotations: Sequence[Any], image: ImageRecord) -> dict:
    """RLE of the union of the masks of annotations; empty if there are none.

    Raises:
        InputError: an annotation has no segmentation, or an invalid one.
    """
    rles = [empty_mask(image.height, image.width)]
    for annotation in annotations:
        if not annotation.get("segmentation"):
            raise InputError(
                f"{refer.DATA_DIR}: annotation {annotation['id']} has no segmentation to compare masks "
                "with; give predictions as boxes"
            )
        try:
            rles.append(to_rle(annotation["segmentation"], image.height, image.width))
        except InputError as error:
            raise InputError(f"{refer.DATA_DIR}: annotation {annotation['id']}: {error}") from None
    return coco_mask.merge(rles)


def empty_mask(height: int, width: int) -> dict:
    """RLE of an empty mask."""
    return to_rle({"size": [height, width], "counts": [height * width]}, height, width)
