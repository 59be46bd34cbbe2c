"""Write many buffers to a file in few system calls, without joining them first."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from itertools import islice

_BUFFERS_PER_CALL = 512  # half of IOV_MAX on Linux and macOS


def write_buffers(file: int, buffers: Iterable[bytes | bytearray | memoryview], offset: int | None = None) -> int:
    """Write buffers one after another.

    Args:
        file: a file descriptor.
        buffers: what to write.
        offset: where to start in the file, in bytes; None for its current position.

    Returns:
        Number of bytes written, the total size of the buffers.

    Raises:
        OSError: the disk is full, or writing failed for another reason.
    """
    remaining = deque(memoryview(buffer) for buffer in buffers if buffer)
    total = 0
    while remaining:  # a call may write less than its buffers, such as the last one before the disk is full
        batch = list(islice(remaining, _BUFFERS_PER_CALL))
        if offset is None:
            written = os.writev(file, batch)
        elif hasattr(os, "pwritev"):
            written = os.pwritev(file, batch, offset + total)
        else:
            written = os.pwrite(file, batch[0], offset + total)
        total += written
        while remaining and written >= len(remaining[0]):
            written -= len(remaining.popleft())
        if written:
            remaining[0] = remaining[0][written:]
    return total
