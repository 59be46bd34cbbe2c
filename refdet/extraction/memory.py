"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

UNKNOWN = 2**32  # bytes: what is taken for free where no one tells


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can be allocated without swapping, in bytes.

    The least of what the machine has and what the control groups of this process, such as a container's or a batch
    system's, leave it. `UNKNOWN` where there is no Linux to ask.

    Args:
        proc, cgroups: where Linux tells; others in tests.
    """
    found = [bytes_ for bytes_ in (_of_machine(proc), *_of_groups(proc, cgroups)) if bytes_ is not None]
    return max(min(found, default=UNKNOWN), 0)


def _of_machine(proc: Path) -> int | None:
    kilobytes = _named(proc / "meminfo", "MemAvailable:")
    return None if kilobytes is None else kilobytes * 1024


def _of_groups(proc: Path, cgroups: Path) -> list[int | None]:
    """What each group leaves that this process is in, of version 1 or 2; every group limits those below it."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[int | None] = []
    for line in lines:
        _, kinds, name = line.split(":", 2)
        if kinds == "":
            root, files = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root, files = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # in a container the name may be that outside, where only the root is what it is inside
        own = root / name.lstrip("/")
        found += [_left(group, *files) for group in (own, *own.parents) if group.is_relative_to(root)]
    return found


def _left(group: Path, limit: str, used: str, cached: str) -> int | None:
    """What is left of the limit of a group; None where it has none. Cached files make room when it is needed."""
    most, taken = _number(group / limit), _number(group / used)
    if most is None or taken is None:
        return None
    return most - taken + (_named(group / "memory.stat", cached) or 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # there is none, or it is "max"
        return None


def _named(path: Path, name: str) -> int | None:
    """The number behind a name, in a file with a name and a number a line."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return None
    return next((int(row[1]) for row in rows if row and row[0] == name), None)
