"""Create HDF5 files with reserved disk space, as HDF5 crashes if the disk fills up while writing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py

# Values of h5py's ``libver``, the oldest and newest file format to use.
CHECKSUMMED = ("v110", "v110")  # that of HDF5 1.10, which has checksums of metadata, unlike older ones
OLDEST_READERS = ("earliest", "latest")  # the oldest possible, so that HDF5 1.6 and newer can read the file


@contextmanager
def new_file(path: Path, space: int, libver: tuple[str, str] = CHECKSUMMED) -> Iterator[h5py.File]:
    """Create an HDF5 file with reserved disk space; unused space is released at the end.

    The block must keep references to its datasets until its end, even if it fails: HDF5 writes when a dataset is
    closed, which crashes the process if the disk is full (`_abandon`).

    Args:
        path: the file.
        space: maximum size of the file in bytes.
        libver: `CHECKSUMMED` or `OLDEST_READERS`.

    Yields:
        The open file.

    Raises:
        OSError: not enough disk space.
    """
    file = h5py.File(path, "w", libver=libver)
    try:
        _reserve(file, space)
        yield file
        file.flush()
        size = file.id.get_filesize()
        file.close()
    except BaseException:
        _abandon(file)
        raise
    os.truncate(path, size)


def _abandon(file: h5py.File) -> None:
    """Close an unwanted file even if its disk is full.

    HDF5 flushes its buffers when the file or a dataset is closed, and crashes the process later if that fails. So the
    file descriptor is first redirected to the null device.
    """
    if not file:
        return  # already closed
    with suppress(Exception):
        null_device = os.open(os.devnull, os.O_RDWR)
        try:
            os.dup2(null_device, file.id.get_vfd_handle())
        finally:
            os.close(null_device)
        file.close()


def reserve_between(file: h5py.File, space: int, excluded: Sequence[tuple[int, int]]) -> None:
    """Reserve disk space for the first ``space`` bytes of a file, except for the excluded ranges (first byte, end)."""
    offset = 0  # everything before has been reserved or excluded
    for first, end in [*sorted(excluded), (space, space)]:
        if first > offset:
            _reserve(file, first - offset, offset)
        offset = max(offset, end)


def _reserve(file: h5py.File, space: int, start: int = 0) -> None:
    """Reserve disk space for ``space`` bytes from ``start``, if the system and the file system can."""
    if not space or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.id.get_vfd_handle(), start, space)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # not supported by the file system
            raise
