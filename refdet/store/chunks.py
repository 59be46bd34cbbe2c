"""Writing of datasets from their first row to their last, contiguous or in compressed chunks."""

from __future__ import annotations

import math
import os
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import h5py
import numpy as np

from refdet.files.parts import write_parts

GZIP_LEVEL = 1  # higher levels take three times as long for floats and save less than 1%
THREADS = min(8, os.cpu_count() or 1)  # for compression; more are limited by writing

_CHUNK_BYTES = 2**18  # a quarter of h5py's chunk cache
_BUFFER = 2**18  # bytes that are written at once, at least, if they are copied first
_LARGE = 2**15  # bytes that are not copied


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


def contiguous_layout() -> h5py.h5p.PropDCID:
    """Creation properties of a dataset for `ContiguousWriter`: it has its place in the file from the start."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    return layout


class ContiguousWriter:
    """Writes a dataset sequentially, in large pieces at its place in the file.

    A call of HDF5 takes longer than writing most rows of an image, and it is not told that the disk is full without
    crashing later (`refdet.store.hdf5_file`).

    Args:
        data: a dataset with the `contiguous_layout`, not empty.

    Attributes:
        place: first byte of the dataset in the file, and its end.
    """

    def __init__(self, data: h5py.Dataset) -> None:
        self._file = data.file.id.get_vfd_handle()
        self._at: int = data.id.get_offset()
        self.place = self._at, self._at + data.id.get_storage_size()
        self._waiting: list[memoryview | bytearray] = []
        self._bytes = 0  # that wait
        self._borrowed = False  # whether some of them are of the caller

    def append(self, data: memoryview) -> None:
        """Append the bytes of rows, which must stay unchanged until `settle`."""
        self._bytes += len(data)
        if len(data) >= _LARGE:
            self._waiting.append(data)
            self._borrowed = True
        else:
            own = self._waiting[-1] if self._waiting else None
            if not isinstance(own, bytearray):
                own = bytearray()
                self._waiting.append(own)
            own += data

    def settle(self) -> None:
        """Make rows that were appended independent of the memory they came from."""
        if self._borrowed or self._bytes >= _BUFFER:
            self.finish()

    def finish(self) -> None:
        """Write all rows that were appended."""
        self._at += write_parts(self._file, self._waiting, self._at)
        self._waiting, self._bytes, self._borrowed = [], 0, False


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
        self._first = self._filled = 0  # first row, and bytes so far, of the chunk
        self._squeezed: deque[tuple[int, Future[bytes]]] = deque()  # first row, chunk

    def append(self, data: memoryview) -> None:
        """Append the bytes of rows."""
        while data:
            chunk = self._rows.reshape(-1).view(np.uint8).data
            part, data = data[: len(chunk) - self._filled], data[len(chunk) - self._filled :]
            chunk[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == len(chunk):
                self._write_chunk()

    def settle(self) -> None:
        """Nothing to do: rows are copied when they are appended."""

    def finish(self) -> None:
        """Write the last chunk after all rows were appended."""
        if self._filled:
            self._write_chunk()
        self._write_squeezed(0)

    def _write_chunk(self) -> None:
        rows = self._filled // self._rows[:1].nbytes
        if self._pool is None:
            self._data[self._first : self._first + rows] = self._rows[:rows]
        else:
            self._squeezed.append((self._first, self._pool.submit(_squeezed, self._rows)))
            self._rows = np.zeros_like(self._rows)
            self._write_squeezed(2 * THREADS)
        self._first, self._filled = self._first + rows, 0

    def _write_squeezed(self, left: int) -> None:
        """Write compressed chunks in order until ``left`` remain."""
        while len(self._squeezed) > left:
            first, chunk = self._squeezed.popleft()
            self._data.id.write_direct_chunk((first, *[0] * (self._data.ndim - 1)), chunk.result())


def _squeezed(rows: np.ndarray) -> bytes:
    """Compress a chunk as HDF5's shuffle and gzip filters do."""
    by_place = rows.reshape(-1).view(np.uint8).reshape(-1, rows.itemsize).T  # first bytes of all numbers, then second
    return zlib.compress(np.ascontiguousarray(by_place).data, GZIP_LEVEL)
