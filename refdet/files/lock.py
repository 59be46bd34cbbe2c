"""Lock a folder for writing; the operating system releases the lock when the process dies."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refdet.errors import InputError

log = logging.getLogger(__name__)

# Errors of file systems without locks; others are errors of the file itself.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@contextmanager
def alone(folder: Path, name: str, fix: str) -> Iterator[None]:
    """Hold a lock file within the block.

    Logs a note and runs the block without a lock where the file system has no locks.

    Args:
        folder: the folder to lock.
        name: name of the lock file in it.
        fix: what to do if another process holds the lock, the end of the message.

    Raises:
        InputError: another process holds the lock.
        OSError: the lock file cannot be created.
    """
    from filelock import FileLock, Timeout  # a slow import that only writers need

    lock = FileLock(folder / name, mode=0o644, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"{folder}: another process is writing to it; {fix}") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        log.warning("note: %s: file system without locks (%s); make sure no other process writes to it", folder, reason)
    try:
        yield
    finally:
        lock.release()
