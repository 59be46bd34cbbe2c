"""Extraction by workers on a Ray cluster, each with a GPU or a CPU slot; this process gives out shards and merges.

A worker computes one shard while it loads the images of the next. Shards of a worker that is lost are given to another
one. As a shard has the same contents whoever computes it, two workers may compute the same one, which is done at the
end for shards that wait behind others.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tqdm import tqdm

from refdet.data.coco import ImageRecord
from refdet.errors import InputError, RuntimeFailure
from refdet.extraction.ray_messages import Failed, Finished, Work
from refdet.extraction.ray_pool import AT_A_TIME, LOST_AT_MOST, Pool, Worker
from refdet.extraction.shards import ShardSet
from refdet.extraction.timing import STAGES, Session
from refdet.extraction.workers import WORKERS, note_workers
from refdet.files.atomic import atomic_write, report_disk_full
from refdet.files.progress import progress_bar
from refdet.files.short_text import counted
from refdet.structures.regions import Regions

_NOTED = 2.0  # seconds between two notes of who computes what
_NAMED = 4  # workers whose speeds are in the progress bar one by one


class RayEngine:
    """Computes shards on the workers of a pool.

    Args:
        pool: the workers, of which one has started.
        given: returns the regions of an image, None if they are to be detected.
        strict: fail at an unusable image.

    Attributes:
        computing: seconds per part of computing, mean of the workers.
        oriented: files that were read and have an EXIF orientation.
    """

    def __init__(self, pool: Pool, given: Callable[[ImageRecord], Regions] | None = None, strict: bool = False) -> None:
        self._pool, self._given, self._strict = pool, given, strict
        self.computing: dict[str, float] = {}
        self.oriented: dict[str, int] = {}

    def __call__(self, parts: ShardSet, numbers: Sequence[int], session: Session) -> None:
        """Compute shards of ``parts``, and take them into ``parts`` as they are finished.

        Args:
            parts: the shards, in a folder that is locked for this process.
            numbers: which to compute.
            session: timing; its stages become the means of the workers.

        Raises:
            InputError: an image is unusable.
            RuntimeFailure: a shard cannot be computed, no worker is left, or the disk is full; finished shards are
                kept.
        """
        if not numbers:
            return
        run = _Run(self._pool, parts, numbers, self._given)
        images = sum(len(batch) for number in numbers for batch in parts.shards[number])
        note_workers(parts.folder, run.token, [])
        work = Work(
            parts.folder.absolute(),
            run.token,
            parts.plan,
            parts.header,
            parts.shards,
            parts.of_plan,
            self._strict,
        )
        shared_work = self._pool.ray.put(work)
        try:
            with progress_bar(images, "extract", "image") as bar:
                while run.wanted:
                    for worker in self._pool.workers:
                        if worker.started and not worker.began:
                            worker.began, worker.since = True, time.monotonic()
                            self._pool.call(worker, "begin", shared_work)
                    run.give_out()
                    for worker, method, answer in self._pool.answers():
                        if method == "start":
                            self._pool.note_start(worker, answer)
                        elif answer is None or isinstance(answer, Failed):
                            run.lose(worker, answer)
                        elif method == "begin":
                            worker.ready = True
                        elif isinstance(answer, Finished):
                            self.oriented |= answer.oriented
                            run.take(worker, answer, session, bar)
                    self._pool.fill_slots()
                    self._pool.check_alive(run.kept)
        finally:
            self._end(session)
            (parts.folder / WORKERS).unlink(missing_ok=True)

    def _end(self, session: Session) -> None:
        found = self._pool.stop()
        for name in STAGES:
            if name != "merge":
                session.stages[name] = _mean(stages[name] for stages, _ in found)
        names = dict.fromkeys(name for _, parts in found for name in parts)
        self.computing = {name: _mean(parts.get(name, 0.0) for _, parts in found) for name in names}


class _Run:
    """Who computes which shards.

    Attributes:
        wanted: shards that are not finished.
        token: identifies this run in the folder.
        kept: the end of error messages.
    """

    def __init__(
        self, pool: Pool, parts: ShardSet, numbers: Sequence[int], given: Callable[[ImageRecord], Regions] | None
    ) -> None:
        self._pool, self._parts, self._given = pool, parts, given
        self._todo, self.wanted = deque(numbers), set(numbers)  # todo: given to nobody
        self._tries: Counter[int] = Counter()
        self._noted = 0.0
        self.token = secrets.token_hex(8)
        self.kept = f"finished shards are kept in {parts.folder}, continue with `resume=True`"

    def give_out(self) -> None:
        """Give shards to the workers, first to those that have none."""
        ready = [worker for worker in self._pool.workers if worker.ready]
        for depth in range(AT_A_TIME):
            for worker in ready:
                if len(worker.shards) == depth and (number := self._next(worker, ready)) is not None:
                    worker.shards.append(number)
                    self._pool.call(worker, "compute", number, self._given_of(number))

    def _next(self, worker: Worker, ready: Sequence[Worker]) -> int | None:
        if self._todo:
            return self._todo.popleft()
        if worker.shards:
            return None
        # nothing else is left: a shard that another worker has not begun
        given = Counter(number for one in ready for number in one.shards)
        behind = [one.shards[-1] for one in ready if len(one.shards) > 1]
        return next((number for number in behind if given[number] == 1 and number in self.wanted), None)

    def _given_of(self, number: int) -> dict[int, Regions]:
        if self._given is None:
            return {}
        return {record.id: self._given(record) for batch in self._parts.shards[number] for record in batch}

    def take(self, worker: Worker, done: Finished, session: Session, bar: tqdm[Any]) -> None:
        """Take a finished shard into the set."""
        number, folder = done.number, self._parts.folder
        worker.shards.remove(number)
        worker.finished += len(done.rows)
        worker.updated = time.monotonic()
        self._pool.lost = 0
        for note in done.notes:
            self._pool.say(note)
        if number in self.wanted:
            if done.data is not None:
                path = folder / f"{number:06d}.shard"
                fix = "finished shards are kept; free some space and continue with `resume=True`"
                with report_disk_full(path, fix), atomic_write(path) as temporary:
                    temporary.write_bytes(done.data)
            self._parts.adopt(number, done.rows, done.shapes)
            self.wanted.discard(number)
            session.finished(len(done.rows))
            bar.update(len(done.rows))
        bar.set_postfix_str(_speeds(self._pool.workers), refresh=False)
        if worker.updated - self._noted > _NOTED:
            self._noted = worker.updated
            note_workers(folder, self.token, [one.state() for one in self._pool.workers if one.started])

    def lose(self, worker: Worker, why: Failed | None) -> None:
        """Give up a worker that failed or, without a reason, was lost; its shards are computed by others."""
        again = [number for number in worker.shards if number in self.wanted]
        held = {number for one in self._pool.workers if one is not worker for number in one.shards}
        self._todo.extendleft(number for number in reversed(again) if number not in held)
        if why is not None:
            if not why.of_machine:
                raise (InputError if why.bad_input else RuntimeFailure)(f"{why.message}; {self.kept}")
            self._pool.refuse(worker, Failed(f"{worker.name}: {why.message}", True, why.bad_input))
            return
        self._pool.drop(worker, lost=True)
        self._pool.say(f"note: worker {worker.name} was lost; {counted(len(again), 'shard')} will be computed again")
        for number in again[:1]:
            self._tries[number] += 1
            if self._tries[number] >= LOST_AT_MOST:
                raise RuntimeFailure(
                    f"shard {number}: {LOST_AT_MOST} workers were lost while they computed it, perhaps for lack of "
                    f"memory; {self.kept}"
                )


def _speeds(workers: Sequence[Worker]) -> str:
    """Images per second of each worker, or their range."""
    speeds = {worker.name: worker.speed for worker in workers if worker.finished}
    if len(speeds) <= _NAMED:
        return ", ".join(f"{name} {speed:.1f}/s" for name, speed in speeds.items())
    return f"{len(speeds)} workers with {min(speeds.values()):.1f} to {max(speeds.values()):.1f}/s each"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
