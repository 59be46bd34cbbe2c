"""Atomic file writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from refdet.errors import InputError, RuntimeFailure, is_disk_full

# Part of every temporary file name, so that cleaning up removes only refdet's own files.
TEMPORARY_MARK = "refdet-tmp"
# Errors of os.link where another hard link cannot be made: file systems without hard links, or with too many to a file.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK}
_RENAME_TIMEOUT = 5.0  # seconds to wait until another process has renamed its file
# Errors of os.fsync on file systems that cannot sync folders.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}
_MAX_NAME_BYTES = 255  # on most file systems
_MAX_SUFFIX_LENGTH = 32  # characters; anything longer is not a file format
_TEMPORARY = re.compile(rf"\.(.*)\.[0-9a-f]{{8}}\.{TEMPORARY_MARK}(\.[^.]*)?", re.DOTALL)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` when the block ends without an exception.

    The temporary file is in the same folder as ``path`` (created if missing), as a rename is atomic only within a
    file system, and has the same suffix, from which some writers infer the format. It is synced to disk before the
    rename, so ``path`` has its old or its new contents even after a power failure. On an exception it is deleted
    and ``path`` is unchanged. A process that is killed leaves it behind, for `find_temporary_files` to find.

    Args:
        path: the file to write.

    Yields:
        The temporary path; the block must write a file there.

    Raises:
        OSError: the file cannot be written; the error names ``path``, not the temporary path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_file(path) as temporary:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)  # the rename itself


@contextmanager
def atomic_create(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path``, like `atomic_write`, but never replaces an existing file.

    Commands check at their start that their output does not exist; this is for a file that appears before they end,
    such as that of the same command in another process.

    Args:
        path: the file to write.

    Yields:
        The temporary path; the block must write a file there.

    Raises:
        InputError: ``path`` exists when the block ends.
        OSError: the file cannot be written; the error names ``path``, not the temporary path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_file(path) as temporary:
        yield temporary
        fsync(temporary)
        try:
            _move_once(temporary, path)
        except FileExistsError:
            raise InputError(f"{path} exists; choose another `out` or remove it") from None
    fsync(path.parent)


@contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path for ``path``; after an error, remove the file and name ``path`` in the error."""
    temporary = temporary_path(path)
    try:
        yield temporary
    except BaseException as error:
        with suppress(OSError):  # must not hide the error
            temporary.unlink(missing_ok=True)
        filename = error.filename if isinstance(error, OSError) else None
        if filename is None and is_disk_full(error):  # some writers give no file name or raise their own exceptions
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if isinstance(error, OSError) and filename in (temporary, str(temporary)):
            error.filename = str(path)
        raise


def temporary_path(path: Path) -> Path:
    """A new path in the folder of ``path``, for a file that is to replace it."""
    stem, suffix = _temporary_stem_and_suffix(path)
    return path.with_name(f".{stem}.{secrets.token_hex(4)}.{TEMPORARY_MARK}{suffix}")


def _temporary_stem_and_suffix(path: Path) -> tuple[str, str]:
    """Stem and suffix for a temporary file of ``path``.

    A stem that would make the name too long is truncated and ends in a hash. If ``path`` itself is too long, the stem
    is left as it is, so that writing fails at the start instead of in the rename.
    """
    stem, suffix = (path.stem, path.suffix) if len(path.suffix) <= _MAX_SUFFIX_LENGTH else (path.name, "")
    max_bytes = _MAX_NAME_BYTES - len(os.fsencode(f"..01234567.{TEMPORARY_MARK}{suffix}"))
    if len(os.fsencode(stem)) > max_bytes and len(os.fsencode(path.name)) <= _MAX_NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
        stem = os.fsencode(stem)[: max_bytes - len(digest)].decode(errors="ignore") + digest
    return stem, suffix


def find_temporary_files(folder: Path, name: str | None = None) -> list[Path]:
    """Find temporary files of `atomic_write`, from processes that were killed or are still running.

    Args:
        folder: where to look.
        name: find only temporary files for the file of this name; None for any file.

    Returns:
        The sorted paths of the temporary files; none if the folder does not exist.
    """
    try:
        matches = [(path, _TEMPORARY.fullmatch(path.name)) for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    wanted = None if name is None else _temporary_stem_and_suffix(Path(name))
    return sorted(path for path, match in matches if match and wanted in (None, (match[1], match[2] or "")))


@contextmanager
def report_disk_full(path: Path, fix: str) -> Iterator[None]:
    """Turn "no space left" errors into a RuntimeFailure.

    Args:
        path: the file to name if the error names none.
        fix: what the user can do, for the end of the message.

    Raises:
        RuntimeFailure: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error) or isinstance(error, RuntimeFailure):
            raise
        name = error.filename if isinstance(error, OSError) and error.filename else path
        raise RuntimeFailure(f"{name}: no space left on the disk", fix=fix) from error


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` atomically as indented JSON, without sorting keys."""
    text = json.dumps(obj, indent=2) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_once(path: Path, obj: Any) -> bool:
    """Write ``obj`` as JSON unless the file exists; of several processes, even on different machines, only one does.

    Needs no locks: making a hard link fails if ``path`` exists. On a file system without hard links, the process that
    creates a temporary file with a fixed name may write ``path``.

    Args:
        path: the file, in an existing folder.
        obj: the value, which must be JSON serializable.

    Returns:
        Whether this process wrote the file; False if it existed.

    Raises:
        OSError: the file cannot be written.
        RuntimeFailure: on a file system without hard links, another process was killed while writing the file.
    """
    try:
        with _temporary_file(path) as temporary:
            temporary.write_text(json.dumps(obj, indent=2) + "\n", encoding="utf-8")
            fsync(temporary)
            _move_once(temporary, path)
    except FileExistsError:
        return False
    fsync(path.parent)
    return True


def _move_once(temporary: Path, path: Path) -> None:
    """Move a temporary file to ``path``, which must not exist; errors are those of `_rename_once`."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_once(temporary, path)
    else:
        temporary.unlink()


def _rename_once(temporary: Path, path: Path) -> None:
    """Rename a temporary file to ``path`` without hard links.

    Args:
        temporary: the file.
        path: its new path.

    Raises:
        FileExistsError: another process has written ``path``.
        RuntimeFailure: another process started to write ``path``, but was probably killed.
    """
    stem, suffix = _temporary_stem_and_suffix(path)
    # the file with the fixed name; named like any temporary file, so that `find_temporary_files` finds it
    claim = path.with_name(f".{stem}.00000000.{TEMPORARY_MARK}{suffix}")
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        deadline = time.monotonic() + _RENAME_TIMEOUT
        while not os.path.lexists(path):
            if time.monotonic() >= deadline:
                raise RuntimeFailure(
                    f"{path}: another process started to write it but did not finish; remove {claim} and try again"
                ) from None
            time.sleep(0.01)
        raise
    try:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.replace(temporary, path)
    finally:
        claim.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file or folder to disk; folders are skipped on file systems that cannot sync them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
