"""Extraction pipeline, independent of how regions are computed. No torch.

Four stages overlap, the last two in order:

1. threads load images;
2. the main thread computes;
3. one thread finishes batches: masks to RLE, and regions to arrays;
4. one thread writes shards.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from refdet.data.coco import ImageRecord
from refdet.errors import InputError, Interrupted, RuntimeFailure, UnusableImageError
from refdet.extraction.plan import Plan, split_into_shards
from refdet.extraction.repair import find_retries, repair
from refdet.extraction.shards import ShardSet, open_extraction
from refdet.extraction.steps import Compute, Finish, Load
from refdet.extraction.summary import Summary, none_usable_error, summarize_store
from refdet.extraction.timing import Session
from refdet.files.progress import progress_bar
from refdet.files.short_text import format_count, format_share
from refdet.interrupt import as_keyboard_interrupt
from refdet.store import Header
from refdet.store.codec import EncodedImage
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)

SHARD_IMAGES = 32  # the most work that an interruption can lose; 40 MB with 100 regions of 3072 float32 per image
_PIXELS_AHEAD = 1 << 28  # maximum number of pixels of prefetched images; 0.8 GB
# Computed batches that wait to be finished. With those being computed and finished, 4 are in GPU memory.
_MAX_QUEUED = 2


def extract(
    out: Path,
    plan: Plan,
    header: Header,
    batches: Sequence[list[ImageRecord]],
    records: Sequence[ImageRecord],
    load: Load,
    compute: Compute | None,
    resume: bool = False,
    workers: int = 2,
    shard_images: int = SHARD_IMAGES,
    strict: bool = False,
    compute_seconds: Callable[[], dict[str, float]] = dict,
    engine: Callable[[ShardSet, Sequence[int], Session], object] | None = None,
) -> Summary:
    """Compute the regions of all images and write the store.

    Args:
        out: the store.
        plan: what to compute; must be unchanged to resume.
        header: metadata of the store.
        batches: images in the order of computation; the images of a batch are computed together.
        records: the same images in the order of the store.
        load: loads an image as (H, W, 3) uint8 of its record's size. If it raises InputError, the reason is stored
            instead of regions. Other exceptions abort the extraction.
        compute: called with each batch in the main thread; an image that could not be loaded is replaced by another one
            of the batch. Returns a function that is called once, in another thread and in batch order, and returns the
            `Regions` of each image; thread-local state (``torch.inference_mode``, CUDA stream) is not passed on to that
            thread. None with an ``engine``.
        resume: continue from finished shards. If the store is finished, retry its unusable images, with the other
            images of their batches.
        workers: number of threads that prefetch images.
        shard_images: number of images at which a shard is complete; must be unchanged to resume.
        strict: fail at an unusable image.
        compute_seconds: called at the end; returns the seconds per part of the network.
        engine: called instead of `compute_shards` with the shards, the numbers of those to compute, and the session.
            This process merges the shards that it computes.

    Returns:
        Numbers and timings.

    Raises:
        InputError: as `refdet.extraction.shards.open_extraction`.
        RuntimeFailure: no image is usable, the disk is full, the machine fails to read images, a feature is NaN or inf,
            or an image is unusable and ``strict`` is True (UnusableImageError); finished shards are kept.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; finished shards are kept.
    """
    if engine is None:
        assert compute is not None
        engine = partial(compute_shards, load=load, compute=compute, workers=workers, strict=strict)
    compute_and_merge = partial(_compute_and_merge, records, engine, compute_seconds)
    session: Session | None = None
    counts = f"{format_count(len(records), 'image')} in {format_count(len(batches), 'batch')}"
    log.info("%s; options %s", counts, plan.options)
    with open_extraction(out, plan, header, split_into_shards(batches, shard_images), resume) as shard_set:
        if shard_set is not None:
            session = compute_and_merge(
                shard_set, shard_set.missing_shards(find_retries(shard_set, records, load, strict))
            )
    if shard_set is None:
        with repair(out, plan, header, batches, records, load, strict, shard_images) as repaired:
            if repaired is not None:
                session = compute_and_merge(repaired, repaired.missing_shards())
    return summarize_store(out, session, compute_seconds, plan.batch_size)


def _compute_and_merge(
    records: Sequence[ImageRecord],
    engine: Callable[[ShardSet, Sequence[int], Session], object],
    compute_seconds: Callable[[], dict[str, float]],
    shard_set: ShardSet,
    shard_numbers: Sequence[int],
) -> Session:
    """Compute shards and merge them into the store."""
    session = Session(shard_set.folder)
    with interruptible(shard_set, len(records)):
        with session.computing():
            engine(shard_set, shard_numbers, session)
        if shard_set.errors and len(shard_set.errors) == len(records):
            raise none_usable_error(shard_set.errors, f"finished shards are kept in {shard_set.folder}")
        with session.timed("merge"):
            shard_set.merge(records, lambda: run_information(shard_set, session, compute_seconds))
    return session


def run_information(
    shard_set: ShardSet, session: Session, compute_seconds: Callable[[], dict[str, float]]
) -> dict[str, Any]:
    """Information about a run for the store, JSON: its timing and batch size."""
    return {
        **session.summary(),
        "batch_size": shard_set.plan.batch_size,
        "computing": {name: round(seconds, 3) for name, seconds in compute_seconds().items()},
    }


def compute_shards(
    shard_set: ShardSet,
    shard_numbers: Sequence[int],
    session: Session,
    load: Load,
    compute: Compute,
    workers: int,
    strict: bool,
) -> None:
    """Compute shards of ``shard_set`` and write them; see `extract` for the other arguments and the errors."""
    batches = [batch for number in shard_numbers for batch in shard_set.shards[number]]
    fix = f"finished shards are kept in {shard_set.folder}, continue with `resume=True`"
    with (
        closing(load_ahead(load, batches, workers)) as loaded,
        progress_bar(sum(map(len, batches)), "extract", "image", disable=not batches) as bar,
        BackgroundWriter(shard_set, shard_numbers, session, bar) as background,
    ):
        for batch in batches:
            with session.timed("load"):
                try:
                    images = next(loaded)
                except RuntimeFailure as error:
                    raise RuntimeFailure(str(error), fix=fix) from error
            unusable = [image for image in images if isinstance(image, str)]
            if strict and unusable:
                raise UnusableImageError(unusable[0], fix=fix)
            with session.timed("compute"):
                finish = start_batch(batch, images, compute)
            with session.timed("wait"):
                background.put(finish)


def start_batch(batch: list[ImageRecord], images: list[np.ndarray | str], compute: Compute) -> Finish:
    """Start computing a batch of images.

    An unusable image gets empty regions with the reason. Another image is computed in its place to keep the batch size,
    which can affect rounding.

    Args:
        batch: the records of the images.
        images: (H, W, 3) uint8 RGB each, or the reason why an image is unusable.
        compute: as in `extract`.

    Returns:
        A function that returns the regions of each image.
    """
    loaded = [(record, image) for record, image in zip(batch, images, strict=True) if not isinstance(image, str)]
    unusable = {
        index: Regions.empty(record.id, record.file_name, record.height, record.width, error=image)
        for index, (record, image) in enumerate(zip(batch, images, strict=True))
        if isinstance(image, str)
    }
    if not loaded:
        return lambda: list(unusable.values())
    usable = iter(loaded)
    filled = [loaded[0] if index in unusable else next(usable) for index in range(len(batch))]
    expected_ids = [record.id for record, _ in filled]
    finish = compute([record for record, _ in filled], [image for _, image in filled])

    def regions() -> list[Regions]:
        computed = finish()
        if [r.image_id for r in computed] != expected_ids:
            raise ValueError("the detector returned regions of other images")
        return [unusable.get(index, item) for index, item in enumerate(computed)]

    return regions


class _NoMoreBatches(Exception):
    """There are no more batches."""


class BackgroundWriter:
    """Threads that finish batches and write shards; their exceptions are raised in the main thread."""

    def __init__(self, shard_set: ShardSet, shard_numbers: Iterable[int], session: Session, bar: tqdm) -> None:
        self._shard_set, self._shard_numbers, self._session, self._bar = shard_set, shard_numbers, session, bar
        self._batches: queue.SimpleQueue[Future[list[EncodedImage]] | None] = queue.SimpleQueue()
        self._finishing = ThreadPoolExecutor(1, "finish")
        self._slots = threading.Semaphore(_MAX_QUEUED)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        # Computed batches are finished even after an interruption, as they may complete a shard. Another Ctrl-C does
        # not end the wait, as the folder would be unlocked while the thread still writes to it.
        interrupted: KeyboardInterrupt | None = None
        with self._session.timed("wait"):
            while not self._ended.is_set():
                try:
                    self._batches.put(None)
                    self._ended.wait()
                except KeyboardInterrupt as interrupt:
                    interrupted = interrupt
                    log.warning("note: finishing the computed batches first")
        self._thread.join()
        self._finishing.shutdown(cancel_futures=True)
        error = self._error or interrupted
        if error is not None and kind is None:
            raise error

    def put(self, finish: Finish) -> None:
        """Queue the next batch of the plan, waiting while the queue is full."""
        self._slots.acquire()
        if self._error is not None:
            raise self._error
        self._batches.put(self._finishing.submit(self._finish, finish))

    def _finish(self, finish: Finish) -> list[EncodedImage]:
        with self._session.timed("finish"):
            return self._shard_set.encode(finish())

    def _run(self) -> None:
        try:
            for number in self._shard_numbers:
                self._write_shard(number)
        except _NoMoreBatches:
            pass
        except BaseException as error:
            self._error = error
            self._slots.release()  # or the main thread would wait forever
        finally:
            self._ended.set()

    def _write_shard(self, number: int) -> None:
        batches, stages = self._shard_set.shards[number], self._session.stages
        started, waited = time.perf_counter(), 0.0
        with self._shard_set.write(number) as add:
            for batch in batches:
                wait_started = time.perf_counter()
                finishing = self._batches.get()
                self._slots.release()
                if finishing is None:
                    raise _NoMoreBatches
                images = finishing.result()
                waited += time.perf_counter() - wait_started
                add(images)
                self._bar.update(len(batch))
        stages["write"] += time.perf_counter() - started - waited
        self._session.record_shard(sum(map(len, batches)))


def load_ahead(
    load: Load, batches: Iterable[list[ImageRecord] | None], workers: int, ahead: int = 3
) -> Generator[list[np.ndarray | str], None, None]:
    """Prefetch the images of batches.

    Args:
        load: loads an image, raising InputError if it is unusable.
        batches: the batches. None in between means that the next one is not known yet; then a prefetched batch is
            yielded instead of waiting for it.
        workers: number of threads.
        ahead: maximum number of prefetched batches.

    Yields:
        The images of the next batch, with the reason in place of an unusable image.
    """

    def attempt(record: ImageRecord) -> np.ndarray | str:
        try:
            return load(record)
        except InputError as error:
            # the message may contain a file name that is not valid Unicode, but strings in the store must be
            return str(error).replace("\0", "?").encode(errors="replace").decode()

    pool = ThreadPoolExecutor(max(1, workers))
    waiting: deque[tuple[int, list[Future[np.ndarray | str]]]] = deque()
    pixels = 0
    try:
        for batch in batches:
            size = sum(record.height * record.width for record in batch or ())
            while waiting and (batch is None or len(waiting) > ahead or pixels + size > _PIXELS_AHEAD):
                finished_size, futures = waiting.popleft()
                pixels -= finished_size
                yield [future.result() for future in futures]
                if batch is None:
                    break
            if batch is None:
                continue
            pixels += size
            waiting.append((size, [pool.submit(attempt, record) for record in batch]))
        while waiting:
            yield [future.result() for future in waiting.popleft()[1]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def interruptible(shard_set: ShardSet, total: int) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into an Interrupted that says what is kept and how to continue."""
    try:
        with as_keyboard_interrupt():
            yield
    except KeyboardInterrupt:
        finished = format_share(shard_set.finished_images, total, "image", "is")
        kept = f"{finished} finished and kept in {shard_set.folder}"
        raise Interrupted(f"stopped: {kept}; continue with `resume=True`") from None
