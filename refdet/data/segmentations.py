"""COCO's three ways of writing a mask, as one."""

from __future__ import annotations

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
