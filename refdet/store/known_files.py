"""Which files were looked at before and are still the same, so that they need not be looked at again."""

from __future__ import annotations

import json
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from refdet.files.version import __version__

_MOST = 500  # files that are remembered, the newest


class FileState(NamedTuple):
    """Where a file is and what it was when it was looked at.

    The time of its last change (``changed``) cannot be set by whoever packs or copies a file, as the others can.
    Times are in nanoseconds.
    """

    path: str
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: str | Path) -> FileState:
        """The present state of a file; OSError if there is none."""
        real = os.path.realpath(path)
        found = os.stat(real)
        return cls(real, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class KnownFiles:
    """Files that passed a check, for this process and in a file of the user's cache folder for the next ones.

    Whoever sends a file cannot put it in here: the cache lies in a folder of the user's own, and is not used where
    others may write to it. A cache that cannot be read or written is none.

    Args:
        check: names the check and whatever its outcome depends on; what passed another is not known.
    """

    def __init__(self, check: str) -> None:
        self._check = f"{check} of refdet {__version__}"
        self._here: dict[str, FileState] = {}

    def __contains__(self, state: FileState) -> bool:
        if self._here.get(state.path) != state and self._read().get(state.path) == list(state[1:]):
            self.add_here(state)
        return self._here.get(state.path) == state

    def add_here(self, state: FileState) -> None:
        """Remember a file in this process and those that it forks."""
        self._here[state.path] = state

    def here(self, path: str | Path) -> FileState | None:
        """The state of a file that this process remembers."""
        return self._here.get(os.path.realpath(path))

    def add(self, state: FileState) -> None:
        """Remember a file, also for later processes."""
        self.add_here(state)
        known = self._read()
        known.pop(state.path, None)
        known[state.path] = list(state[1:])
        newest = dict(list(known.items())[-_MOST:])
        with suppress(OSError, RuntimeError):  # RuntimeError: the user has no home
            _replace(_cache(), json.dumps({"check": self._check, "files": newest}))

    def _read(self) -> dict[str, list[int]]:
        try:
            path = _cache()
            found = path.stat()
            if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return {}
            content = json.loads(path.read_text(encoding="utf-8"))
            return dict(content["files"]) if content["check"] == self._check else {}
        except (OSError, RuntimeError, ValueError, TypeError, KeyError):
            return {}


def _replace(path: Path, text: str) -> None:
    """Give a file new contents at once; it need not outlive a power cut."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch(mode=0o600)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "refdet" / "stores.json"
