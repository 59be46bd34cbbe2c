"""Memory available to this process."""

from __future__ import annotations

from pathlib import Path

FALLBACK_BYTES = 2**32  # assumed if the available memory is unknown


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process can allocate without swapping, in bytes.

    This is the least of the machine's available memory and of what is left in each control group of the process, whose
    limits are set by containers and batch systems; `FALLBACK_BYTES` if none is known, as on systems other than Linux.

    Args:
        proc: mount point of procfs.
        cgroups: mount point of the control groups.
    """
    known = [left for left in (_machine_memory(proc), *_cgroup_memory(proc, cgroups)) if left is not None]
    return max(min(known, default=FALLBACK_BYTES), 0)  # a group may exceed its limit for a moment


def _machine_memory(proc: Path) -> int | None:
    """Memory in bytes that the machine has available, None if unknown."""
    kilobytes = _read_field(proc / "meminfo", "MemAvailable:")
    return None if kilobytes is None else kilobytes * 1024


def _cgroup_memory(proc: Path, cgroups: Path) -> list[int | None]:
    """Bytes left in each control group (v1 or v2) of this process and in their parents; None for one without limit."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left: list[int | None] = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, files = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # in a container the name may be the host's; then only the root exists
        group_path = root / name.lstrip("/")
        left += [
            _memory_left(group, *files) for group in (group_path, *group_path.parents) if group.is_relative_to(root)
        ]
    return left


def _memory_left(group: Path, limit: str, used: str, cached: str) -> int | None:
    """Bytes left in a control group; None if it has no limit. Its inactive page cache counts as free.

    Args:
        group: directory of the group.
        limit: name of the file with its limit.
        used: name of the file with its used bytes.
        cached: name of the field in ``memory.stat`` with the bytes of its inactive page cache.
    """
    limit_bytes, used_bytes = _read_integer(group / limit), _read_integer(group / used)
    if limit_bytes is None or used_bytes is None:
        return None
    return limit_bytes - used_bytes + (_read_field(group / "memory.stat", cached) or 0)


def _read_integer(path: Path) -> int | None:
    """The integer in a file; None if the file is missing or has no number, such as "max" for no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_field(path: Path, name: str) -> int | None:
    """The number after a name in a file with one name and number per line; None if there is none."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return None
    return next((int(row[1]) for row in rows if row and row[0] == name), None)
