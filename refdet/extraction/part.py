"""`Part`: one of several processes that compute an extraction together without Ray, and their files. No torch.

The parts share the folder of the shards. ``parts.json`` holds the number of parts, ``part-3.lock`` is held by the
process that computes part 3, and ``part-3.json`` holds its progress.
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
_LOCK_TIMEOUT = 1.0  # seconds; `_is_running` holds a lock for a moment


@dataclass(frozen=True)
class Part:
    """Part ``number`` of ``count``; it computes the shards ``number - 1``, ``number - 1 + count``, ...

    Neighboring shards have images of similar sizes, so all parts take about as long.

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
            InputError: it is not K/N with K from 1 to N.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if match and 1 <= int(match[1]) <= int(match[2]) <= MAX_PARTS:
            return cls(int(match[1]), int(match[2]))
        why = ""
        if match and int(match[2]) < 1 or match and int(match[2]) > MAX_PARTS:
            why = f"there can be 1 to {MAX_PARTS} parts"
        elif match:
            why = f"the parts of {int(match[2])} are 1/{int(match[2])} to {int(match[2])}/{int(match[2])}"
        raise InputError(f"`part` {text}: {why or 'not K/N'}; give the number of this part and of all, such as 3/8")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def shards(self, shard_count: int) -> range:
        """Numbers of its shards, of ``shard_count`` in total."""
        return range(self.number - 1, shard_count, self.count)

    @contextmanager
    def lock(self, folder: Path) -> Iterator[bool]:
        """Hold the lock of this part within the block.

        Raises:
            Locked: another process computes the same part.
        """
        activity = f"another process is computing part {self}"
        with exclusive_lock(
            folder, f"part-{self.number}.lock", "wait for it to finish", wait=_LOCK_TIMEOUT, activity=activity
        ) as locked:
            yield locked

    def record_count(self, folder: Path) -> None:
        """Record the number of parts unless another part has; raises InputError if that recorded another number."""
        if parts_of(folder) is None:
            write_json_once(folder / PARTS, {"parts": self.count})
        self.check(folder)

    def check(self, folder: Path) -> None:
        """Raise an InputError if a folder was started with another number of parts."""
        count = parts_of(folder)
        if count not in (None, self.count):
            raise InputError(
                f"`part` {self}: {folder} was started in {format_count(count or 0, 'part')}; use the same number, or "
                "finish it in one process with `resume=True`"
            )

    def write_progress(self, folder: Path, **state: Any) -> None:
        """Write the progress of this part for `progress_of_parts`; ignored if the file cannot be written."""
        owner = {"worker": f"part {self}", "host": socket.gethostname(), "pid": os.getpid()}
        with suppress(OSError):
            write_json(folder / f"part-{self.number}.json", owner | state | {"updated": time.time()})


def parts_of(folder: Path) -> int | None:
    """The number of parts that a folder was started with, None if it was not started in parts."""
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
def no_part_running(folder: Path) -> Iterator[None]:
    """Hold the locks of all parts that were ever started in a folder.

    Raises:
        Locked: a process computes one of them.
    """
    with ExitStack() as stack:
        for path in sorted(folder.glob("part-*.lock")):
            if match := _LOCK_NAME.fullmatch(path.name):
                part = Part(int(match[1]), parts_of(folder) or int(match[1]))
                stack.enter_context(part.lock(folder))
        yield


def progress_of_parts(folder: Path) -> list[dict[str, Any]]:
    """Read the progress of each part.

    Args:
        folder: folder of the shards.

    Returns:
        What `Part.write_progress` wrote, by number, with "state" "stopped" if the process ended before its part did.
    """
    states = {}
    for path in folder.glob("part-*.json"):
        if not (match := _STATE_NAME.fullmatch(path.name)):
            continue
        with suppress(InputError):
            state = read_small_json(path)
            if isinstance(state, dict):
                ended = state.get("state") != "finished" and not _is_running(folder, int(match[1]))
                states[int(match[1])] = state | ({"state": "stopped"} if ended else {})
    return [states[number] for number in sorted(states)]


def _is_running(folder: Path, number: int) -> bool:
    """Whether a process computes a part; True if that cannot be determined."""
    try:
        with exclusive_lock(folder, f"part-{number}.lock", "") as locked:
            return not locked
    except (Locked, OSError):
        return True
