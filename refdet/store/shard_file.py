r"""File format of a shard: the regions of several images with checksums. No torch.

    "refdet-shard/2\\n"
    block                 shard_id: number of the shard and hash of its plan; JSON
    blocks                one per image
    u64 0, u32 CRC-32     end marker, and checksum of the checksums of all blocks

A block is its length (u64), its CRC-32 (u32) and its data. The data of an image are the length of a header (u32), the
header (JSON: fields, length of each mask, name, dtype and shape of each array, and, if known, the stamp of the image
file), the concatenated masks, and the arrays in order. Numbers are little-endian.

`ShardWriter.add` and `read` return the `BlockLocation` of each image, with which `refdet.store.shard_images` reads that
image alone. The CRC-32 detects accidental truncation, holes and bit flips.
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

from refdet.files.buffers import write_buffers
from refdet.files.short_text import shorten
from refdet.store.codec import (
    MASK_COUNTS,
    REGION_BYTES,
    EncodedImage,
    checksums_of,
    decode,
    dtypes,
    image_row,
    missing_arrays,
    raw_bytes,
)
from refdet.store.crc import crc32, crc32_of_parts
from refdet.store.schema import Columns
from refdet.structures.limits import is_id, size_problem

_MAGIC = b"refdet-shard/2\n"
_BLOCK_HEADER = struct.Struct("<QI")  # length, CRC-32
_UINT32 = struct.Struct("<I")


class ShardError(Exception):
    """A shard is damaged, missing or of another extraction; the message does not include its path."""


class BlockLocation(NamedTuple):
    """Location of an image's block in its shard, and what is needed to read it without parsing.

    Attributes:
        start: offset in the file of the block's data, in bytes.
        length: number of bytes of the data.
        crc: CRC-32 of the data.
        header_bytes: number of bytes of the data before the arrays.
        mask_sizes: number of bytes of each mask, as the bytes of a uint32 array.
        checksums: CRC-32 of each array, as the bytes of a uint32 array.
        stamp: `EncodedImage.stamp` of the image.
    """

    start: int
    length: int
    crc: int
    header_bytes: int
    mask_sizes: bytes
    checksums: bytes
    stamp: tuple[int, ...] = ()


class ShardWriter:
    """Writes the images of a shard.

    Args:
        file: a file open for writing, unbuffered.
        shard_id: number of the shard and hash of its plan, as a JSON object; `read` requires the same.
    """

    def __init__(self, file: BinaryIO, shard_id: Mapping[str, Any]) -> None:
        self._file = file.fileno()
        self._size = 0  # bytes written so far
        self._crc = 0  # CRC-32 of the CRCs of all blocks so far
        identity = json.dumps(shard_id).encode()
        self._write([_MAGIC, *self._make_block([identity], [crc32(identity)])])

    def add(self, images: Sequence[EncodedImage]) -> list[BlockLocation]:
        """Write images.

        Args:
            images: the images, with checksums, from `refdet.store.codec.encode_all`.

        Returns:
            The locations of their blocks.
        """
        start = self._size
        locations: list[BlockLocation] = []
        parts: list[bytes | memoryview] = []
        for image in images:
            header = _encode_header(image)
            data = [raw_bytes(values) for values in image.arrays.values()]
            block = self._make_block([header, *data], [crc32(header), *image.checksums.values()])
            length, crc = _BLOCK_HEADER.unpack(block[0])
            locations.append(_block_location(image, start + _BLOCK_HEADER.size, length, crc, len(header)))
            start += _BLOCK_HEADER.size + length
            parts += block
        self._write(parts)
        return locations

    def finish(self) -> None:
        """Write the end marker and the checksum of all blocks."""
        self._write([_BLOCK_HEADER.pack(0, self._crc)])

    def _make_block(self, parts: Sequence[bytes | memoryview], part_crcs: Sequence[int]) -> list[bytes | memoryview]:
        """Make the next block, whose data are these parts: its length and CRC-32, then the parts."""
        crc = crc32_of_parts(parts, part_crcs)
        self._crc = crc32(_UINT32.pack(crc), self._crc)
        return [_BLOCK_HEADER.pack(sum(map(len, parts)), crc), *parts]

    def _write(self, parts: Sequence[bytes | memoryview]) -> None:
        self._size += write_buffers(self._file, parts)


def _encode_header(image: EncodedImage) -> bytes:
    """The length of an image's header and the header itself, which precede the arrays."""
    row, arrays = image.row, {_shard_name(name): values for name, values in image.arrays.items()}
    arrays.pop("mask_counts", None)  # described by the lengths of the masks
    header = json.dumps(
        {
            "id": row.id,
            "file_name": row.file_name,
            "height": row.height,
            "width": row.width,
            "error": row.error,
            "masks": image.mask_sizes,
            "arrays": [[name, values.dtype.str, values.shape] for name, values in arrays.items()],
            **({"file": image.stamp} if image.stamp else {}),  # ignored by older versions
        }
    ).encode()
    return _UINT32.pack(len(header)) + header


