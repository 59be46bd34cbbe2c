"""Free memory: the machine's, and what control groups leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from refdet.extraction.memory import FALLBACK_BYTES, available_bytes

KILOBYTES = "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  4000 kB\n"


def write(root: Path, files: dict[str, str]) -> dict[str, Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return {"proc": root / "proc", "cgroups": root / "cgroup"}


def version_1(group: str, limit: int, used: int, cached: int = 0) -> dict[str, str]:
    folder = f"cgroup/memory/{group}"
    return {f"{folder}/memory.limit_in_bytes": f"{limit}\n", f"{folder}/memory.usage_in_bytes": f"{used}\n",
            f"{folder}/memory.stat": f"cache 5\ntotal_inactive_file {cached}\n"}  # fmt: skip


def version_2(group: str, limit: object, used: int, cached: int = 0) -> dict[str, str]:
    folder = f"cgroup/{group}"
    return {f"{folder}/memory.max": f"{limit}\n", f"{folder}/memory.current": f"{used}\n",
            f"{folder}/memory.stat": f"anon 5\ninactive_file {cached}\n"}  # fmt: skip


@pytest.mark.parametrize(("groups", "files", "expected"), [
    ("", {}, 4096000),
    ("0::/\n", {}, 4096000),
    ("0::/a/b\n", version_2("a/b", 1000, 400), 600),
    ("0::/a/b\n", version_2("a/b", 1000, 400, cached=250), 850),
    ("0::/a/b\n", version_2("a/b", "max", 400) | version_2("a", 900, 500), 400),  # what is above limits it too
    ("0::/a/b\n", version_2("a/b", "max", 400), 4096000),
    ("0::/a/b\n", version_2("a/b", 10**9, 400), 4096000),
    ("0::/a/b\n", version_2("a/b", 100, 400), 0),
    ("0::/a\n", version_2("a/c", 1000, 400), 4096000),  # another one's
    ("5:cpu:/x\n4:memory:/a\n0::/\n", version_1("a", 1000, 400, cached=100), 700),
    ("4:cpu,memory:/docker/1\n", version_1("", 1000, 400), 600),  # in a container it has the name that it has outside
    ("4:memory:/a\n", version_1("a", 9223372036854771712, 400), 4096000),
])  # fmt: skip
def test_the_least_counts(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    found = {"proc/meminfo": KILOBYTES, "proc/self/cgroup": groups, **files}
    assert available_bytes(**write(tmp_path, found)) == expected


def test_where_no_one_tells(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "proc", tmp_path / "cgroup") == FALLBACK_BYTES


def test_here_it_is_a_number_of_bytes() -> None:
    assert available_bytes() > 2**20
