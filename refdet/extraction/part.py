"""`Part`: the share of one of several processes that compute an extraction without Ray. No torch.

The parts share the folder of the shards. In it, ``parts.json`` holds the number of parts, ``part-3.lock`` is locked by
the process that computes part 3, and ``part-3.json`` holds the progress of part 3.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.files.atomic import write_json, write_json_once
from refdet.files.json_files import read_small_json
from refdet.files.lock import Locked, exclusive_lock
from refdet.files.short_text import format_count

PARTS = "parts.json"
MAX_PARTS = 100_000
_LOCK_NAME, _STATE_NAME = re.compile(r"part-(\d{1,6})\.lock"), re.compile(r"part-(\d{1,6})\.json")
_LOCK_TIMEOUT = 1.0  # seconds to wait for a part's lock, which `_is_running` of another process may hold for a moment


@dataclass(frozen=True)
class Part:
    """Part ``number`` of ``count``, which computes the shards ``number - 1``, ``number - 1 + count``, ...

    Shards with consecutive numbers have images of similar sizes, so all parts take about the same time.

    Attributes:
        number: number of the part, from 1.
        count: number of parts.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse "3/8".

        Raises:
            InputError: it is not K/N with K from 1 to N, or N exceeds `MAX_PARTS`.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if match and 1 <= int(match[1]) <= int(match[2]) <= MAX_PARTS:
            return cls(int(match[1]), int(match[2]))
        count = int(match[2]) if match else None
        if count is None:
            problem = "not K/N"
        elif 1 <= count <= MAX_PARTS:
            problem = f"the parts of {count} are 1/{count} to {count}/{count}"
        else:
            problem = f"there can be 1 to {MAX_PARTS} parts"
        raise InputError(f"`part` {text}: {problem}; give the number of this part and of all, such as 3/8")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def shards(self, shard_count: int) -> range:
        """Numbers of the shards of this part, of ``shard_count`` in total."""
        return range(self.number - 1, shard_count, self.count)

    @contextmanager
    def lock(self, folder: Path) -> Iterator[bool]:
        """Hold the lock of this part within the block.

        Yields:
            Whether the part is locked; False on a file system without locks.

        Raises:
            Locked: another process is computing this part.
        """
        activity = f"another process is computing part {self}"
        with exclusive_lock(
            folder, f"part-{self.number}.lock", "wait for it to finish", wait=_LOCK_TIMEOUT, activity=activity
        ) as locked:
            yield locked

    def record_count(self, folder: Path) -> None:
        """Record the number of parts in the folder; raises an InputError if another part recorded another number."""
        if read_part_count(folder) is None:
            write_json_once(folder / PARTS, {"parts": self.count})
        self.check(folder)

    def check(self, folder: Path) -> None:
        """Raise an InputError if an extraction was started in the folder with another number of parts."""
        count = read_part_count(folder)
        if count not in (None, self.count):
            raise InputError(
                f"`part` {self}: {folder} was started in {format_count(count or 0, 'part')}; use the same number, or "
                "finish the extraction in one process with `resume=True`"
            )

    def write_progress(self, folder: Path, **state: Any) -> None:
        """Write the progress of this part for `read_progress_of_parts`, unless the file cannot be written."""
        owner = {"worker": f"part {self}", "host": socket.gethostname(), "pid": os.getpid()}
        with suppress(OSError):
            write_json(folder / f"part-{self.number}.json", owner | state | {"updated": time.time()})


def read_part_count(folder: Path) -> int | None:
    """Read the number of parts recorded in a folder, None if its extraction was not started in parts.

    Raises:
        InputError: the file is damaged.
    """
    if not os.path.lexists(folder / PARTS):
        return None
    try:
        count = read_small_json(folder / PARTS)["parts"]
    except (InputError, TypeError, KeyError):
        count = None
    if type(count) is not int or not 0 < count <= MAX_PARTS:
        raise InputError(f"{folder / PARTS}: damaged; remove it once no part is running")
    return count


@contextmanager
def lock_all_parts(folder: Path) -> Iterator[None]:
    """Hold the locks of all parts that were ever started in a folder within the block.

    Raises:
        Locked: another process is computing one of the parts.
    """
    with ExitStack() as stack:
        for path in sorted(folder.glob("part-*.lock")):
            if match := _LOCK_NAME.fullmatch(path.name):
                part = Part(int(match[1]), read_part_count(folder) or int(match[1]))  # the count is only for messages
                stack.enter_context(part.lock(folder))
        yield


def read_progress_of_parts(folder: Path) -> list[dict[str, Any]]:
    """Read the progress of each part.

    Args:
        folder: folder of the shards.

    Returns:
        The objects that `Part.write_progress` wrote, in the order of the parts. The "state" of a part whose process
        ended without finishing it is "stopped".
    """
    states = {}
    for path in folder.glob("part-*.json"):
        if not (match := _STATE_NAME.fullmatch(path.name)):
            continue
        with suppress(InputError):
            state = read_small_json(path, finite=False)
            if isinstance(state, dict):
                number = int(match[1])
                if state.get("state") != "finished" and not _is_running(folder, number):
                    state["state"] = "stopped"
                states[number] = state
    return [states[number] for number in sorted(states)]


def _is_running(folder: Path, number: int) -> bool:
    """Whether a process is computing a part; True if that cannot be determined."""
    try:
        with exclusive_lock(folder, f"part-{number}.lock", "") as locked:
            return not locked
    except (Locked, OSError):
        return True
