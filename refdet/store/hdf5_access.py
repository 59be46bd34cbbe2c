"""Open the HDF5 file of a store, which may be untrusted.

An unknown file is first checked in a separate process (`refdet.store.hdf5_sandbox`), which may crash or hang without
harm and rejects anything that no store has (`refdet.store.hdf5_structure`). Files that passed, and files that refdet
wrote, are remembered (`refdet.store.known_files`), so opening them again takes no extra time.
"""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import h5py

from refdet.errors import InputError
from refdet.files.file_kinds import HDF5_MAGIC
from refdet.store.hdf5_sandbox import check_in_subprocess
from refdet.store.known_files import FileState, KnownFiles

log = logging.getLogger(__name__)

_SPECIAL_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

known_files = KnownFiles(f"HDF5 {h5py.version.hdf5_version} by h5py {h5py.__version__}")


def open_store_file(path: str | Path, again: bool = False) -> h5py.File:
    """Open the HDF5 file of a store for reading.

    Checks the structure of the file; `refdet.store.open` also checks that it has all parts of a store.

    Args:
        path: the store.
        again: check the structure even of a file that was checked before and has not changed.

    Returns:
        The open file.

    Raises:
        InputError: not a regular file, not HDF5, not a store, damaged, or with parts that no store has.
    """
    path = Path(path)
    check_regular(path)
    try:
        with path.open("rb") as raw:
            if raw.read(len(HDF5_MAGIC)) != HDF5_MAGIC:
                raise InputError(f"{path}: not a readable HDF5 file; give a file written by refdet extract-features")
        before = FileState.from_path(path)
        is_known = not again and before in known_files
        if not is_known and (problem := check_in_subprocess(path)):
            raise InputError(f"{path}: {problem}")
        file = h5py.File(path, "r")
        after = FileState.from_path(path)
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file: {error}") from None
    if after != before:
        file.close()
        raise InputError(f"{path}: changed while being opened; wait until it is written and try again")
    if not is_known:
        log.info("%s: checked before opening, remembered", path)
        known_files.add(before)
    return file


def check_regular(path: Path) -> None:
    """Check that a path is a regular file, as opening a pipe would block and a device may be endless.

    Args:
        path: the file.

    Raises:
        InputError: it does not exist or is not a regular file.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; create it with refdet extract-features") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if kind != stat.S_IFREG:
        raise InputError(
            f"{path}: {_SPECIAL_FILES.get(kind, 'a special file')}, not a regular file; "
            "give one written by refdet extract-features"
        )


def remember(path: Path) -> None:
    """Remember a file that refdet has just written, so that opening it needs no check."""
    known_files.add(FileState.from_path(path))
