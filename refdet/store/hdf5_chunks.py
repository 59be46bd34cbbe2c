"""Whether the chunks of an HDF5 dataset are all there and unpack to what they should, before HDF5 unpacks them.

HDF5 takes the length that a compressed chunk unpacks to from the chunk. Where it is too short, HDF5 reads memory that
belongs to something else; where it is too long, a small file takes any amount of memory.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from h5py import h5d, h5p, h5z

MAX_CHUNK = 2**26  # bytes; a store's have a quarter of a megabyte, or one region's features
_LZF = 32000  # as registered with the HDF Group; h5py brings it along
THREADS = min(8, os.cpu_count() or 1)  # that unpack gzip

_PACKINGS = (h5z.FILTER_DEFLATE, _LZF)
_KNOWN = ((), *((code,) for code in _PACKINGS), *((h5z.FILTER_SHUFFLE, code) for code in _PACKINGS))


class Refused(ValueError):
    """A part of a file that no store has; the text names the part and the problem."""


def check_filters(name: str, plan: h5p.PropDCID, width: int) -> tuple[int, ...]:
    """The codes of a dataset's filters, in the order in which they were applied to its numbers of ``width`` bytes.

    Raises:
        Refused: for filters that no store has, or that are made for numbers or chunks of another size.
    """
    found: list[tuple[int, tuple[int, ...]]] = []
    for i in range(plan.get_nfilters()):
        code, _, values, _ = plan.get_filter(i)
        found.append((code, tuple(values)))
    codes = tuple(code for code, _ in found)
    if codes not in _KNOWN:
        raise Refused(f"{name} is packed by filters that no store has ({', '.join(map(str, codes))})")
    chunk = math.prod(plan.get_chunk()) * width if codes else 0
    for code, values in found:
        if (code == h5z.FILTER_SHUFFLE and values != (width,)) or (code == _LZF and values[2:] != (chunk,)):
            raise Refused(f"{name} is packed by a filter for numbers of another size")
    return codes


def check_chunks(
    name: str,
    data: h5d.DatasetID,
    shape: Sequence[int],
    width: int,
    chunk: Sequence[int],
    filters: tuple[int, ...],
    size: int,
) -> None:
    """Refused where the chunks are not all there, lie outside of the file, or unpack to another length than theirs.

    A chunk that cannot be unpacked at all is left to the reading, which says so.

    Args:
        shape, chunk: of the dataset and of a chunk of it.
        width: bytes of a number.
        filters: of `check_filters`.
        size: bytes of the file.
    """
    whole = math.prod(chunk) * width
    if not 0 < whole <= MAX_CHUNK:
        raise Refused(f"{name} has chunks of {whole} bytes")
    grid = [-(-side // step) for side, step in zip(shape, chunk, strict=True)]
    if data.get_num_chunks() != math.prod(grid):
        raise Refused(f"{name} has {data.get_num_chunks()} of {math.prod(grid)} chunks: the others were never written")
    there = np.zeros(grid, bool)

    chunks = _chunks(data)
    for found in chunks:
        place = [first // step for first, step in zip(found.chunk_offset, chunk, strict=True)]
        if any(p >= n for p, n in zip(place, grid, strict=True)) or there[tuple(place)]:
            raise Refused(f"{name} has a chunk outside of it, or twice")
        there[tuple(place)] = True
        if found.byte_offset is None or found.byte_offset + found.size > size:
            raise Refused(f"{name} has a chunk outside of the file")
        if found.size > whole + whole // 100 + 1024:
            raise Refused(f"{name} has a chunk that is larger packed than unpacked")
    with ThreadPoolExecutor(THREADS) as pool:
        for length in pool.map(lambda found: _length(data, found, filters, whole), chunks):
            if length is not None and length != whole:
                raise Refused(f"{name} has a chunk of {length} bytes instead of {whole}")


def _chunks(data: h5d.DatasetID) -> list[Any]:
    found: list[Any] = []
    if hasattr(data, "chunk_iter"):
        data.chunk_iter(found.append)
    else:  # an older HDF5
        found += map(data.get_chunk_info, range(data.get_num_chunks()))
    return found


def _length(data: h5d.DatasetID, found: Any, filters: tuple[int, ...], whole: int) -> int | None:
    """The length that a chunk unpacks to; None where it cannot be unpacked."""
    if not filters or found.filter_mask >> len(filters) - 1 & 1:  # it may be left out of a chunk
        length: int = found.size
        return length
    _, content = data.read_direct_chunk(found.chunk_offset)
    return _inflated(content, whole) if filters[-1] == h5z.FILTER_DEFLATE else _unpacked_lzf(content, whole)


def _inflated(content: bytes, whole: int) -> int | None:
    """The length that a chunk unpacks to, as far as one byte over ``whole``; None where it is damaged."""
    stream = zlib.decompressobj()
    try:
        length = len(stream.decompress(content, whole + 1))
    except zlib.error:
        return None
    return length if stream.eof or length > whole else None


def _unpacked_lzf(content: bytes, whole: int) -> int | None:
    """The same of LZF: runs of bytes, and copies of bytes before, each with its length in front."""
    at = length = 0
    end = len(content)
    while at < end and length <= whole:
        control = content[at]
        if control < 32:
            at += control + 2
            length += control + 1
        else:
            copied = control >> 5
            if copied == 7:
                at += 1
                if at >= end:
                    return None
                copied += content[at]
            at += 2
            length += copied + 2
    return length if at == end or length > whole else None
