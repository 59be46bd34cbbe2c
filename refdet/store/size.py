"""Upper bound of the size of a store, before writing it. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from refdet.store.chunks import chunked_space
from refdet.store.schema import Columns, Header, ImageRow

_SLACK = 64 << 10  # HDF5's metadata and the information about the run


def space_needed(images: Sequence[ImageRow], columns: Columns, header: Header) -> int:
    """Maximum size in bytes of a store of images."""
    regions, dtype = sum(row.regions for row in images), np.dtype(columns.dtype)
    need = regions * (16 + 4 + 8 + 8 * columns.ann_ids + 8 * columns.masks) + sum(row.mask_bytes for row in images)
    large = {f"features/{name}": (regions, *shape) for name, shape in columns.features.items()}
    large |= {f"maps/{name}": (sum(math.prod(row.map_shape) for row in images),) for name in columns.maps}
    for name, shape in large.items():
        compressed = columns.is_compressed(name)
        need += chunked_space(shape, dtype) if compressed else math.prod(shape) * dtype.itemsize
    need += 32 * len(images) if columns.maps else 0
    need += 4 * len(images) * len(columns.names())  # checksums
    need += sum(128 + 4 * (len(row.file_name) + len(row.error)) for row in images)  # HDF5's string heap
    return need + 2 * len(json.dumps(asdict(header))) + _SLACK
