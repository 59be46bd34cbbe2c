"""Estimate of the size of a store before an extraction. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from refdet.config.recipe import Recipe
from refdet.data.coco import ImageRecord
from refdet.detector.backbone_channels import roi_channels
from refdet.store import Columns, Header, ImageRow
from refdet.store.size import space_needed

_MASK_BYTES = 200  # average RLE of a region
_RES5_SIZE = 7  # height and width of res5's output


def feature_shapes(recipe: Recipe, classes: int) -> dict[str, tuple[int, ...]]:
    """Shape of each feature of one region, for a detector of this recipe and number of classes without background."""
    model = recipe.model
    pooled, fc7 = roi_channels(model)
    return {
        "pool5": (pooled,),
        "fc7": (fc7,),
        "class_prob": (1 + classes,),
        "spatial_pool5": (pooled, model.pooler_resolution, model.pooler_resolution),
        "spatial_fc7": (fc7, _RES5_SIZE, _RES5_SIZE),
    }


def estimate_bytes(
    records: Sequence[ImageRecord],
    counts: Sequence[int],
    recipe: Recipe,
    header: Header,
    columns: Columns,
    map_size: Callable[[ImageRecord], tuple[int, int]],
) -> int:
    """Size of a store in bytes, before compression.

    Args:
        records: the images.
        counts: number of regions of each image, or its limit.
        recipe: the recipe of the detector.
        header: the header of the store.
        columns: the columns of the store, with `feature_shapes`.
        map_size: returns the height and width of an image's feature map, for stores with feature maps.
    """
    channels, _ = roi_channels(recipe.model)
    rows = []
    for record, count in zip(records, counts, strict=True):
        masks = count * _MASK_BYTES * columns.masks
        shape = (channels, *map_size(record)) if columns.maps else (0, 0, 0)
        rows.append(ImageRow(record.id, record.file_name, record.height, record.width, "", count, masks, shape))
    return space_needed(rows, columns, header)
