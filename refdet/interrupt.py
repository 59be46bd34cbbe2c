"""Handling of Ctrl-C, SIGTERM and SIGHUP, which all end in exit code 130."""

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
    """A signal ended a wait within `Stop.ends_waiting`; not an Exception, so that no handler catches it as one."""


class Stop:
    """Records the first stop signal; training checks for it after each step.

    A signal interrupts only waits within `ends_waiting`. Later signals are ignored: schedulers and impatient users
    send several, and saving must not be interrupted.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._waiting = False

    @classmethod
    @contextmanager
    def watching(cls) -> Iterator[Stop]:
        """Handle the signals within the block, if it runs in the main thread."""
        stop = cls()
        with _handled_by(stop._note):
            yield stop

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return self.signal is not None

    @property
    def name(self) -> str:
        """Human-readable name of the signal."""
        return "Ctrl-C" if self.signal == signal.SIGINT else str(self.signal and self.signal.name)

    @contextmanager
    def ends_waiting(self) -> Iterator[None]:
        """Raise StopRequested within the block on a signal, including one that was received earlier."""
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
                # Not sys.stderr, which the interrupted code may be writing to.
                os.write(2, b"\nstopping; finishing and saving this step\n")
        if self._waiting:
            self._waiting = False
            raise StopRequested


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt within the block on any of the signals."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


@contextmanager
def ending_imports() -> Iterator[None]:
    """Like `as_keyboard_interrupt`, but a signal during an import exits the process at once with one line.

    Extension modules may swallow any exception of their imports, including KeyboardInterrupt, and continue without
    the module. No work has started while modules are imported, so nothing is lost.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            os.write(2, b"error: interrupted\n")
            os._exit(EXIT_CODE)
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


def ignore() -> None:
    """Ignore the signals in a worker process; terminals and schedulers signal every process, but the parent ends it."""
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
    """Handle the signals within the block; does nothing outside the main thread, where Python cannot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    try:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # set by nohup
            before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
