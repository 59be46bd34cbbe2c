"""Parts of an extraction, in any number and order and killed at any time, write the store of one process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from interrupted_extraction import BATCHES, BROKEN, RECORDS, run
from part_extraction import SHARDS, ended, run_part, start_part
from store_examples import HEADER, PLAN, contents

from refdet import store
from refdet.cli.main import main
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, RuntimeFailure
from refdet.extraction import parts
from refdet.extraction.part import Part, lock_all_parts
from refdet.extraction.workers_file import read_workers
from refdet.files.lock import exclusive_lock
from refdet.splits.inspect import describe
from refdet.structures.regions import Regions


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of one process."""
    out = tmp_path_factory.mktemp("whole") / "a.h5"
    run(out)
    return out


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_LOCK_TIMEOUT", 0.3)


def folder_of(out: Path) -> Path:
    return out.with_name("a.h5.parts")


def is_whole(out: Path, whole: Path) -> None:
    assert contents(out) == contents(whole)
    assert [path.name for path in out.parent.iterdir()] == ["a.h5"]


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_parts_in_any_number_and_order_write_the_same_store(tmp_path: Path, whole: Path, of: int) -> None:
    out, order = tmp_path / "a.h5", list(range(1, of + 1))
    random.Random(of).shuffle(order)
    done = [run_part(out, f"{number}/{of}") for number in order]
    last = max(place for place, number in enumerate(order) if number <= SHARDS)
    # parts that come after the last one with shards find the store complete
    assert [one.merged for one in done] == [place >= last for place in range(of)]
    assert sum(one.computed for one in done) == len(RECORDS)
    assert (done[-1].images, done[-1].errors) == (len(RECORDS), 1)
    is_whole(out, whole)
    with store.open(out) as found:
        assert found.run["images"] == len(RECORDS) and found.run["parts"] == of


