"""Write many pieces of memory to a file at once, without joining them first."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from itertools import islice

_AT_ONCE = 512  # the system takes twice as many at least


def write_parts(file: int, parts: Iterable[bytes | bytearray | memoryview], at: int | None = None) -> int:
    """Write parts one after another.

    Args:
        file: a file descriptor.
        parts: the parts.
        at: first byte in the file; None for its current position.

    Returns:
        Number of bytes written, that of all parts.

    Raises:
        OSError: the disk is full, or something else went wrong.
    """
    remaining, done = deque(memoryview(part) for part in parts if part), 0
    while remaining:  # a disk that becomes full takes some bytes first
        chunk = list(islice(remaining, _AT_ONCE))
        if at is None:
            written = os.writev(file, chunk)
        elif hasattr(os, "pwritev"):
            written = os.pwritev(file, chunk, at + done)
        else:
            written = os.pwrite(file, chunk[0], at + done)
        done += written
        while remaining and written >= len(remaining[0]):
            written -= len(remaining.popleft())
        if written:
            remaining[0] = remaining[0][written:]
    return done
