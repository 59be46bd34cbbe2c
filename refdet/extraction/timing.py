"""Timing of an extraction over all of its sessions. Does not import torch.

A session is one process that computed a part of the extraction, even if it was killed. At its start, at its end and
whenever it finishes a shard, it appends a line with its timing so far to ``sessions.jsonl`` next to the shards, or to
``sessions-3.jsonl`` if it computes part 3; only the last line of a session is used.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from refdet.files.short_text import format_count

log = logging.getLogger(__name__)

STAGES = ("load", "compute", "wait", "finish", "write", "merge")  # see `shares`

_FILE_NAME, _ALL_FILES = "sessions{}.jsonl", "sessions*.jsonl"  # with "" or "-PART"
_MAX_BYTES = 2**26  # larger files are ignored
_MAX_VALUE = 1e12  # larger numbers of images or seconds are damage


def shares(seconds: float, stages: Mapping[str, float]) -> dict[str, float]:
    """Compute the fraction of time spent in each stage.

    The stages of the main thread ("load", "compute", "wait") and the merge add up to almost 1; "finish" and "write"
    run in other threads at the same time, so that all stages together may exceed 1.

    Args:
        seconds: total time without the merge.
        stages: seconds per stage.

    Returns:
        Stage -> fraction, 0 to 1.
    """
    total = seconds + stages.get("merge", 0.0)
    return {name: value / total if total else 0.0 for name, value in stages.items()}


class Timer:
    """Times the session of this process, and records it next to those of earlier processes.

    Args:
        folder: folder of the shards.
        part: number of the part that this process computes; 0 for all.

    Attributes:
        stages: seconds per stage of `STAGES` in this process, only of blocks that have ended.
        images: number of images in the shards that this process finished.
    """

    def __init__(self, folder: Path, part: int = 0) -> None:
        self.stages = dict.fromkeys(STAGES, 0.0)
        self.images = 0
        self._computing = 0.0  # seconds in `computing` blocks that have ended
        self._path = folder / _FILE_NAME.format(f"-{part}" if part else "")
        self._earlier = _read_sessions(self._path)  # of the same part
        self._number = 1 + max(self._earlier, default=0)
        self._since: dict[str, float] = {}  # running stage or "computing" -> start time
        self._append_record()

    @property
    def seconds(self) -> float:
        """Seconds in `computing` blocks, up to now if one is running."""
        return self._computing + self._elapsed("computing")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Add the duration of the block to `seconds`; the block must contain all stages except the merge."""
        self._since["computing"] = time.perf_counter()
        try:
            yield
        finally:
            self._computing += time.perf_counter() - self._since.pop("computing")
            self._append_record()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to a stage; each stage must be timed by one thread only."""
        self._since[stage] = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] += time.perf_counter() - self._since.pop(stage)
            if stage == "merge":  # the last stage: no later shard would record it
                self._append_record()

    def record_shard(self, images: int) -> None:
        """Record that a shard with this number of images is finished."""
        self.images += images
        self._append_record()

    def summary(self) -> dict[str, Any]:
        """Summary of the sessions of all parts, a JSON object for the store; times of concurrent parts are added."""
        other_parts = sorted(path for path in self._path.parent.glob(_ALL_FILES) if path != self._path)
        sessions = [session for path in other_parts for session in _read_sessions(path).values()]
        sessions += [*self._earlier.values(), self._record()]
        images, seconds = (sum(session[name] for session in sessions) for name in ("images", "seconds"))
        stages = {name: sum(session["stages"][name] for session in sessions) for name in STAGES}
        return {
            "sessions": len(sessions),
            "images": images,
            "seconds": round(seconds, 3),
            "images_per_second": round(images / seconds, 3) if seconds else 0.0,
            "stages": {name: round(value, 3) for name, value in stages.items()},
            "shares": {name: round(value, 4) for name, value in shares(seconds, stages).items()},
        }

    def _elapsed(self, stage: str) -> float:
        """Seconds since a stage or "computing" was entered; 0 if it is not running."""
        since = self._since.get(stage)
        return 0.0 if since is None else time.perf_counter() - since

    def _record(self) -> dict[str, Any]:
        """This session's timing so far, as one line of the file."""
        stages = {name: value + self._elapsed(name) for name, value in self.stages.items()}
        return {"session": self._number, "images": self.images, "seconds": self.seconds, "stages": stages}

    def _append_record(self) -> None:
        """Append this session's timing so far to the file; errors are ignored, as no extraction should fail for it."""
        if self._path.is_symlink() or (self._path.exists() and not self._path.is_file()):
            return  # placed there by somebody else; do not write through a link or into a pipe
        # A killed process may leave a partial line, so start a new one; losing a line is harmless.
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(self._record()))


def _read_sessions(path: Path) -> dict[int, dict[str, Any]]:
    """Read the last complete line of each session in a file, by session number; {} if it cannot be read.

    A line that is not JSON was truncated by a kill. A line with invalid values is damage, which is logged.
    """
    sessions: dict[int, dict[str, Any]] = {}
    n_damaged = 0
    with suppress(OSError):
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:  # opening a pipe would block
            return sessions
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                session = json.loads(line)
            except (ValueError, RecursionError):
                continue
            try:
                stages = {name: float(_measured(session["stages"][name], int, float)) for name in STAGES}
                sessions[_measured(session["session"], int)] = {
                    "images": _measured(session["images"], int),
                    "seconds": float(_measured(session["seconds"], int, float)),
                    "stages": stages,
                }
            except (ValueError, TypeError, KeyError):
                n_damaged += 1
    if n_damaged:
        lines = format_count(n_damaged, "line", "is")
        log.warning("note: %s: %s damaged and left out of the times that the store records", path, lines)
    return sessions


def _measured(value: Any, *types: type) -> Any:
    """A number of images or seconds; ValueError if it is of none of the types, negative, NaN or impossibly large."""
    if type(value) not in types or not 0 <= value <= _MAX_VALUE:
        raise ValueError(f"not a measured number: {value!r}")
    return value
