"""Opening HDF5 files: a separate process checks each unknown one first, as HDF5 may crash on a damaged file."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from hostile_stores import write_store

from refdet import store
from refdet.errors import InputError
from refdet.store import hdf5_access, hdf5_sandbox
from refdet.store.dataset import RegionsDataset
from refdet.store.hdf5_access import open_store_file
from refdet.store.known_files import FileState, KnownFiles
from refdet.store.verify import verify

pytestmark = pytest.mark.slow


@pytest.fixture
def checked_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are checked; the check runs in this process."""
    names: list[str] = []

    def check(path: Path) -> str:
        names.append(path.name)
        return hdf5_sandbox.check_in_process(path)

    monkeypatch.setattr(hdf5_access, "check_in_subprocess", check)
    return names


@pytest.fixture
def unknown_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid store that has not been checked, by this or any other process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_store(tmp_path / "a.h5")
    os.utime(path)  # changes its ctime, so the file is not the one that was written
    return path


def test_an_unknown_store_is_checked_once(unknown_store: Path, checked_files: list[str]) -> None:
    store.open(unknown_store).close()
    store.open(unknown_store).close()
    (unknown_store.parent / "link.h5").symlink_to(unknown_store)
    store.open(unknown_store.parent / "link.h5").close()
    assert checked_files == ["a.h5"]
    assert not verify(unknown_store).problems
    assert checked_files == ["a.h5"] * 2  # verifying checks the file again


def test_a_store_written_by_this_process_is_not_checked(tmp_path: Path, checked_files: list[str]) -> None:
    store.open(write_store(tmp_path / "a.h5")).close()
    assert checked_files == []


@pytest.mark.parametrize("content", ["the same", "other"])
def test_a_changed_store_is_checked_again(unknown_store: Path, checked_files: list[str], content: str) -> None:
    """Even if its size and modification time are unchanged."""
    store.open(unknown_store).close()
    before = unknown_store.stat()
    data = unknown_store.read_bytes()
    time.sleep(0.02)
    with unknown_store.open("r+b") as file:
        file.write(data if content == "the same" else bytes(8) + data[8:])
    os.utime(unknown_store, ns=(before.st_atime_ns, before.st_mtime_ns))
    if content == "other":
        with pytest.raises(InputError, match="a.h5: not a readable HDF5 file"):
            open_store_file(unknown_store)
    else:
        store.open(unknown_store).close()
        assert checked_files == ["a.h5"] * 2


def test_the_cache_serves_other_processes(unknown_store: Path, checked_files: list[str]) -> None:
    store.open(unknown_store).close()
    other_process = KnownFiles(f"HDF5 {hdf5_access.h5py.version.hdf5_version} by h5py {hdf5_access.h5py.__version__}")
    assert FileState.from_path(unknown_store) in other_process
    assert FileState.from_path(unknown_store) not in KnownFiles("another check")
    assert FileState.from_path(unknown_store)._replace(changed=1) not in other_process
    cache = unknown_store.parent / "cache" / "refdet" / "stores.json"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "damage",
    [lambda cache: cache.chmod(0o666), lambda cache: cache.write_text("{"), lambda cache: cache.write_text("[]"),
     lambda cache: cache.write_text('{"check": 1}'), lambda cache: cache.write_bytes(b"\xff"),
     lambda cache: (cache.unlink(), cache.mkdir())],
)  # fmt: skip
def test_a_damaged_or_writable_cache_is_ignored(unknown_store: Path, damage: Callable[[Path], object]) -> None:
    KnownFiles("a").add(FileState.from_path(unknown_store))
    assert FileState.from_path(unknown_store) in KnownFiles("a")
    damage(unknown_store.parent / "cache" / "refdet" / "stores.json")
    assert FileState.from_path(unknown_store) not in KnownFiles("a")
    KnownFiles("a").add(FileState.from_path(unknown_store))  # no error, even if the cache cannot be written


def test_the_cache_keeps_the_newest_500_files(unknown_store: Path) -> None:
    known_files, state = KnownFiles("a"), FileState.from_path(unknown_store)
    (unknown_store.parent / "cache" / "refdet").mkdir(parents=True, exist_ok=True)
    cache = unknown_store.parent / "cache" / "refdet" / "stores.json"
    cache.write_text(json.dumps({"check": known_files._check, "files": {str(i): [0] * 4 for i in range(600)}}))
    cache.chmod(0o600)
    known_files.add(state)
    kept = json.loads(cache.read_text())["files"]
    assert len(kept) == 500 and list(kept)[-1] == str(unknown_store) and "100" not in kept and "599" in kept


