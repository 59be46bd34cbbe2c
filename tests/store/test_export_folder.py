"""The folder of an export: whole or not there, whatever fails, whoever else writes to it and whatever it is called."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result
from export_examples import ANNOTATIONS, DETECTIONS, add_heads, write_dataset, write_store

from refdet.cli.main import main
from refdet.errors import InputError, RuntimeFailure
from refdet.store.export import folder as folder_module
from refdet.store.export.folder import json_list, new_folder, require_space
from refdet.store.export.source import Source
from refdet.structures.provenance import file_sha256
from refdet.structures.regions import Regions

FORMATS = (["npz"], ["npz", "--for", "rosita"], ["lmdb"], ["lmdb", "--for", "uniter"], ["mattnet"])


def export(store: Path, out: str | Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["export", "--store", str(store), "--out", str(out), "--format", *options])


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_no_folder_above_either(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), new_folder(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "theirs").touch()
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["theirs"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / ".out.1" / "a.npz"))
    with pytest.raises(RuntimeFailure, match=r"/out: disk full; free some space"), new_folder(tmp_path / "out"):
        raise full
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from refdet.errors import RuntimeFailure
from refdet.store.export.folder import new_folder
with new_folder(Path({str(tmp_path / "out")!r})) as folder:
    (folder / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and len(list(tmp_path.glob(".out.*"))) == 1
    with new_folder(tmp_path / "out") as folder:  # what the dead left is in nobody's way
        (folder / "a").write_text("whole")
    assert (tmp_path / "out" / "a").read_text() == "whole"


def test_the_rename_is_on_the_disk_before_the_folder_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(folder_module, "fsync", lambda path: flushed.append((path.name, (path / "out").exists())))
    (tmp_path / "in").mkdir()
    with new_folder(tmp_path / "in" / "out") as folder:
        (folder / "a").write_text("whole")
        assert flushed == []
    assert flushed == [("in", True)]


@pytest.mark.parametrize("items", [[], [1], [{"a": "ü"}, [2], None]])
def test_a_list_written_item_by_item_is_json(tmp_path: Path, items: list[object]) -> None:
    with json_list(tmp_path / "a.json") as add:
        for item in items:
            add(item)
    assert json.loads((tmp_path / "a.json").read_text()) == items


def test_the_second_of_two_exports_leaves_the_first_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(InputError, match="`out` .*/out: written by another program in the meantime"),
        new_folder(out) as a,
    ):
        (a / "a").write_text("second")
        with new_folder(out) as b:
            (b / "a").write_text("first")
    assert (out / "a").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_appears_under_the_name_stays(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="in the meantime"), new_folder(out) as folder:
        (folder / "a").write_text("ours")
        if kind == "folder":
            out.mkdir()
            (out / "b").touch()
        elif kind == "file":
            out.write_text("theirs")
        else:
            out.symlink_to(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 and (out / "b").exists() == (kind == "folder")


@pytest.mark.parametrize("options", FORMATS, ids=" ".join)
def test_an_export_that_loses_the_race_is_one_line(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lmdb")
    dets = write_store(tmp_path / "d.h5", DETECTIONS)
    out = tmp_path / "out"

    def other_was_faster(path: Path, space: int) -> None:
        out.mkdir()
        (out / "theirs").touch()

    for module in ("npz", "lmdb", "mattnet"):
        monkeypatch.setattr(f"refdet.store.export.{module}.require_space", other_was_faster)
    result = export(dets, out, *options)
    assert result.exit_code == 2 and "in the meantime" in result.stderr and result.stderr.count("error:") == 1
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.h5", "out"]


NAMES = [
    ("file.txt", "exists and is not an empty folder"),
    ("file.txt/out", "parent is a file"),
    ("file.txt/deep/out", "parent is a file"),
    ("new/../file.txt/out", "parent is a file"),
    ("full", "exists and is not an empty folder"),
    ("x" * 300, r"cannot be created \(File name too long"),
    ("loop", "cannot be created|exists and is not an empty folder"),
    (os.fsdecode(b"caf\xe9"), "name is not valid UTF-8"),
    (os.fsdecode(b"caf\xe9/out"), "name is not valid UTF-8"),
]


@pytest.mark.parametrize(("name", "message"), NAMES, ids=lambda text: ascii(text)[:20])
def test_a_name_that_is_no_place_for_a_folder_is_one_line(tmp_path: Path, name: str, message: str) -> None:
    dets = write_store(tmp_path / "d.h5", DETECTIONS)
    (tmp_path / "file.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = export(dets, f"{tmp_path}/{name}", "npz")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("error: --out ")
    assert len(result.stderr) < 500 + len(name)
    assert re.search(message, result.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_current_folder_and_a_mount_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dets = write_store(tmp_path / "d.h5", DETECTIONS)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here", str(tmp_path / "here")):
        result = export(dets, name, "npz")
        assert result.exit_code == 2 and "the current folder cannot be replaced" in result.stderr
        assert result.stderr.count("\n") == 1 and not list((tmp_path / "here").iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "here")
    result = export(dets, "here", "npz")
    assert result.exit_code == 2 and "a mount point" in result.stderr and "here/export" in result.stderr


def test_a_long_name_and_a_deep_one_are_made(tmp_path: Path) -> None:
    dets = write_store(tmp_path / "d.h5", DETECTIONS)
    for name in ("x" * 255, "é" * 127, "a/b/c", "with space", "new\nline"):
        assert export(dets, tmp_path / name, "npz").exit_code == 0
        assert (tmp_path / name / "provenance.json").is_file()


def test_space_is_asked_for_before_the_work(tmp_path: Path) -> None:
    require_space(tmp_path / "out", 1)
    with pytest.raises(
        RuntimeFailure, match=r"out: disk full: the export needs 1000000000\.0 GB, .* more than is free"
    ):
        require_space(tmp_path / "out", 10**18)


def test_a_message_about_space_does_not_contradict_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**11))
    require_space(tmp_path / "out", 10**11)
    with pytest.raises(RuntimeFailure, match=r"needs 100\.0 GB, 1 byte more than is free"):
        require_space(tmp_path / "out", 10**11 + 1)


def test_the_record_is_of_the_file_that_was_read(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5", DETECTIONS)
    read, other = file_sha256(path), write_store(tmp_path / "b.h5", DETECTIONS[:1])
    with Source(path) as source:
        assert source.describe()["sha256"] == read
        os.replace(other, path)  # as a repair does
        assert source.describe()["sha256"] == read != file_sha256(path)


def copies(n: int) -> list[Regions]:
    return [replace(regions, image_id=10 * i + regions.image_id, file_name=f"{i}_{regions.image_id}.jpg")
            for i in range(n) for regions in DETECTIONS]  # fmt: skip


# A process of its own, for HDF5 used to crash it, at times only when it ended.
PROCESS = """
import json, os, resource, sys
from pathlib import Path
from click.testing import CliRunner
from refdet.cli.main import main
import refdet.store.export.lmdb, refdet.store.export.mattnet, refdet.store.export.npz
store, out, formats, limit, ask = sys.argv[1:]
if limit != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
if ask == "no":  # as if something else filled the disk meanwhile
    for module in (refdet.store.export.lmdb, refdet.store.export.mattnet, refdet.store.export.npz):
        module.require_space = lambda path, space: None
