"""Write many buffers to a file in few system calls, without joining them first."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from itertools import islice

_BUFFERS_PER_CALL = 512  # below IOV_MAX, the limit of a call: 1024 on Linux and macOS


def write_buffers(file: int, buffers: Iterable[bytes | bytearray | memoryview], offset: int | None = None) -> int:
    """Write buffers one after another.

    Args:
        file: a file descriptor.
        buffers: what to write; memoryviews must be C-contiguous, of elements of any size.
        offset: where to start in the file, in bytes; None for its current position.

    Returns:
        Number of bytes written, the total size of the buffers.

    Raises:
        OSError: the disk is full, or writing failed for another reason.
    """
    views = [memoryview(buffer) for buffer in buffers]
    remaining = deque(view.cast("B") for view in views if view.nbytes)  # as bytes, so that lengths are in bytes
    total = 0
    while remaining:  # a call may write only a part of its buffers, for example when the disk becomes full
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
