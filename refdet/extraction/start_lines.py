"""The first lines that an extraction logs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from refdet.data.coco import ImageRecord
from refdet.extraction.plan import Plan
from refdet.extraction.size_estimate import estimated_bytes, feature_shapes
from refdet.files.short_text import counted
from refdet.store import Columns, Header

if TYPE_CHECKING:
    from refdet.detector.checkpoint import CheckpointMetadata
    from refdet.extraction.image_list import ImageList
    from refdet.extraction.options import ExtractOptions


def start_lines(
    image_list: ImageList,
    meta: CheckpointMetadata,
    options: ExtractOptions,
    device: str | None,
    plan: Plan,
    header: Header,
    given: Callable[[ImageRecord], int] | None,
) -> list[str]:
    """Lines about the device and precision, the images, the detector, and the size of the store.

    Args:
        image_list: the images.
        meta: metadata of the detector.
        options: the options of the extraction.
        device: the device option; None or "auto" for the default.
        plan: the plan of the extraction.
        header: the header of the store.
        given: image -> number of its given regions; None for detections, which count as ``options.max_regions``.
    """
    from refdet.data.transforms import input_size
    from refdet.device import described
    from refdet.ops._library import kernels_state

    def map_size(record: ImageRecord) -> tuple[int, int]:
        size = input_size(record.height, record.width, meta.recipe.input)
        stride = meta.recipe.model.stride
        if meta.recipe.model.backbone == "vgg16":  # its pooling rounds down
            return max(size.height // stride, 1), max(size.width // stride, 1)
        return math.ceil(size.height / stride), math.ceil(size.width / stride)

    lines = [f"device: {described(device)}, {options.precision}, {kernels_state()}"]
    size = ""
    if given is not None or options.regions == "detections":
        shapes = feature_shapes(meta.recipe, len(meta.categories))
        features = {name: shapes[name] for name in plan.features}
        columns = Columns(features, plan.dtype, plan.masks, plan.ann_ids, plan.maps)  # uncompressed
        bytes_ = estimated_bytes(
            image_list.records, given or (lambda _: options.max_regions), meta.recipe, header, columns, map_size
        )
        most = f"at most, with {counted(options.max_regions, 'region')} per image,"
        size = f"; file size: {'about' if given is not None else most} {_readable(bytes_)}"
        size += " before compression" if plan.compression != "none" else ""
    lines.append(f"images: {len(image_list.records)} of {image_list.name}{size}")
    lines.append(f"detector: recipe {meta.recipe.name}, trained on: {meta.provenance.one_line()}")
    return lines


def _readable(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