def _block_location(image: EncodedImage, start: int, length: int, crc: int, header_bytes: int) -> BlockLocation:
    """The location of an image's block, from the image and the first four attributes."""
    sizes, crcs = np.array(image.mask_sizes, np.uint32), np.array([*image.checksums.values()], np.uint32)
    return BlockLocation(start, length, crc, header_bytes, sizes.tobytes(), crcs.tobytes(), image.stamp)


def read(path: Path, shard_id: Mapping[str, Any], columns: Columns) -> Iterator[tuple[EncodedImage, BlockLocation]]:
    """Iterate over the images of a shard in order.

    Whether the shard is complete is known only at the end of the iteration.

    Args:
        path: the shard.
        shard_id: expected identity of the shard.
        columns: columns of the regions.

    Yields:
        Each image, which `refdet.store.codec.decode` converts to regions, and the location of its block.

    Raises:
        ShardError: the shard is truncated, damaged or has another identity.
    """
    with path.open("rb") as file:
        blocks = _read_blocks(file)
        try:
            actual_id = json.loads(next(blocks)[0])
        except (ValueError, RecursionError):
            raise ShardError("damaged: no shard_id") from None
        if actual_id != shard_id:
            raise ShardError("belongs to another extraction")
        for data, start, crc in blocks:
            with as_shard_error():
                image, header_bytes = parse_image(data, columns)
                decode(image)
                if missing := missing_arrays(image, columns):
                    raise ValueError(f"{min(missing)} is missing")
                _check_layout(image, columns, len(data) - header_bytes)
                location = _block_location(image, start, len(data), crc, header_bytes)
            yield image, location


