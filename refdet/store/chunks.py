"""Size and writing of chunked, compressed datasets."""

from __future__ import annotations

import math
import os
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import h5py
import numpy as np

GZIP_LEVEL = 1  # higher levels take three times as long for floats and save less than 1%
THREADS = min(8, os.cpu_count() or 1)  # for compression; more are limited by writing

_CHUNK_BYTES = 2**18  # a quarter of h5py's chunk cache


def chunk_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Number of rows per chunk of a nonempty dataset: about those of an image, fewer if rows are large."""
    return min(shape[0], max(1, _CHUNK_BYTES // (math.prod(shape[1:]) * dtype.itemsize)))


def chunked_space(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Maximum size in bytes of a chunked dataset whose chunks are written once.

    The last chunk has full size. Incompressible data are stored unchanged by lzf and grow by at most a thousandth
    with gzip. The chunk index takes less than 32 bytes per chunk.
    """
    if 0 in shape:
        return 0
    rows = chunk_rows(shape, dtype)
    chunk = rows * math.prod(shape[1:]) * dtype.itemsize
    return -(-shape[0] // rows) * (chunk + chunk // 500 + 64) + 4096


class ChunkedWriter:
    """Writes a dataset sequentially, one full chunk at a time.

    A chunk that is written twice is also compressed twice, and if it grows its old space in the file is wasted, so the
    size of the file would be unpredictable.

    Args:
        data: a chunked dataset.
        pool: compresses several gzip chunks in parallel, which HDF5 does sequentially.
    """

    def __init__(self, data: h5py.Dataset, pool: ThreadPoolExecutor) -> None:
        self._data = data
        self._pool = pool if data.compression == "gzip" else None
        self._rows = np.zeros((data.chunks[0], *data.shape[1:]), data.dtype)
        self._first = self._filled = 0  # first row and current size of the chunk
        self._squeezed: deque[tuple[int, Future[bytes]]] = deque()  # first row, chunk

    def append(self, values: np.ndarray) -> None:
        """Append rows."""
        while len(values):
            part, values = np.split(values, [len(self._rows) - self._filled])
            self._rows[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == len(self._rows):
                self._write_chunk()

    def finish(self) -> None:
        """Write the last chunk after all rows were appended."""
        if self._filled:
            self._write_chunk()
        self._write_squeezed(0)

    def _write_chunk(self) -> None:
        if self._pool is None:
            self._data[self._first : self._first + self._filled] = self._rows[: self._filled]
        else:
            self._squeezed.append((self._first, self._pool.submit(_squeezed, self._rows)))
            self._rows = np.zeros_like(self._rows)
            self._write_squeezed(2 * THREADS)
        self._first, self._filled = self._first + self._filled, 0

    def _write_squeezed(self, left: int) -> None:
        """Write compressed chunks in order until ``left`` remain."""
        while len(self._squeezed) > left:
            first, chunk = self._squeezed.popleft()
            self._data.id.write_direct_chunk((first, *[0] * (self._data.ndim - 1)), chunk.result())


def _squeezed(rows: np.ndarray) -> bytes:
    """Compress a chunk as HDF5's shuffle and gzip filters do."""
    by_place = rows.reshape(-1).view(np.uint8).reshape(-1, rows.itemsize).T  # first bytes of all numbers, then second
    return zlib.compress(np.ascontiguousarray(by_place).data, GZIP_LEVEL)
