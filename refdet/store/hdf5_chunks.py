"""Check that all chunks of an HDF5 dataset exist and have the right decompressed size, before HDF5 reads them.

HDF5 trusts a compressed chunk about its decompressed size. If it is too short, HDF5 reads out of bounds; if it is too
long, a small file can take any amount of memory.
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
_LZF = 32000  # filter id registered with the HDF Group; included in h5py
THREADS = min(8, os.cpu_count() or 1)  # for decompressing gzip

_PACKINGS = (h5z.FILTER_DEFLATE, _LZF)
_KNOWN = ((), *((code,) for code in _PACKINGS), *((h5z.FILTER_SHUFFLE, code) for code in _PACKINGS))


class Refused(ValueError):
    """A file has a part that no store has; the message has the part and the problem."""


def check_filters(name: str, plan: h5p.PropDCID, width: int) -> tuple[int, ...]:
    """Check the filters of a dataset.

    Args:
        name: name of the dataset, for error messages.
        plan: its creation properties.
        width: size of a number in bytes.

    Returns:
        Filter codes in the order in which they were applied.

    Raises:
        Refused: unknown filters, or filters for numbers or chunks of another size.
    """
    found: list[tuple[int, tuple[int, ...]]] = []
    for i in range(plan.get_nfilters()):
        code, _, values, _ = plan.get_filter(i)
        found.append((code, tuple(values)))
    codes = tuple(code for code, _ in found)
    if codes not in _KNOWN:
        raise Refused(f"{name} has unsupported filters ({', '.join(map(str, codes))})")
    chunk = math.prod(plan.get_chunk()) * width if codes else 0
    for code, values in found:
        if (code == h5z.FILTER_SHUFFLE and values != (width,)) or (code == _LZF and values[2:] != (chunk,)):
            raise Refused(f"{name} has a filter for numbers of another size")
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
    """Check that all chunks exist, lie inside the file and decompress to the right size.

    A chunk that cannot be decompressed is not reported, as reading it fails anyway.

    Args:
        name: name of the dataset, for error messages.
        data: the dataset.
        shape: shape of the dataset.
        width: size of a number in bytes.
        chunk: shape of a chunk.
        filters: filter codes from `check_filters`.
        size: size of the file in bytes.

    Raises:
        Refused: a chunk is missing, outside the file or of a wrong size.
    """
    whole = math.prod(chunk) * width
    if not 0 < whole <= MAX_CHUNK:
        raise Refused(f"{name} has chunks of {whole} bytes")
    grid = [-(-side // step) for side, step in zip(shape, chunk, strict=True)]
    if data.get_num_chunks() != math.prod(grid):
        raise Refused(f"{name} has {data.get_num_chunks()} of {math.prod(grid)} chunks, the others were never written")
    there = np.zeros(grid, bool)

    chunks = _chunks(data)
    for found in chunks:
        place = [first // step for first, step in zip(found.chunk_offset, chunk, strict=True)]
        if any(p >= n for p, n in zip(place, grid, strict=True)) or there[tuple(place)]:
            raise Refused(f"{name} has a duplicate chunk or one outside its shape")
        there[tuple(place)] = True
        if found.byte_offset is None or found.byte_offset + found.size > size:
            raise Refused(f"{name} has a chunk outside the file")
        if found.size > whole + whole // 100 + 1024:
            raise Refused(f"{name} has a chunk that is larger compressed than uncompressed")
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
    """Decompressed length of a chunk, None if it cannot be decompressed."""
    if not filters or found.filter_mask >> len(filters) - 1 & 1:  # a chunk may be stored without the filter
        length: int = found.size
        return length
    _, content = data.read_direct_chunk(found.chunk_offset)
    return _inflated(content, whole) if filters[-1] == h5z.FILTER_DEFLATE else _unpacked_lzf(content, whole)


def _inflated(content: bytes, whole: int) -> int | None:
    """Decompressed length of a gzip chunk, counted up to ``whole`` + 1; None if it is damaged."""
    stream = zlib.decompressobj()
    try:
        length = len(stream.decompress(content, whole + 1))
    except zlib.error:
        return None
    return length if stream.eof or length > whole else None


def _unpacked_lzf(content: bytes, whole: int) -> int | None:
    """Decompressed length of an LZF chunk (length-prefixed literal runs and back-references); None if damaged."""
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
