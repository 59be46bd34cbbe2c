"""Logs of the training processes other than the first: the output of each goes to a file in the run directory."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

FOLDER = "logs"  # in the run directory
_OUTPUT_FDS = (1, 2)  # stdout and stderr


class RankLog:
    """Redirects stdout and stderr of this process, its libraries and its workers, until the log is closed.

    Until the log is opened in a run directory, the output goes to a temporary file.

    Args:
        rank: rank of the process.
    """

    def __init__(self, rank: int) -> None:
        self._name, self._temporary = f"rank-{rank}.log", tempfile.TemporaryFile("w+b")  # noqa: SIM115
        _flush()
        self._saved_fds = [os.dup(fd) for fd in _OUTPUT_FDS]
        self._redirect(self._temporary.fileno())

    def open(self, out: Path) -> None:
        """Append the output so far to a file in the run directory, and redirect to that file."""
        _flush()
        self._temporary.seek(0)
        buffered = self._temporary.read()
        folder = out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / self._name).open("ab") as file:
            file.write(buffered)
            file.flush()
            self._redirect(file.fileno())  # which stays open through its duplicates

    def close(self) -> None:
        """Restore stdout and stderr."""
        _flush()
        for fd, saved_fd in zip(_OUTPUT_FDS, self._saved_fds, strict=True):
            os.dup2(saved_fd, fd)
            os.close(saved_fd)
        self._temporary.close()

    def _redirect(self, target_fd: int) -> None:
        for fd in _OUTPUT_FDS:
            os.dup2(target_fd, fd)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):  # a full disk must not end the run
                stream.flush()
