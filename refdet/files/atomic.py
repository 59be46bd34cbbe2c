"""Files that are either wholly there or not at all, whatever interrupts the writing."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refdet.errors import RuntimeFailure, is_disk_full

# Of a temporary name, so that what is cleaned up later is certainly ours.
MARK = "refdet-tmp"
_TEMPORARY = re.compile(rf"\.(.*)\.[0-9a-f]{{8}}\.{MARK}(\.[^.]*)?", re.DOTALL)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes ``path`` when the block ends without an error.

    The temporary file lies in the folder of ``path`` (made if it is not there), since only within one file
    system is renaming atomic, and keeps its suffix, since some writers choose their format by it. It is
    flushed to the disk before it takes the place of ``path``: after a power cut the file has its old contents
    or its new ones. On any exception it is removed and ``path`` stays as it was; a process that is killed leaves
    it, for `left_behind` to find.

    Yields:
        the temporary path; the block must write a file there.

    Raises:
        OSError: the file cannot be written; it names ``path``, not the temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.{MARK}{path.suffix}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)  # the rename itself
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        named = error.filename if isinstance(error, OSError) else None
        if named is None and is_disk_full(error):  # some writers name no file or have an exception of their own
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if isinstance(error, OSError) and named is not None and Path(named) == temporary:
            error.filename = str(path)
        raise


def left_behind(folder: Path, name: str | None = None) -> list[Path]:
    """The temporary files of `atomic_write` in a folder: of processes that were killed, or are at work.

    Args:
        name: only those for the file of this name.
    """
    try:
        found = [(path, _TEMPORARY.fullmatch(path.name)) for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(path for path, match in found if match and name in (None, match[1] + (match[2] or "")))


@contextmanager
def report_disk_full(path: Path, mend: str) -> Iterator[None]:
    """Turn "no space left" into a RuntimeFailure that names the file, or else ``path``, and ends with ``mend``."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error) or isinstance(error, RuntimeFailure):
            raise
        name = error.filename if isinstance(error, OSError) and error.filename else path
        raise RuntimeFailure(f"{name}: no space left on the disk; {mend}") from error


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as indented JSON, keys in their own order, atomically."""
    text = json.dumps(obj, indent=2) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    """See a file, or the names in a folder, safely on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
