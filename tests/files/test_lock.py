from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from refdet.errors import InputError
from refdet.files.lock import exclusive_lock

HOLD = (
    "import sys, time; from pathlib import Path; from refdet.files.lock import exclusive_lock\n"
    "with exclusive_lock(Path(sys.argv[1]), 'lock', 'x'): print('held', flush=True); time.sleep(60)\n"
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_another_process_is_kept_out_until_it_dies(tmp_path: Path, number: signal.Signals) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    for _ in range(2):
        with (
            pytest.raises(InputError, match="another process is writing to it; wait for it to finish$"),
            exclusive_lock(tmp_path, "lock", "wait for it to finish"),
        ):
            raise AssertionError("got in")
    holder.send_signal(number)
    holder.wait()
    with exclusive_lock(tmp_path, "lock", "wait for it to finish"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    ran = []
    with exclusive_lock(tmp_path, "lock", "x"):
        ran.append(1)
    assert ran and f"without locks ({os.strerror(number)})" in caplog.text


def test_a_folder_that_cannot_hold_it_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), exclusive_lock(tmp_path / "file", "lock", "x"):
        pass


def test_an_error_within_releases_it(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), exclusive_lock(tmp_path, "lock", "x"):
            raise ZeroDivisionError
