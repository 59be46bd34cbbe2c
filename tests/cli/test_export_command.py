"""`refdet export`: its output, its errors and the provenance.json that it writes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from evaluate_examples import PROVENANCE
from export_examples import ANNOTATIONS, DETECTIONS, write_dataset, write_store

from refdet.cli.main import main


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, args)])


def test_export_to_mattnet_records_its_sources_and_can_reuse_data_json(tmp_path: Path) -> None:
    detections, annotations = write_store(tmp_path / "d.h5", DETECTIONS), write_store(tmp_path / "a.h5", ANNOTATIONS)
    out, root = tmp_path / "out", write_dataset(tmp_path / "refer")
    refer_options = ("--refer-root", root, "--dataset", "refcoco", "--split-by", "unc")
    result = run(
        "--store",
        detections,
        "--format",
        "mattnet",
        "--out",
        out,
        "--annotations",
        annotations,
        *refer_options,
        "--json",
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["files"] == ["ann_feats.h5", "data.h5", "data.json", "det_feats.h5", "dets.json", "masks.json"]
    assert "has no attribute words" in result.stderr  # a note
    record = json.loads((out / "provenance.json").read_text())
    assert record["export"] == printed and record["options"]["dataset"] == "refcoco"
    for name, path in (("features", detections), ("annotations", annotations)):
        source = record["sources"][name]
        assert source["file"] == path.name and source["provenance"] == PROVENANCE
        assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    again = run("--store", detections, "--format", "mattnet", "--out", tmp_path / "again", "--annotations", annotations,
                "--data-json", out / "data.json")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert not (tmp_path / "again" / "data.json").exists()
    for name in ("dets.json", "masks.json", "det_feats.h5", "ann_feats.h5"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_export_to_npz_creates_the_folder_and_records_the_options(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    detections = write_store(tmp_path / "d.h5", DETECTIONS)
    result = run("--store", detections, "--format", "npz", "--out", out, "--names", "id", "--feature", "pool5")
    # format, images, regions and files
    assert (result.exit_code, result.stdout.splitlines()[1].split()) == (0, ["npz", "3", "5", "*.npz"])
    assert {path.name for path in out.iterdir()} == {"3.npz", "4.npz", "5.npz", "provenance.json"}
    options = json.loads((out / "provenance.json").read_text())["options"]
    assert options == {"for": "bottom-up-attention", "feature": "pool5", "names": "id"}
    assert "note: objects_id counts the detector's classes from 0" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "npz", "--dataset", "refcoco"], "--dataset is not for --format npz"),
        (["--format", "lmdb", "--names", "id"], "--names is not for --format lmdb"),
        (["--format", "mattnet", "--feature", "fc7"], "--feature is not for --format mattnet"),
        (["--format", "mattnet", "--for", "uniter"], "--for is not for --format mattnet"),
        (
            ["--format", "npz", "--for", "uniter"],
            "--for uniter: cannot read --format npz; choose bottom-up",
        ),
        (["--format", "lmdb", "--for", "mcan"], "--for mcan: cannot read --format lmdb; choose vilbert-m"),
        (["--format", "mattnet", "--dataset", "refcoco"], "data.json needs --refer-root"),
        (["--format", "mattnet", "--max-length", "3"], "data.json needs --refer-root"),
        (["--format", "mattnet", "--data-json", "x", "--dataset", "refcoco"], "--data-json: cannot be combined"),
        (["--format", "mattnet", "--annotations", "a.h5"], "--annotations: the rows of ann_feats.h5 need a data.json"),
    ],
)
def test_an_option_that_does_not_fit_the_format_is_one_error_line(
    tmp_path: Path, args: list[str], message: str
) -> None:
    detections = write_store(tmp_path / "d.h5", DETECTIONS)
    write_store(tmp_path / "a.h5", ANNOTATIONS)
    args = [str(tmp_path / arg) if arg == "a.h5" else arg for arg in args]
    result = run("--store", detections, "--out", tmp_path / "out", *args)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_existing_out_folder_must_be_empty(tmp_path: Path) -> None:
    detections = write_store(tmp_path / "d.h5", DETECTIONS)
    out = tmp_path / "out"
    out.mkdir()
    assert run("--store", detections, "--format", "npz", "--out", out).exit_code == 0
    exported = sorted(out.iterdir())
    result = run("--store", detections, "--format", "npz", "--out", out)
    assert result.exit_code == 2 and "not an empty folder" in result.stderr and sorted(out.iterdir()) == exported
    assert "not an empty folder" in run("--store", detections, "--format", "npz", "--out", detections).stderr
    assert "no such file" in run("--store", tmp_path / "no.h5", "--format", "npz", "--out", tmp_path / "o").stderr


def test_exporting_does_not_import_torch(tmp_path: Path) -> None:
    script = (
        "import sys, refdet.store.export.mattnet, refdet.store.export.npz, refdet.store.export.lmdb; "
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script], env=os.environ).returncode == 0
