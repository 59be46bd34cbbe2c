"""Serialize the regions of an image, for both shards and stores.

An image is encoded as arrays named like the datasets of a store. A store appends them to its datasets, a shard writes
them one after another (`refdet.store.shard_file`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from refdet.errors import RuntimeFailure
from refdet.store.crc import crc32
from refdet.store.schema import Columns, ImageRow
from refdet.structures.regions import Regions

MASK_COUNTS, MASK_START = "regions/mask_counts", "regions/mask_start"
# Bytes per region of each array that is neither features nor masks.
REGION_BYTES = {"regions/box": 16, "regions/score": 4, "regions/category_id": 8, "regions/ann_id": 8}
_FEATURE_PREFIX, _MAP_PREFIX, _IM_INFO = "features/", "maps/", "maps/im_info"
_HALF_INF, _HALF_MINUS_INF = 0x7C00, 0xFC00  # bits of inf and -inf in float16


@dataclass(frozen=True)
class EncodedImage:
    """The regions of an image as arrays.

    Attributes:
        row: the image's row in a store.
        mask_sizes: number of bytes of each mask, () without masks.
        arrays: dataset -> values, little-endian, in the order of a shard: ``regions/box`` (n, 4), ``regions/score``
            (n,), ``regions/category_id`` (n,), ``features/fc7`` (n, D) and so on, as in the store; without
            `MASK_START`, which depends on the other images.
        checksums: dataset -> CRC-32 of its array, in the order of ``arrays``; empty if not computed yet.
        stamp: integers that identify the image file from which it was computed, kept in shards; () if unknown.
    """

    row: ImageRow
    mask_sizes: Sequence[int]
    arrays: Mapping[str, np.ndarray]
    checksums: Mapping[str, int] = field(default_factory=dict)
    stamp: tuple[int, ...] = ()


class RawImage(NamedTuple):
    """The regions of an image without maps, as bytes of arrays that were checked before.

    Attributes:
        row: the image's row in a store.
        mask_sizes: number of bytes of each mask, as the bytes of a uint32 array.
        checksums: CRC-32 of each array, as the bytes of a uint32 array.
        parts: bytes of each array, in the order of `region_bytes`.
    """

    row: ImageRow
    mask_sizes: bytes
    checksums: bytes
    parts: Sequence[memoryview]


def raw_bytes(values: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, aligned or not."""
    return values.reshape(-1).view(np.uint8).data if values.size else memoryview(b"")


def dtypes(columns: Columns) -> Mapping[str, np.dtype]:
    """Dataset -> little-endian dtype, for each array that an image may have."""
    return _dtypes(tuple(columns.features), columns.maps, columns.dtype)


@lru_cache
def _dtypes(features: tuple[str, ...], maps: tuple[str, ...], dtype: str) -> Mapping[str, np.dtype]:
    fixed = {
        MASK_COUNTS: "|u1",
        "regions/box": "<f4",
        "regions/score": "<f4",
        "regions/category_id": "<i8",
        "regions/ann_id": "<i8",
        _IM_INFO: "<f4",
    }
    named = [_FEATURE_PREFIX + name for name in features] + [_MAP_PREFIX + name for name in maps]
    feature_dtype = np.dtype(dtype).newbyteorder("<")
    return {name: np.dtype(code) for name, code in fixed.items()} | dict.fromkeys(named, feature_dtype)


def region_bytes(columns: Columns) -> dict[str, int]:
    """Dataset -> bytes per region of its array, in the order of a shard; 0 for masks, which vary. Without maps."""
    sizes = {MASK_COUNTS: 0} if columns.masks else {}
    sizes |= {name: size for name, size in REGION_BYTES.items() if columns.ann_ids or name != "regions/ann_id"}
    itemsize = np.dtype(columns.dtype).itemsize
    return sizes | {_FEATURE_PREFIX + name: math.prod(shape) * itemsize for name, shape in columns.features.items()}


def encode_all(images: Sequence[Regions], columns: Columns) -> list[EncodedImage]:
    """Convert the regions of images to arrays with checksums, and check that no number is NaN or infinite.

    Checksums are computed in a separate pass at the end: reading all numbers evicts the interpreter's data from the
    CPU's caches, which would make the rest take three times as long.

    Args:
        images: regions of each image.
        columns: as in `encode`.

    Returns:
        The encoded images.

    Raises:
        ValueError: a column is missing.
        RuntimeFailure: a number is not finite, or too large for float16.
    """
    encoded = [encode(image, columns) for image in images]
    with np.errstate(over="ignore", invalid="ignore"):  # the sums in `_is_finite`
        return [
            replace(image, checksums=_check_and_checksum(image, regions))
            for image, regions in zip(encoded, images, strict=True)
        ]


