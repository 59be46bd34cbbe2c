"""A worker of the Ray engine, without Ray: what it computes, refuses and reports."""

from __future__ import annotations

import errno
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detector_folder import DetectorFolder, one_thread
from interrupted_extraction import BATCHES, BROKEN, RECORDS, compute, load
from store_examples import HEADER, PLAN, make_regions

from refdet.data.coco import ImageRecord
from refdet.errors import InputError, RefdetError, RuntimeFailure, UnusableImageError
from refdet.extraction.image_list import ImageList
from refdet.extraction.job import prepare
from refdet.extraction.options import ExtractOptions
from refdet.extraction.plan import split_into_shards
from refdet.extraction.ray_messages import Failed, Finished, Started, Tools, Work
from refdet.extraction.ray_tools import DetectorTools
from refdet.extraction.ray_worker import ShardWorker
from refdet.extraction.shards import ShardSet
from refdet.extraction.steps import Finish
from refdet.extraction.workers_file import write_workers
from refdet.structures.regions import Regions

SHARDS = split_into_shards(BATCHES, 2)
RECIPE_HEADER = replace(HEADER, options=PLAN.options)
_ = one_thread  # a fixture
MakeTools = Callable[[Callable[[ImageRecord], Regions]], Tools]


def shards_in(folder: Path) -> ShardSet:
    return ShardSet(folder.parent / "a.h5", PLAN, RECIPE_HEADER, SHARDS, folder)


@contextmanager
def running_worker(folder: Path, make: MakeTools, strict: bool = False) -> Iterator[ShardWorker]:
    """A started worker of the extraction in a folder, stopped at the end."""
    folder.mkdir(exist_ok=True)
    worker = ShardWorker(make)
    assert isinstance(worker.start(), Started)
    worker.begin(Work(folder, "token", PLAN, RECIPE_HEADER, SHARDS, shards_in(folder).plan_hash, strict))
    try:
        yield worker
    finally:
        worker.stop()


def default_tools(given: Callable[[ImageRecord], Regions]) -> Tools:
    return Tools(load, compute)


def compute_all(worker: ShardWorker, given: dict[int, Regions] | None = None) -> list[Any]:
    """Compute all shards at the same time; returns a `Finished` or `Failed` each."""

    def compute_shard(number: int) -> Finished | Failed:
        ids = [record.id for batch in SHARDS[number] for record in batch]
        return worker.compute(number, {id_: given[id_] for id_ in ids} if given else {})

    with ThreadPoolExecutor(len(SHARDS)) as pool:
        return list(pool.map(compute_shard, range(len(SHARDS))))


@pytest.mark.parametrize("shared", [True, False])
def test_shards_are_written_or_sent(tmp_path: Path, shared: bool) -> None:
    folder = tmp_path / "a.h5.parts"
    folder.mkdir()
    write_workers(folder, "token" if shared else "token of another folder", [])
    with running_worker(folder, default_tools) as worker:
        done = compute_all(worker)
    for one in done:
        assert isinstance(one, Finished) and isinstance(one.file, Path) == shared
    adopted = shards_in(folder)
    assert len(adopted.missing_shards()) == len(SHARDS)
    for one in done:
        adopted.adopt(one.number, one.file, one.rows, one.shapes)
    found = shards_in(folder)
    assert found.missing_shards() == adopted.missing_shards() == []
    assert found._rows == adopted._rows and found._shapes == adopted._shapes


def test_shards_have_the_stamps_of_image_files(tmp_path: Path) -> None:
    def stamping_tools(given: Callable[[ImageRecord], Regions]) -> Tools:
        return Tools(load, compute, stamp_of=lambda image_id: (image_id, 7))

    with running_worker(tmp_path / "a.h5.parts", stamping_tools) as worker:
        done = compute_all(worker)
    assert {row.id: location.stamp for shard in done for row, location in shard.rows} == {
        record.id: (record.id, 7) for record in RECORDS
    }


