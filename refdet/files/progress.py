"""Progress bars on a terminal, occasional lines elsewhere, so that logs stay readable."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, Any

from tqdm import tqdm

LINE_INTERVAL = 30  # seconds between two lines without a terminal
_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}"
_CURSOR_UP = "\x1b[A"  # written by tqdm for nested bars


class _LineStream:
    """A stream for tqdm that writes each update of a bar on a new line.

    Lines that cannot be written are dropped, as the work must go on and be saved: the reader of a pipe may have ended,
    such as tee after Ctrl-C, or the disk of the log may be full.
    """

    encoding = "utf-8"

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text := text.replace(_CURSOR_UP, "").strip("\r\n "):
            with suppress(OSError):
                self._stream.write(text + "\n")

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def progress_bar(
    total: int | None,
    desc: str,
    unit: str,
    initial: int = 0,
    disable: bool = False,
    scale: bool = False,
    leave: bool = True,
) -> tqdm[Any]:
    """Create a tqdm bar on stderr; if stderr is not a terminal, it writes at most one line per `LINE_INTERVAL`.

    If stderr is not a terminal, work that takes less than `LINE_INTERVAL` writes no line.

    Args:
        total: number of units of work, None if unknown.
        desc: what the work is.
        unit: name of a unit, in the singular.
        initial: units that are already done.
        disable: whether to show nothing.
        scale: whether to print large numbers with a prefix, such as 1.3G.
        leave: whether the finished bar stays on the terminal.

    Returns:
        The bar.
    """
    bar = _new_bar(None, total, desc, unit, initial=initial, leave=leave, disable=disable)
    bar.unit_scale = scale
    return bar


def exclude_pause(bar: tqdm[Any], seconds: float) -> None:
    """Exclude a pause of ``seconds``, which has just ended, from the rate and elapsed time of a bar."""
    if not bar.disable:
        bar.start_t += seconds
        bar.last_print_t += seconds


def progress(iterable: Iterable[Any], desc: str, unit: str, total: int | None = None, leave: bool = True) -> tqdm[Any]:
    """Iterate with a `progress_bar`.

    Args:
        iterable: what to iterate over.
        desc: what the work is.
        unit: name of an item, in the singular.
        total: number of items; None for the length of ``iterable``, if it has one.
        leave: whether the finished bar stays on the terminal.

    Returns:
        An iterator over the items.
    """
    return _new_bar(iterable, total, desc, unit, leave=leave)


def _new_bar(
    iterable: Iterable[Any] | None,
    total: int | None,
    desc: str,
    unit: str,
    *,
    initial: int = 0,
    leave: bool = True,
    disable: bool = False,
) -> tqdm[Any]:
    """Create the bar of `progress_bar`, which yields the items of ``iterable`` unless that is None."""
    disable = disable or not logging.getLogger("refdet").isEnabledFor(logging.WARNING)  # the option -q
    common: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "initial": initial, "disable": disable}
    stream = sys.stderr
    if stream is None or not stream.isatty():
        lines: Any = None if stream is None else _LineStream(stream)
        return tqdm(
            iterable,
            **common,
            file=lines,
            leave=False,  # no line at the end
            mininterval=LINE_INTERVAL,
            maxinterval=2 * LINE_INTERVAL,
            miniters=1,
            delay=LINE_INTERVAL,
            bar_format=_LINE.replace("{unit}s", "{unit}") if total == 1 else _LINE,
        )
    return tqdm(iterable, **common, leave=leave, dynamic_ncols=True)
