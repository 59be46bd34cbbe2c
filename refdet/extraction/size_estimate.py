"""Estimate of the size of a store before an extraction. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from refdet.config.recipe import Recipe
from refdet.data.coco import ImageRecord
from refdet.detector.backbone_channels import roi_channels
from refdet.store import Columns, Header, ImageRow
from refdet.store.size import space_needed

_MASK_BYTES = 200  # average size of the compressed RLE of a region
_RES5_SIZE = 7  # height and width of res5's output for a region


def feature_shapes(recipe: Recipe, classes: int) -> dict[str, tuple[int, ...]]:
    """Feature name -> shape per region, for a detector of this recipe and number of classes without background."""
    model = recipe.model
    pool5_channels, fc7_channels = roi_channels(model)
    return {
        "pool5": (pool5_channels,),
        "fc7": (fc7_channels,),
        "class_prob": (1 + classes,),
        "spatial_pool5": (pool5_channels, model.pooler_resolution, model.pooler_resolution),
        "spatial_fc7": (fc7_channels, _RES5_SIZE, _RES5_SIZE),
    }


def estimate_bytes(
    records: Sequence[ImageRecord],
    counts: Sequence[int],
    recipe: Recipe,
    header: Header,
    columns: Columns,
    map_size: Callable[[ImageRecord], tuple[int, int]],
) -> int:
    """Estimate the size of a store in bytes, before compression.

    Args:
        records: the images.
        counts: number of regions of each image, or the most that it can have.
        recipe: the recipe of the detector.
        header: the header of the store.
        columns: the columns of the store, with `feature_shapes`.
        map_size: returns the height and width of an image's feature map; called only if ``columns`` has feature maps.
    """
    channels, _ = roi_channels(recipe.model)  # those of the feature map too
    rows = []
    for record, count in zip(records, counts, strict=True):
        mask_bytes = count * _MASK_BYTES if columns.masks else 0
        map_shape = (channels, *map_size(record)) if columns.maps else (0, 0, 0)
        rows.append(
            ImageRow(record.id, record.file_name, record.height, record.width, "", count, mask_bytes, map_shape)
        )
    return space_needed(rows, columns, header)
