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

_FILE, _ALL = "sessions{}.jsonl", "sessions*.jsonl"
_MOST = 2**26  # bytes; larger files are ignored


def shares(seconds: float, stages: Mapping[str, float]) -> dict[str, float]:
    """Compute the fraction of time spent in each stage.

    The stages of the main thread and the merge add up to almost 1; finish and write run in parallel.

    Args:
        seconds: total time without the merge.
        stages: seconds per stage.

    Returns:
        Stage -> fraction, 0 to 1.
    """
    whole = seconds + stages.get("merge", 0.0)
    return {name: value / whole if whole else 0.0 for name, value in stages.items()}


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
        self._path = folder / _FILE.format(f"-{part}" if part else "")
        self._before = _read(self._path)
        self._number = 1 + max(self._before, default=0)
        self._since: dict[str, float] = {}  # running stage -> start time
        self._note()

    @property
    def seconds(self) -> float:
        """Seconds spent computing, up to now if it is running."""
        return self._computing + self._going_on("computing")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Time all stages except the merge."""
        self._since["computing"] = time.perf_counter()
        try:
            yield
        finally:
            self._computing += time.perf_counter() - self._since.pop("computing")
            self._note()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Time a part of a stage; a stage must be timed by one thread only."""
        self._since[stage] = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] += time.perf_counter() - self._since.pop(stage)
            if stage == "merge":  # no shard is finished after it
                self._note()

    def finished(self, images: int) -> None:
        """Record that a shard with a number of images was finished."""
        self.images += images
        self._note()

    def summary(self) -> dict[str, Any]:
        """Summary of all sessions for the store, JSON."""
        others = sorted(path for path in self._path.parent.glob(_ALL) if path != self._path)  # of parts
        of_others = [one for path in others for one in _read(path).values()]
        of_all = [*of_others, *self._before.values(), self._so_far()]
        images, seconds = (sum(one[name] for one in of_all) for name in ("images", "seconds"))
        stages = {name: sum(one["stages"][name] for one in of_all) for name in STAGES}
        return {
            "sessions": len(of_all),
            "images": images,
            "seconds": round(seconds, 3),
            "images_per_second": round(images / seconds, 3) if seconds else 0.0,
            "stages": {name: round(value, 3) for name, value in stages.items()},
            "shares": {name: round(value, 4) for name, value in shares(seconds, stages).items()},
        }

    def _going_on(self, stage: str) -> float:
        since = self._since.get(stage)
        return 0.0 if since is None else time.perf_counter() - since

    def _so_far(self) -> dict[str, Any]:
        stages = {name: value + self._going_on(name) for name, value in self.stages.items()}
        return {"session": self._number, "images": self.images, "seconds": self.seconds, "stages": stages}

    def _note(self) -> None:
        # A killed process may leave a partial line, so start a new one; losing a line is harmless.
        if self._path.is_symlink() or (self._path.exists() and not self._path.is_file()):
            return
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(self._so_far()))


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """Session -> its last complete line."""
    found: dict[int, dict[str, Any]] = {}
    with suppress(OSError):
        if not path.is_file() or path.stat().st_size > _MOST:  # opening a pipe would block
            return found
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
                one = json.loads(line)
                numbers = {name: float(one["stages"][name]) for name in STAGES}
                found[int(one["session"])] = {
                    "images": int(one["images"]),
                    "seconds": float(one["seconds"]),
                    "stages": numbers,
                }
    return found
