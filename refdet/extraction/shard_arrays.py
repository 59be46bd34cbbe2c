r"""One shard on disk: the regions of some images, one image after the other, with checksums. No torch.

    "refdet-shard/2\\n"
    block                 the shard's shard_id: which shard of which plan it is; JSON
    blocks                of each image
    u64 0, u32 CRC-32     the end, and the checksum of the checksums of all blocks

A block is its length (u64), its CRC-32 (u32) and so many bytes. Those of an image are the length of a head (u32), the
head (JSON: its fields, the length of each mask, and name, dtype and shape of each array), then the masks back to back,
then the arrays in that order. Numbers are little-endian.

Images are written as they come and read one by one, so memory holds one of them however large its features are. Who
writes or reads a shard learns the `BlockLocation` of each image, and can read that one alone afterwards. The CRC-32 is
for accidents: it finds a cut, a hole and a flipped bit at the speed of memory.
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
    """A shard is not what was written; the message says what is wrong with it, without its name."""


class BlockLocation(NamedTuple):
    """Where the block of an image is in its shard: the first of its bytes, how many they are, and their CRC-32."""

    start: int
    length: int
    crc: int


class ShardWriter:
    """Writes the images of one shard to a file opened for it.

    Args:
        shard_id: which shard this is; JSON. `read` wants the same.
        plan: says what is kept of the regions.
    """

    def __init__(self, file: BinaryIO, shard_id: Mapping[str, Any], plan: Plan) -> None:
        self._file, self._plan = file, plan
        self._size = len(_MAGIC)
        self._crc = 0  # of the blocks' own
        file.write(_MAGIC)
        self._write([json.dumps(shard_id).encode()])

    def add(self, regions: Regions) -> BlockLocation:
        """Write one image; gives where it is.

        Raises:
            ValueError: a column is missing that is to be kept.
            RuntimeFailure: a number is not finite, or too large for float16.
        """
        masks = regions.masks or () if self._plan.masks else ()
        if self._plan.masks and len(masks) != len(regions):
            raise ValueError(f"image {regions.image_id}: regions without masks where masks are kept")
        arrays = _arrays(regions, self._plan)
        head = json.dumps({
            "id": regions.image_id, "file_name": regions.file_name,
            "height": regions.height, "width": regions.width, "error": regions.error,
            "masks": [len(mask) for mask in masks],
            "arrays": [[name, values.dtype.str, values.shape] for name, values in arrays.items()],
        }).encode()  # fmt: skip
        parts = [values.reshape(-1).view(np.uint8).data for values in arrays.values() if values.size]
        return self._write([_NUMBER.pack(len(head)), head, *masks, *parts])

    def finish(self) -> None:
        """Write the end and its checksum."""
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
    """The images of a shard, in the order they were added.

    Only when all have come without an error the shard is whole.

    Raises:
        ShardError: it is cut or damaged, or is another shard.
    """
    with path.open("rb") as file:
        blocks = _blocks(file)
        try:
            found = json.loads(next(blocks)[0])
        except (ValueError, RecursionError):
            raise ShardError("damaged: it has no shard_id") from None
        if found != shard_id:
            raise ShardError("it is of another extraction")
        for data, place in blocks:
            yield _image(data, plan), place


def read_at(path: Path, place: BlockLocation, plan: Plan) -> Regions:
    """One image of a shard.

    Raises:
        ShardError: what is there is not what was written, or the shard is gone.
    """
    try:
        with path.open("rb") as file:
            file.seek(place.start)
            return _image(_checked(file.read(place.length), place), plan)
    except FileNotFoundError:
        raise ShardError("it is gone") from None


def _blocks(file: BinaryIO) -> Iterator[tuple[bytes, BlockLocation]]:
    """All blocks of a shard; each is checked before it is given, and at the end that none is missing."""
    left = os.fstat(file.fileno()).st_size - len(_MAGIC)
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ShardError("damaged: it is no shard" if left > -len(_MAGIC) else "damaged: it is empty")
    blocks = 0
    all_crcs = 0
    while True:
        if left < _BLOCK.size:
            raise ShardError("damaged: it is cut")
        length, crc = _BLOCK.unpack(file.read(_BLOCK.size))
        left -= _BLOCK.size + length
        if not length:
            break
        if left < 0:  # before so many bytes are asked for
            raise ShardError("damaged: it is cut")
        place = BlockLocation(file.tell(), length, crc)
        yield _checked(file.read(length), place), place
        all_crcs = zlib.crc32(_NUMBER.pack(crc), all_crcs)
        blocks += 1
    if crc != all_crcs or left or not blocks:
        raise ShardError("damaged: its end does not fit")


def _checked(data: bytes, place: BlockLocation) -> bytes:
    if len(data) != place.length:
        raise ShardError("damaged: it is cut")
    if zlib.crc32(data) != place.crc:
        raise ShardError("damaged: a checksum does not fit")
    return data


def _image(data: bytes, plan: Plan) -> Regions:
    # A checksum is right of what somebody wrote on purpose, too.
    try:
        return _parsed(data, plan)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError, MemoryError,
            struct.error) as error:  # fmt: skip
        raise ShardError(f"damaged: an image in it is none ({type(error).__name__}: {cut(error)})") from None


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
            raise ValueError(f"{name} is of {dtype!r:.20}")
        count = math.prod(shape)
        if min(shape, default=0) < 0:
            raise ValueError(f"{name} is of a negative size")
        # a copy, since among bytes of any length numbers lie as they do not for any other reader
        arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape).copy() if count else np.zeros(shape, dtype)
        at += count * np.dtype(dtype).itemsize
    regions = _regions(head, masks if plan.masks else None, arrays)
    if missing := _required(regions, plan) - arrays.keys():
        raise ValueError(f"{min(missing)} is missing")
    return regions


def _check_head(head: Mapping[str, Any]) -> None:
    """ValueError where a field could not be written to a store."""
    texts, size = (head["file_name"], head["error"]), (head["height"], head["width"])
    if not is_id(head["id"]) or any(type(side) is not int for side in size):
        raise ValueError("its id and its size are not integers")
    if problem := size_problem(*size):
        raise ValueError(problem)
    if min(head["masks"], default=0) < 0:
        raise ValueError("a mask of a negative length")
    if any("\0" in text for text in texts):
        raise ValueError("a zero in a text")
    for text in texts:
        text.encode("utf-8", "surrogateescape")


def _dtypes(plan: Plan) -> dict[str, np.dtype]:
    """Each array that an image can have -> what its numbers are."""
    fixed = {"box": "<f4", "score": "<f4", "category_id": "<i8", "ann_id": "<i8", "im_info": "<f4"}
    of_plan = [_FEATURE + name for name in plan.features] + [_MAP + name for name in plan.maps]
    return {name: np.dtype(dtype) for name, dtype in [*fixed.items(), *((name, plan.dtype) for name in of_plan)]}


def _required(regions: Regions, plan: Plan) -> set[str]:
    """The arrays that an image must have beside those of its boxes."""
    of_regions = ["ann_id"] * plan.ann_ids + [_FEATURE + name for name in plan.features]
    maps = [] if regions.error else [_MAP + name for name in plan.maps]
    return {*maps, *(of_regions if len(regions) else [])}


def _arrays(regions: Regions, plan: Plan) -> dict[str, np.ndarray]:
    """What is kept of an image's regions, as it is kept; with `_regions` the only place that knows the columns."""
    arrays = {
        "box": np.ascontiguousarray(regions.boxes, "<f4"),
        "score": np.ascontiguousarray(regions.scores, "<f4"),
        "category_id": np.ascontiguousarray(regions.category_ids, "<i8"),
    }
    if plan.ann_ids and len(regions):
        if regions.ann_ids is None:
            raise ValueError(f"image {regions.image_id}: regions without annotation ids where they are kept")
        arrays["ann_id"] = np.ascontiguousarray(regions.ann_ids, "<i8")
    for name in plan.features:
        if len(regions) and name not in regions.features:
            raise ValueError(f"image {regions.image_id}: regions without {name}")
        if name in regions.features:  # an image without regions may still know the shape of its features
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
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        return np.ascontiguousarray(values, dtype)


