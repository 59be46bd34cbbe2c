"""Binary masks of COCO segmentations."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .errors import ReferDataError
from .rle import covered_pixels

_MOST_PIXELS = 2**28
# pycocotools walks along every edge of a polygon in fifths of a pixel, and writes down each step: what lies far away,
# or goes to and fro for ever, would take all the memory.
FARTHEST = 10_000
LONGEST = 1_000_000


def decode(segmentation: Any, height: Any, width: Any) -> np.ndarray:
    """The mask of a segmentation.

    Args:
        segmentation: polygons ``[[x, y, ...], ...]`` in pixels, one RLE (compressed or not), or a list of
            RLEs, as RefClef has them; the mask is the union of the parts. Polygons of fewer than three points
            enclose nothing.
        height, width: size of the image in pixels.

    Returns:
        (height, width) uint8, 1 inside; RLEs are of the size that they say themselves.

    Raises:
        ReferDataError: the segmentation is neither, or damaged.
    """
    _check_size(height, width)
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    rles: list[dict[str, Any]] = []
    polygons = [part for part in parts if isinstance(part, list)]
    if not (set(map(type, chain.from_iterable(polygons))) <= {int, float} and can_be_drawn(polygons, height, width)):
        raise ReferDataError("a polygon must be numbers [x, y, x, y, ...] on or near its image, and of bearable length")
    for part in parts:
        if isinstance(part, list):
            if len(part) >= 6:
                rles += coco_mask.frPyObjects([part], height, width)
        elif isinstance(part, dict):
            rles.append(_rle(part))
        else:
            raise ReferDataError(f"a segmentation is polygons or RLEs, not a {type(part).__name__}")
    if not rles:
        return np.zeros((height, width), np.uint8)
    if any(list(rle["size"]) != list(rles[0]["size"]) for rle in rles):
        raise ReferDataError("the parts of a segmentation are of different sizes")
    return np.asarray(coco_mask.decode(coco_mask.merge(rles)), np.uint8)


def can_be_drawn(polygons: Iterable[Any], height: int, width: int) -> bool:
    """Whether pycocotools draws these polygons without an end of time or memory.

    They must be numbers ``[x, y, x, y, ...]`` in pixels, within 10,000 of the image, and their outlines together at
    most a million steps from pixel to pixel long, diagonals being one step.
    """
    farthest, length = FARTHEST + max(height, width), 0.0
    for polygon in polygons:
        try:
            points = np.array(polygon, np.float64).reshape(-1, 2)
        except (TypeError, ValueError, OverflowError):
            return False
        if not (np.abs(points) <= farthest).all():
            return False
        length += float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())
    return length <= LONGEST


def _check_size(height: Any, width: Any) -> None:
    if not (type(height) is int and type(width) is int and min(height, width) > 0 and height * width <= _MOST_PIXELS):
        raise ReferDataError("there is no usable height and width")


def _rle(rle: dict[str, Any]) -> dict[str, Any]:
    """A checked and compressed RLE: pycocotools writes beyond its memory for some bad ones."""
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list) or len(size) != 2:
        raise ReferDataError("an RLE has no size [height, width]")
    _check_size(*size)
    pixels = size[0] * size[1]
    if isinstance(counts, list):
        if not set(map(type, counts)) <= {int} or min(counts, default=0) < 0 or sum(counts) != pixels:
            raise ReferDataError(f"the counts of an RLE do not add up to its {pixels} pixels")
        compressed: dict[str, Any] = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)
        return compressed
    if not isinstance(counts, str | bytes) or rle_pixels(counts) != pixels:
        raise ReferDataError(f"the counts of an RLE do not add up to its {pixels} pixels")
    return {"size": size, "counts": counts.encode() if isinstance(counts, str) else counts}


def rle_pixels(counts: str | bytes) -> int:
    """How many pixels a compressed RLE covers, inside and outside of its mask; -1 where it is none.

    pycocotools decodes what does not fit its image to garbage or beyond its memory, so this is asked first.
    """
    data = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
    covered = covered_pixels(np.frombuffer(data, np.uint8), np.array([0, len(data)]))
    return -1 if covered is None else int(covered[0])
