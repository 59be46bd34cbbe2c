"""Write the folder of an export atomically."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from refdet.errors import InputError, RuntimeFailure, is_disk_full
from refdet.files.atomic import fsync
from refdet.files.short_text import format_missing_space

_MAX_NAME_BYTES = 200  # of the folder's name that the temporary folder's name repeats, which may have 255 bytes
_EXISTS_ERRNOS = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # errors of a rename to an existing path
# Errors that another path would avoid, so that the user must change `out`.
_PATH_ERRNOS = (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` when the block ends without an exception.

    If the process is killed, the temporary folder remains next to ``out``, with a name that starts with a dot.

    Args:
        out: the folder.

    Yields:
        The temporary folder.

    Raises:
        InputError: ``out`` is a file, is not empty, or cannot be written to or replaced; or another program created it
            in the meantime, in which case it is left unchanged.
        RuntimeFailure: the disk is full.
    """
    path = resolve_folder(out)
    temporary = path.with_name(f".{_truncate(path.name)}.{secrets.token_hex(4)}")
    created = [parent for parent in path.parents if not parent.exists()]  # deepest first; removed after an error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        _remove_empty(created)
        _raise_if_full(path, error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise InputError(f"`out` {out}: parent is a file; choose another folder") from None
        raise _not_creatable(out, error) from None
    try:
        yield temporary
        os.sync()  # once, as an fsync of each of 28,000 files would take minutes
        _publish(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(created)
        _raise_if_full(path, error)
        raise


def require_space(out: Path, num_bytes: int) -> None:
    """Check the free disk space before starting an export.

    Args:
        out: the folder, whose parent exists.
        num_bytes: required space in bytes.

    Raises:
        RuntimeFailure: less is free.
    """
    free = shutil.disk_usage(out.resolve().parent).free
    if free < num_bytes:
        raise RuntimeFailure(
            f"{out}: disk full: the export needs {format_missing_space(num_bytes, free)}; free some space or choose "
            "another `out`"
        )


@contextmanager
def json_list(path: Path) -> Iterator[Callable[[Any], None]]:
    """Write a JSON list item by item; yields a function that appends an item."""
    with path.open("w", encoding="utf-8") as file:
        separator = "[\n"

        def add(item: Any) -> None:
            nonlocal separator
            file.write(separator + json.dumps(item, allow_nan=False))
            separator = ",\n"

        yield add
        file.write("[]\n" if separator == "[\n" else "\n]\n")


def resolve_folder(out: Path) -> Path:
    """Resolve the path of an export folder and check that it can be created.

    Args:
        out: the folder.

    Returns:
        The absolute path of the folder, without links.

    Raises:
        InputError: the folder cannot be created, is not empty, or is a mount point or the current folder, which the
            finished export cannot replace.
    """
    try:
        path = out.resolve()
        exists = _exists(path)
        in_use = exists and (not path.is_dir() or any(path.iterdir()))
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links, before Python 3.13
        raise _not_creatable(out, error) from None
    try:
        str(path).encode()  # fails for surrogates, which stand for bytes that are not UTF-8
    except UnicodeEncodeError:
        raise InputError(f"`out` {str(out)!a}: name is not valid UTF-8; choose another") from None
    if in_use:
        raise InputError(f"`out` {out}: exists and is not an empty folder; choose another or remove it")
    if exists and (path == Path.cwd() or os.path.ismount(path)):
        what = "the current folder" if path == Path.cwd() else "a mount point"
        raise InputError(f"`out` {out}: {what} cannot be replaced; give a new folder in it, such as {out / 'export'}")
    return path


def _exists(path: Path) -> bool:
    """Whether a path exists; raises OSError if that cannot be found out, unlike `Path.exists`."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _truncate(name: str) -> str:
    """The first `_MAX_NAME_BYTES` of a name, without a partial character."""
    return os.fsencode(name)[:_MAX_NAME_BYTES].decode("utf-8", "ignore")


def _publish(temporary: Path, path: Path) -> None:
    """Rename the finished temporary folder to ``path``, which is missing or an empty folder."""
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno in _EXISTS_ERRNOS:
            raise InputError(
                f"`out` {path}: written by another program in the meantime, and left unchanged; choose another `out`"
            ) from None
        raise
    fsync(path.parent)  # the rename itself


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, given deepest first, until one is not empty or cannot be removed."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _raise_if_full(path: Path, error: BaseException) -> None:
    """Raise a RuntimeFailure if an error was caused by a full disk or the limit on file sizes."""
    if is_disk_full(error) and not isinstance(error, RuntimeFailure):
        raise RuntimeFailure(f"{path}: disk full; free some space and export again") from error
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        raise RuntimeFailure(
            f"{path}: file size limit of this process exceeded; raise it (ulimit -f) and export again"
        ) from error


def _not_creatable(out: Path, error: Exception) -> Exception:
    """The exception to raise for a folder that cannot be created: ``error`` itself if another path would not help."""
    if isinstance(error, OSError) and error.errno not in _PATH_ERRNOS:
        return error
    why = error.strerror if isinstance(error, OSError) else "loop of symbolic links"
    return InputError(f"`out` {out}: cannot be created ({why}); choose another folder")
