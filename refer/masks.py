"""Convert COCO segmentations to binary masks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .errors import ReferDataError
from .rle import total_run_lengths

_MAX_PIXELS = 2**28
# pycocotools stores every step of a fifth of a pixel along the edges of a polygon, so distant or very long polygons
# would use all memory.
MAX_DISTANCE = 10_000
MAX_LENGTH = 1_000_000


def decode(segmentation: Any, height: Any, width: Any, any_size: bool = False) -> np.ndarray:
    """Decode a segmentation to a mask.

    Args:
        segmentation: polygons ``[[x, y, ...], ...]`` in pixels, an RLE (compressed or not), or a list of RLEs as in
            RefClef; the mask is the union of the parts. Polygons with fewer than three points are empty.
        height: height of the image in pixels.
        width: width of the image in pixels.
        any_size: whether RLEs may have another size than the image.

    Returns:
        (height, width) uint8 with 1 inside; with ``any_size``, RLEs have their own size.

    Raises:
        ReferDataError: the segmentation is none of these, or damaged, or of another size than the image, or the height
            or width is invalid.
    """
    _check_size(height, width)
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    rles: list[dict[str, Any]] = []
    polygons = [part for part in parts if isinstance(part, list)]
    if not (set(map(type, chain.from_iterable(polygons))) <= {int, float} and can_be_drawn(polygons, height, width)):
        raise ReferDataError(
            f"polygons must be numbers [x, y, x, y, ...] within {MAX_DISTANCE} pixels of their image, with outlines of "
            f"at most {MAX_LENGTH} pixels in total"
        )
    for part in parts:
        if isinstance(part, list):
            if len(part) >= 6:
                rles += coco_mask.frPyObjects([part], height, width)
        elif isinstance(part, dict):
            rles.append(_compress_rle(part))
        else:
            raise ReferDataError(f"segmentation must be polygons or RLEs, not a {type(part).__name__}")
    if not rles:
        return np.zeros((height, width), np.uint8)
    if any(list(rle["size"]) != list(rles[0]["size"]) for rle in rles):
        raise ReferDataError("parts of a segmentation have different sizes")
    size = list(rles[0]["size"])
    if not any_size and size != [height, width]:
        raise ReferDataError(f"its RLE has size {size}, but its image is {[height, width]}")
    return np.asarray(coco_mask.decode(coco_mask.merge(rles)), np.uint8)


def can_be_drawn(polygons: Iterable[Any], height: int, width: int) -> bool:
    """Whether pycocotools can draw polygons in reasonable time and memory.

    Their coordinates must be within `MAX_DISTANCE` pixels of the image, and the total length of their edges at most
    `MAX_LENGTH` pixels, where a diagonal step counts as one.

    Args:
        polygons: ``[[x, y, x, y, ...], ...]`` in pixels.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        Whether they can be drawn.
    """
    limit, length = MAX_DISTANCE + max(height, width), 0.0
    for polygon in polygons:
        try:
            points = np.array(polygon, np.float64).reshape(-1, 2)
        except (TypeError, ValueError, OverflowError):
            return False
        if not (np.abs(points) <= limit).all():
            return False
        length += float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())
    return length <= MAX_LENGTH


def _check_size(height: Any, width: Any) -> None:
    """Raise ReferDataError unless these are positive integers, of at most `_MAX_PIXELS` pixels in all."""
    if not (type(height) is int and type(width) is int and min(height, width) > 0 and height * width <= _MAX_PIXELS):
        raise ReferDataError("no valid height and width")


def _compress_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """Check an RLE, as pycocotools writes out of bounds for some invalid ones, and compress it if it is a list."""
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list) or len(size) != 2:
        raise ReferDataError("an RLE has no size [height, width]")
    _check_size(*size)
    pixels = size[0] * size[1]
    if isinstance(counts, list):
        if not set(map(type, counts)) <= {int} or min(counts, default=0) < 0 or sum(counts) != pixels:
            raise ReferDataError(f"the counts of an RLE do not add up to its {size[0]} x {size[1]} pixels")
        compressed: dict[str, Any] = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)
        return compressed
    if not isinstance(counts, str | bytes) or rle_pixels(counts) != pixels:
        raise ReferDataError(f"the counts of an RLE do not add up to its {size[0]} x {size[1]} pixels")
    return {"size": size, "counts": counts.encode() if isinstance(counts, str) else counts}


def rle_pixels(counts: str | bytes) -> int:
    """Sum of the runs of a compressed RLE, inside and outside the mask: the pixels of its image; -1 if it is invalid.

    To be compared with the size of the image before decoding: pycocotools decodes an RLE of another size to garbage, or
    writes out of bounds.
    """
    try:
        data = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError:
        return -1
    totals = total_run_lengths(np.frombuffer(data, np.uint8), np.array([0, len(data)]))
    return -1 if totals is None else int(totals[0])
