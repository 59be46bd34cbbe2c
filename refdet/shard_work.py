"""The work of an extraction, a shard at a time, whatever computes the regions. No torch.

Three stages overlap: threads load images ahead, the main thread computes, and one thread in the background finishes
the batches in their order and writes the shards.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, WorkError
from refdet.regions import Regions
from refdet.shard_plan import Plan, cut_into_shards
from refdet.shards import Parts, begin
from refdet.store import Header

Load = Callable[[ImageRecord], np.ndarray]
Finish = Callable[[], list[Regions]]
Compute = Callable[[list[ImageRecord], list[np.ndarray]], Finish]

SHARD_IMAGES = 32  # what a stop can cost; with 100 regions of 3072 float32 an image, 40 MB
_WAITING = 2  # batches computed and not yet finished; a GPU holds them all

STAGES = ("load", "compute", "wait", "finish", "write", "merge")


@dataclass(frozen=True)
class Summary:
    """What an extraction did.

    Attributes:
        images, regions: in the store; errors: images that could not be used.
        computed: images of this run, the others were finished before; seconds: what they took.
        bytes: size of the store.
        images_per_second: of this run, without the merge; 0 where nothing was left to compute.
        stages: seconds of each of `STAGES`. The main thread waits for images (load), computes, and waits for the
            thread in the background (wait); that one meanwhile finishes batches and writes shards. At last the
            shards become the store (merge).
    """

    images: int
    regions: int
    errors: int
    computed: int
    seconds: float
    bytes: int
    images_per_second: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


def extract(
    out: Path,
    plan: Plan,
    header: Header,
    batches: Sequence[list[ImageRecord]],
    records: Sequence[ImageRecord],
    load: Load,
    compute: Compute,
    resume: bool = False,
    workers: int = 2,
    shard_images: int = SHARD_IMAGES,
    strict: bool = False,
) -> Summary:
    """Compute the regions of all images and write the store.

    Arguments:
        out: the store.
        plan: what is computed; a resumed extraction must have the same.
        header: what the store says of itself.
        batches: the images in the order of the work; those of a batch go through the detector together.
        records: the same images in the order they get in the store.
        load: gives an image as (H, W, 3) uint8 of its record's size; where it raises InputError, that image
            gets no regions but the reason.
        compute: called with a batch in the main thread; what it gives is called once, in another thread and in the
            order of the batches, for the batch's `Regions`, one for each of its images. What belongs to a thread, such
            as ``torch.inference_mode`` and the stream of a GPU, is not handed over. An image that could not be loaded
            is replaced by another of its batch, which is then in it twice.
        resume: continue from finished shards.
        workers: threads that load ahead.
        shard_images: a shard is closed when it has this many images; a resumed extraction must have the same.
        strict: stop at an image that cannot be used.

    Raises:
        InputError: see `refdet.shards.begin`.
        WorkError: the disk is full, the work was interrupted, or it is strict and an image cannot be used; finished
            shards are kept.
    """
    computed, seconds, stages = 0, 0.0, dict.fromkeys(STAGES, 0.0)
    with begin(out, plan, cut_into_shards(batches, shard_images), resume) as parts:
        if parts is not None:
            with _stoppable(parts, len(records)):
                numbers = parts.missing(strict)
                started = time.perf_counter()
                _compute_shards(parts, numbers, load, compute, workers, strict, stages)
                seconds = time.perf_counter() - started
                computed = sum(len(batch) for number in numbers for batch in parts.shards[number])
                with _timed(stages, "merge"):
                    parts.merge(records, replace(header, run=_told(computed, seconds, stages)))
    with store.open(out) as finished:
        images, regions, errors = len(finished), finished.regions, finished.errors
    if strict and errors:
        raise WorkError(f"--strict: {next(iter(errors.values()))}; {out} has no regions of {len(errors)} images")
    speed = computed / seconds if computed else 0.0
    return Summary(images, regions, len(errors), computed, seconds, out.stat().st_size, speed, stages)


def _told(images: int, seconds: float, stages: Mapping[str, float]) -> dict[str, Any]:
    """What the store says of the run that finished it; JSON."""
    rounded = {name: round(value, 3) for name, value in stages.items() if name != "merge"}
    speed = round(images / seconds, 3) if images else 0.0
    return {"images": images, "seconds": round(seconds, 3), "images_per_second": speed, "stages": rounded}


def _compute_shards(
    parts: Parts,
    numbers: Sequence[int],
    load: Load,
    compute: Compute,
    workers: int,
    strict: bool,
    stages: dict[str, float],
) -> None:
    batches = [batch for number in numbers for batch in parts.shards[number]]
    with (
        closing(_load_ahead(load, batches, workers)) as loaded,
        tqdm(total=sum(map(len, batches)), unit="image", disable=not batches) as bar,
        _Background(parts, numbers, stages, bar) as background,
    ):
        for batch in batches:
            with _timed(stages, "load"):
                images = next(loaded)
            bad = [image for image in images if isinstance(image, str)]
            if strict and bad:
                raise WorkError(f"--strict: {bad[0]}; what is finished is kept in {parts.folder}: add --resume then")
            with _timed(stages, "compute"):
                finish = _begin_batch(batch, images, compute)
            with _timed(stages, "wait"):
                background.put(finish)


def _begin_batch(batch: list[ImageRecord], images: list[np.ndarray | str], compute: Compute) -> Finish:
    """Compute a batch; an image that could not be loaded gets no regions, and says why.

    The place of such an image is taken by another of the batch, so that the batch keeps its size: what a network makes
    of an image can depend on that, by rounding.
    """
    good = [(record, image) for record, image in zip(batch, images, strict=True) if not isinstance(image, str)]
    bad = {
        place: Regions.empty(record.id, record.file_name, record.height, record.width, error=image)
        for place, (record, image) in enumerate(zip(batch, images, strict=True))
        if isinstance(image, str)
    }
    if not good:
        return lambda: list(bad.values())
    usable = iter(good)
    filled = [good[0] if place in bad else next(usable) for place in range(len(batch))]
    asked = [record.id for record, _ in filled]
    finish = compute([record for record, _ in filled], [image for _, image in filled])

    def regions() -> list[Regions]:
        found = finish()
        if [r.image_id for r in found] != asked:
            raise ValueError("the detector gave regions of other images than it was asked for")
        return [bad.get(place, one) for place, one in enumerate(found)]

    return regions


class _Stopped(Exception):
    """No more batches come."""


class _Background:
    """The thread that finishes batches and writes shards; what goes wrong in it is raised in the main thread."""

    def __init__(self, parts: Parts, numbers: Sequence[int], stages: dict[str, float], bar: tqdm) -> None:
        self._parts, self._numbers, self._stages, self._bar = parts, numbers, stages, bar
        self._batches: queue.Queue[Finish | None] = queue.Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="finish and write", daemon=True)

    def __enter__(self) -> _Background:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        # Also when the work is stopped, what was computed is finished: it may complete a shard.
        self._batches.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def put(self, finish: Finish) -> None:
        """Hand over the next batch of the plan; waits while the thread is behind."""
        if self._error is not None:
            raise self._error
        self._batches.put(finish)

    def _run(self) -> None:
        try:
            for number in self._numbers:
                self._write_shard(number)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
            while self._batches.get() is not None:  # or the main thread would wait for ever
                pass

    def _write_shard(self, number: int) -> None:
        started, others = time.perf_counter(), 0.0
        with self._parts.write(number) as add:
            for batch in self._parts.shards[number]:
                asked = time.perf_counter()
                finish = self._batches.get()
                if finish is None:
                    raise _Stopped
                got = time.perf_counter()
                found = finish()
                finished = time.perf_counter()
                self._stages["finish"] += finished - got
                others += finished - asked
                for regions in found:
                    add(regions)
                self._bar.update(len(batch))
        self._stages["write"] += time.perf_counter() - started - others


@contextmanager
def _timed(stages: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        stages[name] += time.perf_counter() - started


def _load_ahead(
    load: Load, batches: Sequence[list[ImageRecord]], workers: int, ahead: int = 3
) -> Generator[list[np.ndarray | str], None, None]:
    """The images of each batch, an image that cannot be used as the reason; ``ahead`` batches are loaded at once."""

    def attempt(record: ImageRecord) -> np.ndarray | str:
        try:
            return load(record)
        except InputError as error:
            # a name on disk need not be Unicode, but what the store holds must be
            return str(error).replace("\0", "?").encode(errors="replace").decode()

    pool = ThreadPoolExecutor(max(1, workers))
    waiting: deque[list[Future[np.ndarray | str]]] = deque()
    try:
        for batch in batches:
            waiting.append([pool.submit(attempt, record) for record in batch])
            if len(waiting) > ahead:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _stoppable(parts: Parts, total: int) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into a WorkError that says what is kept and how to go on."""

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except KeyboardInterrupt:
        kept = f"{parts.done} of {total} images are finished and kept in {parts.folder}"
        raise WorkError(f"stopped; {kept}; add --resume to continue") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, previous)
