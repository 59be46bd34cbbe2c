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

# Holds the lock of a folder until it is killed.
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
            pytest.fail("two processes hold the lock")
    holder.send_signal(number)
    holder.wait()
    with exclusive_lock(tmp_path, "lock", "wait for it to finish"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_on_a_file_system_without_locks_the_block_runs_with_a_warning(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    yielded = []
    with exclusive_lock(tmp_path, "lock", "x") as has_locks:
        yielded.append(has_locks)
    assert yielded == [False] and f"without locks ({os.strerror(number)})" in caplog.text


def test_a_lock_file_that_cannot_be_created_raises_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), exclusive_lock(tmp_path / "file", "lock", "x"):
        pytest.fail("the block ran")


def test_an_error_in_the_block_releases_the_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), exclusive_lock(tmp_path, "lock", "x"):
            raise ZeroDivisionError
