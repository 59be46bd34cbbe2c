"""Datasets in chunks that are compressed each for itself: how large they are, and how they are filled."""

from __future__ import annotations

import math
import os
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import h5py
import numpy as np

GZIP_LEVEL = 1  # higher ones take three times as long for floats and save less than 1%
THREADS = min(8, os.cpu_count() or 1)  # that compress; beyond it the writing is slower than they are

_CHUNK_BYTES = 2**18  # a quarter of the chunks that h5py keeps in memory


def chunk_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Rows in a chunk of a dataset that is not empty.

    About those of one image, or what is quickly unpacked where they are large.
    """
    return min(shape[0], max(1, _CHUNK_BYTES // (math.prod(shape[1:]) * dtype.itemsize)))


def chunked_space(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes that a dataset in chunks needs at most, if each of them is written once.

    The last is as long as the others. What does not shrink is stored as it is by lzf, and grows by a thousandth at
    most by gzip. The table of the chunks has less than 32 bytes for each.
    """
    if 0 in shape:
        return 0
    rows = chunk_rows(shape, dtype)
    chunk = rows * math.prod(shape[1:]) * dtype.itemsize
    return -(-shape[0] // rows) * (chunk + chunk // 500 + 64) + 4096


class ChunkedWriter:
    """Fills a dataset from its first row to its last, a chunk at a time.

    A chunk that is written twice is compressed twice, and where it has grown its old place in the file stays empty:
    then nobody could say how much space the file needs.

    Args:
        pool: compresses what is gzip, several chunks at once; HDF5 itself does one after the other.
    """

    def __init__(self, data: h5py.Dataset, pool: ThreadPoolExecutor) -> None:
        self._data = data
        self._pool = pool if data.compression == "gzip" else None
        self._rows = np.zeros((data.chunks[0], *data.shape[1:]), data.dtype)
        self._first = self._filled = 0  # the row that the chunk begins with, and how many of its rows are there
        self._squeezed: deque[tuple[int, Future[bytes]]] = deque()  # first row, chunk

    def append(self, values: np.ndarray) -> None:
        """Add rows."""
        while len(values):
            part, values = np.split(values, [len(self._rows) - self._filled])
            self._rows[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == len(self._rows):
                self._write_chunk()

    def finish(self) -> None:
        """Write what is left, when the last row was added."""
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
        """Write chunks, the first ones first, until so many are left."""
        while len(self._squeezed) > left:
            first, chunk = self._squeezed.popleft()
            self._data.id.write_direct_chunk((first, *[0] * (self._data.ndim - 1)), chunk.result())


def _squeezed(rows: np.ndarray) -> bytes:
    """A chunk as HDF5's filters shuffle and gzip make it."""
    by_place = rows.reshape(-1).view(np.uint8).reshape(-1, rows.itemsize).T  # first bytes of all numbers, then second
    return zlib.compress(np.ascontiguousarray(by_place).data, GZIP_LEVEL)
