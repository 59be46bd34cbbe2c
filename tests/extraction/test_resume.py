"""Starting and resuming: settings and files that are refused, files of other programs, and repeated interruptions."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupted_extraction import RECORDS, environment
from resumable_extraction import RECIPE, RECIPE_HEADER, interrupt, interrupted_before_the_merge, load, run
from store_examples import contents

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, Interrupted
from refdet.extraction import shards
from refdet.files import atomic

OTHER_HEADERS = [
    (replace(RECIPE_HEADER, recipe=json.dumps(RECIPE | {"input": {"min_sizes": [800], "max_size": 1000}})),
     r"another recipe of the checkpoint \(input.min_sizes was \[600\] and is now \[800\]\)"),
    (replace(RECIPE_HEADER, recipe="name: other"), "another recipe of the checkpoint"),
    (replace(RECIPE_HEADER, classes=[{"id": 3, "name": "cat"}]), "other classes of the checkpoint"),
    (replace(RECIPE_HEADER, provenance={"source": "y.json"}), "another provenance of the checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(("header", "message"), OTHER_HEADERS)
def test_another_recipe_classes_or_provenance_is_refused(
    tmp_path: Path, header: Any, message: str, finished: bool
) -> None:
    out = tmp_path / "a.h5"
    if finished:
        run(out)
    else:
        with pytest.raises(Interrupted):
            run(out, stop_at=2)
    with pytest.raises(InputError, match=message):
        run(out, header=header, resume=True)
    assert run(out, resume=True).computed == (0 if finished else 5)


def test_of_many_changes_of_a_recipe_three_are_listed(tmp_path: Path) -> None:
    run(tmp_path / "a.h5")
    many = replace(RECIPE_HEADER, recipe=json.dumps(RECIPE | {name: 1 for name in "abcdef"}))
    with pytest.raises(
        InputError, match="a was not set and is now 1; b was not set .*; c was not set and is now 1; \\.\\.\\."
    ):
        run(tmp_path / "a.h5", header=many, resume=True)


def test_a_plan_without_a_recipe_of_an_older_version_is_refused(tmp_path: Path) -> None:
    out, plan = tmp_path / "a.h5", tmp_path / "a.h5.parts" / "plan.json"
    with pytest.raises(Interrupted):
        run(out, stop_at=2)
    older = json.loads(plan.read_text())
    del older["header"]
    plan.write_text(json.dumps(older))
    with pytest.raises(
        InputError, match="started with different settings: another version of refdet; .* or remove the folder"
    ):
        run(out, resume=True)


def test_finished_shards_do_not_overwrite_a_file_of_another_program(tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    interrupted_before_the_merge(out)
    out.write_bytes(b"not refdet's")
    with pytest.raises(InputError, match="a.h5 exists, but .* is an unfinished extraction; remove one of them"):
        run(out, resume=True)
    assert out.read_bytes() == b"not refdet's"
    out.unlink()
    assert run(out, resume=True).computed == 0


def test_a_file_that_appears_during_the_work_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "a.h5"

    def load_and_write(record: ImageRecord) -> np.ndarray:
        out.write_bytes(b"not refdet's")
        return load(record)

    with pytest.raises(InputError, match="remove one of them"):
        run(out, load=load_and_write)
    assert out.read_bytes() == b"not refdet's"


def test_a_file_that_replaced_the_merged_store_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(shards, "remove_merged", interrupt)
        run(out)
    other = tmp_path / "other"
    other.write_bytes(b"not refdet's")
    other.rename(out)
    with pytest.raises(InputError, match="remove one of them"):
        run(out, resume=True)
    assert out.read_bytes() == b"not refdet's"


def test_a_file_system_without_locks_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fails)
    run(tmp_path / "a.h5")
    assert caplog.text.count("file system without locks (No locks available); make sure no other process") == 1


def test_a_second_ctrl_c_waits_for_the_background_thread(tmp_path: Path) -> None:
    """The lock is held until that thread has finished the batches it has, as after one Ctrl-C."""
    code = (
        "import os, signal, sys, threading, time; from pathlib import Path; import resumable_extraction as t\n"
        "def press(): os.kill(os.getpid(), signal.SIGINT)\n"
        "def slow(batch, images):\n"
        "    if batch == t.BATCHES[2]:\n"
        "        for seconds in (0.3, 0.5): threading.Timer(seconds, press).start()\n"
        "        press(); time.sleep(9)\n"
        "    regions = t.compute(batch, images)\n"
        "    return lambda: time.sleep(0.6) or regions()\n"
        "t.run(Path(sys.argv[1]), compute=slow)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.h5")]
    process = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert "5 of 10 images are finished" in process.stderr and "`resume=True`" in process.stderr
    assert "finishing the computed batches first" in process.stderr
    assert run(tmp_path / "a.h5", resume=True).computed == 5
    run(tmp_path / "whole.h5")
    assert contents(tmp_path / "a.h5") == contents(tmp_path / "whole.h5")


def test_an_extraction_interrupted_in_several_merges_is_finished(tmp_path: Path) -> None:
    """First after the rename, and then three times before it; the merged file is still recognized as refdet's."""
    out = tmp_path / "a.h5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "remove_merged", interrupt)
        with pytest.raises(Interrupted, match="stopped"):
            run(out)
    rename = os.replace

    def interrupted_replace(old: str | Path, new: str | Path) -> None:
        if Path(new) == out:
            raise KeyboardInterrupt
        rename(old, new)

    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(atomic.os, "replace", interrupted_replace)
            with pytest.raises(Interrupted, match="stopped"):
                run(out, resume=True)
    run(out, resume=True)
    with store.open(out) as file:
        assert len(file) == len(RECORDS)


def test_files_of_other_programs_beside_a_store_and_its_shards_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    beside = [tmp_path / name for name in (".a.original.h5", ".a.backup01.h5", ".a.0123abcd.h5", "a.txt")]
    for path in beside:
        path.write_text("not refdet's")
    with pytest.raises(Interrupted):
        run(out, stop_at=2)
    inside = [tmp_path / "a.h5.parts" / name for name in (".notes", "notes.txt", ".000001.txt")]
    for path in inside:
        path.write_text("not refdet's")
    temporary = [tmp_path / ".a.0123abcd.refdet-tmp.h5", tmp_path / "a.h5.parts" / ".000001.0123abcd.refdet-tmp.shard"]
    for path in temporary:
        path.write_text("half-written")
    assert run(out, resume=True).computed == 5
    assert all(path.read_text() == "not refdet's" for path in [*beside, *inside])
    assert not list((tmp_path / "a.h5.parts").glob("*.shard")) and not (tmp_path / "a.h5.parts" / "plan.json").exists()
    assert not any(path.exists() for path in temporary)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", ".notes", "photo.jpg", "000001.shard.bak"])
def test_a_folder_with_other_files_is_not_used_for_shards(tmp_path: Path, name: str, resume: bool) -> None:
    (tmp_path / "a.h5.parts").mkdir()
    (tmp_path / "a.h5.parts" / name).write_text("not refdet's")
    with pytest.raises(InputError, match=f"contains {name}, not part of an extraction"):
        run(tmp_path / "a.h5", resume=resume)
    assert [path.name for path in (tmp_path / "a.h5.parts").iterdir()] == [name]


def test_resuming_without_shards_starts_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(tmp_path / "a.h5", resume=True).computed == len(RECORDS)
    assert "nothing to resume in" in caplog.text and "starting from the beginning" in caplog.text
