"""Binary masks of COCO segmentations."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .errors import ReferDataError


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask of a segmentation.

    Arguments:
        segmentation: polygons ``[[x, y, ...], ...]`` in pixels, one RLE (compressed or not), or a list of
            RLEs; the mask is the union of the parts. Polygons of fewer than three points enclose nothing.
        height, width: size of the image in pixels.

    Returns:
        (height, width) uint8, 1 inside.

    Raises:
        ReferDataError: the segmentation is neither, or cannot be decoded.
    """
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    rles = []
    try:
        for part in parts:
            if isinstance(part, list):
                if len(part) >= 6:
                    rles += coco_mask.frPyObjects([part], height, width)
            elif isinstance(part["counts"], list):
                rles.append(coco_mask.frPyObjects(part, *part["size"]))
            else:
                rles.append(part)
        if not rles:
            return np.zeros((height, width), np.uint8)
        return np.asarray(coco_mask.decode(coco_mask.merge(rles)), np.uint8)
    except Exception as error:  # pycocotools raises plain Exception
        raise ReferDataError(f"a segmentation cannot be decoded ({type(error).__name__}: {error})") from None