def test_a_worker_describes_given_regions(tmp_path: Path) -> None:
    def copying_tools(given: Callable[[ImageRecord], Regions]) -> Tools:
        def computing(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
            return lambda: [given(record) for record in batch]

        return Tools(load, computing)

    with running_worker(tmp_path / "a.h5.parts", copying_tools) as worker:
        done = compute_all(worker, {record.id: make_regions(record.id, 2 + record.id % 3) for record in RECORDS})
        assert worker._given_regions == {}  # not kept after the shard
    counts = {row.id: row.regions for shard in done for row, _ in shard.rows if not row.error}
    assert counts == {record.id: 2 + record.id % 3 for record in RECORDS if record.id != BROKEN}


def failing_tools(error: BaseException) -> MakeTools:
    def make(given: Callable[[ImageRecord], Regions]) -> Tools:
        def computing(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
            raise error

        return Tools(load, computing)

    return make


@pytest.mark.parametrize(
    ("error", "is_machine_error", "kind", "message"),
    [
        pytest.param(None, False, UnusableImageError, "^ümlaut_.*.jpg: not a readable image$", id="broken image"),
        pytest.param(
            OSError(errno.ENOSPC, "No space left on device"), True, RuntimeFailure, "No space left on", id="disk"
        ),
        pytest.param(MemoryError("too little"), True, RuntimeFailure, "MemoryError: too little$", id="memory"),
        pytest.param(ValueError("a bug"), False, RuntimeFailure, "ValueError: a bug$", id="bug"),
        pytest.param(InputError("a bad file"), False, InputError, "a bad file$", id="bad file"),
        # the driver adds the fix
        pytest.param(RuntimeFailure("no", fix="free it"), False, RuntimeFailure, "no$", id="runtime failure"),
    ],
)
def test_an_error_is_reported_for_every_shard(
    tmp_path: Path, error: Exception | None, is_machine_error: bool, kind: type[RefdetError], message: str
) -> None:
    """Without an error of `compute`, ``strict`` makes the broken image one."""
    make, strict = (default_tools, True) if error is None else (failing_tools(error), False)
    with running_worker(tmp_path / "a.h5.parts", make, strict) as worker:
        failed = [result for result in compute_all(worker) if isinstance(result, Failed)]
        assert 1 <= len(failed) <= len(SHARDS) if strict else len(failed) == len(SHARDS)
        failed.append(worker.compute(0, {}))  # after an error, it computes nothing more
    for result in failed:
        assert (result.is_machine_error, result.kind) == (is_machine_error, kind), result
        assert re.search(message, result.message), result


def without_images(given: Callable[[ImageRecord], Regions]) -> Tools:
    def lost(record: ImageRecord) -> np.ndarray:
        raise RuntimeFailure("/data/a.zip/1.jpg: cannot be read now") from FileNotFoundError(
            errno.ENOENT, "No such file"
        )

    return Tools(lost, compute)


def test_losing_the_images_is_a_machine_error(tmp_path: Path) -> None:
    with running_worker(tmp_path / "a.h5.parts", without_images) as worker:
        failed = worker.compute(0, {})
    assert isinstance(failed, Failed) and failed.is_machine_error and failed.message.startswith("/data/a.zip/1.jpg: ")


def test_a_missing_temporary_folder_is_a_machine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no such folder"))
    worker = ShardWorker(default_tools)
    worker.start()
    failed = worker.begin(Work(tmp_path, "token", PLAN, RECIPE_HEADER, SHARDS, "", False))
    assert isinstance(failed, Failed) and failed.is_machine_error and "no such folder" in failed.message


def shifting_tools(difference: float) -> MakeTools:
    def make(given: Callable[[ImageRecord], Regions]) -> Tools:
        def computing(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
            finish = compute(batch, images)
            return lambda: [replace(one, boxes=one.boxes + np.float32(difference)) for one in finish()]

        return Tools(load, computing)

    return make


def test_of_two_workers_with_different_results_the_first_shard_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "a.h5.parts"
    folder.mkdir()
    write_workers(folder, "token", [])
    adopted = shards_in(folder)
    with running_worker(folder, shifting_tools(0)) as first, running_worker(folder, shifting_tools(0.5)) as second:
        done = compute_all(first)
        for one in done:
            adopted.adopt(one.number, one.file, one.rows, one.shapes)
        assert isinstance(second.compute(0, {}), Finished)  # as if the first result was lost on its way
    assert shards_in(folder)._rows == adopted._rows and not adopted.missing_shards()


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> DetectorTools:
    root = tmp_path_factory.mktemp("detector")
    folder = DetectorFolder(root, 3)
    images = ImageList.of_instances(folder.instances)
    job = prepare(
        folder.run, folder.images, root / "a.h5", images, options=ExtractOptions(), boxes=None, box_format="xywh",
        batch_size=None, resume=False, say=print,
    )  # fmt: skip
    return DetectorTools.from_job(job, "cpu", None)


def test_a_worker_that_differs_from_the_driver_is_refused(
    tools: DetectorTools, tmp_path: Path, one_thread: None
) -> None:
    started = ShardWorker(tools).start()
    assert isinstance(started, Started) and (started.device, started.precision) == ("cpu, 1 thread each", "float32")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes((tools.images / "0.png").read_bytes())
    another_checkpoint = "`checkpoint` .*: a different one on .*; copy the same one there"
    for changes, message in [
        ({"software": "refdet 0.0 (sources 0), torch 1"}, r"has refdet .*, the driver refdet 0\.0 .*; install"),
        ({"checkpoint": tmp_path / "run"}, "`checkpoint` .*/run: not found on .*; copy it there or use a"),
        ({"checkpoint_sha256": "0" * 64}, another_checkpoint),
        ({"recipe": "{}"}, another_checkpoint),
        ({"categories": tools.categories[::-1]}, another_checkpoint),
        ({"images": tmp_path / "x.zip"}, "`images` .*x.zip: not found on .*; copy the zip there or use a"),
        ({"images": tmp_path / "images"}, "`images` .*: holds different files on .*; missing there: 2, first"),
    ]:
        failed = ShardWorker(replace(tools, **changes)).start()
        assert isinstance(failed, Failed) and failed.kind is InputError and not failed.is_machine_error
        assert re.search(message, failed.message), failed.message


def test_the_tools_stamp_the_files_that_they_load(tools: DetectorTools, one_thread: None) -> None:
    made, record = tools(lambda record: make_regions(record.id, 1)), tools.records[0]
    assert made.stamp_of(record.id) == ()
    made.load(record)
    assert made.stamp_of(record.id)[0] == zlib.crc32((tools.images / record.file_name).read_bytes())
