"""Progress of long work: a bar at a terminal, elsewhere a line now and then, so that a log stays readable."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import IO, Any

from tqdm import tqdm

SECONDS = 30  # between two lines where there is no terminal
_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}"


class _Lines:
    """A stream that a bar writes to, which makes a line of what would overwrite the line before."""

    encoding = "utf-8"

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(total: int, desc: str, unit: str, initial: int = 0, disable: bool = False) -> tqdm[Any]:
    """A tqdm bar on stderr that counts to ``total``; a line each `SECONDS` at most where stderr is no terminal.

    Work that is done sooner than that leaves no line in a log.
    """
    return _bar(None, total, desc, unit, initial, True, disable)


def progress(things: Iterable[Any], desc: str, unit: str, total: int | None = None, leave: bool = True) -> tqdm[Any]:
    """The things one by one, with a `progress_bar`."""
    return _bar(things, total, desc, unit, 0, leave, False)


def _bar(
    things: Iterable[Any] | None, total: int | None, desc: str, unit: str, initial: int, leave: bool, disable: bool
) -> tqdm[Any]:
    disable = disable or not logging.getLogger("refdet").isEnabledFor(logging.WARNING)  # a quiet command
    common: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "initial": initial, "disable": disable}
    stream = sys.stderr
    if stream is None or not stream.isatty():
        lines: Any = None if stream is None else _Lines(stream)
        return tqdm(
            things, **common, file=lines, leave=False, mininterval=SECONDS, maxinterval=2 * SECONDS, miniters=1,
            delay=SECONDS, bar_format=_LINE,
        )  # fmt: skip
    return tqdm(things, **common, leave=leave, dynamic_ncols=True)