def checksums_of(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """CRC-32 of each array."""
    return {name: crc32(raw_bytes(values)) for name, values in arrays.items()}


def _check_and_checksum(image: EncodedImage, regions: Regions) -> dict[str, int]:
    """Check that each array is finite and return its CRC-32, in one pass while it is in the CPU's cache."""
    checksums = {}
    for name, values in image.arrays.items():
        _check_finite(name, values, regions)
        checksums[name] = crc32(raw_bytes(values))
    return checksums


def encode(regions: Regions, columns: Columns) -> EncodedImage:
    """Convert regions to arrays; the inverse of `decode`.

    Args:
        regions: the regions of an image.
        columns: the columns to encode, all of which are required; their shapes are not checked.

    Returns:
        The encoded image.

    Raises:
        ValueError: a column is missing.
    """
    n, where = len(regions), f"image {regions.image_id}"
    masks = (regions.masks or ()) if columns.masks else ()
    if columns.masks and len(masks) != n:
        raise ValueError(f"{where}: no masks, which are required")
    values_of: dict[str, np.ndarray | None] = {
        MASK_COUNTS: np.frombuffer(b"".join(masks), np.uint8) if columns.masks else None,
        "regions/box": regions.boxes,
        "regions/score": regions.scores,
        "regions/category_id": regions.category_ids,
    }
    if columns.ann_ids and n:
        if regions.ann_ids is None:
            raise ValueError(f"{where}: no annotation ids, which are required")
        values_of["regions/ann_id"] = regions.ann_ids
    for name in columns.features:
        if n and name not in regions.features:
            raise ValueError(f"{where}: no {name} features")
        values_of[_FEATURE_PREFIX + name] = regions.features.get(name)  # without regions, (0, D) or None
    for name in columns.maps:
        if name not in regions.maps and not regions.error:
            raise ValueError(f"{where}: no {name} map")
        values_of[_MAP_PREFIX + name] = regions.maps.get(name)
        values_of[_IM_INFO] = regions.im_info
    types = dtypes(columns)
    with np.errstate(over="ignore"):  # values that are too large for float16 are found by `encode_all`
        arrays = {
            name: np.ascontiguousarray(values, types[name]) for name, values in values_of.items() if values is not None
        }
    row = image_row(
        arrays,
        image_id=regions.image_id,
        file_name=regions.file_name,
        height=regions.height,
        width=regions.width,
        error=regions.error,
    )
    return EncodedImage(row, [len(mask) for mask in masks], arrays)


def image_row(
    arrays: Mapping[str, np.ndarray], *, image_id: int, file_name: str, height: int, width: int, error: str
) -> ImageRow:
    """Row in a store of an image with these arrays, which give its numbers of regions and bytes of masks."""
    mask_bytes = arrays[MASK_COUNTS].nbytes if MASK_COUNTS in arrays else 0
    row = ImageRow(image_id, file_name, height, width, error, len(arrays["regions/box"]), mask_bytes)
    head_map = arrays.get(_MAP_PREFIX + "head")
    return row if head_map is None else row._replace(map_shape=head_map.shape)


def decode(image: EncodedImage, names: Mapping[int, str] | None = None) -> Regions:
    """Convert arrays to regions; the inverse of `encode`.

    Args:
        image: the image.
        names: category id -> name, for `Regions.names`.

    Returns:
        The regions.

    Raises:
        ValueError: lengths or shapes do not match.
        KeyError: the boxes, scores or category ids are missing.
    """
    row, arrays, masks = image.row, image.arrays, None
    if MASK_COUNTS in arrays:
        counts, offsets = arrays[MASK_COUNTS].tobytes(), np.cumsum([0, *image.mask_sizes]).tolist()
        if offsets[-1] != len(counts):
            raise ValueError(f"{len(counts)} bytes of masks, expected {offsets[-1]}")
        masks = tuple(counts[first:end] for first, end in pairwise(offsets))
    maps = _strip_prefix(_MAP_PREFIX, {name: values for name, values in arrays.items() if name != _IM_INFO})
    return Regions(
        row.id,
        row.file_name,
        row.height,
        row.width,
        boxes=arrays["regions/box"],
        scores=arrays["regions/score"],
        category_ids=arrays["regions/category_id"],
        ann_ids=arrays.get("regions/ann_id"),
        masks=masks,
        features=_strip_prefix(_FEATURE_PREFIX, arrays),
        error=row.error,
        maps=maps,
        im_info=arrays.get(_IM_INFO),
        names=names,
    )


def _strip_prefix(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names start with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}


def missing_arrays(image: EncodedImage, columns: Columns) -> set[str]:
    """Names of the arrays of features, annotation ids and maps that ``columns`` require and an image lacks."""
    per_region = ["regions/ann_id"] * columns.ann_ids + [_FEATURE_PREFIX + name for name in columns.features]
    maps = [] if image.row.error else [_MAP_PREFIX + name for name in columns.maps]
    return {*maps, *(per_region if image.row.regions else [])} - image.arrays.keys()


def _check_finite(name: str, values: np.ndarray, regions: Regions) -> None:
    """Raise RuntimeFailure if a number is NaN, infinite, or was too large for float16."""
    if values.dtype.kind != "f" or _is_finite(values):
        return
    name = name.split("/")[-1]
    where = f"image {regions.image_id} ({regions.file_name}): {name}"
    original, dtype = {**regions.features, **regions.maps}.get(name), values.dtype.name
    out_of_range = f"beyond the range of {dtype} ({np.finfo(dtype).max:g}); start again with `dtype='float32'`"
    if original is not None and _is_finite(original):
        raise RuntimeFailure(f"{where} reaches {float(np.abs(original).max()):g}, {out_of_range}")
    if dtype == "float16" and original is not None and original.dtype == dtype and not np.isnan(original).any():
        # the device has checked the numbers and then converted them to float16, so inf can only be an overflow
        raise RuntimeFailure(f"{where} is {out_of_range}")
    raise RuntimeFailure(f"{where} contains NaN or inf; check the checkpoint's weights")


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype != np.float16:
        # summing is faster: a finite sum proves that every number is finite; another may only have overflowed
        return math.isfinite(np.add.reduce(values, axis=None)) or bool(np.isfinite(values).all())
    # numpy's check is slow for float16; read as integers, inf and NaN are the largest values of each sign
    positive, negative = values.view(np.int16).max(initial=0), values.view(np.uint16).max(initial=0)
    return bool(positive < _HALF_INF and negative < _HALF_MINUS_INF)
