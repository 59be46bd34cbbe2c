"""Handling of Ctrl-C, SIGTERM and SIGHUP, which all end in exit code 130."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_CODE = 130
_Handler = Callable[[int, FrameType | None], None]


class StopRequested(KeyboardInterrupt):
    """A signal interrupted a wait; like KeyboardInterrupt, it is not caught by ``except Exception``."""


class Stop:
    """Records the first stop signal; training checks for it after each step.

    The first signal raises an exception only in an `interrupt_waits` block, elsewhere it is recorded. Later ones are
    ignored: schedulers and impatient users send several, and saving must not be interrupted.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._waiting = False

    @classmethod
    @contextmanager
    def watch(cls) -> Iterator[Stop]:
        """Context manager that yields a `Stop` which records signals; outside the main thread it records none."""
        stop = cls()
        with _handle_signals(stop._on_signal):
            yield stop

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return self.signal is not None

    @property
    def name(self) -> str:
        """Human-readable name of the recorded signal."""
        if self.signal is None:
            return "no signal"
        return "Ctrl-C" if self.signal == signal.SIGINT else self.signal.name

    @contextmanager
    def interrupt_waits(self) -> Iterator[None]:
        """Context manager in which a signal raises StopRequested; raises it at once if one was received before."""
        self._waiting = True
        try:
            if self.requested:
                raise StopRequested
            yield
        finally:
            self._waiting = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            if number == signal.SIGINT and not self._waiting:
                _write_to_stderr(b"\nstopping; finishing and saving this step\n")
        if self._waiting:
            self._waiting = False
            raise StopRequested


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Context manager in which any of the signals raises KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handle_signals(interrupt):
        yield


@contextmanager
def exit_during_imports() -> Iterator[None]:
    """Like `as_keyboard_interrupt`, but a signal during an import exits the process at once with one line.

    Extension modules may swallow any exception of their imports, including KeyboardInterrupt, and continue without
    the module. Nothing finished is lost: most imports precede the work, and files are replaced atomically.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            _write_to_stderr(b"error: interrupted\n")
            os._exit(EXIT_CODE)
        raise KeyboardInterrupt

    with _handle_signals(interrupt):
        yield


def ignore_signals() -> None:
    """Ignore the signals in a worker process.

    Terminals and schedulers send them to every process of a job, but the main process decides when its workers end.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _write_to_stderr(text: bytes) -> None:
    """Write to stderr from a signal handler.

    Not through sys.stderr, which the interrupted code may be writing to. A failure is ignored: Ctrl-C also ends a
    reader such as ``| tee log``, and an exception raised here would abort the step that is to be saved.
    """
    with suppress(OSError):
        os.write(2, text)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a frame, or one that called it, is Python's import machinery."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def _handle_signals(handler: _Handler) -> Iterator[None]:
    """Context manager that sets a signal handler; does nothing outside the main thread, as Python forbids it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {}
    try:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # set by nohup
            previous[number] = signal.signal(number, handler)
        yield
    finally:
        for number, action in previous.items():
            signal.signal(number, signal.SIG_DFL if action is None else action)
