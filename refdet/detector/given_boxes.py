"""Check the boxes and categories passed to `Detector.describe`. Does not import torch.

Shape shorthand in this module:

    n: boxes of an image
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from refdet.errors import ArgumentError
from refdet.files.short_text import shorten


def check_boxes(boxes: object, height: int, width: int) -> np.ndarray:
    """Check boxes and clip them to their image.

    Args:
        boxes: (n, 4) numbers, half-open ``x1 y1 x2 y2`` in pixels; if there are none, any empty list or array.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        The clipped boxes, (n, 4) float32.

    Raises:
        ArgumentError: wrong shape, or a box that is not finite, is reversed, or has no area in the image.
    """
    try:
        array = np.asarray(boxes, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        reason = shorten(error, 200)
        raise ArgumentError("boxes", f"(n, 4) numbers are needed, x1 y1 x2 y2 of each box ({reason})") from None
    if array.size == 0:
        return np.zeros((0, 4), np.float32)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ArgumentError("boxes", f"(n, 4) numbers are needed, x1 y1 x2 y2 of each box, not {array.shape}")
    clipped = array.clip(0, [width, height] * 2).astype(np.float32)
    invalid = ~np.isfinite(array).all(axis=1) | ~(clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    if invalid.any():
        row = int(invalid.argmax())
        raise ArgumentError("boxes", f"row {row}, {array[row].tolist()}, {_problem(array[row], height, width)}")
    return clipped


def _problem(box: np.ndarray, height: int, width: int) -> str:
    """What is wrong with an invalid box (4,), as the end of a sentence about it."""
    x1, y1, x2, y2 = box.tolist()
    if not np.isfinite(box).all():
        return "is not finite"
    if x2 < x1 or y2 < y1:
        return "is reversed; give x1 y1 x2 y2 with x1 < x2 and y1 < y2, not x y width height"
    if x1 == x2 or y1 == y2:
        return "has no area"
    return f"has no area in the image, which is {width}x{height}"


def check_category_ids(category_ids: object, count: int, classes: Container[int]) -> np.ndarray:
    """Check the category ids of boxes.

    Args:
        category_ids: (n,) integers.
        count: number of boxes, n.
        classes: the category ids of the detector.

    Returns:
        The ids, (n,) int64.

    Raises:
        ArgumentError: wrong number of ids, not integers, or an unknown id.
    """
    try:
        array = np.asarray(category_ids)
    except ValueError:
        array = np.zeros((), object)  # lists of different lengths; refused below
    if array.size == 0:
        array = np.zeros(0, np.int64)  # NumPy makes an empty list float64
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise ArgumentError(
            "category_ids", f"({count},) integers are needed, one per box, not {array.dtype} {array.shape}"
        )
    for row, category in enumerate(array.tolist()):
        if category not in classes:
            raise ArgumentError(
                "category_ids", f"row {row}, {category}, is not a category of the detector; see its classes"
            )
    return array.astype(np.int64)
