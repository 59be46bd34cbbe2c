"""Extractions that are killed, lose power or fill the disk, and then resume, write the store of an undisturbed one."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import interrupted_extraction
import numpy as np
import pytest
from interrupted_extraction import BATCHES, BROKEN, PUT_AT_ONCE, RECORDS, Case, environment, line, run
from store_examples import contents

pytestmark = pytest.mark.slow


class Outcome(NamedTuple):
    """Result of a `Case`.

    Attributes:
        code: exit code, -9 if it was killed.
        text: error message.
        steps: steps that changed files, unless it was killed.
    """

    code: int
    text: str
    steps: list[str]


Extraction = Callable[..., Outcome]


@pytest.fixture(scope="module")
def extraction() -> Iterator[Extraction]:
    """Runs a `Case`, given as keyword arguments, in a child process, which may be killed."""
    command = [sys.executable, interrupted_extraction.__file__]
    server = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin and server.stdout

    def extract(out: Path, **what: Any) -> Outcome:
        assert server.stdin and server.stdout
        server.stdin.write(line(Case(str(out), **what)))
        server.stdin.flush()
        return Outcome(**json.loads(server.stdout.readline()))

    yield extract
    server.stdin.close()
    assert server.wait(10) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an undisturbed extraction."""
    out = tmp_path_factory.mktemp("whole") / "a.h5"
    summary = run(out)
    assert (summary.images, summary.errors) == (len(RECORDS), 1)
    return out


@pytest.fixture(scope="module")
def steps(extraction: Extraction, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The steps of an undisturbed extraction that change files."""
    outcome = extraction(tmp_path_factory.mktemp("steps") / "a.h5")
    assert outcome.code == 0
    return outcome.steps


def resume_and_compare(whole: Path, out: Path, what: str) -> int:
    """Resume, and compare with the undisturbed store; returns how many images had to be computed."""
    computed = run(out, resume=True).computed
    assert contents(out) == contents(whole), what
    assert [path.name for path in out.parent.iterdir()] == ["a.h5"], what
    return computed


def new_store_path(tmp_path: Path, number: object) -> Path:
    """Path of a store in a new folder."""
    folder = tmp_path / str(number)
    folder.mkdir()
    return folder / "a.h5"


def test_the_steps_are_those_of_a_whole_extraction(steps: list[str]) -> None:
    assert (steps.count("add"), steps.count("put")) == (len(BATCHES), -(-len(RECORDS) // PUT_AT_ONCE))
    assert steps.count("replace") == 1 + len(BATCHES) + 2  # plan.json, the shards, merged.json and the store
    assert (
        steps.count("fsync") == 2 * steps.count("replace") + 2
    )  # of each file and its folder, and of two more folders
    assert steps[steps.index("unlink") :][:2] == ["unlink", "fsync"]  # plan.json is removed first, and that is synced
    assert steps[-1] == "rmdir"


@pytest.mark.parametrize("after", [False, True])
def test_an_extraction_killed_at_every_step_resumes_to_the_same_store(
    tmp_path: Path, extraction: Extraction, whole: Path, steps: list[str], after: bool
) -> None:
    computed = []
    for step, name in enumerate(steps):
        if after and name in ("add", "put"):
            continue  # nothing is written between the end of these and the start of the next step
        out = new_store_path(tmp_path, step)
        assert extraction(out, kill=step, after=after).code == -9
        computed.append(resume_and_compare(whole, out, f"killed {'after' if after else 'before'} step {step}, {name}"))
    assert computed == sorted(computed, reverse=True)  # finished shards are not computed again
    assert (computed[0], computed[-1]) == (len(RECORDS), 0)


def test_an_extraction_killed_three_times_resumes_to_the_same_store(
    tmp_path: Path, extraction: Extraction, whole: Path, steps: list[str]
) -> None:
    random_numbers = random.Random(0)
    killed = 0
    for number in range(12):
        out = new_store_path(tmp_path, number)
        kills = [random_numbers.randrange(len(steps)) for _ in range(3)]
        for kill in kills:
            started = any(out.parent.iterdir())
            outcome = extraction(out, kill=kill, after=random_numbers.random() < 0.5, resume=started)
            killed += outcome.code == -9
        resume_and_compare(whole, out, f"killed at steps {kills}")
    assert killed > 12  # a resumed extraction has fewer steps, so some are not killed


def test_an_extraction_killed_at_any_time_resumes_to_the_same_store(
    tmp_path: Path, extraction: Extraction, whole: Path
) -> None:
    random_numbers = random.Random(0)
    for number in range(8):
        out = new_store_path(tmp_path, number)
        seconds = random_numbers.uniform(0.001, 0.15)  # an extraction takes about that long
        extraction(out, seconds=seconds)
        resume_and_compare(whole, out, f"killed after {seconds} s")


@pytest.mark.parametrize("loss", ["absent", "empty", "cut", "zeros"])
def test_a_power_failure_after_a_rename_loses_at_most_that_file(
    tmp_path: Path, extraction: Extraction, whole: Path, steps: list[str], loss: str
) -> None:
    """Until the folder is synced, the new name may be lost; a careless file system may lose the file's contents too."""
    for step, name in enumerate(steps):
        if name != "replace":
            continue
        out = new_store_path(tmp_path, step)
        assert extraction(out, kill=step, after=True).code == -9
        renamed = Path(out.parent.with_suffix(".replaced").read_text())
        data = renamed.read_bytes()
        if loss == "absent":
            renamed.unlink()
        else:
            renamed.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "zeros": bytes(len(data))}[loss])
        resume_and_compare(whole, out, f"{renamed.name} is {loss}")


