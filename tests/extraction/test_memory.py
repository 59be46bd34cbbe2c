"""Available memory: the machine's, limited by the control groups of the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from refdet.extraction.memory import FALLBACK_BYTES, available_bytes

MEMINFO = "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  4000 kB\n"


def write_files(root: Path, files: dict[str, str]) -> dict[str, Path]:
    """Write files below ``root``; returns the arguments of `available_bytes`."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return {"proc": root / "proc", "cgroups": root / "cgroup"}


def cgroup_v1(group: str, limit: int, used: int, cached: int = 0) -> dict[str, str]:
    folder = f"cgroup/memory/{group}"
    return {f"{folder}/memory.limit_in_bytes": f"{limit}\n", f"{folder}/memory.usage_in_bytes": f"{used}\n",
            f"{folder}/memory.stat": f"cache 5\ntotal_inactive_file {cached}\n"}  # fmt: skip


def cgroup_v2(group: str, limit: object, used: int, cached: int = 0) -> dict[str, str]:
    folder = f"cgroup/{group}"
    return {f"{folder}/memory.max": f"{limit}\n", f"{folder}/memory.current": f"{used}\n",
            f"{folder}/memory.stat": f"anon 5\ninactive_file {cached}\n"}  # fmt: skip


@pytest.mark.parametrize(("groups", "files", "expected"), [
    ("", {}, 4096000),  # only MemAvailable
    ("0::/\n", {}, 4096000),
    ("0::/a/b\n", cgroup_v2("a/b", 1000, 400), 600),
    ("0::/a/b\n", cgroup_v2("a/b", 1000, 400, cached=250), 850),
    ("0::/a/b\n", cgroup_v2("a/b", "max", 400) | cgroup_v2("a", 900, 500), 400),  # the parent's limit counts too
    ("0::/a/b\n", cgroup_v2("a/b", "max", 400), 4096000),
    ("0::/a/b\n", cgroup_v2("a/b", 10**9, 400), 4096000),
    ("0::/a/b\n", cgroup_v2("a/b", 100, 400), 0),
    ("0::/a\n", cgroup_v2("a/c", 1000, 400), 4096000),  # of another group
    ("5:cpu:/x\n4:memory:/a\n0::/\n", cgroup_v1("a", 1000, 400, cached=100), 700),
    ("4:cpu,memory:/docker/1\n", cgroup_v1("", 1000, 400), 600),  # in a container, the name may be the host's
    ("4:memory:/a\n", cgroup_v1("a", 9223372036854771712, 400), 4096000),
])  # fmt: skip
def test_available_memory_is_the_least_of_the_machine_and_its_control_groups(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    found = {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups, **files}
    assert available_bytes(**write_files(tmp_path, found)) == expected


def test_without_procfs_a_fallback_is_used(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "proc", tmp_path / "cgroup") == FALLBACK_BYTES


def test_this_machine_has_more_than_a_mebibyte() -> None:
    assert available_bytes() > 2**20
