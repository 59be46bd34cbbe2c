"""The work of an extraction, a shard at a time, whatever computes the regions. No torch."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, WorkError
from refdet.regions import Regions
from refdet.shards import Parts, Plan, begin
from refdet.store import Header

Load = Callable[[ImageRecord], np.ndarray]
Compute = Callable[[list[ImageRecord], list[np.ndarray]], list[Regions]]

SHARD_IMAGES = 32  # what a stop can cost; with 100 regions of 3072 float32 an image, 40 MB


@dataclass(frozen=True)
class Summary:
    """What an extraction did.

    Attributes:
        images, regions: in the store; errors: images that could not be used.
        computed: images of this run, the others were finished before; seconds: what they took.
        bytes: size of the store.
    """

    images: int
    regions: int
    errors: int
    computed: int
    seconds: float
    bytes: int


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
        compute: gives the regions of a batch, one `Regions` for each of its images.
        resume: continue from finished shards.
        workers: threads that load ahead.
        shard_images: a shard is closed when it has this many images.

    Raises:
        InputError: see `refdet.shards.begin`.
        WorkError: the disk is full, or the work was interrupted; finished shards are kept.
    """
    computed, seconds = 0, 0.0
    with begin(out, plan, resume) as parts:
        if parts is not None:
            before = len(parts.done)
            started = time.perf_counter()
            with _stoppable(parts, len(records)):
                left = [[r for r in batch if r.id not in parts.done] for batch in batches]
                _compute_shards(parts, [batch for batch in left if batch], load, compute, workers, shard_images)
                computed, seconds = len(parts.done) - before, time.perf_counter() - started
                parts.merge(records, header)
    with store.open(out) as finished:
        images, regions, errors = len(finished), finished.regions, len(finished.errors)
    return Summary(images, regions, errors, computed, seconds, out.stat().st_size)


def _compute_shards(
    parts: Parts, batches: list[list[ImageRecord]], load: Load, compute: Compute, workers: int, shard_images: int
) -> None:
    shard: list[Regions] = []
    with tqdm(total=sum(map(len, batches)), unit="image", disable=not batches) as bar:
        for batch, images in zip(batches, _load_ahead(load, batches, workers), strict=True):
            shard += _of_batch(batch, images, compute)
            bar.update(len(batch))
            if len(shard) >= shard_images:
                parts.write(shard)
                shard = []
    if shard:
        parts.write(shard)


def _of_batch(batch: list[ImageRecord], images: list[np.ndarray | str], compute: Compute) -> list[Regions]:
    """The regions of a batch; an image that could not be loaded gets none, and says why."""
    good = [(record, image) for record, image in zip(batch, images, strict=True) if not isinstance(image, str)]
    regions = compute([record for record, _ in good], [image for _, image in good]) if good else []
    if [r.image_id for r in regions] != [record.id for record, _ in good]:
        raise ValueError("the detector gave regions of other images than it was asked for")
    bad = [
        Regions.empty(record.id, record.file_name, record.height, record.width, error=image)
        for record, image in zip(batch, images, strict=True)
        if isinstance(image, str)
    ]
    return regions + bad


def _load_ahead(
    load: Load, batches: Sequence[list[ImageRecord]], workers: int, ahead: int = 3
) -> Iterator[list[np.ndarray | str]]:
    """The images of each batch, an image that cannot be used as the reason; ``ahead`` batches are loaded at once."""

    def attempt(record: ImageRecord) -> np.ndarray | str:
        try:
            return load(record)
        except InputError as error:
            return str(error)

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
        kept = f"{len(parts.done)} of {total} images are finished and kept in {parts.folder}"
        raise WorkError(f"stopped; {kept}; add --resume to continue") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, previous)
