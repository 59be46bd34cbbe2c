"""Extraction by workers on a Ray cluster, each with a GPU or a CPU slot; this process assigns shards and merges them.

A worker computes one shard while it loads the images of the next. The shards of a lost worker are assigned to other
workers. As a shard has the same contents whichever worker computes it, up to rounding, two workers may compute the same
shard; at the end, idle workers compute shards that still wait in another worker's queue.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refdet.data.coco import ImageRecord
from refdet.errors import RuntimeFailure
from refdet.extraction.ray_messages import Failed, Finished, Work
from refdet.extraction.ray_pool import MAX_LOST, SHARDS_PER_WORKER, Pool, Worker
from refdet.extraction.shards import ShardSet
from refdet.extraction.timing import STAGES, Timer
from refdet.extraction.workers_file import WORKERS, write_workers
from refdet.files.progress import progress_bar
from refdet.files.short_text import format_count
from refdet.structures.regions import Regions

_PROGRESS_SECONDS = 2.0  # seconds between updates of ``workers.json``
_MAX_SPEEDS = 4  # with more workers, the progress bar shows the range of their speeds


class RayEngine:
    """Computes shards on the workers of a pool.

    Args:
        pool: the workers, at least one of which has started.
        given_regions: returns the regions of an image; None to detect them.
        strict: fail at an unusable image.

    Attributes:
        computing: seconds per part of the network, mean over the workers; {} until the call ends.
        orientations: file name -> EXIF orientation, of the images that were read and have one.
    """

    def __init__(
        self, pool: Pool, given_regions: Callable[[ImageRecord], Regions] | None = None, strict: bool = False
    ) -> None:
        self._pool, self._given_regions, self._strict = pool, given_regions, strict
        self.computing: dict[str, float] = {}
        self.orientations: dict[str, int] = {}

    def __call__(self, shard_set: ShardSet, shard_numbers: Sequence[int], timer: Timer) -> None:
        """Compute shards and add them to ``shard_set`` as they are finished.

        Args:
            shard_set: the shards, in a folder that this process has locked.
            shard_numbers: numbers of the shards to compute.
            timer: timing; its stages become the means over the workers.

        Raises:
            RuntimeFailure: a shard cannot be computed, no worker is left, the disk is full, or an image is unusable and
                ``strict`` is True (UnusableImageError); finished shards are kept.
        """
        if not shard_numbers:
            return
        run = _Run(self._pool, shard_set, shard_numbers, self._given_regions)
        images = sum(len(batch) for number in shard_numbers for batch in shard_set.shards[number])
        write_workers(shard_set.folder, run.token, [])
        work = Work(
            folder=shard_set.folder.absolute(),
            token=run.token,
            plan=shard_set.plan,
            header=shard_set.header,
            shards=shard_set.shards,
            plan_hash=shard_set.plan_hash,
            strict=self._strict,
        )
        shared_work = self._pool.ray.put(work)
        try:
            with progress_bar(images, "extract", "image") as bar:
                while run.unfinished:
                    for worker in self._pool.workers:
                        if worker.started and not worker.work_sent:
                            worker.work_sent, worker.work_sent_at = True, time.monotonic()
                            self._pool.call(worker, "begin", shared_work)
                    run.assign_shards()
                    for worker, method, answer in self._pool.answers():
                        if method == "start":
                            self._pool.handle_start(worker, answer)
                        elif answer is None or isinstance(answer, Failed):
                            run.drop_failed(worker, answer)
                        elif method == "begin":
                            worker.ready = True
                        elif isinstance(answer, Finished):
                            self.orientations |= answer.orientations
                            run.accept(worker, answer, timer, bar)
                    self._pool.fill_slots()
                    self._pool.check_alive(run.fix)
        finally:
            self._end(timer)
            (shard_set.folder / WORKERS).unlink(missing_ok=True)

    def _end(self, timer: Timer) -> None:
        """Stop the workers, and set `computing` and the stages of the timer to means over the workers."""
        reports = self._pool.stop()
        for name in STAGES:
            if name != "merge":
                timer.stages[name] = _mean(stages[name] for stages, _ in reports)
        names = dict.fromkeys(name for _, seconds in reports for name in seconds)
        self.computing = {name: _mean(seconds.get(name, 0.0) for _, seconds in reports) for name in names}


class _Run:
    """Assignment of the shards to compute to the workers.

    Attributes:
        unfinished: numbers of the shards that are not finished.
        token: random text in ``workers.json``, by which workers recognize the folder.
        fix: the fix in this run's errors, which says where finished shards are kept.
    """

    def __init__(
        self,
        pool: Pool,
        shard_set: ShardSet,
        shard_numbers: Sequence[int],
        given_regions: Callable[[ImageRecord], Regions] | None,
    ) -> None:
        self._pool, self._shard_set, self._given_regions = pool, shard_set, given_regions
        self._unassigned, self.unfinished = deque(shard_numbers), set(shard_numbers)
        self._losses: Counter[int] = Counter()  # shard number -> number of workers lost while they computed it
        self._last_progress = 0.0  # time of the last update of ``workers.json``, in seconds of time.monotonic
        self.token = secrets.token_hex(8)
        self.fix = f"finished shards are kept in {shard_set.folder}, continue with `resume=True`"

    def assign_shards(self) -> None:
        """Give each worker up to `SHARDS_PER_WORKER` shards, first to workers that have none."""
        ready = [worker for worker in self._pool.workers if worker.ready]
        for depth in range(SHARDS_PER_WORKER):
            for worker in ready:
                if len(worker.shards) == depth and (number := self._choose_shard(worker, ready)) is not None:
                    worker.shards.append(number)
                    self._pool.call(worker, "compute", number, self._regions_of(number))

    def _choose_shard(self, worker: Worker, ready: Sequence[Worker]) -> int | None:
        """Choose a shard for a worker: an unassigned one, or for an idle worker a queued one; None if there is none."""
        if self._unassigned:
            return self._unassigned.popleft()
        if worker.shards:
            return None
        # All shards are assigned: take one that another worker has not started and that was not taken before.
        assigned = Counter(number for other in ready for number in other.shards)
        queued = [other.shards[-1] for other in ready if len(other.shards) > 1]
        return next((number for number in queued if assigned[number] == 1 and number in self.unfinished), None)

    def _regions_of(self, number: int) -> dict[int, Regions]:
        if self._given_regions is None:
            return {}
        return {record.id: self._given_regions(record) for batch in self._shard_set.shards[number] for record in batch}

    def accept(self, worker: Worker, done: Finished, timer: Timer, bar: tqdm[Any]) -> None:
        """Add a finished shard to the set, unless another worker has finished the same shard already."""
        number = done.number
        worker.shards.remove(number)
        worker.finished += len(done.rows)
        worker.updated = time.monotonic()
        self._pool.lost = 0
        for note in done.notes:
            self._pool.log_once(note)
        if number in self.unfinished:
            self._shard_set.adopt(number, done.file, done.rows, done.shapes)
            self.unfinished.discard(number)
            timer.record_shard(len(done.rows))
            bar.update(len(done.rows))
        elif isinstance(done.file, Path):
            done.file.unlink(missing_ok=True)
        bar.set_postfix_str(_speeds(self._pool.workers), refresh=False)
        if worker.updated - self._last_progress > _PROGRESS_SECONDS:
            self._last_progress = worker.updated
            write_workers(
                self._shard_set.folder, self.token, [other.state() for other in self._pool.workers if other.started]
            )

    def drop_failed(self, worker: Worker, failure: Failed | None) -> None:
        """Drop a worker that failed or, if ``failure`` is None, was lost; other workers compute its shards.

        Raises:
            RuntimeFailure: the failure is not one of the worker's machine, or so many workers were lost while they
                computed a shard that the shard must be the cause; other kinds of failures raise their own exception.
        """
        retries = [number for number in worker.shards if number in self.unfinished]
        assigned = {number for other in self._pool.workers if other is not worker for number in other.shards}
        self._unassigned.extendleft(number for number in reversed(retries) if number not in assigned)
        if failure is not None:
            if not failure.is_machine_error:
                raise failure.kind(failure.message, fix=self.fix)
            named_failure = Failed(f"{worker.name}: {failure.message}", is_machine_error=True, kind=failure.kind)
            self._pool.refuse(worker, named_failure)
            return
        self._pool.drop(worker, lost=True)
        self._pool.log_once(
            f"note: worker {worker.name} was lost; {format_count(len(retries), 'shard')} will be computed again"
        )
        if not retries:
            return
        number = retries[0]  # the shard that the worker was computing
        self._losses[number] += 1
        if self._losses[number] >= MAX_LOST:
            raise RuntimeFailure(
                f"shard {number}: {MAX_LOST} workers were lost while they computed it, perhaps for lack of memory",
                fix=self.fix,
            )


def _speeds(workers: Sequence[Worker]) -> str:
    """Images per second of each worker, or their range if there are more than `_MAX_SPEEDS`, for the progress bar."""
    speeds = {worker.name: worker.speed for worker in workers if worker.finished}
    if len(speeds) <= _MAX_SPEEDS:
        return ", ".join(f"{name} {speed:.1f}/s" for name, speed in speeds.items())
    return f"{format_count(len(speeds), 'worker')} with {min(speeds.values()):.1f} to {max(speeds.values()):.1f}/s each"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
