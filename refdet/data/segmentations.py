"""COCO's three ways of writing a mask, as one."""

from __future__ import annotations

import reprlib

import numpy as np
from pycocotools import mask as coco_mask

from refdet.errors import InputError
from refer.masks import can_be_drawn


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
    text = counts.decode("latin-1") if isinstance(counts, bytes) else counts
    return isinstance(text, str) and rle_pixels(text) == pixels


def _shown(segmentation: object) -> str:
    # a short piece of it: the repr of the whole may be of megabytes
    return reprlib.repr(segmentation)[:80]


def rle_pixels(counts: str) -> int:
    """How many pixels a compressed RLE covers, inside and outside of its mask; -1 where it is none.

    pycocotools decodes what does not fit its image to garbage or beyond its memory, so this is asked first.
    The coding is that of rleFrString in COCO's maskApi.c: groups of five bits, lowest first, in characters
    from "0" on, the sixth bit telling that more follow; from the fourth number on they are differences to the
    number two before.
    """
    codes = np.frombuffer(counts.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(ends) or ends[-1] != len(codes) - 1 or codes.min() < 0 or codes.max() > 63:
        return -1
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 32 bits
        return -1
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shift, starts)
    runs -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return int(runs.sum()) if runs.min() >= 0 else -1
