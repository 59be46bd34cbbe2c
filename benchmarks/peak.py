"""Peak memory of a process, for the benchmarks of this folder; without torch, which alone is half a gigabyte."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_memory() -> int:
    """Most bytes that this process had in memory.

    Those of the parent that started it are not among them, as they are in what getrusage says.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
