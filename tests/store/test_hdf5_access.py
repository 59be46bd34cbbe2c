"""The door that every store is opened through: a process of its own tries first what is not known."""

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
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are looked through, in this process."""
    names: list[str] = []

    def look(path: Path) -> str:
        names.append(path.name)
        return hdf5_sandbox.check_in_process(path)

    monkeypatch.setattr(hdf5_access, "check_in_subprocess", look)
    return names


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound store that this process knows nothing of, and no other did."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_store(tmp_path / "a.h5")
    os.utime(path)  # its time of change is another one now
    return path


def test_a_foreign_store_is_tried_once(foreign: Path, tried: list[str]) -> None:
    store.open(foreign).close()
    store.open(foreign).close()
    (foreign.parent / "link.h5").symlink_to(foreign)
    store.open(foreign.parent / "link.h5").close()
    assert tried == ["a.h5"]
    assert not verify(foreign).problems
    assert tried == ["a.h5"] * 2  # damage that came later is looked for


def test_own_stores_are_known(tmp_path: Path, tried: list[str]) -> None:
    store.open(write_store(tmp_path / "a.h5")).close()
    assert tried == []


@pytest.mark.parametrize("content", ["the same", "other"])
def test_a_changed_store_is_tried_again(foreign: Path, tried: list[str], content: str) -> None:
    """Also where whoever changed it has kept its size and set its time back."""
    store.open(foreign).close()
    before = foreign.stat()
    data = foreign.read_bytes()
    time.sleep(0.02)
    with foreign.open("r+b") as file:
        file.write(data if content == "the same" else bytes(8) + data[8:])
    os.utime(foreign, ns=(before.st_atime_ns, before.st_mtime_ns))
    if content == "other":
        with pytest.raises(InputError, match="a.h5: not a readable HDF5 file"):
            open_store_file(foreign)
    else:
        store.open(foreign).close()
        assert tried == ["a.h5"] * 2


def test_another_process_knows_it_too(foreign: Path, tried: list[str]) -> None:
    store.open(foreign).close()
    other = KnownFiles(f"HDF5 {hdf5_access.h5py.version.hdf5_version} by h5py {hdf5_access.h5py.__version__}")
    assert FileState.from_path(foreign) in other
    assert FileState.from_path(foreign) not in KnownFiles("another check")
    assert FileState.from_path(foreign)._replace(changed=1) not in other
    cache = foreign.parent / "cache" / "refdet" / "stores.json"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "spoil",
    [lambda cache: cache.chmod(0o666), lambda cache: cache.write_text("{"), lambda cache: cache.write_text("[]"),
     lambda cache: cache.write_text('{"check": 1}'), lambda cache: cache.write_bytes(b"\xff"),
     lambda cache: (cache.unlink(), cache.mkdir())],
)  # fmt: skip
def test_a_cache_of_others_or_a_damaged_one_is_none(foreign: Path, spoil: Callable[[Path], object]) -> None:
    KnownFiles("a").add(FileState.from_path(foreign))
    assert FileState.from_path(foreign) in KnownFiles("a")
    spoil(foreign.parent / "cache" / "refdet" / "stores.json")
    assert FileState.from_path(foreign) not in KnownFiles("a")
    KnownFiles("a").add(FileState.from_path(foreign))  # no error, whether it can be written or not


def test_the_cache_keeps_the_newest(foreign: Path) -> None:
    known_files, state = KnownFiles("a"), FileState.from_path(foreign)
    (foreign.parent / "cache" / "refdet").mkdir(parents=True, exist_ok=True)
    cache = foreign.parent / "cache" / "refdet" / "stores.json"
    cache.write_text(json.dumps({"check": known_files._check, "files": {str(i): [0] * 4 for i in range(600)}}))
    cache.chmod(0o600)
    known_files.add(state)
    kept = json.loads(cache.read_text())["files"]
    assert len(kept) == 500 and list(kept)[-1] == str(foreign) and "100" not in kept and "599" in kept


def test_a_worker_need_not_try_what_its_parent_did(
    foreign: Path, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # nothing can be written there
    content = pickle.dumps(RegionsDataset(foreign))
    assert tried == ["a.h5"]
    monkeypatch.setattr(hdf5_access.known_files, "_in_process", {})  # as in a process that was spawned
    assert pickle.loads(content)[0]["image_id"] == 10
    assert tried == ["a.h5"]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    from refdet.cli.main import main

    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "folder.h5").mkdir()
    (tmp_path / "loop.h5").symlink_to(tmp_path / "loop.h5")
    for path, says in (
        (tmp_path / "pipe.h5", "a named pipe, not a regular file"),
        (tmp_path / "folder.h5", "a folder, not a regular file"),
        (Path("/dev/zero"), "a device, not a regular file"),
        (tmp_path / "no.h5", "no such file"),
        (tmp_path / "loop.h5", "cannot be read"),
    ):
        with pytest.raises(InputError, match=f"{path}: {says}"):
            open_store_file(path)
    for path in (tmp_path / "pipe.h5", Path("/dev/zero")):
        for more in ([], ["--verify"]):
            done = CliRunner().invoke(main, ["inspect", str(path), *more])
            assert done.exit_code == 2 and re.search("not a (regular )?file", done.stderr)


LOOKS = {
    "while True: pass": "does not finish within 0.5.* seconds of CPU time",
    "os.kill(os.getpid(), signal.SIGSEGV)": r"HDF5 crashes \(SIGSEGV\)",
    "raise SystemExit(3)": "HDF5 exits with 3",
    "bytearray(2**33)": "HDF5 needs more memory",
    "time.sleep(60)": "does not finish within 1.5.* seconds",
}


@pytest.mark.parametrize("does", LOOKS)
def test_what_hdf5_does_to_the_other_process_is_damage(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, does: str
) -> None:
    name = "_check" if "bytearray" in does else "check_in_process"
    code = f"import os, signal, time; from refdet.store import hdf5_sandbox\ndef check(path):\n    {does}\n"
    code += f"hdf5_sandbox.{name} = check\n"
    before, main = hdf5_sandbox._CHILD_CODE.split("from refdet.store.hdf5_sandbox import main\n")
    monkeypatch.setattr(
        hdf5_sandbox, "_CHILD_CODE", f"{before}{code}from refdet.store.hdf5_sandbox import main\n{main}"
    )
    monkeypatch.setattr(hdf5_sandbox, "CPU_SECONDS", 0.5)
    monkeypatch.setattr(hdf5_sandbox, "WALL_TIME_FACTOR", 20)
    if "sleep" in does:
        monkeypatch.setattr(hdf5_sandbox, "_NOTE_AFTER", 0.1)
        monkeypatch.setattr(hdf5_sandbox, "WALL_TIME_FACTOR", 3)
    with pytest.raises(InputError, match=f"a.h5: damaged: .*{LOOKS[does]}.*; extract it again"):
        open_store_file(foreign)


def test_where_no_process_can_be_started_it_is_tried_here(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hdf5_sandbox.sys, "executable", "/nonexistent")
    store.open(foreign).close()
    assert "a.h5: checked without a separate process" in caplog.text


@pytest.mark.parametrize("how", [["-m", "refdet"], ["-P", "-c", "from refdet.cli.main import main; main()"]])
def test_nothing_of_the_current_folder_is_imported(foreign: Path, how: list[str]) -> None:
    if "-P" in how and sys.version_info < (3, 11):
        pytest.skip("Python itself puts the folder first")
    folder = foreign.parent / "download"
    folder.mkdir()
    for name in ("h5py", "numpy", "click", "json", "refer", "resource", "sitecustomize"):
        (folder / f"{name}.py").write_text("open('PWNED', 'w').write(__name__)\n")
    foreign.rename(folder / "a.h5")
    command = [sys.executable, *how, "inspect", "a.h5", "--verify"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "OK: 3 images" in done.stdout or "regions/mask_counts" in done.stdout, done.stderr
    assert not (folder / "PWNED").exists()


def test_plugins_of_hdf5_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDF5_PLUGIN_PATH", "/tmp/plugins")
    found = hdf5_sandbox._environment()
    assert "HDF5_PLUGIN_PATH" not in found and found["HDF5_PLUGIN_PRELOAD"] == "::"


def test_opening_a_known_store_starts_no_process(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5")
    code = (
        "import sys; from refdet.store import reader\n"
        "sys.addaudithook(lambda e, a: e == 'subprocess.Popen' and sys.exit(7))\n"
        "reader.open(sys.argv[1]).close()"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 0
    os.utime(path)
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 7


@pytest.mark.parametrize(("name", "problem"), [("SIGKILL", "not checked: "), ("SIGSEGV", "damaged: HDF5 crashes")])
def test_only_crashes_are_taken_for_damage(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    """A check that the system kills, such as for lack of memory, says nothing about the file."""
    kill = f'import os, signal; print("started", flush=True); os.kill(os.getpid(), signal.{name})'
    monkeypatch.setattr(hdf5_sandbox, "_CHILD_CODE", kill)
    with pytest.raises(InputError, match=rf"a\.h5: {problem}.*\({name}\)"):
        store.open(foreign)
    monkeypatch.undo()
    store.open(foreign).close()
