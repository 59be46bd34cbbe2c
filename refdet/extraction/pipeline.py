"""The work of an extraction, a shard at a time, whatever computes the regions. No torch.

Three stages overlap: threads load images ahead, the main thread computes, and one thread in the background finishes
the batches in their order and writes the shards.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
from tqdm import tqdm

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, Interrupted, RuntimeFailure
from refdet.extraction.plan import Plan, cut_into_shards
from refdet.extraction.repair import none_usable, readable, repair
from refdet.extraction.shards import ShardSet, open_extraction
from refdet.extraction.timing import STAGES, Session, shares
from refdet.files.progress import progress_bar
from refdet.interrupt import as_keyboard_interrupt
from refdet.store import Header
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)

Load = Callable[[ImageRecord], np.ndarray]
Finish = Callable[[], list[Regions]]
Compute = Callable[[list[ImageRecord], list[np.ndarray]], Finish]

SHARD_IMAGES = 32  # what a stop can cost; with 100 regions of 3072 float32 an image, 40 MB
_PIXELS_AHEAD = 1 << 28  # of images that wait for their turn, 0.8 GB
_WAITING = 2  # batches computed and not yet finished; a GPU holds them all


@dataclass(frozen=True)
class Summary:
    """What an extraction did.

    Attributes:
        images, regions: in the store; errors: images that could not be used.
        computed: images of this run, the others were finished before; seconds: what they took.
        bytes: size of the store.
        images_per_second: of this run, without the merge; 0 where nothing was left to compute.
        batch_size: images of a batch at most.
        computing: seconds of each part of computing, where that tells; see `refdet.detector.profiler`.
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
    batch_size: int = 0
    computing: dict[str, float] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, float]:
        """The share of each stage in the time of this run, 0 to 1; see `refdet.extraction.timing.shares`."""
        return shares(self.seconds, self.stages)


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
    parts_of_computing: Callable[[], dict[str, float]] = dict,
) -> Summary:
    """Compute the regions of all images and write the store.

    Args:
        out: the store.
        plan: what is computed; a resumed extraction must have the same.
        header: what the store says of itself.
        batches: the images in the order of the work; those of a batch go through the detector together.
        records: the same images in the order they get in the store.
        load: gives an image as (H, W, 3) uint8 of its record's size; where it raises InputError, that image
            gets no regions but the reason. Any other error ends the work.
        compute: called with a batch in the main thread; what it gives is called once, in another thread and in the
            order of the batches, for the batch's `Regions`, one for each of its images. What belongs to a thread, such
            as ``torch.inference_mode`` and the stream of a GPU, is not handed over. An image that could not be loaded
            is replaced by another of its batch, which is then in it twice.
        resume: continue from finished shards; of a finished store compute the images that could not be used and now
            can, with the other images of their batches.
        workers: threads that load ahead.
        shard_images: a shard is closed when it has this many images; a resumed extraction must have the same.
        strict: stop at an image that cannot be used.
        parts_of_computing: tells when the work is done how many seconds each part of computing took.

    Raises:
        InputError: see `refdet.extraction.shards.open_extraction`.
        RuntimeFailure: no image at all could be used, the disk is full, images cannot be read for a reason that is not
            theirs, a number is not finite, or it is strict and an image cannot be used; finished shards are kept.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; finished shards are kept.
    """
    work = partial(_work, records, load, compute, workers, strict, parts_of_computing)
    session: Session | None = None
    log.info("%d images in %d batches; options %s", len(records), len(batches), plan.options)
    with open_extraction(out, plan, header, cut_into_shards(batches, shard_images), resume) as parts:
        if parts is not None:
            again = set(parts.errors) if strict else readable(parts.errors, records, load)
            session = work(parts, parts.missing(again))
    if parts is None:
        with repair(out, plan, header, batches, records, load, strict, shard_images) as broken:
            if broken is not None:
                session = work(broken, broken.missing())
    with store.open(out) as finished:
        images, regions, errors = len(finished), finished.regions, finished.errors
    if errors and len(errors) == images:
        raise RuntimeFailure(none_usable(errors, f"{out} has no regions"))
    computed, seconds = (session.images, session.seconds) if session else (0, 0.0)
    stages = session.stages if session else dict.fromkeys(STAGES, 0.0)
    speed = computed / seconds if computed else 0.0
    return Summary(
        images, regions, len(errors), computed, seconds, out.stat().st_size, speed, stages, plan.batch_size,
        parts_of_computing(),
    )  # fmt: skip


def _work(
    records: Sequence[ImageRecord],
    load: Load,
    compute: Compute,
    workers: int,
    strict: bool,
    parts_of_computing: Callable[[], dict[str, float]],
    parts: ShardSet,
    numbers: Sequence[int],
) -> Session:
    """Compute shards and merge all into the store."""
    session = Session(parts.folder)
    with _stoppable(parts, len(records)):
        with session.computing():
            _compute_shards(parts, numbers, load, compute, workers, strict, session)
        if parts.errors and len(parts.errors) == len(records):
            raise RuntimeFailure(none_usable(parts.errors, f"{parts.folder} keeps what is finished"))
        with session.timed("merge"):
            parts.merge(
                records,
                lambda: {
                    **session.summary(),
                    "batch_size": parts.plan.batch_size,
                    "computing": {part: round(took, 3) for part, took in parts_of_computing().items()},
                },
            )
    return session