results = []
for options in json.loads(formats):
    result = CliRunner().invoke(main, ["export", "--store", store, "--out", out, "--format", *options])
    left = os.listdir(Path(out).parent)
    results.append((result.exit_code, [line for line in result.stderr.splitlines() if "error" in line.lower()], left))
print(json.dumps(results))
"""


def in_a_process(store: Path, out: Path, *prefix: str, limit: int = 0, ask: bool = True) -> None:
    """Export in every form where none can be written, and check that each says so in a line and leaves nothing."""
    given = [str(store), str(out), json.dumps(FORMATS), str(limit), "yes" if ask else "no"]
    done = subprocess.run([*prefix, sys.executable, "-c", PROCESS, *given], capture_output=True, text=True,
                          env=os.environ)  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    results = json.loads(done.stdout)
    message = "out: file size limit of this process exceeded" if limit else "out: disk full"
    for (code, errors, left), options in zip(results, FORMATS, strict=True):
        assert (code, len(errors), left) == (1, 1, []), (options, code, errors, left)
        assert message in errors[0], (options, errors)


@pytest.mark.parametrize("ask", [True, False])
def test_a_disk_that_is_full_is_one_line(tmp_path: Path, ask: bool) -> None:
    """On a real file system of 200 KB, at the start and on the way."""
    pytest.importorskip("lmdb")
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no private mounts here")
    many = copies(20)
    dets = write_store(tmp_path / "d.h5", many)
    add_heads(dets, [None] * len(many), [(0.0, 0.0, 0.0)] * len(many))
    (tmp_path / "mount").mkdir()
    mounted = 'mount -t tmpfs -o size=200k tmpfs "$0" && exec "$@"'
    prefix = ["unshare", "-rm", "sh", "-c", mounted, str(tmp_path / "mount")]
    in_a_process(dets, tmp_path / "mount" / "out", *prefix, ask=ask)


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    (tmp_path / "in").mkdir()
    in_a_process(write_store(tmp_path / "d.h5", DETECTIONS), tmp_path / "in" / "out", limit=8192)


def test_a_full_disk_under_any_of_mattnets_files_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space of each HDF5 file is set aside before it is written."""
    dets, anns = write_store(tmp_path / "d.h5", DETECTIONS), write_store(tmp_path / "a.h5", ANNOTATIONS)
    add_heads(dets, [np.ones((2, 3, 4), np.float32), None, None], [(1.0, 1.0, 1.0)] * 3)
    root = write_dataset(tmp_path / "refer")
    options = ["mattnet", "--annotations", str(anns), "--refer-root", str(root), "--dataset", "refcoco",
               "--split-by", "unc"]  # fmt: skip
    reserve, asked = os.posix_fallocate, 0
    fail_at = 0

    def fallocate(descriptor: int, first: int, space: int) -> None:
        nonlocal asked
        asked += 1
        if asked == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, first, space)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    assert export(dets, tmp_path / "whole", *options).exit_code == 0
    files = ["det_feats.h5", "ann_feats.h5", "head/4.h5", "data.h5"]
    assert asked == len(files) and all((tmp_path / "whole" / name).is_file() for name in files)
    for fail_at in range(1, len(files) + 1):  # noqa: B007  # read by fallocate
        asked = 0
        result = export(dets, tmp_path / "out", *options)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "out: disk full" in result.stderr
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
