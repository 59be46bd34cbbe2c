"""Parts of an extraction, in any number and order and killed at any time, write the store that one process writes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from interrupted_extraction import BATCHES, BROKEN, RECORDS, run
from part_extraction import SHARDS, ended, run_part, start_part
from resumable_extraction import load as load_all
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
    """The store that one process writes."""
    out = tmp_path_factory.mktemp("whole") / "a.h5"
    run(out)
    return out


@pytest.fixture(autouse=True)
def short_lock_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait only 0.3 s for the lock of the folder."""
    monkeypatch.setattr(parts, "_LOCK_TIMEOUT", 0.3)


def folder_of(out: Path) -> Path:
    return out.with_name("a.h5.parts")


def assert_whole(out: Path, whole: Path) -> None:
    """Check that a store has the contents of another, and that nothing else is left beside it."""
    assert contents(out) == contents(whole)
    assert [path.name for path in out.parent.iterdir()] == ["a.h5"]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_in_any_number_and_order_write_the_same_store(tmp_path: Path, whole: Path, count: int) -> None:
    out, order = tmp_path / "a.h5", list(range(1, count + 1))
    random.Random(count).shuffle(order)
    done = [run_part(out, f"{number}/{count}") for number in order]
    # of the parts that have shards, the last one merges; parts without shards after it find the store complete
    merging = max(place for place, number in enumerate(order) if number <= SHARDS)
    assert [summary.merged for summary in done] == [place >= merging for place in range(count)]
    assert sum(summary.computed for summary in done) == len(RECORDS)
    assert (done[-1].images, done[-1].errors) == (len(RECORDS), 1)
    assert_whole(out, whole)
    with store.open(out) as found:
        assert found.run["images"] == len(RECORDS) and found.run["parts"] == count


def test_a_part_reports_its_own_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = run_part(tmp_path / "a.h5", "2/3")
    batch = BATCHES[1]
    assert (done.merged, done.images, done.computed) == (False, len(batch), len(batch))
    assert done.regions == sum(1 + record.id % 4 for record in batch) and done.bytes > 0  # as `compute` makes them
    assert "note: part 2/3 is finished; 3 of 4 shards are missing: the last part to finish writes" in caplog.text
    again = run_part(tmp_path / "a.h5", "2/3")
    assert (again.merged, again.images, again.computed) == (False, len(batch), 0)


