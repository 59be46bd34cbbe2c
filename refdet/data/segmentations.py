"""COCO's three ways of writing a mask, as one."""

from __future__ import annotations

import reprlib

from pycocotools import mask as coco_mask

from refdet.errors import InputError
from refer.masks import can_be_drawn, rle_pixels


def to_rle(segmentation: list | dict, height: int, width: int) -> dict:
    """A segmentation as a pycocotools RLE ``{"size": [height, width], "counts": bytes}``.

    Args:
        segmentation: polygons ``[[x, y, ...], ...]`` in pixels, RLE with a list of counts, or compressed RLE.
        height, width: of the image in pixels.

    Raises:
        InputError: polygons as of `check_polygons`, an RLE of another size or that does not cover it, or what
            pycocotools cannot read.
    """
    try:
        if isinstance(segmentation, list):
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
            check_polygons(polygons, height, width)
            return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        if segmentation["size"] != [height, width]:
            raise InputError(f"a segmentation has size {segmentation['size']!r:.40}, its image {[height, width]}")
        counts = segmentation["counts"]
        # pycocotools writes beyond its memory for some RLEs that do not fit their size.
        if not _covers(counts, height * width):
            raise InputError(f"the counts of an RLE do not add up to the {height * width} pixels of its image")
        if isinstance(counts, list):
            return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"a segmentation is neither polygons nor RLE: {_shown(segmentation)}") from error


def check_polygons(polygons: list, height: int, width: int) -> None:
    """InputError if pycocotools cannot draw polygons of an image of this size: see `refer.masks.can_be_drawn`."""
    if not can_be_drawn(polygons, height, width):
        raise InputError(
            f"a polygon is no list of numbers [x, y, x, y, ...], far from its image or of absurd length: "
            f"{_shown(polygons)}"
        )


def _covers(counts: object, pixels: int) -> bool:
    """Whether the counts of an RLE, compressed or not, are sound and add up to so many pixels."""
    if isinstance(counts, list):
        return all(type(count) is int and count >= 0 for count in counts) and sum(counts) == pixels
    return isinstance(counts, str | bytes) and rle_pixels(counts) == pixels


def _shown(segmentation: object) -> str:
    # a short piece of it: the repr of the whole may be of megabytes
    return reprlib.repr(segmentation)[:80]
