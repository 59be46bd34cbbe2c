"""Upper bound of the size of a store, known before writing it. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from refdet.store.chunks import chunked_space
from refdet.store.schema import Columns, Header, ImageRow

_METADATA_BYTES = 64 << 10  # for HDF5's metadata and the attribute `run`


def space_needed(images: Sequence[ImageRow], columns: Columns, header: Header) -> int:
    """Maximum size in bytes of a store of images."""
    need = contiguous_space(images, columns)
    if columns.compression != "none":
        need += sum(chunked_space(shape, np.dtype(columns.dtype)) for shape in _compressible_shapes(images, columns))
    need += 4 * len(images) * len(columns.checksum_names())  # checksums, uint32
    # the columns of /images, with HDF5's string heap; a character takes at most 4 bytes in UTF-8
    need += sum(128 + 4 * (len(row.file_name) + len(row.error)) for row in images)
    return need + 2 * len(json.dumps(asdict(header))) + _METADATA_BYTES  # twice the header, as a margin


def contiguous_space(images: Sequence[ImageRow], columns: Columns) -> int:
    """Size in bytes of the datasets of regions, features and maps that are not compressed."""
    regions = sum(row.regions for row in images)
    # box, score, category_id, ann_id, mask_start; mask_counts; for maps, the start, shape and im_info of each image
    need = regions * (16 + 4 + 8 + 8 * columns.ann_ids + 8 * columns.masks) + sum(row.mask_bytes for row in images)
    need += 32 * len(images) if columns.maps else 0
    if columns.compression == "none":
        need += (
            sum(math.prod(shape) for shape in _compressible_shapes(images, columns)) * np.dtype(columns.dtype).itemsize
        )
    return need


def _compressible_shapes(images: Sequence[ImageRow], columns: Columns) -> list[tuple[int, ...]]:
    """Shapes of the datasets that ``columns.compression`` applies to: features and maps."""
    regions, map_values = sum(row.regions for row in images), sum(math.prod(row.map_shape) for row in images)
    return [*((regions, *shape) for shape in columns.features.values()), *((map_values,) for _ in columns.maps)]
