"""A worker of the Ray engine, without Ray: what it computes, refuses and reports."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detector_folder import DetectorFolder, one_thread
from interrupted_extraction import BATCHES, RECORDS, compute, load
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
Make = Callable[[Callable[[ImageRecord], Regions]], Tools]


def shards_in(folder: Path) -> ShardSet:
    return ShardSet(folder.parent / "a.h5", PLAN, RECIPE_HEADER, SHARDS, folder)


@contextmanager
def working(folder: Path, make: Make, strict: bool = False) -> Iterator[ShardWorker]:
    """A worker of the extraction in a folder."""
    folder.mkdir(exist_ok=True)
    worker = ShardWorker(make)
    assert isinstance(worker.start(), Started)
    worker.begin(Work(folder, "token", PLAN, RECIPE_HEADER, SHARDS, shards_in(folder).plan_hash, strict))
    try:
        yield worker
    finally:
        worker.stop()


def plain(given: Callable[[ImageRecord], Regions]) -> Tools:
    return Tools(load, compute)


def all_of(worker: ShardWorker, given: dict[int, Regions] | None = None) -> list[Any]:
    def computed(number: int) -> Finished | Failed:
        ids = [record.id for batch in SHARDS[number] for record in batch]
        return worker.compute(number, {id_: given[id_] for id_ in ids} if given else {})

    with ThreadPoolExecutor(len(SHARDS)) as pool:
        return list(pool.map(computed, range(len(SHARDS))))


@pytest.mark.parametrize("shared", [True, False])
def test_shards_are_written_or_sent(tmp_path: Path, shared: bool) -> None:
    folder = tmp_path / "a.h5.parts"
    folder.mkdir()
    write_workers(folder, "token" if shared else "of another folder", [])
    with working(folder, plain) as worker:
        done = all_of(worker)
    for one in done:
        assert isinstance(one, Finished) and isinstance(one.file, Path) == shared
    adopted = shards_in(folder)
    assert len(adopted.missing_shards()) == len(SHARDS)
    for one in done:
        adopted.adopt(one.number, one.file, one.rows, one.shapes)
    found = shards_in(folder)
    assert found.missing_shards() == adopted.missing_shards() == []
    assert found._rows == adopted._rows and found._shapes == adopted._shapes


def test_regions_that_are_given(tmp_path: Path) -> None:
    def described(given: Callable[[ImageRecord], Regions]) -> Tools:
        def computing(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
            return lambda: [given(record) for record in batch]

        return Tools(load, computing)

    with working(tmp_path / "a.h5.parts", described) as worker:
        done = all_of(worker, {record.id: make_regions(record.id, 2 + record.id % 3) for record in RECORDS})
        assert worker._given_regions == {}  # forgotten
    counts = {row.id: row.regions for one in done for row, _ in one.rows if not row.error}
    assert counts == {record.id: 2 + record.id % 3 for record in RECORDS if record.id in counts} and len(counts) == 9


def failing(error: BaseException) -> Make:
    def make(given: Callable[[ImageRecord], Regions]) -> Tools:
        def computing(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
            raise error

        return Tools(load, computing)

    return make


@pytest.mark.parametrize(
    ("make", "strict", "of_machine", "kind", "says"),
    [
        (plain, True, False, UnusableImageError, "^ümlaut_.*.jpg: not a readable image$"),
        (failing(OSError(errno.ENOSPC, "No space left on device")), False, True, RuntimeFailure, "No space left on"),
        (failing(MemoryError("too little")), False, True, RuntimeFailure, "MemoryError: too little$"),
        (failing(ValueError("a bug")), False, False, RuntimeFailure, "ValueError: a bug$"),
        (failing(InputError("a bad file")), False, False, InputError, "a bad file$"),
        (failing(RuntimeFailure("no", fix="free it")), False, False, RuntimeFailure, "no$"),  # the driver adds its fix
    ],
)
def test_what_fails_is_reported_for_every_shard(
    tmp_path: Path, make: Make, strict: bool, of_machine: bool, kind: type[RefdetError], says: str
) -> None:
    with working(tmp_path / "a.h5.parts", make, strict) as worker:
        failed = [one for one in all_of(worker) if isinstance(one, Failed)]
        failed.append(worker.compute(0, {}))  # it computes nothing more
    for one in failed:
        assert (one.is_machine_error, one.kind) == (of_machine, kind) and re.search(says, one.message), one


def without_images(given: Callable[[ImageRecord], Regions]) -> Tools:
    def lost(record: ImageRecord) -> np.ndarray:
        raise RuntimeFailure("/data/a.zip/1.jpg: cannot be read now") from FileNotFoundError(
            errno.ENOENT, "No such file"
        )

    return Tools(lost, compute)


def test_a_machine_that_loses_its_images_leaves_the_work_to_others(tmp_path: Path) -> None:
    with working(tmp_path / "a.h5.parts", without_images) as worker:
        failed = worker.compute(0, {})
    assert isinstance(failed, Failed) and failed.is_machine_error and failed.message.startswith("/data/a.zip/1.jpg: ")


def test_a_machine_without_room_leaves_the_work_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no such folder"))
    worker = ShardWorker(plain)
    worker.start()
    failed = worker.begin(Work(tmp_path, "token", PLAN, RECIPE_HEADER, SHARDS, "", False))
    assert isinstance(failed, Failed) and failed.is_machine_error and "no such folder" in failed.message


def rounding(difference: float) -> Make:
    def make(given: Callable[[ImageRecord], Regions]) -> Tools:
        def computing(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
            finish = compute(batch, images)
            return lambda: [replace(one, boxes=one.boxes + np.float32(difference)) for one in finish()]

        return Tools(load, computing)

    return make


def test_a_shard_that_two_workers_compute_differently_is_that_of_one(tmp_path: Path) -> None:
    folder = tmp_path / "a.h5.parts"
    folder.mkdir()
    write_workers(folder, "token", [])
    adopted = shards_in(folder)
    with working(folder, rounding(0)) as first, working(folder, rounding(0.5)) as second:
        done = all_of(first)
        for one in done:
            adopted.adopt(one.number, one.file, one.rows, one.shapes)
        assert isinstance(second.compute(0, {}), Finished)  # also after its driver has lost it
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


def test_a_worker_compares_its_machine_with_the_drivers(tools: DetectorTools, tmp_path: Path, one_thread: None) -> None:
    started = ShardWorker(tools).start()
    assert isinstance(started, Started) and (started.device, started.precision) == ("cpu, 1 thread each", "float32")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes((tools.images / "0.png").read_bytes())
    for other, says in [
        (
            replace(tools, software="refdet 0.0 (sources 0), torch 1"),
            r"has refdet .*, the driver refdet 0\.0 .*; install",
        ),
        (replace(tools, checkpoint=tmp_path / "run"), "`checkpoint` .*/run: not found on .*; copy it there or use a"),
        (replace(tools, checkpoint_sha256="0" * 64), "`checkpoint` .*: a different one on .*; copy the same one there"),
        (replace(tools, recipe="{}"), "`checkpoint` .*: a different one on .*; copy the same one there"),
        (
            replace(tools, categories=tools.categories[::-1]),
            "`checkpoint` .*: a different one on .*; copy the same one there",
        ),
        (replace(tools, images=tmp_path / "x.zip"), "`images` .*x.zip: not found on .*; copy the zip there or use a"),
        (
            replace(tools, images=tmp_path / "images"),
            "`images` .*: holds different files on .*; missing there: 2, first",
        ),
    ]:
        failed = ShardWorker(other).start()
        assert isinstance(failed, Failed) and failed.kind is InputError and not failed.is_machine_error
        assert re.search(says, failed.message), failed.message
