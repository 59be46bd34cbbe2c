"""Extraction pipeline, independent of how regions are computed; does not import torch.

Four stages run at the same time, each at least a batch ahead of the next:

1. several threads load images;
2. the main thread starts computing batches;
3. one thread finishes batches: masks to RLE, and regions to arrays;
4. one thread writes batches to shards.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from refdet.data.coco import ImageRecord
from refdet.errors import Interrupted, RuntimeFailure, UnusableImageError
from refdet.extraction.load_ahead import load_ahead
from refdet.extraction.open_extraction import open_extraction
from refdet.extraction.plan import Plan, split_into_shards
from refdet.extraction.repair import repair
from refdet.extraction.retries import find_retries, report_replaced
from refdet.extraction.shards import ShardSet
from refdet.extraction.stamped_source import StampedSource
from refdet.extraction.steps import Compute, Finish, Load, Stamp, no_stamp
from refdet.extraction.summary import Summary, none_usable_error, summarize_store
from refdet.extraction.timing import Timer
from refdet.files.progress import progress_bar
from refdet.files.short_text import format_count, format_share
from refdet.interrupt import as_keyboard_interrupt
from refdet.store import Header
from refdet.store.codec import EncodedImage
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)

SHARD_IMAGES = 32  # images that an interruption can lose; 40 MB with 100 regions of 3072 float32 per image
# Batches that wait between stages 2 and 3. With the one that each of these stages handles, 4 are in GPU memory.
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
    engine: Callable[[ShardSet, Sequence[int], Timer], object] | None = None,
    source: StampedSource | None = None,
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
        resume: continue from finished shards. Unusable images that can now be read are computed again: in an unfinished
            extraction with their shard, as are images that were replaced by others
            (`refdet.extraction.retries.find_retries`), in a complete store with their batch
            (`refdet.extraction.repair.repair`).
        workers: number of threads that prefetch images.
        shard_images: number of images at which a shard is complete; must be unchanged to resume.
        strict: fail at an unusable image.
        compute_seconds: called at the end; returns the seconds that each part of the network took, by its name.
        engine: called instead of `compute_shards` to compute shards in other processes, with the `ShardSet`, the
            numbers of the shards to compute, and the `Timer`; its result is ignored. This process merges the shards
            into the store. None to compute in this process.
        source: the images that ``load`` loads, to compute those again that were replaced since an earlier session;
            None for no such check.

    Returns:
        Counts of images and regions, and timings.

    Raises:
        InputError: as `refdet.extraction.open_extraction.open_extraction`.
        RuntimeFailure: no image is usable, the disk is full, the machine fails to read images, a feature is NaN or inf,
            or an image is unusable and ``strict`` is True (UnusableImageError); finished shards are kept.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; finished shards are kept.
    """
    if engine is None:
        assert compute is not None
        engine = partial(
            compute_shards,
            load=load,
            compute=compute,
            workers=workers,
            strict=strict,
            stamp_of=no_stamp if source is None else source.stamp_of,
        )
    compute_and_merge = partial(_compute_and_merge, records, engine, compute_seconds)
    timer: Timer | None = None  # stays None if there is nothing to compute
    counts = f"{format_count(len(records), 'image')} in {format_count(len(batches), 'batch')}"
    log.info("%s; options %s", counts, plan.options)
    with open_extraction(out, plan, header, split_into_shards(batches, shard_images), resume) as shard_set:
        if shard_set is not None:  # None: the store is complete
            retry_ids = find_retries(shard_set, records, load, strict, source)
            timer = compute_and_merge(shard_set, shard_set.missing_shards(retry_ids))
    if shard_set is None:  # only unusable images may be left to compute
        with repair(out, plan, header, batches, records, load, strict, shard_images) as repair_shards:
            if repair_shards is not None:  # None: no unusable image can be read now
                replaced = {} if source is None else source.replaced(repair_shards.stamps)
                report_replaced(repair_shards, replaced)
                timer = compute_and_merge(repair_shards, repair_shards.missing_shards(replaced))
    return summarize_store(out, timer, compute_seconds, plan.batch_size)


def _compute_and_merge(
    records: Sequence[ImageRecord],
    engine: Callable[[ShardSet, Sequence[int], Timer], object],
    compute_seconds: Callable[[], dict[str, float]],
    shard_set: ShardSet,
    shard_numbers: Sequence[int],
) -> Timer:
    """Compute the shards with the given numbers, and merge all shards of the set into the store; see `extract`."""
    timer = Timer(shard_set.folder)
    with interruptible(shard_set):
        with timer.computing():
            engine(shard_set, shard_numbers, timer)
        if shard_set.errors and len(shard_set.errors) == len(records):
            raise none_usable_error(shard_set.errors, kept=f"finished shards are kept in {shard_set.folder}")
        with timer.timed("merge"):
            shard_set.merge(records, lambda: run_information(shard_set, timer, compute_seconds))
    return timer


def run_information(
    shard_set: ShardSet, timer: Timer, compute_seconds: Callable[[], dict[str, float]]
) -> dict[str, Any]:
    """Information about a run, as a JSON object that is written to the store: its timing and batch size."""
    return {
        **timer.summary(),
        "batch_size": shard_set.plan.batch_size,
        "computing": {name: round(seconds, 3) for name, seconds in compute_seconds().items()},
    }


