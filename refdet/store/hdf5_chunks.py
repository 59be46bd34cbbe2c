"""Check that all chunks of an HDF5 dataset exist and have the right decompressed size, before HDF5 reads them.

HDF5 does not check the decompressed size of a chunk. If it is too small, HDF5 reads out of bounds; if it is too large,
a small file can take any amount of memory.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from h5py import h5d, h5p, h5z

from refdet.store.chunks import THREADS

MAX_CHUNK = 2**26  # bytes of a chunk; a store has chunks of about 256 KiB, or of one region if that is larger
_LZF = 32000  # id of h5py's LZF filter, registered with the HDF Group

_COMPRESSION_FILTERS = (h5z.FILTER_DEFLATE, _LZF)
_ALLOWED_FILTERS = (
    (),
    *((code,) for code in _COMPRESSION_FILTERS),
    *((h5z.FILTER_SHUFFLE, code) for code in _COMPRESSION_FILTERS),
)


class StructureError(ValueError):
    """A file has a structure that no store has; the message names the part and the problem."""


def check_filters(name: str, dcpl: h5p.PropDCID, itemsize: int) -> tuple[int, ...]:
    """Check the filters of a dataset.

    Args:
        name: name of the dataset, for error messages.
        dcpl: its creation property list.
        itemsize: size of an element in bytes.

    Returns:
        Filter codes in the order in which they were applied.

    Raises:
        StructureError: unsupported filters, or filters for elements or chunks of another size.
    """
    filters: list[tuple[int, tuple[int, ...]]] = []
    for i in range(dcpl.get_nfilters()):
        code, _, values, _ = dcpl.get_filter(i)
        filters.append((code, tuple(values)))
    codes = tuple(code for code, _ in filters)
    if codes not in _ALLOWED_FILTERS:
        raise StructureError(f"{name} has unsupported filters ({', '.join(map(str, codes))})")
    chunk_size = math.prod(dcpl.get_chunk()) * itemsize if codes else 0
    # the filters' parameters (cd_values): shuffle: (itemsize,); LZF: (filter revision, LZF version, bytes of a chunk)
    for code, values in filters:
        if (code == h5z.FILTER_SHUFFLE and values != (itemsize,)) or (code == _LZF and values[2:] != (chunk_size,)):
            raise StructureError(f"{name} has a filter for elements or chunks of another size")
    return codes


def check_chunks(
    name: str,
    data: h5d.DatasetID,
    shape: Sequence[int],
    itemsize: int,
    chunk: Sequence[int],
    filters: tuple[int, ...],
    size: int,
) -> None:
    """Check that all chunks exist, lie inside the file and decompress to the right size.

    A chunk that cannot be decompressed is not reported here, as reading it fails anyway.

    Args:
        name: name of the dataset, for error messages.
        data: the dataset.
        shape: shape of the dataset.
        itemsize: size of an element in bytes.
        chunk: shape of a chunk.
        filters: filter codes from `check_filters`.
        size: size of the file in bytes.

    Raises:
        StructureError: a chunk is missing, outside the file or of the wrong size.
    """
    chunk_size = math.prod(chunk) * itemsize
    if not 0 < chunk_size <= MAX_CHUNK:
        raise StructureError(f"{name} has chunks of {chunk_size} bytes")
    grid = [-(-side // step) for side, step in zip(shape, chunk, strict=True)]  # number of chunks along each dimension
    found, expected = data.get_num_chunks(), math.prod(grid)
    if found < expected:
        raise StructureError(f"{name} has {found} of {expected} chunks, the others were never written")
    if found > expected:
        raise StructureError(f"{name} has {found} chunks, but its shape has room for {expected}")
    seen = np.zeros(grid, bool)

    infos = _chunk_infos(data)
    for info in infos:
        index = [first // step for first, step in zip(info.chunk_offset, chunk, strict=True)]
        if any(i >= n for i, n in zip(index, grid, strict=True)) or seen[tuple(index)]:
            raise StructureError(f"{name} has a duplicate chunk or one outside its shape")
        seen[tuple(index)] = True
        if info.byte_offset is None or info.byte_offset + info.size > size:
            raise StructureError(f"{name} has a chunk outside the file")
        if info.size > chunk_size + chunk_size // 100 + 1024:  # incompressible data grow by less
            raise StructureError(f"{name} has a chunk that is larger compressed than uncompressed")
    with ThreadPoolExecutor(THREADS) as pool:
        for length in pool.map(lambda info: _decompressed_length(data, info, filters, chunk_size), infos):
            if length is not None and length != chunk_size:
                raise StructureError(f"{name} has a chunk of {length} bytes instead of {chunk_size}")


def _chunk_infos(data: h5d.DatasetID) -> list[Any]:
    """Offset, size and filter mask of each chunk, as h5py's StoreInfo."""
    infos: list[Any] = []
    if hasattr(data, "chunk_iter"):
        data.chunk_iter(infos.append)
    else:  # an older HDF5
        infos += map(data.get_chunk_info, range(data.get_num_chunks()))
    return infos


def _decompressed_length(data: h5d.DatasetID, info: Any, filters: tuple[int, ...], chunk_size: int) -> int | None:
    """Decompressed length of a chunk in bytes, None if it cannot be decompressed."""
    # a bit of the mask is set if the filter was skipped; compression is the last filter
    is_uncompressed = not filters or (info.filter_mask >> (len(filters) - 1)) & 1
    if is_uncompressed:
        length: int = info.size
        return length
    _, content = data.read_direct_chunk(info.chunk_offset)
    return _gzip_length(content, chunk_size) if filters[-1] == h5z.FILTER_DEFLATE else _lzf_length(content, chunk_size)


def _gzip_length(content: bytes, chunk_size: int) -> int | None:
    """Decompressed length of a gzip chunk, counted up to ``chunk_size`` + 1; None if it is damaged."""
    stream = zlib.decompressobj()
    try:
        length = len(stream.decompress(content, chunk_size + 1))
    except zlib.error:
        return None
    return length if stream.eof or length > chunk_size else None


def _lzf_length(content: bytes, chunk_size: int) -> int | None:
    """Decompressed length of an LZF chunk, counted until it exceeds ``chunk_size``; None if the chunk is damaged.

    A chunk is a sequence of literals (a control byte below 32, then 1 to 32 bytes) and back-references (2 or 3 bytes).
    """
    offset = length = 0
    end = len(content)
    while offset < end and length <= chunk_size:
        control = content[offset]
        if control < 32:
            offset += control + 2
            length += control + 1
        else:
            copied = control >> 5
            if copied == 7:  # a longer reference, with one more byte
                offset += 1
                if offset >= end:
                    return None
                copied += content[offset]
            offset += 2
            length += copied + 2
    return length if offset == end or length > chunk_size else None
