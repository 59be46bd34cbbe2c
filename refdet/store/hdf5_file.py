"""HDF5 files that cannot run out of disk halfway: the library answers that with a crash."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py

# The layout of HDF5 1.10 has checksums in its own tables too, which the older one has not.
CHECKED = ("v110", "v110")
ANY_READER = ("earliest", "latest")  # what every HDF5 since 1.6 reads


@contextmanager
def new_file(path: Path, space: int, libver: tuple[str, str] = CHECKED) -> Iterator[h5py.File]:
    """A new HDF5 file to write to, for which the disk has set aside so many bytes; what is left of them is given back.

    The block keeps its datasets open to its end, also where it fails: see `_abandon`.

    Args:
        path: the file.
        space: bytes that it takes at most.
        libver: the oldest and the newest layout it may have, see h5py.

    Raises:
        OSError: the disk has no room for them.
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
    """Close a file that nobody wants any more, whatever state its disk is in.

    HDF5 writes what it still holds when the file or one of its datasets is closed, and where that fails it crashes the
    process a little later. So before any of that it gets the one device to write to that is never full.
    """
    if not file:
        return  # closed already
    with suppress(Exception):
        nowhere = os.open(os.devnull, os.O_RDWR)
        try:
            os.dup2(nowhere, file.id.get_vfd_handle())
        finally:
            os.close(nowhere)
        file.close()


def _reserve(file: h5py.File, space: int) -> None:
    if not space or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.id.get_vfd_handle(), 0, space)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # not every file system can
            raise
