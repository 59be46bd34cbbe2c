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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from refdet.files.short_text import cut
from refdet.store.codec import (
    MASK_COUNTS,
    EncodedImage,
    decode,
    dtypes,
    encode,
    missing,
    raw_bytes,
    row_of,
)
from refdet.store.crc import crc32
from refdet.store.schema import Columns
from refdet.structures.limits import is_id, size_problem
from refdet.structures.regions import Regions

_MAGIC = b"refdet-shard/2\n"
_BLOCK = struct.Struct("<QI")
_NUMBER = struct.Struct("<I")


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
        columns: which columns of the regions to write.
    """

    def __init__(self, file: BinaryIO, shard_id: Mapping[str, Any], columns: Columns) -> None:
        self._file, self._columns = file, columns
        self._size = len(_MAGIC)
        self._crc = 0  # of the blocks' CRCs
        file.write(_MAGIC)
        self._write([json.dumps(shard_id).encode()])

    def add(self, image: Regions | EncodedImage) -> tuple[EncodedImage, BlockLocation]:
        """Write an image.

        Args:
            image: its regions, or what they were encoded to with a check that they are finite.

        Returns:
            The image as `read` gives it, and the location of its block.

        Raises:
            ValueError: a required column is missing.
            RuntimeFailure: a number is not finite, or too large for float16.
        """
        if isinstance(image, Regions):
            image = encode(image, self._columns, finite=True)
        row = image.row
        arrays = {_short(name): values for name, values in image.arrays.items()}
        parts = [raw_bytes(values) for values in arrays.values()]
        arrays.pop("mask_counts", None)
        head = json.dumps(
            {
                "id": row.id,
                "file_name": row.file_name,
                "height": row.height,
                "width": row.width,
                "error": row.error,
                "masks": image.mask_sizes,
                "arrays": [[name, values.dtype.str, values.shape] for name, values in arrays.items()],
            }
        ).encode()
        return image, self._write([_NUMBER.pack(len(head)), head, *parts])

    def finish(self) -> None:
        """Write the end marker and the checksum of all blocks."""
        self._file.write(_BLOCK.pack(0, self._crc))

    def _write(self, parts: Sequence[bytes | memoryview]) -> BlockLocation:
        length, crc = sum(map(len, parts)), 0
        for part in parts:
            crc = crc32(part, crc)
        self._file.write(_BLOCK.pack(length, crc))
        for part in parts:
            self._file.write(part)
        self._crc = crc32(_NUMBER.pack(crc), self._crc)
        place = BlockLocation(self._size + _BLOCK.size, length, crc)
        self._size = place.start + length
        return place


def read(path: Path, shard_id: Mapping[str, Any], columns: Columns) -> Iterator[tuple[EncodedImage, BlockLocation]]:
    """Iterate over the images of a shard in order.

    The shard is known to be complete only at the end of the iteration.

    Args:
        path: the shard.
        shard_id: expected identity of the shard.
        columns: columns of the regions.

    Yields:
        Each image, which `refdet.store.codec.decode` converts to regions, and the location of its block.

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
            with _malformed():
                image = _image(data, columns)
                decode(image)
                if absent := missing(image, columns):
                    raise ValueError(f"{min(absent)} is missing")
            yield image, place


def read_at(path: Path, place: BlockLocation, columns: Columns) -> EncodedImage:
    """Read one image of a shard.

    Args:
        path: the shard.
        place: location of the image's block.
        columns: columns of the regions.

    Returns:
        The image.

    Raises:
        ShardError: the shard is damaged or missing.
    """
    try:
        with path.open("rb") as file:
            file.seek(place.start)
            data = _checked(file.read(place.length), place)
    except FileNotFoundError:
        raise ShardError("missing") from None
    with _malformed():
        return _image(data, columns)


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
        all_crcs = crc32(_NUMBER.pack(crc), all_crcs)
        blocks += 1
    if crc != all_crcs or left or not blocks:
        raise ShardError("damaged: wrong end marker or checksum")


def _checked(data: bytes, place: BlockLocation) -> bytes:
    if len(data) != place.length:
        raise ShardError("damaged: truncated")
    if crc32(data) != place.crc:
        raise ShardError("damaged: checksum mismatch")
    return data


@contextmanager
def _malformed() -> Iterator[None]:
    """Turn what malformed data cause into a ShardError: a file written with malicious intent has valid checksums."""
    try:
        yield
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


def _image(data: bytes, columns: Columns) -> EncodedImage:
    """Parse an image; its arrays are views of the data, which may be unaligned."""
    (length,) = _NUMBER.unpack_from(data)
    at = _NUMBER.size + length
    head = json.loads(data[_NUMBER.size : at])
    _check_head(head)
    types, arrays = {_short(name): (name, dtype) for name, dtype in dtypes(columns).items()}, {}
    text = np.frombuffer(data[at : at + sum(head["masks"])], types.pop("mask_counts")[1])
    if columns.masks:
        arrays[MASK_COUNTS] = text
    at += sum(head["masks"])
    for name, dtype, shape in head["arrays"]:
        dataset, wanted = types[name]
        if dtype != wanted.str:
            raise ValueError(f"{name} has dtype {dtype!r:.20}")
        count = math.prod(shape)
        if min(shape, default=0) < 0:
            raise ValueError(f"{name} has a negative size")
        arrays[dataset] = np.frombuffer(data, dtype, count, at).reshape(shape) if count else np.zeros(shape, dtype)
        at += count * wanted.itemsize
    fields = (head["id"], head["file_name"], head["height"], head["width"], head["error"])
    return EncodedImage(row_of(fields, arrays), head["masks"] if columns.masks else (), arrays)


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


def _short(dataset: str) -> str:
    """Name of an array in a shard."""
    return "im_info" if dataset == "maps/im_info" else dataset.removeprefix("regions/")
