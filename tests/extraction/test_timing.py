"""The timing of an extraction in a store: the sum over its sessions, and the share of each stage."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import pytest
from interrupted_extraction import environment
from resumable_extraction import BATCHES, interrupted_before_the_merge, run

from refdet import store
from refdet.errors import InputError, Interrupted
from refdet.extraction.timing import STAGES, Timer


def read_run(out: Path) -> dict[str, Any]:
    """The timing that a store records."""
    with store.open(out) as found:
        return found.run


def test_a_store_records_the_time_of_all_sessions(tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    for stop_at in (1, 2):
        with pytest.raises(Interrupted):
            run(out, stop_at=stop_at, resume=True)
    done = run(out, resume=True)
    found = read_run(out)
    assert (found["sessions"], found["images"], done.computed) == (3, 10, 5)
    assert found["seconds"] > done.seconds  # of the last session alone
    assert found["images_per_second"] == pytest.approx(10 / found["seconds"], rel=0.1)
    assert tuple(found["stages"]) == tuple(found["shares"]) == STAGES
    assert found["stages"]["merge"] > 0
    total = found["seconds"] + found["stages"]["merge"]
    assert found["shares"]["compute"] == pytest.approx(found["stages"]["compute"] / total, abs=0.05)
    assert sum(found["shares"][name] for name in ("load", "compute", "wait", "merge")) <= 1.001


def test_an_interruption_during_the_merge_keeps_the_count_of_images(tmp_path: Path) -> None:
    interrupted_before_the_merge(tmp_path / "a.h5")
    assert run(tmp_path / "a.h5", resume=True).computed == 0
    found = read_run(tmp_path / "a.h5")
    assert (found["sessions"], found["images"]) == (2, 10) and found["images_per_second"] > 0


def test_a_killed_session_counts_up_to_its_last_shard(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; import resumable_extraction as t\n"
        "def killed(batch, images):\n"
        "    if batch == t.BATCHES[2]:\n"
        "        while Path(sys.argv[1] + '.parts/sessions.jsonl').read_text().count('{\"session\"') < 3:\n"
        "            time.sleep(0.01)\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return t.compute(batch, images)\n"
        "t.run(Path(sys.argv[1]), compute=killed)\n"
    )
    out = tmp_path / "a.h5"
    process = subprocess.run([sys.executable, "-c", code, str(out)], env=environment(), capture_output=True, timeout=60)
    assert process.returncode == -9
    log = tmp_path / "a.h5.parts" / "sessions.jsonl"
    log.write_text(log.read_text() + '\n{"session": 1, "ima')  # a line truncated by the kill
    assert run(out, resume=True).computed == sum(map(len, BATCHES[2:]))
    found = read_run(out)
    assert (found["sessions"], found["images"]) == (2, 10)


INVALID_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1.5", "1e300", '"nan"', "true", "null", "9" * 400)


@pytest.mark.parametrize("number", INVALID_NUMBERS)
@pytest.mark.parametrize("key", ["images", "seconds", "load", "session"])
@pytest.mark.parametrize("name", ["sessions.jsonl", "sessions-2.jsonl"])
def test_numbers_that_are_no_measurements_reach_no_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, key: str, number: str
) -> None:
    session = {"session": 1, "images": 3, "seconds": 4.0, "stages": dict.fromkeys(STAGES, 0.5)}
    line = json.dumps(session)
    replaced = {"session": '"session": 1', "images": '"images": 3', "seconds": '"seconds": 4.0', "load": '"load": 0.5'}
    damaged = line.replace(replaced[key], f'"{key}": {number}')
    assert damaged != line
    (tmp_path / name).write_text(f"{line}\n{damaged}\n")
    timer = Timer(tmp_path)
    found = timer.summary()
    json.dumps(found, allow_nan=False)
    assert found["images"] == 3 and math.isclose(found["seconds"], 4.0, abs_tol=1.0)
    assert f"{name}: 1 line is damaged and left out of the times" in caplog.text


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_store_opens_whatever_its_times_are(tmp_path: Path, caplog: pytest.LogCaptureFixture, number: str) -> None:
    path = tmp_path / "a.h5"
    run(path)
    with h5py.File(path, "r+") as file:
        file.attrs["run"] = f'{{"seconds": {number}, "images": 10, "stages": {{"load": {number}, "merge": 0.5}}}}'
    expected = {"seconds": None, "images": 10, "stages": {"load": None, "merge": 0.5}}
    assert read_run(path) == expected
    assert f"note: {path}: attribute run has 2 numbers that are not finite and read as null" in caplog.text


@pytest.mark.parametrize("text", ["[1]", '{"seconds": ', "null"])
def test_a_store_whose_times_are_not_json_is_damaged(tmp_path: Path, text: str) -> None:
    run(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.attrs["run"] = text
    with pytest.raises(InputError, match="attribute run is not "):
        store.open(tmp_path / "a.h5")


@pytest.mark.parametrize("name", ["options", "provenance", "classes"])
def test_other_attributes_with_numbers_that_are_not_finite_are_damaged(tmp_path: Path, name: str) -> None:
    run(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.attrs[name] = '{"score_threshold": NaN}'
    with pytest.raises(InputError, match=f"attribute {name} is not valid JSON"):
        store.open(tmp_path / "a.h5")


def test_the_summary_has_the_share_of_each_stage(tmp_path: Path) -> None:
    done = run(tmp_path / "a.h5")
    assert tuple(done.shares) == STAGES
    assert done.shares["merge"] == pytest.approx(done.stages["merge"] / (done.seconds + done.stages["merge"]))
    assert set(run(tmp_path / "a.h5", resume=True).shares.values()) == {0.0}  # nothing was left to compute


def test_a_session_log_that_cannot_be_written_is_ignored(tmp_path: Path) -> None:
    timer = Timer(tmp_path / "gone")
    timer.record_shard(3)
    assert timer.summary()["images"] == 3 and timer.summary()["sessions"] == 1
