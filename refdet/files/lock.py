"""A lock on a folder that one process at a time may write; the system releases it when the process dies."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refdet.errors import InputError

log = logging.getLogger(__name__)

# What a file system without locks answers; anything else is a fault of the file itself.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@contextmanager
def alone(folder: Path, name: str, mend: str) -> Iterator[None]:
    """Hold the lock file ``folder / name`` within the block, or say that another process holds it.

    Where the file system has no locks a note says so, and the block runs.

    Args:
        mend: what to do when another process holds it, the end of the error.

    Raises:
        InputError: another process holds it.
        OSError: the lock file cannot be made.
    """
    from filelock import FileLock, Timeout  # here: a tenth of a second that only writers pay

    lock = FileLock(folder / name, mode=0o644, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"{folder}: another process is writing it; {mend}") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        log.warning("note: %s: the file system has no locks (%s): see that no other process writes it", folder, reason)
    try:
        yield
    finally:
        lock.release()