def compute_shards(
    shard_set: ShardSet,
    shard_numbers: Sequence[int],
    timer: Timer,
    load: Load,
    compute: Compute,
    workers: int,
    strict: bool,
    stamp_of: Callable[[int], Stamp],
) -> None:
    """Compute the shards with the given numbers and write them; other arguments and errors are those of `extract`.

    ``stamp_of`` returns the stamp of the file of an image that was loaded, given the id of the image.
    """
    batches = [batch for number in shard_numbers for batch in shard_set.shards[number]]
    fix = f"finished shards are kept in {shard_set.folder}, continue with `resume=True`"
    with (
        closing(load_ahead(load, batches, workers)) as loaded,
        progress_bar(sum(map(len, batches)), "extract", "image", disable=not batches) as bar,
        BackgroundWriter(shard_set, shard_numbers, timer, bar, stamp_of) as background,
    ):
        for batch in batches:
            with timer.timed("load"):
                try:
                    images = next(loaded)
                except RuntimeFailure as error:
                    raise RuntimeFailure(str(error), fix=fix) from error
            unusable = [image for image in images if isinstance(image, str)]
            if strict and unusable:
                raise UnusableImageError(unusable[0], fix=fix)
            with timer.timed("compute"):
                finish = start_batch(batch, images, compute)
            with timer.timed("wait"):
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
        return lambda: list(unusable.values())  # of all images
    usable = iter(loaded)
    filled = [loaded[0] if index in unusable else next(usable) for index in range(len(batch))]
    expected_ids = [record.id for record, _ in filled]
    finish_computing = compute([record for record, _ in filled], [image for _, image in filled])

    def finish() -> list[Regions]:
        computed = finish_computing()
        if [r.image_id for r in computed] != expected_ids:
            raise ValueError("the detector returned regions of other images")
        return [unusable.get(index, regions) for index, regions in enumerate(computed)]

    return finish


class _NoMoreBatches(Exception):
    """The main thread was interrupted or failed, and queues no more batches, though the shard is not complete."""


class BackgroundWriter:
    """Threads that finish batches and write shards; their exceptions are raised in the main thread.

    Args:
        shard_set: the shards.
        shard_numbers: numbers of the shards to write; their batches are passed to `put` in the same order.
        timer: timing of the threads.
        bar: progress bar of the written images.
        stamp_of: as in `compute_shards`.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        shard_numbers: Iterable[int],
        timer: Timer,
        bar: tqdm,
        stamp_of: Callable[[int], Stamp],
    ) -> None:
        self._shard_set, self._shard_numbers, self._timer, self._bar = shard_set, shard_numbers, timer, bar
        self._stamp_of = stamp_of
        # batches in order, each encoded or to be encoded; None if the main thread queues no more
        self._encoded: queue.SimpleQueue[Future[list[EncodedImage]] | None] = queue.SimpleQueue()
        self._finish_pool = ThreadPoolExecutor(1, "finish")
        self._slots = threading.Semaphore(_MAX_QUEUED)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._write_thread = threading.Thread(target=self._run, name="write", daemon=True)

    def __enter__(self) -> BackgroundWriter:
        self._write_thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        # Queued batches are finished even after an interruption, as they may complete a shard. Another Ctrl-C does not
        # end the wait, as the folder would be unlocked while the write thread still writes to it.
        interrupted: KeyboardInterrupt | None = None
        with self._timer.timed("wait"):
            while not self._ended.is_set():
                try:
                    self._encoded.put(None)
                    self._ended.wait()
                except KeyboardInterrupt as interrupt:
                    interrupted = interrupt
                    log.warning("note: finishing the computed batches first")
        self._write_thread.join()
        self._finish_pool.shutdown(cancel_futures=True)
        error = self._error or interrupted
        if error is not None and kind is None:
            raise error

    def put(self, finish: Finish) -> None:
        """Queue the next batch, after waiting for room in the queue; raises the error of a thread that failed."""
        self._slots.acquire()
        if self._error is not None:
            raise self._error
        self._encoded.put(self._finish_pool.submit(self._finish, finish))

    def _finish(self, finish: Finish) -> list[EncodedImage]:
        with self._timer.timed("finish"):
            images = self._shard_set.encode(finish())
            return [replace(image, stamp=self._stamp_of(image.row.id)) for image in images]

    def _run(self) -> None:
        """Write the shards, in the write thread."""
        try:
            for number in self._shard_numbers:
                self._write_shard(number)
        except _NoMoreBatches:
            pass
        except BaseException as error:
            self._error = error
            self._slots.release()  # or `put` might wait forever
        finally:
            self._ended.set()

    def _write_shard(self, number: int) -> None:
        batches, stages = self._shard_set.shards[number], self._timer.stages
        started, waited = time.perf_counter(), 0.0
        with self._shard_set.write(number) as add:
            for batch in batches:
                wait_started = time.perf_counter()
                future = self._encoded.get()
                self._slots.release()
                if future is None:
                    raise _NoMoreBatches
                images = future.result()
                waited += time.perf_counter() - wait_started
                add(images)
                self._bar.update(len(batch))
        stages["write"] += time.perf_counter() - started - waited
        self._timer.record_shard(sum(map(len, batches)))


@contextmanager
def interruptible(shard_set: ShardSet) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into an Interrupted that says what is kept and how to continue."""
    try:
        with as_keyboard_interrupt():
            yield
    except KeyboardInterrupt:
        finished = format_share(shard_set.finished_images, shard_set.images, "image", verb="is")
        kept = f"{finished} finished and kept in {shard_set.folder}"
        raise Interrupted(f"stopped: {kept}; continue with `resume=True`") from None
