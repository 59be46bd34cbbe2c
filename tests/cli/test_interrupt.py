"""Ctrl-C, SIGTERM and SIGHUP end a command at any time with exit code 130 and one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from refdet.interrupt import SIGNALS, Stop, StopRequested, as_keyboard_interrupt

# A module that swallows exceptions of its imports, as some extension modules do, and the module that it imports, during
# whose import a signal arrives.
SWALLOWS = "import os, signal, sys\nfor _ in range(3):\n    try: import signaled\n    except BaseException: pass\n"
SIGNALED = "import os, signal, sys\nos.kill(os.getpid(), int(os.environ['NUMBER']))\nraise ImportError\n"


def environment(*folders: Path, **more: str) -> dict[str, str]:
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_an_import_that_swallows_exceptions_ends_the_command(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    (tmp_path / "signaled.py").write_text(SIGNALED)
    code = (
        "import click, sys; import refdet.cli.main as m\n"
        "@click.command('inspect')\n"
        "def command():\n    import swallows; print('went on')\n"
        "import refdet.cli.inspect; refdet.cli.inspect.command = command\n"
        "m.main(['inspect'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path, NUMBER=str(int(number))), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_after_its_cleanup(number: signal.Signals) -> None:
    code = (
        "import click, os, sys; import refdet.cli.main as m\n"
        "@click.command('inspect')\n"
        "def command():\n"
        f"    try: os.kill(os.getpid(), {int(number)}); print('went on')\n"
        "    finally: print('cleaned up')\n"
        "import refdet.cli.inspect; refdet.cli.inspect.command = command\n"
        "m.main(['inspect'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "cleaned up\n")
    assert done.stderr.split() == ["error:", "interrupted"]  # click prints a line end before it


def test_a_signal_during_the_import_of_click_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run(
        [sys.executable, "-c", "import refdet.cli.main"], env=environment(tmp_path), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def send_signal(number: int) -> None:
    os.kill(os.getpid(), number)


def test_stop_remembers_the_first_signal_and_interrupts_nothing() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stop.watch() as stop:
        assert not stop.requested
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            send_signal(number)
        assert stop.requested and stop.name == "SIGTERM"
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("before_waiting", [True, False])
def test_stop_interrupts_waiting_and_only_waiting(before_waiting: bool) -> None:
    with Stop.watch() as stop:
        if before_waiting:
            send_signal(signal.SIGHUP)
        with pytest.raises(StopRequested), stop.interrupt_waits():
            send_signal(signal.SIGHUP)
            raise AssertionError("went on")
        send_signal(signal.SIGINT)  # raises nothing outside interrupt_waits
    assert stop.name == "SIGHUP"


def test_a_signal_does_not_abort_a_step_if_stderr_is_a_broken_pipe() -> None:
    code = (
        "import os, signal\n"
        "from refdet.interrupt import Stop\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 2)\n"
        "with Stop.watch() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('finished the step, stopping by', stop.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "finished the step, stopping by Ctrl-C\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_an_import_exits_even_if_stderr_is_a_broken_pipe(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    (tmp_path / "signaled.py").write_text(SIGNALED)
    code = (
        "import os\n"
        "from refdet.interrupt import exit_during_imports\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 2)\n"
        "with exit_during_imports():\n"
        "    import swallows; print('went on')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path, NUMBER=str(int(number))),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stdout) == (130, "")


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop.watch() as stop, as_keyboard_interrupt():
            send_signal(signal.SIGHUP)
        assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_handlers_are_not_changed_outside_the_main_thread() -> None:
    handlers: list[object] = []

    def look() -> None:
        with Stop.watch(), as_keyboard_interrupt():
            handlers.extend(signal.getsignal(number) for number in SIGNALS)

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == before