def test_a_flipped_bit_anywhere_in_a_shard_is_detected(
    tmp_path: Path, extraction: Extraction, whole: Path, steps: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = new_store_path(tmp_path, 0)
    assert extraction(out, kill=steps.index("put")).code == -9
    kept = shutil.copytree(out.parent, tmp_path / "kept")
    shard = out.parent / "a.h5.parts" / "000001.shard"
    data = shard.read_bytes()
    for offset in (*range(0, 60, 5), *range(60, len(data), 157), *range(len(data) - 8, len(data), 2)):
        shutil.rmtree(out.parent)
        shutil.copytree(kept, out.parent)
        shard.write_bytes(data[:offset] + bytes([data[offset] ^ 4]) + data[offset + 1 :])
        caplog.clear()
        assert resume_and_compare(whole, out, f"byte {offset} of {len(data)}") == len(BATCHES[1])
        assert f"{shard}: damaged" in caplog.text


def test_a_full_disk_at_every_step_is_reported_and_resumed(
    tmp_path: Path, extraction: Extraction, whole: Path, steps: list[str]
) -> None:
    for step, name in enumerate(steps[: steps.index("unlink")]):
        out = new_store_path(tmp_path, step)
        outcome = extraction(out, full=step)
        assert outcome.code == 1 and "no space left" in outcome.text and str(out) in outcome.text, outcome
        assert "--resume" in outcome.text or "run it again" in outcome.text, outcome
        assert not [path for path in out.parent.rglob(".*") if path.is_file()]  # no temporary files are left
        resume_and_compare(whole, out, f"full at step {step}, {name}")


@pytest.mark.parametrize("kib", [8, 16, 40, 80])
def test_a_full_tmpfs_is_reported_and_resumed(tmp_path: Path, whole: Path, kib: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # in a user namespace of its own, each command may mount a file system of this size
    mount = f"mount -t tmpfs -o size={kib}k none {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    serve = f"{sys.executable} {interrupted_extraction.__file__}"
    out = disk / "a.h5"
    (tmp_path / "first").write_text(line(Case(str(out))))
    (tmp_path / "second").write_text(line(Case(str(out), resume=True)))
    script = (
        f"{mount} && {serve} < {tmp_path / 'first'} && mount -o remount,size=9m {disk} && "
        f"{serve} < {tmp_path / 'second'} && cp {out} {tmp_path / 'a.h5'}"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], env=environment(), capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert '"code": 1' in first and "no space left" in first and str(disk) in first
    assert '"code": 0' in second
    assert contents(tmp_path / "a.h5") == contents(whole)


def test_a_store_beside_unfinished_shards_is_not_overwritten(
    tmp_path: Path, extraction: Extraction, whole: Path, steps: list[str]
) -> None:
    out = new_store_path(tmp_path, 0)
    assert extraction(out, kill=steps.index("finish") + 6).code == -9  # before the second shard is synced
    out.write_bytes(b"not refdet's")
    outcome = extraction(out, resume=True)
    assert outcome.code == 2 and "is an unfinished extraction; remove one of them" in outcome.text
    assert out.read_bytes() == b"not refdet's"
    out.unlink()
    resume_and_compare(whole, out, "the store was removed")


def test_the_broken_image_is_in_the_store(whole: Path) -> None:
    with h5py.File(whole) as file:
        errors = file["images/error"].asstr()[:]
        assert np.flatnonzero(errors).tolist() == [BROKEN]
