"""Remember which files passed a check, for as long as they do not change."""

from __future__ import annotations

import json
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from refdet.files.version import __version__

_MAX_FILES = 500  # number of files to remember, the most recent ones


class FileState(NamedTuple):
    """State of a file when it was checked.

    Attributes:
        path: absolute path without symbolic links.
        inode: inode number.
        size: in bytes.
        modified: time of the last modification in nanoseconds.
        changed: time of the last status change in nanoseconds; unlike the modification time, unpacking or copying
            cannot set it, so it shows that another file has replaced the checked one.
    """

    path: str
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def from_path(cls, path: str | Path) -> FileState:
        """Return the current state of a file; raises OSError if it does not exist."""
        real = os.path.realpath(path)
        status = os.stat(real)
        return cls(real, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class KnownFiles:
    """Files that passed a check, kept in this process and in the user's cache folder.

    Whoever sends a file cannot add it to the cache, which is in the user's own folder and is ignored if another user
    owns it or can write to it. A cache that cannot be read is treated as empty.

    Args:
        check: identifies the check and everything that its result depends on. The cache holds files of one check only:
            those that passed another one are unknown, and are forgotten when a file is added.
    """

    def __init__(self, check: str) -> None:
        self._check = f"{check} of refdet {__version__}"
        self._in_process: dict[str, FileState] = {}  # path -> state

    def __contains__(self, state: FileState) -> bool:
        """Whether a file passed the check in this state."""
        if self._in_process.get(state.path) != state and self._read_cache().get(state.path) == list(state[1:]):
            self.add_in_process(state)  # so that the cache is read only once
        return self._in_process.get(state.path) == state

    def add_in_process(self, state: FileState) -> None:
        """Remember a file in this process and its forks."""
        self._in_process[state.path] = state

    def get(self, path: str | Path) -> FileState | None:
        """The state that this process remembers of a file, None if it remembers none."""
        return self._in_process.get(os.path.realpath(path))

    def add(self, state: FileState) -> None:
        """Remember a file in this and later processes."""
        self.add_in_process(state)
        known = self._read_cache()
        known.pop(state.path, None)  # so that the file becomes the most recent one
        known[state.path] = list(state[1:])
        newest = dict(list(known.items())[-_MAX_FILES:])
        with suppress(OSError, RuntimeError):  # RuntimeError: no home directory
            _replace(_cache_path(), json.dumps({"check": self._check, "files": newest}))

    def _read_cache(self) -> dict[str, list[int]]:
        """Path -> other fields of the state of each file in the cache; {} if the cache is unusable."""
        try:
            path = _cache_path()
            status = path.stat()
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return {}
            content = json.loads(path.read_text(encoding="utf-8"))
            return dict(content["files"]) if content["check"] == self._check else {}
        except (OSError, RuntimeError, ValueError, TypeError, KeyError):
            return {}


def _replace(path: Path, text: str) -> None:
    """Replace a file atomically, without syncing it to disk."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch(mode=0o600)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _cache_path() -> Path:
    """Path of the cache file."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "refdet" / "stores.json"
