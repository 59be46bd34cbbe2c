"""Extractions that are killed, lose power or run out of disk end, resumed, in the store of an undisturbed one."""

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


class Answer(NamedTuple):
    code: int
    text: str
    steps: list[str]


Extraction = Callable[..., Answer]


@pytest.fixture(scope="module")
def extraction() -> Iterator[Extraction]:
    """Runs a `Case` in a process of its own that may die of it."""
    command = [sys.executable, interrupted_extraction.__file__]
    server = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin and server.stdout

    def extract(out: Path, **what: Any) -> Answer:
        assert server.stdin and server.stdout
        server.stdin.write(line(Case(str(out), **what)))
        server.stdin.flush()
        return Answer(**json.loads(server.stdout.readline()))

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
    answer = extraction(tmp_path_factory.mktemp("steps") / "a.h5")
    assert answer.code == 0
    return answer.steps


def resumed_is(whole: Path, out: Path, what: str) -> int:
    """Resume and compare; how many images had to be computed."""
    computed = run(out, resume=True).computed
    assert contents(out) == contents(whole), what
    assert [path.name for path in out.parent.iterdir()] == ["a.h5"], what
    return computed


def fresh(tmp_path: Path, number: object) -> Path:
    folder = tmp_path / str(number)
    folder.mkdir()
    return folder / "a.h5"


def test_the_steps_are_those_of_a_whole_extraction(steps: list[str]) -> None:
    assert (steps.count("add"), steps.count("put")) == (len(BATCHES), -(-len(RECORDS) // PUT_AT_ONCE))
    assert steps.count("replace") == 1 + len(BATCHES) + 2  # the plan, the shards, which file they became, and that file
    assert steps.count("fsync") == 2 * steps.count("replace") + 2  # of file and folder, and of two folders more
    assert steps[steps.index("unlink") :][:2] == ["unlink", "fsync"]  # first the plan, for good
    assert steps[-1] == "rmdir"


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_step(
    tmp_path: Path, extraction: Extraction, whole: Path, steps: list[str], after: bool
) -> None:
    computed = []
    for step, name in enumerate(steps):
        if after and name in ("add", "put"):
            continue  # nothing happens between this and what comes before the next step
        out = fresh(tmp_path, step)
        assert extraction(out, kill=step, after=after).code == -9
        computed.append(resumed_is(whole, out, f"killed {'after' if after else 'before'} step {step}, {name}"))
    assert computed == sorted(computed, reverse=True)  # what was finished is not computed again
    assert (computed[0], computed[-1]) == (len(RECORDS), 0)


def test_killed_again_and_again(tmp_path: Path, extraction: Extraction, whole: Path, steps: list[str]) -> None:
    chance = random.Random(0)
    for number in range(12):
        out = fresh(tmp_path, number)
        kills = [chance.randrange(len(steps)) for _ in range(3)]
        for place, kill in enumerate(kills):
            begun = any(out.parent.iterdir())
            extraction(out, kill=kill, after=chance.random() < 0.5, resume=place > 0 and begun)
        resumed_is(whole, out, f"killed at steps {kills}")


def test_killed_at_any_time(tmp_path: Path, extraction: Extraction, whole: Path) -> None:
    chance = random.Random(0)
    for number in range(8):
        out = fresh(tmp_path, number)
        seconds = chance.uniform(0.001, 0.15)
        extraction(out, seconds=seconds)
        resumed_is(whole, out, f"killed after {seconds} s")


@pytest.mark.parametrize("loss", ["absent", "empty", "cut", "zeros"])
def test_power_lost_after_a_rename(
    tmp_path: Path, extraction: Extraction, whole: Path, steps: list[str], loss: str
) -> None:
    """Before the folder is on the disk, the new name may be lost, or what a careless file system kept of the file."""
    for step, name in enumerate(steps):
        if name != "replace":
            continue
        out = fresh(tmp_path, step)
        assert extraction(out, kill=step, after=True).code == -9
        renamed = Path(out.parent.with_suffix(".replaced").read_text())
        data = renamed.read_bytes()
        if loss == "absent":
            renamed.unlink()
        else:
            renamed.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "zeros": bytes(len(data))}[loss])
        resumed_is(whole, out, f"{renamed.name} is {loss}")


def test_damage_is_noticed_wherever_it_is(
    tmp_path: Path, extraction: Extraction, whole: Path, steps: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = fresh(tmp_path, 0)
    assert extraction(out, kill=steps.index("put")).code == -9
    kept = shutil.copytree(out.parent, tmp_path / "kept")
    shard = out.parent / "a.h5.parts" / "000001.shard"
    data = shard.read_bytes()
    for place in (*range(0, 60, 5), *range(60, len(data), 157), *range(len(data) - 8, len(data), 2)):
        shutil.rmtree(out.parent)
        shutil.copytree(kept, out.parent)
        shard.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        caplog.clear()
        assert resumed_is(whole, out, f"byte {place} of {len(data)}") == len(BATCHES[1])
        assert f"{shard}: damaged" in caplog.text


def test_a_disk_that_is_full_at_every_step(
    tmp_path: Path, extraction: Extraction, whole: Path, steps: list[str]
) -> None:
    for step, name in enumerate(steps[: steps.index("unlink")]):
        out = fresh(tmp_path, step)
        answer = extraction(out, full=step)
        assert answer.code == 1 and "no space left" in answer.text and str(out) in answer.text, answer
        assert "--resume" in answer.text or "run it again" in answer.text, answer
        assert not [path for path in out.parent.rglob(".*") if path.is_file()]  # nothing half-written stays
        resumed_is(whole, out, f"full at step {step}, {name}")


@pytest.mark.parametrize("kib", [8, 16, 40, 80])
def test_a_disk_that_is_really_full(tmp_path: Path, whole: Path, kib: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
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
    out = fresh(tmp_path, 0)
    assert extraction(out, kill=steps.index("finish") + 6).code == -9
    out.write_bytes(b"somebody's")
    answer = extraction(out, resume=True)
    assert answer.code == 2 and "is an unfinished extraction; remove one of them" in answer.text
    assert out.read_bytes() == b"somebody's"
    out.unlink()
    resumed_is(whole, out, "the store was removed")


def test_the_broken_image_is_in_the_store(whole: Path) -> None:
    with h5py.File(whole) as file:
        errors = file["images/error"].asstr()[:]
        assert np.flatnonzero(errors).tolist() == [BROKEN]