def test_a_strict_part_keeps_its_shards_while_an_image_is_still_unusable(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.h5"
    shard = next(number for number, batch in enumerate(BATCHES) if BROKEN in {record.id for record in batch})
    part = f"{shard + 1}/{SHARDS}"
    run_part(out, part)
    (path,) = folder_of(out).glob("*.shard")
    before = path.read_bytes()
    with pytest.raises(RuntimeFailure, match="`strict`: .* not a readable image; finished shards are kept in "):
        run_part(out, part, strict=True)
    assert path.read_bytes() == before
    with pytest.raises(RuntimeFailure, match="`strict`: lost"):  # another image of the shard can no longer be read
        run_part(out, part, strict=True, load=_load_only(BROKEN))
    assert path.read_bytes() == before
    assert (run_part(out, part, strict=True, load=load_all).errors, path.exists()) == (0, True)


def _load_only(image_id: int) -> Callable[[ImageRecord], np.ndarray]:
    def load(record: ImageRecord) -> np.ndarray:
        if record.id != image_id:
            raise InputError("lost")
        return load_all(record)

    return load


def test_parts_in_three_processes_write_the_same_store(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.h5"
    processes = [start_part(out, f"{number}/3") for number in (1, 2, 3)]
    results = [ended(process) for process in processes]
    assert [code for code, _ in results] == [0, 0, 0], results
    assert_whole(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["compute 1", "compute 2", "add 1", "add 2"])
def test_a_killed_part_is_resumed(tmp_path: Path, whole: Path, kill: str) -> None:
    out = tmp_path / "a.h5"
    assert ended(start_part(out, "1/2", kill))[0] == -9
    assert [one["state"] for one in read_workers(folder_of(out))] == ["stopped"]
    assert not run_part(out, "2/2").merged
    if kill.startswith("add"):
        assert len(list(folder_of(out).glob(".*.shard"))) == 1  # the half-written shard, which other parts leave alone
    kept = len(list(folder_of(out).glob("[0-9]*.shard"))) - 2  # of part 1, beside the two shards of part 2
    done = run_part(out, "1/2")
    assert done.merged and done.computed == sum(map(len, BATCHES[2 * kept :: 2]))  # part 1 has shards 0 and 2
    assert_whole(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["1/2", "2/2", "resume"])
def test_a_killed_merge_is_finished_by_any_part_or_by_resuming(tmp_path: Path, whole: Path, how: str) -> None:
    out = tmp_path / "a.h5"
    run_part(out, "1/2")
    assert ended(start_part(out, "2/2", "put 1"))[0] == -9
    assert not out.exists()
    assert (run(out, resume=True) if how == "resume" else run_part(out, how)).computed == 0
    assert_whole(out, whole)


def test_resuming_in_one_process_computes_the_missing_parts(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.h5"
    run_part(out, "2/4")
    assert run(out, resume=True).computed == len(RECORDS) - len(BATCHES[1])
    assert_whole(out, whole)


def test_parts_continue_an_extraction_of_one_process(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.h5"

    def fail(batch: list[ImageRecord], images: list[np.ndarray]) -> None:
        raise RuntimeFailure("stopped")

    with pytest.raises(RuntimeFailure, match="stopped"):
        run(out, compute=fail)
    assert [run_part(out, part).merged for part in ("1/2", "2/2")] == [False, True]
    assert_whole(out, whole)


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


def test_resumed_parts_read_their_shards_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part does not hold the lock of the folder while it reads, so others can start."""
    out, both_read = tmp_path / "a.h5", threading.Barrier(2, timeout=20)

    def load_together(shard_set: parts.ShardSet, number: int) -> None:
        both_read.wait()
        load(shard_set, number)

    load = parts.ShardSet._load
    for part in ("1/5", "2/5"):
        run_part(out, part)
    monkeypatch.setattr(parts.ShardSet, "_load", load_together)
    with ThreadPoolExecutor(2) as pool:
        summaries = list(pool.map(lambda part: run_part(out, part), ("1/5", "2/5")))
    assert [summary.computed for summary in summaries] == [0, 0]


@pytest.mark.parametrize("first_shard_is_read", [True, False])
def test_a_part_resumed_while_another_merges_finds_the_store_complete(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, first_shard_is_read: bool
) -> None:
    out = tmp_path / "a.h5"

    def load_after_merge(shard_set: parts.ShardSet, number: int) -> None:
        monkeypatch.setattr(parts.ShardSet, "_load", load)
        if first_shard_is_read:
            load(shard_set, number)
        assert run_part(out, "2/2").merged  # which removes the shards
        load(shard_set, number + 2 if first_shard_is_read else number)  # the part has shards 0 and 2

    load = parts.ShardSet._load
    run_part(out, "1/2")
    monkeypatch.setattr(parts.ShardSet, "_load", load_after_merge)
    done = run_part(out, "1/2")
    assert done.merged and done.computed == 0
    assert_whole(out, whole)


def test_another_number_of_parts_or_other_settings_are_refused(tmp_path: Path, whole: Path) -> None:
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
    assert_whole(out, whole)


def test_a_damaged_parts_file_is_named(tmp_path: Path) -> None:
    run_part(tmp_path / "a.h5", "1/4")
    (folder_of(tmp_path / "a.h5") / "parts.json").write_text('{"parts": "4"}')
    with pytest.raises(InputError, match="parts.json: damaged; remove it"):
        run_part(tmp_path / "a.h5", "2/4")


@pytest.mark.parametrize("text", ["9/8", "0/8", "1/0", "3", "a/b", "3/8/1", "-1/2", "1/1000000"])
def test_an_invalid_part_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"^`part` {text}: .*such as 3/8$"):
        Part.parse(text)


@pytest.mark.parametrize("size", [0, -1, True, 10**6, None, "4"])
def test_a_damaged_batch_size_in_the_plan_is_refused(tmp_path: Path, size: Any) -> None:
    run_part(tmp_path / "a.h5", "1/2")
    path = folder_of(tmp_path / "a.h5") / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"batch_size": size}))
    shown = "not set" if size is None else json.dumps(size).strip('"')
    with pytest.raises(InputError, match=f"`batch_size` was {shown} and is now 4"):
        run_part(tmp_path / "a.h5", "2/2", fixed_batch_size=False)


def test_later_parts_use_the_batch_size_of_the_first(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.h5"
    run_part(out, "1/2")
    done = run_part(out, "2/2", plan=replace(PLAN, batch_size=1), fixed_batch_size=False)
    assert done.merged and done.batch_size == PLAN.batch_size
    assert_whole(out, whole)


def test_a_repaired_image_is_computed_again_by_its_part(tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    (broken,) = [number for number, batch in enumerate(BATCHES) if RECORDS[BROKEN] in batch]
    part = f"{broken + 1}/{SHARDS}"
    run_part(out, part)
    assert run_part(out, part, load=load_all).computed == len(BATCHES[broken])
    for number in range(SHARDS):
        run_part(out, f"{number + 1}/{SHARDS}", load=load_all)
    with store.open(out) as found:
        assert not found.errors


def test_without_locks_only_the_part_that_claims_it_merges(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fails)
    out = tmp_path / "a.h5"
    run_part(out, "1/2")
    (folder_of(out) / "merging.json").write_text(json.dumps({"part": "1/2"}))
    assert not run_part(out, "2/2").merged  # part 1/2 is merging, or was killed while it did
    assert run(out, resume=True).computed == 0
    assert_whole(out, whole)


def test_a_damaged_shard_of_another_part_is_reported_and_computed_again(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.h5"
    run_part(out, "1/2")
    damaged = folder_of(out) / "000002.shard"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(RuntimeFailure, match=r"1 damaged shard removed; check the disk, and run part 1/2 again or"):
        run_part(out, "2/2")
    assert run_part(out, "1/2").computed == len(BATCHES[2])
    assert_whole(out, whole)


@pytest.mark.parametrize("folder_vanishes", [False, True])
def test_of_two_parts_that_end_at_the_same_time_one_merges(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, folder_vanishes: bool
) -> None:
    out, merge_if_last = tmp_path / "a.h5", parts._merge_if_last

    def merge_after_the_other_part(*args: Any) -> bool:
        monkeypatch.setattr(parts, "_merge_if_last", merge_if_last)
        assert run_part(out, "2/2").merged
        if folder_vanishes:  # after it was created for the lock file, before that is created
            monkeypatch.setattr(parts, "exclusive_lock", raise_not_found)
        return merge_if_last(*args)

    def raise_not_found(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(parts, "_merge_if_last", merge_after_the_other_part)
    done = run_part(out, "1/2")
    assert done.merged and done.images == len(RECORDS)
    assert_whole(out, whole)


def test_a_full_disk_keeps_finished_shards(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, encode, written = tmp_path / "a.h5", parts.ShardSet.encode, []

    def encode_until_full(shard_set: parts.ShardSet, images: Sequence[Regions]) -> object:
        written.extend(images)
        if len(written) > len(BATCHES[0]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return encode(shard_set, images)

    with monkeypatch.context() as patch:
        patch.setattr(parts.ShardSet, "encode", encode_until_full)
        with pytest.raises(RuntimeFailure, match="no space left on the disk; finished shards are kept"):
            run_part(out, "1/2")
    assert [path.name for path in folder_of(out).glob("*.shard")] == ["000000.shard"]
    run_part(out, "2/2")
    assert run_part(out, "1/2").computed == len(BATCHES[2])
    assert_whole(out, whole)


def test_inspect_shows_the_workers_of_each_part(tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    for part in ("3/4", "1/4"):
        run_part(out, part, header=replace(HEADER, provenance={}))
    workers = describe(folder_of(out))["workers"]
    assert [(worker["worker"], worker["state"]) for worker in workers] == [
        ("part 1/4", "finished"), ("part 3/4", "finished"),
    ]  # fmt: skip
    assert [(worker["finished"], worker["images"]) for worker in workers] == [(3, 3), (2, 2)]
    assert all(worker["host"] and worker["pid"] and worker["seconds_ago"] < 60 for worker in workers)
    shown = CliRunner().invoke(main, ["inspect", str(folder_of(out))])
    assert shown.exit_code == 0 and "worker" in shown.stdout and "part 3/4" in shown.stdout
    assert f"({os.getpid()})" in shown.stdout and "finished  3 of 3" in shown.stdout
    (folder_of(out) / "part-1.json").write_text('{"worker": 3, "updated": NaN, "finished": true}')
    assert describe(folder_of(out))["workers"][0] == {
        "worker": None, "host": None, "pid": None, "state": "stopped", "shards": None, "finished": None,
        "images": None, "images_per_second": None, "seconds_ago": None,
    }  # fmt: skip
