"""Convert COCO's three segmentation formats, polygons and uncompressed or compressed RLE, to compressed RLE."""

from __future__ import annotations

from pycocotools import mask as coco_mask

from refdet.errors import InputError
from refdet.files.short_text import short_repr
from refer.masks import can_be_drawn, rle_pixels


def to_rle(segmentation: list | dict, height: int, width: int) -> dict:
    """Convert a segmentation to a compressed RLE.

    Args:
        segmentation: polygons ``[[x, y, ...], ...]`` in pixels, an RLE with a list of counts, or a compressed RLE.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        A pycocotools RLE ``{"size": [height, width], "counts": bytes}``.

    Raises:
        InputError: invalid polygons, an RLE of another size or with wrong counts, or a segmentation that
            pycocotools cannot read.
    """
    try:
        if isinstance(segmentation, list):
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6]  # of at least three points
            if not polygons:
                raise InputError(f"segmentation {short_repr(segmentation)} has no polygon of at least three points")
            check_polygons(polygons, height, width)
            return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        if segmentation["size"] != [height, width]:
            size = short_repr(segmentation["size"])
            raise InputError(f"segmentation has size {size}, but its image has {[height, width]}")
        counts = segmentation["counts"]
        # pycocotools writes out of bounds for some RLEs that do not match their size.
        if not _covers(counts, height * width):
            raise InputError(f"counts of an RLE do not add up to the {height} x {width} pixels of its image")
        if isinstance(counts, list):
            return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"segmentation {short_repr(segmentation)} is neither polygons nor RLE") from error


def check_polygons(polygons: list, height: int, width: int) -> None:
    """Check that pycocotools can draw polygons (`refer.masks.can_be_drawn`).

    Args:
        polygons: ``[[x, y, ...], ...]`` in pixels.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Raises:
        InputError: pycocotools cannot draw them.
    """
    if not can_be_drawn(polygons, height, width):
        raise InputError(
            f"polygon is not a list of numbers [x, y, x, y, ...], or it is far outside its image or absurdly long: "
            f"{short_repr(polygons)}"
        )


def _covers(counts: object, pixels: int) -> bool:
    """Whether the counts of an RLE, compressed or not, are valid and add up to the number of pixels."""
    if isinstance(counts, list):
        return all(type(count) is int and count >= 0 for count in counts) and sum(counts) == pixels
    return isinstance(counts, str | bytes) and rle_pixels(counts) == pixels
