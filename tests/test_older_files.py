"""Files of an older refdet open, verify and go on: a split, a run directory, a store and an unfinished extraction.

``fixtures/older_files.tar.xz`` was made by refdet 0.1 on 2026-11-27 from 40 drawn images: ``build-split``, ``train``,
``extract-features``, and the last once more, stopped in its second shard by an image that could not be read.
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
# The recipe as its user gave it then.
CHANGES = ["model.width=2", "model.fpn_channels=4", "model.fpn_hidden=4", "model.rpn_channels=4",
           "model.mask_channels=4", "train.batch_size=2", "train.workers=0", "head.samples=8", "train.warmup_steps=2",
           "train.log_every=1", "input.short_sides=[64]", "train.save_every=2"]  # fmt: skip
EXTRACTION = ["extract-features", "--checkpoint", "run", "--images", "images", "--instances", "split.json",
              "--device", "cpu", "--max-regions", "5", "--score-threshold", "0"]  # fmt: skip


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: str) -> Result:
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return done


def training(*changes: str) -> list[str]:
    sets = [word for change in (*CHANGES, *changes) for word in ("--set", change)]
    return ["train", "--recipe", "demo", *sets, "--instances", "split.json", "--images", "images", "--out", "run",
            "--device", "cpu", "--resume"]  # fmt: skip


def test_what_they_hold_is_shown_and_proven(older: Path) -> None:
    for name, kind in (("split.json", "split"), ("run", "checkpoint"), ("store.h5", "store"),
                       ("begun.h5.parts", "unfinished store")):  # fmt: skip
        assert json.loads(command("inspect", name, "--json").stdout)["kind"] == kind
    assert "OK: 38 images, 190 regions" in command("inspect", "store.h5", "--verify").stdout
    for what in ("--checkpoint=run", "--store=store.h5"):
        assert "proven: " in command("audit", what, "--instances=split.json", "--refer-root=refer").stdout


def test_a_training_goes_on(older: Path) -> None:
    assert "resumes from step 2" in command(*training("train.steps=4")).output
    assert steps_of(older / "run") == [1, 2, 3, 4]


def test_the_extraction_goes_on_to_the_same_store(older: Path) -> None:
    shard = older / "begun.h5.parts/000000.shard"
    assert shard.exists()
    command(*EXTRACTION, "--out", "begun.h5", "--resume")
    assert "store.h5 is complete" in command(*EXTRACTION, "--out", "store.h5", "--resume").output
    with h5py.File("begun.h5") as new, h5py.File("store.h5") as old:
        assert list(new) == list(old) and new.attrs["options"] == old.attrs["options"]
        for name in ("images/id", "images/file_name", "images/region_start", "images/error"):
            np.testing.assert_array_equal(new[name][:], old[name][:])
        kept = old["images/region_start"][32]  # of the shard that was finished; the rest is computed here
        for name in ("regions/box", "regions/score", "regions/category_id", "features/pool5", "features/fc7"):
            np.testing.assert_array_equal(new[name][:kept], old[name][:kept])
            assert np.isfinite(new[name][:]).all() and new[name].shape == old[name].shape
