"""The folder of an export appears complete or not at all, and never replaces what another program wrote."""

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


def test_an_error_removes_the_temporary_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_error_removes_the_parent_folders_that_were_created(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), new_folder(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "other").touch()  # by another program
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]


def test_a_full_disk_is_reported_with_the_folder(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / ".out.1" / "a.npz"))
    with pytest.raises(RuntimeFailure, match=r"/out: disk full; free some space"), new_folder(tmp_path / "out"):
        raise full
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_does_not_create_the_folder(tmp_path: Path) -> None:
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
    with new_folder(tmp_path / "out") as folder:  # the temporary folder of the killed export does no harm
        (folder / "a").write_text("whole")
    assert (tmp_path / "out" / "a").read_text() == "whole"


def test_the_parent_folder_is_synced_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(folder_module, "fsync", lambda path: synced.append((path.name, (path / "out").exists())))
    (tmp_path / "in").mkdir()
    with new_folder(tmp_path / "in" / "out") as folder:
        (folder / "a").write_text("whole")
        assert synced == []
    assert synced == [("in", True)]


@pytest.mark.parametrize("items", [[], [1], [{"a": "ü"}, [2], None]])
def test_a_list_written_item_by_item_is_valid_json(tmp_path: Path, items: list[object]) -> None:
    with json_list(tmp_path / "a.json") as add:
        for item in items:
            add(item)
    assert json.loads((tmp_path / "a.json").read_text()) == items


