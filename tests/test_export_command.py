"""refdet export: what it prints and refuses, the record it leaves, and that a folder is whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from evaluate_examples import PROVENANCE
from export_examples import ANNOTATIONS, DETECTIONS, write_dataset, write_store
from refdet.cli.main import main

from refdet.errors import WorkError
from refdet.export import folder as folder_module
from refdet.export.folder import json_list, new_folder


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, args)])


def test_mattnet_from_the_command_line(tmp_path: Path) -> None:
    dets, anns = write_store(tmp_path / "d.h5", DETECTIONS), write_store(tmp_path / "a.h5", ANNOTATIONS)
    out, root = tmp_path / "out", write_dataset(tmp_path / "refer")
    data = ("--refer-root", root, "--dataset", "refcoco", "--split-by", "unc")
    result = run("--features", dets, "--format", "mattnet", "--out", out, "--annotations", anns, *data, "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["files"] == ["ann_feats.h5", "data.h5", "data.json", "det_feats.h5", "dets.json", "masks.json"]
    assert "has no attribute words" in result.stderr
    record = json.loads((out / "provenance.json").read_text())
    assert record["export"] == made and record["options"]["dataset"] == "refcoco"
    for name, path in (("features", dets), ("annotations", anns)):
        source = record["sources"][name]
        assert source["file"] == path.name and source["provenance"] == PROVENANCE
        assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    again = run("--features", dets, "--format", "mattnet", "--out", tmp_path / "again", "--annotations", anns,
                "--data-json", out / "data.json")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert not (tmp_path / "again" / "data.json").exists()
    for name in ("dets.json", "masks.json", "det_feats.h5", "ann_feats.h5"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_npz_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    dets = write_store(tmp_path / "d.h5", DETECTIONS)
    result = run("--features", dets, "--format", "npz", "--out", out, "--names", "id", "--feature", "pool5")
    assert (result.exit_code, result.stdout.splitlines()[1].split()) == (0, ["npz", "3", "5", "*.npz"])
    assert {path.name for path in out.iterdir()} == {"3.npz", "4.npz", "5.npz", "provenance.json"}
    assert json.loads((out / "provenance.json").read_text())["options"] == {"feature": "pool5", "names": "id"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "npz", "--dataset", "refcoco"], "--dataset is not for --format npz"),
        (["--format", "lmdb", "--names", "id"], "--names is not for --format lmdb"),
        (["--format", "mattnet", "--feature", "fc7"], "--feature is not for --format mattnet"),
        (["--format", "mattnet", "--dataset", "refcoco"], "data.json needs --refer-root"),
        (["--format", "mattnet", "--max-length", "3"], "data.json needs --refer-root"),
        (["--format", "mattnet", "--data-json", "x", "--dataset", "refcoco"], "--data-json: give it without"),
        (["--format", "mattnet", "--annotations", "a.h5"], "--annotations: data.json numbers the rows"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path: Path, args: list[str], message: str) -> None:
    dets = write_store(tmp_path / "d.h5", DETECTIONS)
    write_store(tmp_path / "a.h5", ANNOTATIONS)
    args = [str(tmp_path / arg) if arg == "a.h5" else arg for arg in args]
    result = run("--features", dets, "--out", tmp_path / "out", *args)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    dets = write_store(tmp_path / "d.h5", DETECTIONS)
    out = tmp_path / "out"
    out.mkdir()
    assert run("--features", dets, "--format", "npz", "--out", out).exit_code == 0  # empty
    kept = sorted(out.iterdir())
    result = run("--features", dets, "--format", "npz", "--out", out)
    assert result.exit_code == 2 and "not an empty folder" in result.stderr and sorted(out.iterdir()) == kept
    assert "not an empty folder" in run("--features", dets, "--format", "npz", "--out", dets).stderr
    assert "no such file" in run("--features", tmp_path / "no.h5", "--format", "npz", "--out", tmp_path / "o").stderr


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / ".out.1" / "a.npz"))
    with pytest.raises(WorkError, match=r"/out: no space left on the disk"), new_folder(tmp_path / "out"):
        raise full
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from refdet.errors import WorkError
from refdet.export.folder import new_folder
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
    monkeypatch.setattr(folder_module, "flush", lambda path: flushed.append((path.name, (path / "out").exists())))
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


def test_exporting_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys, refdet.export.mattnet, refdet.export.npz, refdet.export.lmdb; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script], env=os.environ).returncode == 0
