"""COCO's three ways of writing a mask, as one."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask

from refdet.errors import InputError


def to_rle(segmentation: list | dict, height: int, width: int) -> dict:
    """A segmentation as a pycocotools RLE ``{"size": [height, width], "counts": bytes}``.

    Args:
        segmentation: polygons ``[[x, y, ...], ...]`` in pixels, RLE with a list of counts, or compressed RLE.
        height, width: of the image in pixels.
    Raises:
        InputError: an RLE of another size, or what pycocotools cannot read.
    """
    try:
        if isinstance(segmentation, list):
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
            return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        if list(segmentation["size"]) != [height, width]:
            raise InputError(f"a segmentation has size {segmentation['size']}, its image {[height, width]}")
        if isinstance(segmentation["counts"], list):
            return coco_mask.frPyObjects(segmentation, height, width)
        counts = segmentation["counts"]
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"a segmentation is neither polygons nor RLE: {str(segmentation)[:80]}") from error


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
