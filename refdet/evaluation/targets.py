"""What the sentences of a ref refer to: one annotated object, or in gRefCOCO any number of them, also none."""

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
    """Whether refs may have no or several objects, as in gRefCOCO: then ``ann_id`` is a list."""
    return any(isinstance(ref["ann_id"], list) for ref in refs)


def objects_of(refer: REFER, ref: Any) -> list[Any]:
    """The annotations of the objects a ref refers to."""
    return [refer.Anns[ann_id] for ann_id in target_ids(ref)]


def boxes(refer: REFER, targets: Sequence[Any]) -> np.ndarray:
    """(n, 4) float64: the boxes of annotations, half-open xyxy in pixels as the file has them.

    Raises:
        refer.ReferError: an annotation has no box, or one that is not finite.
    """
    xywh = np.array([box_of(refer.DATA_DIR, annotation) for annotation in targets], np.float64).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def mask(refer: REFER, targets: Sequence[Any], image: ImageRecord) -> dict:
    """The union of the masks of annotations as an RLE of the whole image; of none it has no pixel.

    Raises:
        InputError: an annotation has no segmentation, or one that cannot be drawn.
    """
    rles = [empty_mask(image.height, image.width)]
    for annotation in targets:
        if not annotation.get("segmentation"):
            raise InputError(f"{refer.DATA_DIR}: annotation {annotation['id']} has no segmentation to compare masks "
                             "with; give predictions as boxes")  # fmt: skip
        try:
            rles.append(to_rle(annotation["segmentation"], image.height, image.width))
        except InputError as error:
            raise InputError(f"{refer.DATA_DIR}: annotation {annotation['id']}: {error}") from None
    return coco_mask.merge(rles)


def empty_mask(height: int, width: int) -> dict:
    """An RLE without a pixel."""
    return to_rle({"size": [height, width], "counts": [height * width]}, height, width)