def _read_blocks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Iterate over (data, offset of the data in the file, CRC-32) of each block of a shard.

    Each block is checked and, at the end of the iteration, that none is missing.
    """
    size = os.fstat(file.fileno()).st_size
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ShardError("damaged: not a shard" if size else "damaged: empty")
    remaining = size - len(_MAGIC)
    blocks = 0
    all_crcs = 0
    while True:
        if remaining < _BLOCK_HEADER.size:
            raise ShardError("damaged: truncated")
        length, crc = _BLOCK_HEADER.unpack(file.read(_BLOCK_HEADER.size))
        remaining -= _BLOCK_HEADER.size + length
        if not length:  # the end marker, whose CRC-32 is that of all blocks
            break
        if remaining < 0:  # checked before allocating `length` bytes
            raise ShardError("damaged: truncated")
        start, data = file.tell(), file.read(length)
        check_block(data, length, crc)
        yield data, start, crc
        all_crcs = crc32(_UINT32.pack(crc), all_crcs)
        blocks += 1
    if crc != all_crcs or remaining or not blocks:
        raise ShardError("damaged: wrong end marker or checksum")


def check_block(data: bytes | memoryview, length: int, crc: int) -> None:
    """Raise a ShardError unless data have this length and CRC-32."""
    if len(data) != length:
        raise ShardError("damaged: truncated")
    if crc32(data) != crc:
        raise ShardError("damaged: checksum mismatch")


@contextmanager
def as_shard_error() -> Iterator[None]:
    """Turn errors from malformed data into a ShardError; the data may be malicious, with valid checksums."""
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
        raise ShardError(f"damaged: invalid image ({type(error).__name__}: {shorten(error)})") from None


def parse_image(data: bytes | memoryview, columns: Columns) -> tuple[EncodedImage, int]:
    """Parse the data of an image.

    Args:
        data: the data of the image's block.
        columns: columns of the regions.

    Returns:
        The image, whose arrays are views of the data and may be unaligned; and the offset in the data of the first
        array, in bytes.

    Raises:
        Exception: those that `as_shard_error` turns into a ShardError, if the data are malformed.
    """
    (length,) = _UINT32.unpack_from(data)
    start = offset = _UINT32.size + length
    header = json.loads(bytes(data[_UINT32.size : offset]))
    _check_header(header)
    types = {_shard_name(dataset): (dataset, dtype) for dataset, dtype in dtypes(columns).items()}
    arrays = {}
    _, mask_dtype = types.pop("mask_counts")  # not among the header's arrays
    masks_end = offset + sum(header["masks"])
    if columns.masks:
        arrays[MASK_COUNTS] = np.frombuffer(data[offset:masks_end], mask_dtype)
    offset = masks_end
    for name, dtype, shape in header["arrays"]:
        dataset, expected = types[name]
        if dtype != expected.str:
            raise ValueError(f"{name} has dtype {dtype!r:.20}")
        count = math.prod(shape)
        if min(shape, default=0) < 0:
            raise ValueError(f"{name} has a negative size")
        arrays[dataset] = np.frombuffer(data, dtype, count, offset).reshape(shape) if count else np.zeros(shape, dtype)
        offset += count * expected.itemsize
    row = image_row(
        arrays,
        image_id=header["id"],
        file_name=header["file_name"],
        height=header["height"],
        width=header["width"],
        error=header["error"],
    )
    mask_sizes = header["masks"] if columns.masks else ()
    return EncodedImage(row, mask_sizes, arrays, checksums_of(arrays), tuple(header.get("file", ()))), start


def _check_header(header: Mapping[str, Any]) -> None:
    """Raise a ValueError if a field cannot be written to a store."""
    texts, size = (header["file_name"], header["error"]), (header["height"], header["width"])
    if not is_id(header["id"]) or any(type(side) is not int for side in size):
        raise ValueError("id or size is not an integer")
    if problem := size_problem(*size):
        raise ValueError(problem)
    if min(header["masks"], default=0) < 0:
        raise ValueError("a mask has a negative length")
    if not all(map(is_id, header.get("file", ()))):
        raise ValueError("the stamp of the file is not a list of integers")
    if any("\0" in text for text in texts):
        raise ValueError("NUL in file_name or error")
    for text in texts:
        text.encode("utf-8", "surrogateescape")


def _check_layout(image: EncodedImage, columns: Columns, size: int) -> None:
    """Raise a ValueError if the arrays have another order or size than `refdet.store.shard_images` assumes.

    Args:
        image: the image.
        columns: columns of the regions.
        size: number of bytes of the block's data after the header.
    """
    arrays = image.arrays
    order = [MASK_COUNTS, *REGION_BYTES, *(f"features/{name}" for name in columns.features)]
    if [name for name in arrays if name in order] != [name for name in order if name in arrays]:
        raise ValueError("arrays in another order")
    for name, region_bytes in REGION_BYTES.items():
        if name in arrays and arrays[name].nbytes != region_bytes * image.row.regions:
            raise ValueError(f"{name} has another shape")
    if sum(values.nbytes for values in arrays.values()) != size:
        raise ValueError("unused bytes")


def _shard_name(dataset: str) -> str:
    """Name in the headers of a shard of the array for a dataset: "box" for "regions/box", "features/fc7" as it is."""
    return "im_info" if dataset == "maps/im_info" else dataset.removeprefix("regions/")