def test_a_worker_does_not_check_a_store_that_its_parent_checked(
    unknown_store: Path, checked_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # no cache can be written
    pickled = pickle.dumps(RegionsDataset(unknown_store))
    assert checked_files == ["a.h5"]
    monkeypatch.setattr(hdf5_access.known_files, "_in_process", {})  # as in a spawned process
    assert pickle.loads(pickled)[0]["image_id"] == 10
    assert checked_files == ["a.h5"]


def test_pipes_devices_and_folders_are_refused(tmp_path: Path) -> None:
    from refdet.cli.main import main

    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "folder.h5").mkdir()
    (tmp_path / "loop.h5").symlink_to(tmp_path / "loop.h5")
    for path, message in (
        (tmp_path / "pipe.h5", "a named pipe, not a regular file"),
        (tmp_path / "folder.h5", "a folder, not a regular file"),
        (Path("/dev/zero"), "a device, not a regular file"),
        (tmp_path / "no.h5", "no such file"),
        (tmp_path / "loop.h5", "cannot be read"),
    ):
        with pytest.raises(InputError, match=f"{path}: {message}"):
            open_store_file(path)
    for path in (tmp_path / "pipe.h5", Path("/dev/zero")):
        for more in ([], ["--verify"]):
            done = CliRunner().invoke(main, ["inspect", str(path), *more])
            assert done.exit_code == 2 and re.search("not a (regular )?file", done.stderr)


# What the check process does, and the error.
CRASHES = {
    "while True: pass": "does not finish within 0.5.* seconds of CPU time",
    "os.kill(os.getpid(), signal.SIGSEGV)": r"HDF5 crashes \(SIGSEGV\)",
    "raise SystemExit(3)": "HDF5 exits with 3",
    "bytearray(2**33)": "HDF5 needs more memory",
    "time.sleep(60)": "does not finish within 1.5.* seconds",
}


@pytest.mark.parametrize("statement", CRASHES)
def test_a_failing_check_process_means_damage(
    unknown_store: Path, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    name = "_check" if "bytearray" in statement else "check_in_process"
    code = f"import os, signal, time; from refdet.store import hdf5_sandbox\ndef check(path):\n    {statement}\n"
    code += f"hdf5_sandbox.{name} = check\n"
    before, main = hdf5_sandbox._CHILD_CODE.split("from refdet.store.hdf5_sandbox import main\n")
    monkeypatch.setattr(
        hdf5_sandbox, "_CHILD_CODE", f"{before}{code}from refdet.store.hdf5_sandbox import main\n{main}"
    )
    monkeypatch.setattr(hdf5_sandbox, "CPU_SECONDS", 0.5)
    monkeypatch.setattr(hdf5_sandbox, "WALL_TIME_FACTOR", 20)
    if "sleep" in statement:
        monkeypatch.setattr(hdf5_sandbox, "_NOTE_AFTER", 0.1)
        monkeypatch.setattr(hdf5_sandbox, "WALL_TIME_FACTOR", 3)
    with pytest.raises(InputError, match=f"a.h5: damaged: .*{CRASHES[statement]}.*; extract it again"):
        open_store_file(unknown_store)


def test_without_a_separate_process_the_check_runs_in_this_one(
    unknown_store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hdf5_sandbox.sys, "executable", "/nonexistent")
    store.open(unknown_store).close()
    assert "a.h5: checked without a separate process" in caplog.text


@pytest.mark.parametrize("how", [["-m", "refdet"], ["-P", "-c", "from refdet.cli.main import main; main()"]])
def test_modules_in_the_current_folder_are_not_imported(unknown_store: Path, how: list[str]) -> None:
    if "-P" in how and sys.version_info < (3, 11):
        pytest.skip("Python itself puts the folder first")
    folder = unknown_store.parent / "download"
    folder.mkdir()
    for name in ("h5py", "numpy", "click", "json", "refer", "resource", "sitecustomize"):
        (folder / f"{name}.py").write_text("open('PWNED', 'w').write(__name__)\n")
    unknown_store.rename(folder / "a.h5")
    command = [sys.executable, *how, "inspect", "a.h5", "--verify"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "OK: 3 images" in done.stdout or "regions/mask_counts" in done.stdout, done.stderr
    assert not (folder / "PWNED").exists()


def test_hdf5_plugins_are_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDF5_PLUGIN_PATH", "/plugins")
    environment = hdf5_sandbox._environment()
    assert "HDF5_PLUGIN_PATH" not in environment and environment["HDF5_PLUGIN_PRELOAD"] == "::"


def test_opening_a_known_store_starts_no_process(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5")
    code = (
        "import sys; from refdet.store import reader\n"
        "sys.addaudithook(lambda e, a: e == 'subprocess.Popen' and sys.exit(7))\n"
        "reader.open(sys.argv[1]).close()"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 0
    os.utime(path)  # now it is unknown
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 7


@pytest.mark.parametrize(("name", "problem"), [("SIGKILL", "not checked: "), ("SIGSEGV", "damaged: HDF5 crashes")])
def test_only_crashes_of_the_check_mean_damage(
    unknown_store: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    """A check that the system kills, for example for lack of memory, says nothing about the file."""
    kill = f'import os, signal; print("started", flush=True); os.kill(os.getpid(), signal.{name})'
    monkeypatch.setattr(hdf5_sandbox, "_CHILD_CODE", kill)
    with pytest.raises(InputError, match=rf"a\.h5: {problem}.*\({name}\)"):
        store.open(unknown_store)
    monkeypatch.undo()
    store.open(unknown_store).close()
