"""The lines that an extraction shows when it starts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from refdet.data.coco import ImageRecord
from refdet.extraction.size_estimate import estimate_bytes, feature_shapes
from refdet.files.short_text import format_bytes, format_count
from refdet.store import Columns

if TYPE_CHECKING:
    from refdet.extraction.job import Job


def start_lines(job: Job, device: str, kernels: str) -> list[str]:
    """Describe the device and precision, the images, the detector, and the size of the store, a line each.

    Args:
        job: the extraction.
        device: description of the device or devices.
        kernels: description of the kernels of `refdet.ops` in use.
    """
    from refdet.data.transforms import input_size

    meta, options, plan = job.meta, job.options, job.plan

    def map_size(record: ImageRecord) -> tuple[int, int]:
        size = input_size(record.height, record.width, meta.recipe.input)
        stride = meta.recipe.model.stride
        if meta.recipe.model.backbone == "vgg16":  # its pooling rounds sizes down, ResNet's strided convolutions up
            return max(size.height // stride, 1), max(size.width // stride, 1)
        return math.ceil(size.height / stride), math.ceil(size.width / stride)

    shapes = feature_shapes(meta.recipe, len(meta.categories))
    features = {name: shapes[name] for name in plan.features}
    # without `plan.compression`, as the estimate is of the size before compression
    columns = Columns(features, plan.dtype, plan.masks, plan.ann_ids, plan.maps)
    if job.given_regions is None:
        bound = f"at most, with {format_count(options.max_regions, 'region')} per image,"
        counts = [options.max_regions] * len(job.records)
    else:
        bound = "about"
        counts = [job.given_regions.count(record.id) for record in job.records]
    size = estimate_bytes(job.records, counts, meta.recipe, job.header, columns, map_size)
    compression = " before compression" if plan.compression != "none" else ""
    return [
        f"device: {device}, {options.precision}, {kernels}",
        f"images: {len(job.records)} of {job.image_list.name}; file size: {bound} {format_bytes(size)}{compression}",
        f"detector: recipe {meta.recipe.name}, trained on: {meta.provenance.one_line()}",
    ]