def _compute_shards(
    parts: ShardSet,
    numbers: Sequence[int],
    load: Load,
    compute: Compute,
    workers: int,
    strict: bool,
    session: Session,
) -> None:
    batches = [batch for number in numbers for batch in parts.shards[number]]
    kept = f"what is finished is kept in {parts.folder}"
    with (
        closing(load_ahead(load, batches, workers)) as loaded,
        progress_bar(sum(map(len, batches)), "extract", "image", disable=not batches) as bar,
        _Background(parts, numbers, session, bar) as background,
    ):
        for batch in batches:
            with session.timed("load"):
                try:
                    images = next(loaded)
                except RuntimeFailure as error:
                    raise RuntimeFailure(f"{error}; {kept}: continue with --resume") from error
            bad = [image for image in images if isinstance(image, str)]
            if strict and bad:
                raise RuntimeFailure(f"--strict: {bad[0]}; {kept}: add --resume then")
            with session.timed("compute"):
                finish = begin_batch(batch, images, compute)
            with session.timed("wait"):
                background.put(finish)


def begin_batch(batch: list[ImageRecord], images: list[np.ndarray | str], compute: Compute) -> Finish:
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

    def __init__(self, parts: ShardSet, numbers: Sequence[int], session: Session, bar: tqdm) -> None:
        self._parts, self._numbers, self._session, self._bar = parts, numbers, session, bar
        self._batches: queue.SimpleQueue[Finish | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(_WAITING)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="finish and write", daemon=True)

    def __enter__(self) -> _Background:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        # Also when the work is stopped, what was computed is finished: it may complete a shard. Whoever cannot wait and
        # presses Ctrl-C again still has to, or another process might write to the same folder as the thread.
        again: KeyboardInterrupt | None = None
        with self._session.timed("wait"):
            while not self._ended.is_set():
                try:
                    self._batches.put(None)
                    self._ended.wait()
                except KeyboardInterrupt as pressed:
                    again = pressed
                    log.warning("note: what is computed is being finished first")
        self._thread.join()
        error = self._error or again
        if error is not None and kind is None:
            raise error

    def put(self, finish: Finish) -> None:
        """Hand over the next batch of the plan; waits while the thread is behind."""
        self._room.acquire()
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
            self._room.release()  # or the main thread would wait for ever
        finally:
            self._ended.set()

    def _write_shard(self, number: int) -> None:
        batches, stages = self._parts.shards[number], self._session.stages
        started, others = time.perf_counter(), 0.0
        with self._parts.write(number) as add:
            for batch in batches:
                asked = time.perf_counter()
                finish = self._batches.get()
                self._room.release()
                if finish is None:
                    raise _Stopped
                with self._session.timed("finish"):
                    found = finish()
                others += time.perf_counter() - asked
                for regions in found:
                    add(regions)
                self._bar.update(len(batch))
        stages["write"] += time.perf_counter() - started - others
        self._session.finished(sum(map(len, batches)))


def load_ahead(
    load: Load, batches: Sequence[list[ImageRecord]], workers: int, ahead: int = 3
) -> Generator[list[np.ndarray | str], None, None]:
    """The images of each batch, an image that cannot be used as the reason.

    ``ahead`` batches are loaded at once, fewer where their images are so large that they would fill the memory.
    """

    def attempt(record: ImageRecord) -> np.ndarray | str:
        try:
            return load(record)
        except InputError as error:
            # a name on disk need not be Unicode, but what the store holds must be
            return str(error).replace("\0", "?").encode(errors="replace").decode()

    pool = ThreadPoolExecutor(max(1, workers))
    waiting: deque[tuple[int, list[Future[np.ndarray | str]]]] = deque()
    pixels = 0
    try:
        for batch in batches:
            size = sum(record.height * record.width for record in batch)
            while waiting and (len(waiting) > ahead or pixels + size > _PIXELS_AHEAD):
                done, futures = waiting.popleft()
                pixels -= done
                yield [future.result() for future in futures]
            pixels += size
            waiting.append((size, [pool.submit(attempt, record) for record in batch]))
        while waiting:
            yield [future.result() for future in waiting.popleft()[1]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _stoppable(parts: ShardSet, total: int) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into an Interrupted that says what is kept and how to go on."""
    try:
        with as_keyboard_interrupt():
            yield
    except KeyboardInterrupt:
        kept = f"{parts.done} of {total} images are finished and kept in {parts.folder}"
        raise Interrupted(f"stopped; {kept}; add --resume to continue") from None
