"""The one way to open a store's HDF5 file, whoever sent it.

A file that is not known is first looked through by a process of its own (`refdet.store.hdf5_trial`), which refuses
what no store has (`refdet.store.hdf5_structure`) and may crash or never end without harm. Files that passed, and those
that refdet wrote itself, are remembered (`refdet.store.known_files`), so that opening them again costs nothing.
"""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import h5py

from refdet.errors import InputError
from refdet.store.hdf5_trial import try_file
from refdet.store.known_files import FileState, KnownFiles

log = logging.getLogger(__name__)

MAGIC = b"\x89HDF\r\n\x1a\n"
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
          stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}  # fmt: skip

known = KnownFiles(f"HDF5 {h5py.version.hdf5_version} by h5py {h5py.__version__}")


def open_store_file(path: str | Path, again: bool = False) -> h5py.File:
    """Open the HDF5 file of a store for reading.

    Of what is in it only the kinds of its parts are checked here, not that it has all parts of a store: see
    `refdet.store.open`.

    Args:
        again: look through it even if it is known.

    Raises:
        InputError: it is no regular file, no HDF5, no store, damaged, or holds what no store holds.
    """
    path = Path(path)
    check_regular(path)
    try:
        with path.open("rb") as start:
            if start.read(len(MAGIC)) != MAGIC:
                raise InputError(f"{path}: not a readable HDF5 file; refdet extract-features writes one")
        before = FileState.of(path)
        passed = not again and before in known
        if not passed and (wrong := try_file(path)):
            raise InputError(f"{path}: {wrong}")
        file = h5py.File(path, "r")
        after = FileState.of(path)
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file: {error}") from None
    if after != before:
        file.close()
        raise InputError(f"{path}: changed while it was opened; wait until it is written, then try again")
    if not passed:
        log.info("%s: looked through before it was opened; remembered", path)
        known.add(before)
    return file


def check_regular(path: Path) -> None:
    """InputError where there is no file, or something that is none: a pipe would be waited for, a device has no end."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; refdet extract-features writes it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if kind != stat.S_IFREG:
        raise InputError(f"{path}: {_KINDS.get(kind, 'no file')}, not a file; refdet extract-features writes one")


def remember(path: Path) -> None:
    """Say of a file that refdet has just written it itself."""
    known.add(FileState.of(path))
