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
    left, done = deque(memoryview(part) for part in parts if part), 0
    while left:  # a disk that becomes full takes some bytes first
        some = list(islice(left, _AT_ONCE))
        if at is None:
            written = os.writev(file, some)
        elif hasattr(os, "pwritev"):
            written = os.pwritev(file, some, at + done)
        else:
            written = os.pwrite(file, some[0], at + done)
        done += written
        while left and written >= len(left[0]):
            written -= len(left.popleft())
        if written:
            left[0] = left[0][written:]
    return done
