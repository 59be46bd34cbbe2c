"""The folder of an export: wholly there or not at all, and the files in it that are written piece by piece."""

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

_LONGEST = 200  # bytes of a folder's name that its temporary name takes over; a name has 255 at most
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # of a rename to what is there by now
_UNUSABLE = (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` to write to, which becomes ``out`` when the block ends without an error.

    A process that is killed leaves the temporary folder, whose name begins with a dot, and nothing under ``out``.

    Raises:
        InputError: ``out`` is a file, a folder that is not empty or cannot be replaced, or no place to write to;
            or another export took the name in the meantime, whose folder stays as it is.
        RuntimeFailure: the disk is full.
    """
    path = resolved(out)
    temporary = path.with_name(f".{_shortened(path.name)}.{secrets.token_hex(4)}")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        _remove_empty(made)
        _raise_full(path, error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise InputError(f"--out {out}: lies inside a file; choose another folder") from None
        raise _unusable(out, error) from None
    try:
        yield temporary
        os.sync()  # once for all: an fsync for each of 28,000 files would take minutes
        _publish(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        _raise_full(path, error)
        raise


def require_space(out: Path, space: int) -> None:
    """RuntimeFailure if the disk of ``out``, whose parent is there, has not that many bytes left.

    Said before the work begins; what else fills the disk meanwhile, `new_folder` reports.
    """
    free = shutil.disk_usage(out.resolve().parent).free
    if free < space:
        raise RuntimeFailure(f"{out}: disk full: the export takes {_size(space)} and {_size(free)} are free; "
                        "free some space or choose another --out")  # fmt: skip


@contextmanager
def json_list(path: Path) -> Iterator[Callable[[Any], None]]:
    """Write a JSON list whose items are given one after the other, so that memory holds one of them."""
    with path.open("w", encoding="utf-8") as file:
        between = "[\n"

        def add(item: Any) -> None:
            nonlocal between
            file.write(between + json.dumps(item, allow_nan=False))
            between = ",\n"

        yield add
        file.write("[]\n" if between == "[\n" else "\n]\n")


def resolved(out: Path) -> Path:
    """The whole path of a folder that can be made. InputError where it cannot."""
    try:
        path = out.resolve()
        there = _is_there(path)
        taken = there and (not path.is_dir() or any(path.iterdir()))
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise _unusable(out, error) from None
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"--out {str(out)!a}: the name is not UTF-8; choose another") from None
    if taken:
        raise InputError(f"--out {out}: exists and is not an empty folder; choose another or remove it")
    if there and (path == Path.cwd() or os.path.ismount(path)):
        what = "the current folder" if path == Path.cwd() else "where a disk is mounted"
        raise InputError(f"--out {out}: is {what}, which an export cannot replace; name a new folder in it, "
                         f"such as {out / 'export'}")  # fmt: skip
    return path


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _shortened(name: str) -> str:
    return os.fsencode(name)[:_LONGEST].decode("utf-8", "ignore")


def _publish(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno in _TAKEN:
            raise InputError(f"--out {path}: another program wrote to it in the meantime, and that stays; "
                             "choose another --out") from None  # fmt: skip
        raise
    fsync(path.parent)  # the rename itself


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the deepest first, unless something has been put into them."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _raise_full(path: Path, error: BaseException) -> None:
    """RuntimeFailure if ``error`` comes of a full disk or a limit of the process on the size of files."""
    if is_disk_full(error) and not isinstance(error, RuntimeFailure):
        raise RuntimeFailure(f"{path}: disk full, no space left; free some and export again") from error
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        raise RuntimeFailure(f"{path}: a file is larger than this process may write; raise the limit (ulimit -f) and "
                        "export again") from error  # fmt: skip


def _unusable(out: Path, error: Exception) -> Exception:
    """What to raise where the folder cannot be made."""
    if isinstance(error, OSError) and error.errno not in _UNUSABLE:
        return error
    why = error.strerror if isinstance(error, OSError) else "links in a circle"
    return InputError(f"--out {out}: cannot be made: {why}; choose another folder")


def _size(space: int) -> str:
    for unit in ("bytes", "KB", "MB"):
        if space < 1000:
            return f"{space:.0f} {unit}"
        space = -(-space // 1000)
    return f"{space} GB"
