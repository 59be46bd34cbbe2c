"""Timing of an extraction over all of its sessions, including killed ones. No torch.

Whenever a shard is finished, a line with the session's timing so far is appended to ``sessions.jsonl`` next to the
shards, or to a file of its own for each part; only the last line of a session is used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STAGES = ("load", "compute", "wait", "finish", "write", "merge")

_FILE_NAME, _ALL_FILES = "sessions{}.jsonl", "sessions*.jsonl"
_MAX_BYTES = 2**26  # larger files are ignored


def shares(seconds: float, stages: Mapping[str, float]) -> dict[str, float]:
    """Compute the fraction of time spent in each stage.

    The stages of the main thread and the merge add up to almost 1; finish and write run in parallel.

    Args:
        seconds: total time without the merge.
        stages: seconds per stage.

    Returns:
        Stage -> fraction, 0 to 1.
    """
    total = seconds + stages.get("merge", 0.0)
    return {name: value / total if total else 0.0 for name, value in stages.items()}


class Session:
    """Timing of one process of an extraction, and of earlier ones.

    Args:
        folder: folder of the shards.
        part: number of the part that this process computes; 0 for all.

    Attributes:
        stages: seconds per stage of `STAGES`.
        images: number of images in the shards that it finished.
    """

    def __init__(self, folder: Path, part: int = 0) -> None:
        self.stages = dict.fromkeys(STAGES, 0.0)
        self.images = 0
        self._computing = 0.0
        self._path = folder / _FILE_NAME.format(f"-{part}" if part else "")
        self._earlier = _read(self._path)
        self._number = 1 + max(self._earlier, default=0)
        self._since: dict[str, float] = {}  # running stage -> start time
        self._append_record()

    @property
    def seconds(self) -> float:
        """Seconds spent computing, up to now if that is still running."""
        return self._computing + self._elapsed("computing")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Add the duration of the block, which contains all stages except the merge, to `seconds`."""
        self._since["computing"] = time.perf_counter()
        try:
            yield
        finally:
            self._computing += time.perf_counter() - self._since.pop("computing")
            self._append_record()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to a stage, which only one thread may time."""
        self._since[stage] = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] += time.perf_counter() - self._since.pop(stage)
            if stage == "merge":  # no shard is finished after it
                self._append_record()

    def record_shard(self, images: int) -> None:
        """Record a finished shard by its number of images."""
        self.images += images
        self._append_record()

    def summary(self) -> dict[str, Any]:
        """Summary of all sessions, for the store, as JSON."""
        others = sorted(path for path in self._path.parent.glob(_ALL_FILES) if path != self._path)  # of other parts
        other_sessions = [session for path in others for session in _read(path).values()]
        sessions = [*other_sessions, *self._earlier.values(), self._record()]
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
        since = self._since.get(stage)
        return 0.0 if since is None else time.perf_counter() - since

    def _record(self) -> dict[str, Any]:
        stages = {name: value + self._elapsed(name) for name, value in self.stages.items()}
        return {"session": self._number, "images": self.images, "seconds": self.seconds, "stages": stages}

    def _append_record(self) -> None:
        # A killed process may leave a partial line, so start a new one; losing a line is harmless.
        if self._path.is_symlink() or (self._path.exists() and not self._path.is_file()):
            return
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(self._record()))


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """Session number -> its last complete line."""
    sessions: dict[int, dict[str, Any]] = {}
    with suppress(OSError):
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:  # opening a pipe would block
            return sessions
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
                session = json.loads(line)
                stages = {name: float(session["stages"][name]) for name in STAGES}
                sessions[int(session["session"])] = {
                    "images": int(session["images"]),
                    "seconds": float(session["seconds"]),
                    "stages": stages,
                }
    return sessions
