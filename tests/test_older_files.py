"""Files of refdet 0.1 still work: a split, a run directory, a store and an unfinished extraction.

``fixtures/older_files.tar.xz`` was made by refdet 0.1 on 2026-11-27 from 40 synthetic images with ``build-split``,
``train``, ``extract-features`` (store.h5), and another ``extract-features`` that was stopped in its second shard by an
unreadable image (begun.h5.parts).
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from training_examples import steps_of

from refdet.cli.main import main

ARCHIVE = Path(__file__).parent / "fixtures" / "older_files.tar.xz"
# images of a shard
SHARD_IMAGES = 32
# changes of the recipe that the run was trained with, some by keys that have other names now
CHANGES = ["model.width=2", "model.fpn_channels=4", "model.fpn_hidden=4", "model.rpn_channels=4",
           "model.mask_channels=4", "train.batch_size=2", "train.workers=0", "head.samples=8", "train.warmup_steps=2",
           "train.log_every=1", "input.short_sides=[64]", "train.save_every=2"]  # fmt: skip
EXTRACTION = ["extract-features", "--checkpoint", "run", "--images", "images", "--instances", "split.json",
              "--device", "cpu", "--max-regions", "5", "--score-threshold", "0"]  # fmt: skip


@pytest.fixture
def older_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        # Python 3.10.11, 3.11.3 and older have no filters, 3.12 and 3.13 warn without one
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(*words: str) -> Result:
    """Run a command, asserting that it succeeds."""
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return done


def resume_training(*changes: str) -> list[str]:
    """The words of the command that resumes the training run."""
    sets = [word for change in (*CHANGES, *changes) for word in ("--set", change)]
    return ["train", "--recipe", "demo", *sets, "--instances", "split.json", "--images", "images", "--out", "run",
            "--device", "cpu", "--resume"]  # fmt: skip


def test_older_files_can_be_inspected_verified_and_audited(older_files: Path) -> None:
    kinds = {"split.json": "split", "run": "checkpoint", "store.h5": "store", "begun.h5.parts": "unfinished store"}
    for name, kind in kinds.items():
        assert json.loads(run_command("inspect", name, "--json").stdout)["kind"] == kind
    assert "OK: 38 images, 190 regions" in run_command("inspect", "store.h5", "--verify").stdout
    for option in ("--checkpoint=run", "--store=store.h5"):
        assert "proven: " in run_command("audit", option, "--instances=split.json", "--refer-root=refer").stdout


def test_an_older_training_run_can_be_resumed(older_files: Path) -> None:
    assert "resumes from step 2" in run_command(*resume_training("train.steps=4")).output
    assert steps_of(older_files / "run") == [1, 2, 3, 4]


def test_an_older_extraction_resumes_to_the_same_store(older_files: Path) -> None:
    shard = older_files / "begun.h5.parts/000000.shard"
    assert shard.exists()
    with h5py.File("store.h5") as old:
        # make the images of the finished shard unreadable, so that computing it again would fail
        for name in old["images/file_name"].asstr()[:SHARD_IMAGES]:
            (older_files / "images" / name).write_bytes(b"")
    run_command(*EXTRACTION, "--out", "begun.h5", "--resume")
    assert "store.h5 is complete" in run_command(*EXTRACTION, "--out", "store.h5", "--resume").output
    with h5py.File("begun.h5") as new, h5py.File("store.h5") as old:
        assert list(new) == list(old) and new.attrs["options"] == old.attrs["options"]
        for name in ("images/id", "images/file_name", "images/region_start", "images/error"):
            np.testing.assert_array_equal(new[name][:], old[name][:])
        # regions of the first shard, which is kept; the second is computed here
        kept = old["images/region_start"][SHARD_IMAGES]
        for name in ("regions/box", "regions/score", "regions/category_id", "features/pool5", "features/fc7"):
            np.testing.assert_array_equal(new[name][:kept], old[name][:kept])
            assert np.isfinite(new[name][:]).all() and new[name].shape == old[name].shape