def test_a_part_says_what_it_did(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = run_part(tmp_path / "a.h5", "2/3")
    own = BATCHES[1]
    assert (done.merged, done.images, done.computed) == (False, len(own), len(own))
    assert done.regions == sum(1 + record.id % 4 for record in own) and done.bytes > 0
    assert "note: part 2/3 is finished; 3 of 4 shards are missing: the last part to finish writes" in caplog.text
    again = run_part(tmp_path / "a.h5", "2/3")
    assert (again.merged, again.images, again.computed) == (False, len(own), 0)


def test_parts_at_the_same_time(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.h5"
    answers = [ended(one) for one in [start_part(out, f"{number}/3") for number in (1, 2, 3)]]
    assert [code for code, _ in answers] == [0, 0, 0], answers
    is_whole(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["compute 1", "compute 2", "add 1", "add 2"])
def test_a_part_that_was_killed_is_run_again(tmp_path: Path, whole: Path, kill: str) -> None:
    out = tmp_path / "a.h5"
    assert ended(start_part(out, "1/2", kill))[0] == -9
    assert [one["state"] for one in read_workers(folder_of(out))] == ["stopped"]
    assert not run_part(out, "2/2").merged
    if kill.startswith("add"):
        assert len(list(folder_of(out).glob(".*.shard"))) == 1  # half-written, and left alone by other parts
    kept = len(list(folder_of(out).glob("[0-9]*.shard"))) - 2
    done = run_part(out, "1/2")
    assert done.merged and done.computed == sum(map(len, BATCHES[2 * kept :: 2]))
    is_whole(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["1/2", "2/2", "resume"])
def test_a_merge_that_was_killed_is_done_by_any_part_or_by_resuming(tmp_path: Path, whole: Path, how: str) -> None:
    out = tmp_path / "a.h5"
    run_part(out, "1/2")
    assert ended(start_part(out, "2/2", "put 1"))[0] == -9
    assert not out.exists()
    assert (run(out, resume=True) if how == "resume" else run_part(out, how)).computed == 0
    is_whole(out, whole)


def test_resuming_in_one_process_computes_what_parts_left(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.h5"
    run_part(out, "2/4")
    assert run(out, resume=True).computed == len(RECORDS) - len(BATCHES[1])
    is_whole(out, whole)


def test_parts_continue_what_one_process_began(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.h5"

    def stops(batch: list[ImageRecord], images: list[np.ndarray]) -> None:
        raise RuntimeFailure("stopped")

    with pytest.raises(RuntimeFailure, match="stopped"):
        run(out, compute=stops)
    assert [run_part(out, part).merged for part in ("1/2", "2/2")] == [False, True]
    is_whole(out, whole)


def test_a_part_is_computed_by_one_process_only(tmp_path: Path) -> None:
    out, folder = tmp_path / "a.h5", folder_of(tmp_path / "a.h5")
    run_part(out, "1/2")
    with Part(2, 2).lock(folder):
        with pytest.raises(InputError, match="another process is computing part 2/2; wait for it to finish"):
            run_part(out, "2/2")
        with pytest.raises(InputError, match="another process is computing part 2/2; wait for it to finish"):
            run(out, resume=True)
        assert run_part(out, "1/2").merged is False
    with (
        exclusive_lock(folder, "lock", ""),
        pytest.raises(InputError, match="another process is writing to it; wait for it to finish"),
    ):
        run_part(out, "2/2")
    with lock_all_parts(folder):
        assert [one["state"] for one in read_workers(folder)] == ["finished"]
    assert run_part(out, "2/2").merged


def test_parts_that_are_run_again_read_their_shards_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part does not keep others from starting while it does."""
    out, both = tmp_path / "a.h5", threading.Barrier(2, timeout=20)

    def together(shard_set: parts.ShardSet, number: int) -> None:
        both.wait()
        load(shard_set, number)

    load = parts.ShardSet._load
    for part in ("1/5", "2/5"):
        run_part(out, part)
    monkeypatch.setattr(parts.ShardSet, "_load", together)
    with ThreadPoolExecutor(2) as pool:
        assert [one.computed for one in pool.map(lambda part: run_part(out, part), ("1/5", "2/5"))] == [0, 0]


@pytest.mark.parametrize("gone", [False, True])
def test_a_part_that_is_run_again_while_another_one_merges(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    out = tmp_path / "a.h5"

    def merged_first(shard_set: parts.ShardSet, number: int) -> None:
        monkeypatch.setattr(parts.ShardSet, "_load", load)
        if not gone:
            load(shard_set, number)
        assert run_part(out, "2/2").merged
        load(shard_set, number + 2 * (not gone))

    load = parts.ShardSet._load
    run_part(out, "1/2")
    monkeypatch.setattr(parts.ShardSet, "_load", merged_first)
    done = run_part(out, "1/2")
    assert done.merged and done.computed == 0
    is_whole(out, whole)


def test_other_parts_or_settings_are_refused(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.h5"
    run_part(out, "1/4")
    with pytest.raises(InputError, match=r"`part` 1/3: .*a.h5.parts was started in 4 parts; use the same number, or"):
        run_part(out, "1/3")
    other = replace(PLAN, options=PLAN.options | {"score_threshold": 0.2})
    with pytest.raises(InputError, match="`score_threshold` was 0.05 and is now 0.2; use the same options"):
        run_part(out, "2/4", plan=other)
    with pytest.raises(InputError, match="`batch_size` was 4 and is now 2"):
        run_part(out, "2/4", plan=replace(PLAN, batch_size=2))
    run(out, resume=True)
    with pytest.raises(InputError, match="is complete but has different settings"):
        run_part(out, "2/4", plan=other)
    assert run_part(out, "2/4").computed == 0
    is_whole(out, whole)


def test_a_damaged_number_of_parts_is_said(tmp_path: Path) -> None:
    run_part(tmp_path / "a.h5", "1/4")
    (folder_of(tmp_path / "a.h5") / "parts.json").write_text('{"parts": "4"}')
    with pytest.raises(InputError, match="parts.json: damaged; remove it"):
        run_part(tmp_path / "a.h5", "2/4")


@pytest.mark.parametrize("text", ["9/8", "0/8", "1/0", "3", "a/b", "3/8/1", "-1/2", "1/1000000"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(InputError, match=f"^`part` {text}: .*such as 3/8$"):
        Part.parse(text)


@pytest.mark.parametrize("size", [0, -1, True, 10**6, None, "4"])
def test_no_part_computes_with_a_damaged_batch_size(tmp_path: Path, size: Any) -> None:
    run_part(tmp_path / "a.h5", "1/2")
    path = folder_of(tmp_path / "a.h5") / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"batch_size": size}))
    previous = "not set" if size is None else json.dumps(size).strip('"')
    with pytest.raises(InputError, match=f"`batch_size` was {previous} and is now 4"):
        run_part(tmp_path / "a.h5", "2/2", fixed_batch_size=False)


def test_the_batch_size_is_that_of_the_first_part_unless_one_is_asked_for(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.h5"
    run_part(out, "1/2")
    done = run_part(out, "2/2", plan=replace(PLAN, batch_size=1), fixed_batch_size=False)
    assert done.merged and done.batch_size == PLAN.batch_size
    is_whole(out, whole)


def test_an_image_that_was_repaired_is_computed_again_by_its_part(tmp_path: Path) -> None:
    out, (place,) = tmp_path / "a.h5", [n for n, batch in enumerate(BATCHES) if any(r.id == BROKEN for r in batch)]

    def repaired(record: ImageRecord) -> np.ndarray:
        return np.full((record.height, record.width, 3), record.id, np.uint8)

    part = f"{place + 1}/{SHARDS}"
    run_part(out, part)
    assert run_part(out, part, load=repaired).computed == len(BATCHES[place])
    for number in range(SHARDS):
        run_part(out, f"{number + 1}/{SHARDS}", load=repaired)
    with store.open(out) as found:
        assert not found.errors


def test_without_locks_one_part_merges(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fails)
    out = tmp_path / "a.h5"
    run_part(out, "1/2")
    (folder_of(out) / "merging.json").write_text(json.dumps({"part": "1/2"}))
    assert not run_part(out, "2/2").merged  # as another part has begun to, or was killed
    assert run(out, resume=True).computed == 0
    is_whole(out, whole)


def test_a_damaged_shard_of_another_part_is_named_and_computed_again(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.h5"
    run_part(out, "1/2")
    damaged = folder_of(out) / "000002.shard"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(RuntimeFailure, match=r"1 damaged shard removed; check the disk, and run part 1/2 again or"):
        run_part(out, "2/2")
    assert run_part(out, "1/2").computed == len(BATCHES[2])
    is_whole(out, whole)


@pytest.mark.parametrize("gone", [False, True])
def test_two_parts_that_end_at_the_same_time(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    out, original = tmp_path / "a.h5", parts._merge_if_last

    def other_first(*given: Any) -> bool:
        monkeypatch.setattr(parts, "_merge_if_last", original)
        assert run_part(out, "2/2").merged
        if gone:  # between the creation of the folder for the lock and that of the lock
            monkeypatch.setattr(parts, "exclusive_lock", vanished)
        return original(*given)

    def vanished(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(parts, "_merge_if_last", other_first)
    done = run_part(out, "1/2")
    assert done.merged and done.images == len(RECORDS)
    is_whole(out, whole)


def test_a_full_disk_keeps_finished_shards(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, written = tmp_path / "a.h5", []

    def full(writer: parts.ShardSet, images: Sequence[Regions]) -> object:
        written.extend(images)
        if len(written) > len(BATCHES[0]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(writer, images)

    original = parts.ShardSet.encode
    with monkeypatch.context() as patch:
        patch.setattr(parts.ShardSet, "encode", full)
        with pytest.raises(RuntimeFailure, match="no space left on the disk; finished shards are kept"):
            run_part(out, "1/2")
    assert [path.name for path in folder_of(out).glob("*.shard")] == ["000000.shard"]
    run_part(out, "2/2")
    assert run_part(out, "1/2").computed == len(BATCHES[2])
    is_whole(out, whole)


def test_inspect_shows_who_computes_what(tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    for part in ("3/4", "1/4"):
        run_part(out, part, header=replace(HEADER, provenance={}))
    found = describe(folder_of(out))["workers"]
    assert [(one["worker"], one["state"]) for one in found] == [("part 1/4", "finished"), ("part 3/4", "finished")]
    assert [(one["finished"], one["images"]) for one in found] == [(3, 3), (2, 2)]
    assert all(one["host"] and one["pid"] and one["seconds_ago"] < 60 for one in found)
    shown = CliRunner().invoke(main, ["inspect", str(folder_of(out))])
    assert shown.exit_code == 0 and "worker" in shown.stdout and "part 3/4" in shown.stdout
    assert f"({os.getpid()})" in shown.stdout and "finished  3 of 3" in shown.stdout
    (folder_of(out) / "part-1.json").write_text('{"worker": 3, "updated": NaN, "finished": true}')
    assert describe(folder_of(out))["workers"][0] == {
        "worker": None, "host": None, "pid": None, "state": "stopped", "shards": None, "finished": None,
        "images": None, "images_per_second": None, "seconds_ago": None,
    }  # fmt: skip
