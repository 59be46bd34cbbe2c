"""Ctrl-C, SIGTERM and SIGHUP: what each kind of work makes of them. All end in exit code 130."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_CODE = 130
_Handler = Callable[[int, FrameType | None], None]


class StopRequested(KeyboardInterrupt):
    """A signal ended a wait within `Stop.ends_waiting`; no error of its own, so that nothing takes it for one."""


class Stop:
    """Remembers the first signal that asked training to stop, which the training looks for after each step.

    Nothing is cut short by it, but for the waits within `ends_waiting`. Later signals change nothing: schedulers and
    impatient people send several, and what is being saved must be saved to its end.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._waiting = False

    @classmethod
    @contextmanager
    def watching(cls) -> Iterator[Stop]:
        """Handle the signals within the block, where it runs in the main thread."""
        stop = cls()
        with _handled_by(stop._note):
            yield stop

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    @property
    def name(self) -> str:
        """What came, for people."""
        return "Ctrl-C" if self.signal == signal.SIGINT else str(self.signal and self.signal.name)

    @contextmanager
    def ends_waiting(self) -> Iterator[None]:
        """Within it a signal, also one that came before, raises StopRequested: whatever is waited for is given up."""
        self._waiting = True
        try:
            if self.requested:
                raise StopRequested
            yield
        finally:
            self._waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            if number == signal.SIGINT and not self._waiting:
                # Not by way of sys.stderr, which the interrupted code may be writing to.
                os.write(2, b"\nstopping after this step, which is then saved\n")
        if self._waiting:
            self._waiting = False
            raise StopRequested


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Within the block each of the signals raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


@contextmanager
def ending_imports() -> Iterator[None]:
    """As `as_keyboard_interrupt`, but a signal that comes during an import ends the process at once, in one line.

    Extension modules clear whatever exception an import of theirs raises, KeyboardInterrupt too, and go on without
    what they wanted. While modules are imported no work has begun, so nothing can be lost.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            os.write(2, b"error: interrupted\n")
            os._exit(EXIT_CODE)
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


def ignore() -> None:
    """For helper processes: a terminal or a scheduler signals them all, and their parent says when they end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def _handled_by(handler: _Handler) -> Iterator[None]:
    """Handle the signals within the block; in another thread than the main one it cannot be, and nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    try:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup asked for it
            before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
