r"""File format of a shard: the regions of several images with checksums. No torch.

    "refdet-shard/2\\n"
    block                 shard_id: number of the shard and hash of its plan; JSON
    blocks                one per image
    u64 0, u32 CRC-32     end marker, and checksum of the checksums of all blocks

A block is its length (u64), its CRC-32 (u32) and its data. The data of an image are the length of a header (u32), the
header (JSON: fields, length of each mask, and name, dtype and shape of each array), the concatenated masks, and the
arrays in order. Numbers are little-endian.

Images are written and read one at a time, so only one is in memory. Writing and reading return the `BlockLocation` of
each image, by which it can be read individually. The CRC-32 detects accidental truncation, holes and bit flips.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from refdet.errors import RuntimeFailure
from refdet.extraction.plan import Plan
from refdet.files.short_text import cut
from refdet.structures.limits import is_id, size_problem
from refdet.structures.regions import Regions

_MAGIC = b"refdet-shard/2\n"
_BLOCK = struct.Struct("<QI")
_NUMBER = struct.Struct("<I")
_FEATURE, _MAP = "features/", "maps/"


class ShardError(Exception):
    """A damaged or foreign shard; the message does not include its path."""


class BlockLocation(NamedTuple):
    """Location of an image's block in its shard.

    Attributes:
        start: offset of its data in bytes.
        length: number of bytes.
        crc: CRC-32 of the data.
    """

    start: int
    length: int
    crc: int


class ShardWriter:
    """Writes the images of a shard.

    Args:
        file: a binary file open for writing.
        shard_id: identity of the shard, JSON; `read` requires the same.
        plan: which columns of the regions to write.
    """

    def __init__(self, file: BinaryIO, shard_id: Mapping[str, Any], plan: Plan) -> None:
        self._file, self._plan = file, plan
        self._size = len(_MAGIC)
        self._crc = 0  # of the blocks' CRCs
        file.write(_MAGIC)
        self._write([json.dumps(shard_id).encode()])

    def add(self, regions: Regions) -> BlockLocation:
        """Write an image.

        Args:
            regions: the regions of the image.

        Returns:
            Location of its block.

        Raises:
            ValueError: a required column is missing.
            RuntimeFailure: a number is not finite, or too large for float16.
        """
        masks = regions.masks or () if self._plan.masks else ()
        if self._plan.masks and len(masks) != len(regions):
            raise ValueError(f"image {regions.image_id}: no masks, which the plan requires")
        arrays = _arrays(regions, self._plan)
        head = json.dumps(
            {
                "id": regions.image_id,
                "file_name": regions.file_name,
                "height": regions.height,
                "width": regions.width,
                "error": regions.error,
                "masks": [len(mask) for mask in masks],
                "arrays": [[name, values.dtype.str, values.shape] for name, values in arrays.items()],
            }
        ).encode()
        parts = [values.reshape(-1).view(np.uint8).data for values in arrays.values() if values.size]
        return self._write([_NUMBER.pack(len(head)), head, *masks, *parts])

    def finish(self) -> None:
        """Write the end marker and the checksum of all blocks."""
        self._file.write(_BLOCK.pack(0, self._crc))

    def _write(self, parts: Sequence[bytes | memoryview]) -> BlockLocation:
        length, crc = sum(map(len, parts)), 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        self._file.write(_BLOCK.pack(length, crc))
        for part in parts:
            self._file.write(part)
        self._crc = zlib.crc32(_NUMBER.pack(crc), self._crc)
        place = BlockLocation(self._size + _BLOCK.size, length, crc)
        self._size = place.start + length
        return place


def read(path: Path, shard_id: Mapping[str, Any], plan: Plan) -> Iterator[tuple[Regions, BlockLocation]]:
    """Iterate over the images of a shard in order.

    The shard is known to be complete only at the end of the iteration.

    Args:
        path: the shard.
        shard_id: expected identity of the shard.
        plan: columns of the regions.

    Yields:
        Regions of each image and location of its block.

    Raises:
        ShardError: the shard is truncated, damaged or another one.
    """
    with path.open("rb") as file:
        blocks = _blocks(file)
        try:
            found = json.loads(next(blocks)[0])
        except (ValueError, RecursionError):
            raise ShardError("damaged: no shard_id") from None
        if found != shard_id:
            raise ShardError("belongs to another extraction")
        for data, place in blocks:
            yield _image(data, plan), place


def read_at(path: Path, place: BlockLocation, plan: Plan) -> Regions:
    """Read one image of a shard.

    Args:
        path: the shard.
        place: location of the image's block.
        plan: columns of the regions.

    Returns:
        Regions of the image.

    Raises:
        ShardError: the shard is damaged or missing.
    """
    try:
        with path.open("rb") as file:
            file.seek(place.start)
            return _image(_checked(file.read(place.length), place), plan)
    except FileNotFoundError:
        raise ShardError("missing") from None


def _blocks(file: BinaryIO) -> Iterator[tuple[bytes, BlockLocation]]:
    """Iterate over the blocks of a shard, checking each one and finally that none is missing."""
    left = os.fstat(file.fileno()).st_size - len(_MAGIC)
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ShardError("damaged: not a shard" if left > -len(_MAGIC) else "damaged: empty")
    blocks = 0
    all_crcs = 0
    while True:
        if left < _BLOCK.size:
            raise ShardError("damaged: truncated")
        length, crc = _BLOCK.unpack(file.read(_BLOCK.size))
        left -= _BLOCK.size + length
        if not length:
            break
        if left < 0:  # before allocating so many bytes
            raise ShardError("damaged: truncated")
        place = BlockLocation(file.tell(), length, crc)
        yield _checked(file.read(length), place), place
        all_crcs = zlib.crc32(_NUMBER.pack(crc), all_crcs)
        blocks += 1
    if crc != all_crcs or left or not blocks:
        raise ShardError("damaged: wrong end marker or checksum")


def _checked(data: bytes, place: BlockLocation) -> bytes:
    if len(data) != place.length:
        raise ShardError("damaged: truncated")
    if zlib.crc32(data) != place.crc:
        raise ShardError("damaged: checksum mismatch")
    return data


def _image(data: bytes, plan: Plan) -> Regions:
    # A file written with malicious intent has valid checksums, too.
    try:
        return _parsed(data, plan)
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        OverflowError,
        RecursionError,
        MemoryError,
        struct.error,
    ) as error:
        raise ShardError(f"damaged: invalid image ({type(error).__name__}: {cut(error)})") from None


def _parsed(data: bytes, plan: Plan) -> Regions:
    (length,) = _NUMBER.unpack_from(data)
    at = _NUMBER.size + length
    head = json.loads(data[_NUMBER.size : at])
    _check_head(head)
    ends = list(accumulate(head["masks"], initial=at))
    masks = tuple(data[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True))
    dtypes = _dtypes(plan)
    arrays, at = {}, ends[-1]
    for name, dtype, shape in head["arrays"]:
        if dtype != dtypes[name].str:
            raise ValueError(f"{name} has dtype {dtype!r:.20}")
        count = math.prod(shape)
        if min(shape, default=0) < 0:
            raise ValueError(f"{name} has a negative size")
        # copied, as the data may be unaligned
        arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape).copy() if count else np.zeros(shape, dtype)
        at += count * np.dtype(dtype).itemsize
    regions = _regions(head, masks if plan.masks else None, arrays)
    if missing := _required(regions, plan) - arrays.keys():
        raise ValueError(f"{min(missing)} is missing")
    return regions


def _check_head(head: Mapping[str, Any]) -> None:
    """Raise a ValueError if a field cannot be written to a store."""
    texts, size = (head["file_name"], head["error"]), (head["height"], head["width"])
    if not is_id(head["id"]) or any(type(side) is not int for side in size):
        raise ValueError("id or size is not an integer")
    if problem := size_problem(*size):
        raise ValueError(problem)
    if min(head["masks"], default=0) < 0:
        raise ValueError("mask with a negative length")
    if any("\0" in text for text in texts):
        raise ValueError("NUL in a text")
    for text in texts:
        text.encode("utf-8", "surrogateescape")


def _dtypes(plan: Plan) -> dict[str, np.dtype]:
    """Name -> dtype of each array that an image can have."""
    fixed = {"box": "<f4", "score": "<f4", "category_id": "<i8", "ann_id": "<i8", "im_info": "<f4"}
    of_plan = [_FEATURE + name for name in plan.features] + [_MAP + name for name in plan.maps]
    return {name: np.dtype(dtype) for name, dtype in [*fixed.items(), *((name, plan.dtype) for name in of_plan)]}


def _required(regions: Regions, plan: Plan) -> set[str]:
    """Names of the arrays that an image must have besides its boxes."""
    of_regions = ["ann_id"] * plan.ann_ids + [_FEATURE + name for name in plan.features]
    maps = [] if regions.error else [_MAP + name for name in plan.maps]
    return {*maps, *(of_regions if len(regions) else [])}


def _arrays(regions: Regions, plan: Plan) -> dict[str, np.ndarray]:
    """Convert an image's regions to the arrays that are stored; the inverse of `_regions`."""
    arrays = {
        "box": np.ascontiguousarray(regions.boxes, "<f4"),
        "score": np.ascontiguousarray(regions.scores, "<f4"),
        "category_id": np.ascontiguousarray(regions.category_ids, "<i8"),
    }
    if plan.ann_ids and len(regions):
        if regions.ann_ids is None:
            raise ValueError(f"image {regions.image_id}: no annotation ids, which the plan requires")
        arrays["ann_id"] = np.ascontiguousarray(regions.ann_ids, "<i8")
    for name in plan.features:
        if len(regions) and name not in regions.features:
            raise ValueError(f"image {regions.image_id}: no {name} features")
        if name in regions.features:  # an image without regions may have features with a known shape
            arrays[_FEATURE + name] = _cast(regions.features[name], plan.dtype)
    for name in plan.maps:
        if name not in regions.maps and not regions.error:
            raise ValueError(f"image {regions.image_id}: no {name} map")
        if name in regions.maps:
            arrays[_MAP + name] = _cast(regions.maps[name], plan.dtype)
            arrays["im_info"] = np.ascontiguousarray(regions.im_info, "<f4")
    for name, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise _not_finite(regions, name, plan.dtype)
    return arrays


