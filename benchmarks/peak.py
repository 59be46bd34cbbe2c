"""Peak memory of this process. Does not import torch, which would add half a gigabyte."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_memory() -> int:
    """Peak resident memory of this process in bytes.

    On Linux, getrusage would include the memory of the parent process before exec.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