def test_the_slower_of_two_exports_does_not_replace_the_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(InputError, match="`out` .*/out: written by another program in the meantime"),
        new_folder(out) as slower,
    ):
        (slower / "a").write_text("slower")
        with new_folder(out) as faster:
            (faster / "a").write_text("faster")
    assert (out / "a").read_text() == "faster" and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_file_folder_or_link_that_appears_meanwhile_is_kept(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="in the meantime"), new_folder(out) as folder:
        (folder / "a").write_text("exported")
        if kind == "folder":
            out.mkdir()
            (out / "b").touch()
        elif kind == "file":
            out.write_text("other")
        else:
            out.symlink_to(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if kind == "folder":
        assert [path.name for path in out.iterdir()] == ["b"]
    elif kind == "file":
        assert out.read_text() == "other"
    else:
        assert out.is_symlink()


@pytest.mark.parametrize("options", FORMATS, ids=" ".join)
def test_an_export_whose_folder_appears_meanwhile_fails_in_one_line(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lmdb")
    dets = write_store(tmp_path / "d.h5", DETECTIONS)
    out = tmp_path / "out"

    def create_folder(path: Path, space: int) -> None:
        out.mkdir()
        (out / "other").touch()

    for module in ("npz", "lmdb", "mattnet"):
        monkeypatch.setattr(f"refdet.store.export.{module}.require_space", create_folder)
    result = export(dets, out, *options)
    assert result.exit_code == 2 and "in the meantime" in result.stderr and result.stderr.count("error:") == 1
    assert [path.name for path in out.iterdir()] == ["other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.h5", "out"]


INVALID_FOLDERS = [
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


@pytest.mark.parametrize(("name", "message"), INVALID_FOLDERS, ids=lambda text: ascii(text)[:20])
def test_an_invalid_folder_is_refused_in_one_line(tmp_path: Path, name: str, message: str) -> None:
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


def test_the_current_folder_and_a_mount_point_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_long_nested_and_unusual_folder_names_are_created(tmp_path: Path) -> None:
    dets = write_store(tmp_path / "d.h5", DETECTIONS)
    for name in ("x" * 255, "é" * 127, "a/b/c", "with space", "new\nline"):
        assert export(dets, tmp_path / name, "npz").exit_code == 0
        assert (tmp_path / name / "provenance.json").is_file()


def test_too_little_space_is_reported_with_the_missing_amount(tmp_path: Path) -> None:
    require_space(tmp_path / "out", 1)
    with pytest.raises(
        RuntimeFailure, match=r"out: disk full: the export needs 1000000000\.0 GB, .* more than is free"
    ):
        require_space(tmp_path / "out", 10**18)


def test_one_missing_byte_is_reported_as_one_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**11))
    require_space(tmp_path / "out", 10**11)
    with pytest.raises(RuntimeFailure, match=r"needs 100\.0 GB, 1 byte more than is free"):
        require_space(tmp_path / "out", 10**11 + 1)


def test_the_recorded_sha256_is_of_the_file_that_was_opened(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5", DETECTIONS)
    sha256, other = file_sha256(path), write_store(tmp_path / "b.h5", DETECTIONS[:1])
    with Source(path) as source:
        assert source.describe()["sha256"] == sha256
        os.replace(other, path)  # as a repair does
        assert source.describe()["sha256"] == sha256 != file_sha256(path)


def repeat_detections(n: int) -> list[Regions]:
    """The images of `DETECTIONS`, n times under new ids and names."""
    return [replace(regions, image_id=10 * i + regions.image_id, file_name=f"{i}_{regions.image_id}.jpg")
            for i in range(n) for regions in DETECTIONS]  # fmt: skip


# Exports in several formats where they do not fit, in a child process, which HDF5 may crash even at its end.
EXPORT_SCRIPT = """
import json, os, resource, sys
from pathlib import Path
from click.testing import CliRunner
from refdet.cli.main import main
import refdet.store.export.lmdb, refdet.store.export.mattnet, refdet.store.export.npz
store, out, formats, limit, check_space = sys.argv[1:]
if limit != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
if check_space == "no":  # as if another program filled the disk afterwards
    for module in (refdet.store.export.lmdb, refdet.store.export.mattnet, refdet.store.export.npz):
        module.require_space = lambda path, space: None
results = []
for options in json.loads(formats):
    result = CliRunner().invoke(main, ["export", "--store", store, "--out", out, "--format", *options])
    left = os.listdir(Path(out).parent)
    results.append((result.exit_code, [line for line in result.stderr.splitlines() if "error" in line.lower()], left))
print(json.dumps(results))
"""


def check_exports_fail(store: Path, out: Path, *prefix: str, limit: int = 0, check_space: bool = True) -> None:
    """Check that an export in each format fails with an error of one line, and leaves nothing behind.

    Args:
        store: the store to export.
        out: where to, on a file system that is too small.
        prefix: command that runs the child process.
        limit: largest size of a file that the child process may write, in bytes; 0 for none.
        check_space: whether the exports check for free space at the start.
    """
    arguments = [str(store), str(out), json.dumps(FORMATS), str(limit), "yes" if check_space else "no"]
    command = [*prefix, sys.executable, "-c", EXPORT_SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    results = json.loads(done.stdout)
    message = "out: file size limit of this process exceeded" if limit else "out: disk full"
    for (code, errors, left), options in zip(results, FORMATS, strict=True):
        assert (code, len(errors), left) == (1, 1, []), (options, code, errors, left)
        assert message in errors[0], (options, errors)


@pytest.mark.parametrize("check_space", [True, False])
def test_a_full_tmpfs_is_reported_in_one_line(tmp_path: Path, check_space: bool) -> None:
    """On a file system of 200 KB, by the check at the start or while writing."""
    pytest.importorskip("lmdb")
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no private mounts here")
    many = repeat_detections(20)
    dets = write_store(tmp_path / "d.h5", many)
    add_heads(dets, [None] * len(many), [(0.0, 0.0, 0.0)] * len(many))
    (tmp_path / "mount").mkdir()
    mounted = 'mount -t tmpfs -o size=200k tmpfs "$0" && exec "$@"'
    prefix = ["unshare", "-rm", "sh", "-c", mounted, str(tmp_path / "mount")]
    check_exports_fail(dets, tmp_path / "mount" / "out", *prefix, check_space=check_space)


def test_a_file_size_limit_is_reported_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    (tmp_path / "in").mkdir()
    check_exports_fail(write_store(tmp_path / "d.h5", DETECTIONS), tmp_path / "in" / "out", limit=8192)


def test_a_full_disk_at_any_hdf5_file_of_mattnet_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space of each HDF5 file is reserved before it is written."""
    dets, anns = write_store(tmp_path / "d.h5", DETECTIONS), write_store(tmp_path / "a.h5", ANNOTATIONS)
    add_heads(dets, [np.ones((2, 3, 4), np.float32), None, None], [(1.0, 1.0, 1.0)] * 3)
    root = write_dataset(tmp_path / "refer")
    options = ["mattnet", "--annotations", str(anns), "--refer-root", str(root), "--dataset", "refcoco",
               "--split-by", "unc"]  # fmt: skip
    real_fallocate, calls = os.posix_fallocate, 0
    fail_at = 0

    def fallocate(descriptor: int, first: int, space: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fallocate(descriptor, first, space)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    assert export(dets, tmp_path / "whole", *options).exit_code == 0
    files = ["det_feats.h5", "ann_feats.h5", "head/4.h5", "data.h5"]
    assert calls == len(files) and all((tmp_path / "whole" / name).is_file() for name in files)
    for fail_at in range(1, len(files) + 1):  # noqa: B007  # read by fallocate
        calls = 0
        result = export(dets, tmp_path / "out", *options)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "out: disk full" in result.stderr
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
