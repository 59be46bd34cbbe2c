"""Write datasets sequentially, contiguous or in compressed chunks."""

from __future__ import annotations

import math
import os
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import h5py
import numpy as np

from refdet.files.buffers import write_buffers

GZIP_LEVEL = 1  # higher levels take three times as long for floats and save less than 1%
THREADS = min(8, os.cpu_count() or 1)  # for compression; with more than 8, writing is the bottleneck

_CHUNK_BYTES = 2**18  # size of a chunk, unless a row is larger; a quarter of h5py's chunk cache
_BUFFER_BYTES = 2**18  # copied data are written when there are at least this many bytes
_MIN_BORROWED_BYTES = 2**15  # data of at least this size are not copied before they are written


def chunk_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Number of rows per chunk of a nonempty dataset: those of 256 KiB, at least one; 32 for 2048 float32 per row."""
    return min(shape[0], max(1, _CHUNK_BYTES // (math.prod(shape[1:]) * dtype.itemsize)))


def chunked_space(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Maximum size in bytes of a chunked dataset in which each chunk is written once.

    The last chunk has full size. Incompressible data are stored unchanged by lzf and grow by at most a thousandth with
    gzip. The chunk index takes less than 32 bytes per chunk. The margins here are twice that, and 4 KiB.
    """
    if 0 in shape:
        return 0
    rows = chunk_rows(shape, dtype)
    chunk_bytes = rows * math.prod(shape[1:]) * dtype.itemsize
    num_chunks = math.ceil(shape[0] / rows)
    return num_chunks * (chunk_bytes + chunk_bytes // 500 + 64) + 4096


def contiguous_layout() -> h5py.h5p.PropDCID:
    """Creation properties of a dataset for `ContiguousWriter`: its space is allocated when it is created."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    return layout


class ContiguousWriter:
    """Writes a dataset sequentially, with large writes directly to the file.

    HDF5 itself is not used: a call to it takes longer than writing the rows of most images, and it cannot report a full
    disk without crashing later (`refdet.store.hdf5_file`).

    Args:
        data: a dataset with the `contiguous_layout`, not empty.

    Attributes:
        byte_range: offsets in the file of the dataset's first byte and of the byte after its last.
    """

    def __init__(self, data: h5py.Dataset) -> None:
        self._file = data.file.id.get_vfd_handle()
        self._offset: int = data.id.get_offset()
        self.byte_range = self._offset, self._offset + data.id.get_storage_size()
        self._pending: list[memoryview | bytearray] = []
        self._pending_bytes = 0
        self._borrowed = False  # whether any of `_pending` is the caller's memory

    def append(self, data: memoryview) -> None:
        """Append the bytes of rows, which must not change until `flush_borrowed`."""
        self._pending_bytes += len(data)
        if len(data) >= _MIN_BORROWED_BYTES:
            self._pending.append(data)
            self._borrowed = True
        else:
            last = self._pending[-1] if self._pending else None
            if isinstance(last, bytearray):
                last += data
            else:
                self._pending.append(bytearray(data))

    def flush_borrowed(self) -> None:
        """Write appended rows that were not copied, so that the caller can reuse their memory."""
        if self._borrowed or self._pending_bytes >= _BUFFER_BYTES:
            self.finish()

    def finish(self) -> None:
        """Write all appended rows."""
        self._offset += write_buffers(self._file, self._pending, self._offset)
        self._pending, self._pending_bytes, self._borrowed = [], 0, False


class ChunkedWriter:
    """Writes a dataset sequentially, one full chunk at a time.

    A chunk written twice would be compressed twice, and if it grew, its old space in the file would be wasted, making
    the size of the file unpredictable.

    Args:
        data: a chunked dataset.
        pool: threads that compress gzip chunks in parallel, unlike HDF5.
    """

    def __init__(self, data: h5py.Dataset, pool: ThreadPoolExecutor) -> None:
        self._data = data
        self._pool = pool if data.compression == "gzip" else None
        self._rows = np.zeros((data.chunks[0], *data.shape[1:]), data.dtype)
        self._first = self._filled = 0  # first row of the current chunk, and number of bytes in it so far
        self._pending: deque[tuple[int, Future[bytes]]] = deque()  # first row and compressed chunk

    def append(self, data: memoryview) -> None:
        """Append the bytes of rows."""
        while data:
            chunk = self._rows.reshape(-1).view(np.uint8).data
            piece, data = data[: len(chunk) - self._filled], data[len(chunk) - self._filled :]
            chunk[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            if self._filled == len(chunk):
                self._write_chunk()

    def flush_borrowed(self) -> None:
        """Do nothing, as rows are copied when they are appended."""

    def finish(self) -> None:
        """Write the last chunk after all rows were appended."""
        if self._filled:
            self._write_chunk()
        self._write_pending(0)

    def _write_chunk(self) -> None:
        """Write the current chunk, or let a thread compress it, and start the next one."""
        rows = self._filled // self._rows[:1].nbytes
        if self._pool is None:
            self._data[self._first : self._first + rows] = self._rows[:rows]
        else:
            self._pending.append((self._first, self._pool.submit(_compress, self._rows)))
            self._rows = np.zeros_like(self._rows)
            self._write_pending(2 * THREADS)  # enough to keep the threads busy, few enough to fit in memory
        self._first, self._filled = self._first + rows, 0

    def _write_pending(self, remaining: int) -> None:
        """Write compressed chunks in order until ``remaining`` are left."""
        while len(self._pending) > remaining:
            first, chunk = self._pending.popleft()
            self._data.id.write_direct_chunk((first, *[0] * (self._data.ndim - 1)), chunk.result())


def _compress(rows: np.ndarray) -> bytes:
    """Compress a chunk as HDF5's shuffle and gzip filters do."""
    # the first byte of every element, then the second, and so on
    byte_planes = rows.reshape(-1).view(np.uint8).reshape(-1, rows.itemsize).T
    return zlib.compress(np.ascontiguousarray(byte_planes).data, GZIP_LEVEL)
