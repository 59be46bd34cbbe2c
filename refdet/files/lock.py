"""Lock a folder for writing; the operating system releases the lock when the process dies."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from refdet.errors import InputError

log = logging.getLogger(__name__)

# Errors of file systems without locks; any other error concerns the lock file itself.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class Locked(InputError):
    """Another process holds a lock."""


@contextmanager
def exclusive_lock(
    folder: Path, name: str, fix: str, *, wait: float = 0.0, activity: str = "another process is writing to it"
) -> Iterator[bool]:
    """Hold a lock file within the block.

    On a file system without locks, the block runs unlocked, with a note in the log.

    Args:
        folder: the folder to lock.
        name: name of the lock file in it.
        fix: what to do if another process holds the lock, the end of the message.
        wait: seconds to wait for another process to release the lock.
        activity: what the other process is doing, for the message.

    Yields:
        Whether the lock is held; False on a file system without locks.

    Raises:
        Locked: another process still holds the lock after ``wait`` seconds.
        OSError: the lock file cannot be created.
    """
    from filelock import FileLock, Timeout  # a slow import that only writers need

    lock = FileLock(folder / name, mode=0o644, fallback_to_soft=False)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise Locked(f"{folder}: {activity}; {fix}") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        _warn_of_no_locks(folder, getattr(error, "strerror", None) or str(error))
    try:
        yield lock.is_locked
    finally:
        lock.release()


@lru_cache(maxsize=64)  # to warn once per folder, for any number of locks in it
def _warn_of_no_locks(folder: Path, reason: str) -> None:
    log.warning("note: %s: file system without locks (%s); make sure no other process writes to it", folder, reason)