def _not_finite(regions: Regions, name: str, dtype: str) -> RuntimeFailure:
    """The error for an array that holds infinity, or what is no number."""
    where = f"image {regions.image_id} ({regions.file_name}): {name.split('/')[-1]}"
    given = {**regions.features, **regions.maps}.get(name.split("/")[-1])
    if given is not None and np.isfinite(given).all():
        largest = float(np.abs(given).max())
        return RuntimeFailure(f"{where} reaches {largest:g}, more than {dtype} can hold ({np.finfo(dtype).max:g}); "
                         "start again with --dtype float32")  # fmt: skip
    return RuntimeFailure(f"{where} is not finite; are the weights of the checkpoint?")


def _regions(head: Mapping[str, Any], masks: tuple[bytes, ...] | None, arrays: Mapping[str, np.ndarray]) -> Regions:
    return Regions(
        head["id"], head["file_name"], head["height"], head["width"],
        boxes=arrays["box"],
        scores=arrays["score"],
        category_ids=arrays["category_id"],
        ann_ids=arrays.get("ann_id"),
        masks=masks,
        features=_named(_FEATURE, arrays),
        error=head["error"],
        maps=_named(_MAP, arrays),
        im_info=arrays.get("im_info"),
    )  # fmt: skip


def _named(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}
