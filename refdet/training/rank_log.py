"""Logs of the training processes other than the first, whose output goes to a file each in the run directory."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

FOLDER = "logs"  # in the run directory


class RankLog:
    """Redirects stdout and stderr of this process, its libraries and its workers, until it is closed.

    Args:
        rank: rank of the process.
    """

    def __init__(self, rank: int) -> None:
        self._name, self._file = f"rank-{rank}.log", tempfile.TemporaryFile("w+b")  # noqa: SIM115
        _flush()
        self._saved_fds = [os.dup(number) for number in (1, 2)]
        self._redirect(self._file.fileno())

    def open(self, out: Path) -> None:
        """Redirect to a file in the run directory, starting with the output so far."""
        _flush()
        self._file.seek(0)
        buffered = self._file.read()
        folder = out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / self._name).open("ab") as file:
            file.write(buffered)
            file.flush()
            self._redirect(file.fileno())

    def close(self) -> None:
        """Restore stdout and stderr."""
        _flush()
        for fd, saved_fd in zip((1, 2), self._saved_fds, strict=True):
            os.dup2(saved_fd, fd)
            os.close(saved_fd)
        self._file.close()

    def _redirect(self, file: int) -> None:
        for fd in (1, 2):
            os.dup2(file, fd)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):  # a full disk must not end a training
                stream.flush()