def _cast(values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinite values are refused later
        return np.ascontiguousarray(values, dtype)


def _not_finite(regions: Regions, name: str, dtype: str) -> RuntimeFailure:
    """Error for an array that contains infinity or NaN."""
    where = f"image {regions.image_id} ({regions.file_name}): {name.split('/')[-1]}"
    given = {**regions.features, **regions.maps}.get(name.split("/")[-1])
    if given is not None and np.isfinite(given).all():
        largest = float(np.abs(given).max())
        return RuntimeFailure(
            f"{where} reaches {largest:g}, beyond the range of {dtype} ({np.finfo(dtype).max:g}); "
            "start again with `dtype='float32'`"
        )
    return RuntimeFailure(f"{where} contains NaN or inf; check the checkpoint's weights")


def _regions(head: Mapping[str, Any], masks: tuple[bytes, ...] | None, arrays: Mapping[str, np.ndarray]) -> Regions:
    return Regions(
        head["id"],
        head["file_name"],
        head["height"],
        head["width"],
        boxes=arrays["box"],
        scores=arrays["score"],
        category_ids=arrays["category_id"],
        ann_ids=arrays.get("ann_id"),
        masks=masks,
        features=_named(_FEATURE, arrays),
        error=head["error"],
        maps=_named(_MAP, arrays),
        im_info=arrays.get("im_info"),
    )


def _named(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}
