"""A process that computes shards for `refdet.extraction.ray_engine`.

This module imports neither Ray nor torch; the function that `ShardWorker.start` calls imports torch.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from refdet.data.coco import ImageRecord
from refdet.errors import (
    InputError,
    RefdetError,
    RuntimeFailure,
    UnusableImageError,
    is_disk_full,
    is_system_error,
)
from refdet.extraction.load_ahead import load_ahead
from refdet.extraction.pipeline import BackgroundWriter, start_batch
from refdet.extraction.ray_messages import Failed, Finished, MakeTools, RegionsById, Started, Work
from refdet.extraction.shards import ShardSet
from refdet.extraction.timing import Timer
from refdet.extraction.workers_file import read_token
from refdet.files.atomic import fsync, temporary_path
from refdet.files.progress import progress_bar
from refdet.structures.regions import Regions

_END = -1  # ends a queue of shard numbers


class _MachineFailure(RuntimeFailure):
    """A failure of this machine; another one may succeed."""


class WorkerShards(ShardSet):
    """The shards that a worker writes, to the folder of the extraction or to a temporary one.

    Shards keep temporary names until the driver renames one with each number: two workers may compute the same shard,
    with rounding that differs between GPUs, and the driver must not combine the rows of one with the file of the other.

    Args:
        work: the extraction.
        folder: folder to write to.
        shared: whether ``folder`` is the folder of the extraction.
        on_finished: called with the number of each finished shard.
    """

    def __init__(self, work: Work, folder: Path, shared: bool, on_finished: Callable[[int], object]) -> None:
        # The first argument would be the store, which a worker does not write. It reads no shards: shard_numbers=().
        super().__init__(work.folder, work.plan, work.header, work.shards, folder, shard_numbers=())
        self.plan_hash = work.plan_hash
        self._shared, self._on_finished = shared, on_finished
        self._files: dict[Path, Path] = {}  # path of a shard -> its temporary file

    @contextmanager
    def write(self, number: int) -> Iterator[Callable[..., None]]:
        """Like `ShardSet.write`, and report the finished shard."""
        with super().write(number) as add:
            yield add
        self._on_finished(number)

    @contextmanager
    def _temporary_file(self, path: Path) -> Iterator[Path]:
        temporary = temporary_path(path)  # unlike in the base class, kept at the end of the block
        try:
            yield temporary
            fsync(temporary)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._files[path] = temporary

    def take(self, number: int) -> Finished:
        """Remove and return a finished shard, with its contents if it is not in the folder of the extraction."""
        rows, path = self._rows.pop(number), self._files.pop(self._path(number))
        file: Path | bytes = path
        if not self._shared:
            file = path.read_bytes()
            path.unlink()
        return Finished(number, rows, dict(self._shapes), file)


class ShardWorker:
    """Computes shards one after another, and meanwhile loads images ahead, also those of the next shard.

    Ray calls the methods from several threads; all shards are computed in one thread.

    Args:
        make: checks the worker's machine, loads the detector and returns the `Tools`.
    """

    def __init__(self, make: MakeTools) -> None:
        self._make = make
        self._compute_thread = ThreadPoolExecutor(1, "compute")
        self._given_regions: dict[int, Regions] = {}  # image id -> regions that the driver sent, of unfinished shards
        self._todo: queue.SimpleQueue[int] = queue.SimpleQueue()  # numbers of shards to compute, finally `_END`
        self._futures: dict[int, Future[None]] = {}  # shard number -> future that is done when the shard is written
        self._error: BaseException | None = None
        self._temporary_folder: TemporaryDirectory[str] | None = None
        self._stopping = False
        self._lock = threading.Lock()
        self._notes = _LogCollector()

    def start(self) -> Started | Failed:
        """Check what the worker needs and load the detector."""
        try:
            make = self._compute_thread.submit(self._make, lambda record: self._given_regions[record.id])
            self._tools = make.result()
        except Exception as error:
            return _failed_message(error)
        tools = self._tools
        return Started(socket.gethostname(), os.getpid(), tools.device, tools.precision, tools.kernels)

    def auto_batch_size(self) -> int | Failed:
        """Measure the number of images that fit into memory at once."""

        def measure() -> int:
            with self._tools.context():
                return self._tools.auto_batch_size()

        try:
            return self._compute_thread.submit(measure).result()
        except Exception as error:
            return _failed_message(error)

    def begin(self, work: Work) -> bool | Failed:
        """Start waiting for shards of an extraction; returns whether the worker can write to the folder of shards."""
        try:
            return self._begin(work)
        except OSError as error:  # for example no space for a temporary folder
            return replace(_failed_message(error), is_machine_error=True)

    def _begin(self, work: Work) -> bool:
        shared = read_token(work.folder) == work.token and os.access(work.folder, os.W_OK)
        self._temporary_folder = None if shared else TemporaryDirectory(prefix="refdet-")
        folder = work.folder if self._temporary_folder is None else Path(self._temporary_folder.name)
        self._shard_set = WorkerShards(work, folder, shared, self._on_finished)
        self._timer = _UnrecordedTimer(folder)
        self._compute_thread.submit(self._compute_shards, work.strict)
        return shared

    def compute(self, number: int, given_regions: RegionsById) -> Finished | Failed:
        """Compute a shard, after those of earlier calls that have not returned yet, and wait until it is written.

        Args:
            number: number of the shard.
            given_regions: the regions of the shard's images; empty if regions are to be detected.

        Returns:
            The finished shard, or why the worker has failed.
        """
        with self._lock:
            self._given_regions |= given_regions
            future = self._futures.setdefault(number, Future())
            if self._error is not None:
                return _failed_message(self._error)
            self._todo.put(number)
        try:
            future.result()
            finished = self._shard_set.take(number)
        except Exception as error:
            return _failed_message(error)
        return replace(finished, orientations=dict(self._tools.orientations), notes=self._notes.take())

    def stop(self) -> tuple[dict[str, float], dict[str, float]]:
        """Stop after the current batch; returns the seconds per stage and per part of the network."""
        self._stopping = True
        self._todo.put(_END)
        self._compute_thread.shutdown()
        if self._temporary_folder is not None:
            self._temporary_folder.cleanup()
        return self._timer.stages, self._tools.compute_seconds()

    def _on_finished(self, number: int) -> None:
        """Let the call of `compute` that waits for a shard return, and forget the shard's given regions."""
        with self._lock:
            for batch in self._shard_set.shards[number]:
                for record in batch:
                    self._given_regions.pop(record.id, None)
            future = self._futures.pop(number, None)
        if future is not None:  # None if the worker has failed
            future.set_result(None)

    def _on_failed(self, error: BaseException) -> None:
        """Let all calls of `compute`, now and later, return an error."""
        with self._lock:
            self._error = error
            futures, self._futures = list(self._futures.values()), {}
        for future in futures:
            future.set_exception(error)

    def _compute_shards(self, strict: bool) -> None:
        """Compute the shards in the queue, until `_END` or an error."""
        tools, timer = self._tools, self._timer
        queued_batches: deque[list[ImageRecord]] = deque()  # batches whose images are loaded or being loaded
        shard_numbers: queue.SimpleQueue[int] = queue.SimpleQueue()  # the shards to write, for the writer

        def generate_batches() -> Generator[list[ImageRecord] | None, None, None]:
            """The batches of the shards in the queue.

            If the queue is empty while batches are being loaded, yields None, so that those are computed meanwhile.
            """
            while True:
                try:
                    number = self._todo.get(block=not queued_batches)
                except queue.Empty:
                    yield None
                    continue
                shard_numbers.put(number)
                for batch in self._shard_set.shards[number] if number != _END else ():
                    queued_batches.append(batch)
                    yield batch
                if number == _END or self._stopping:
                    return

        try:
            with (
                tools.context(),
                closing(load_ahead(tools.load, generate_batches(), tools.threads)) as loaded,
                progress_bar(None, "", "image", disable=True) as bar,
                _ReportingWriter(
                    self._shard_set,
                    iter(shard_numbers.get, _END),
                    timer,
                    bar,
                    tools.stamp_of,
                    on_failed=self._on_failed,
                ) as background,
            ):
                try:
                    while not self._stopping and (images := _timed_next(loaded, timer)) is not None:
                        batch = queued_batches.popleft()
                        # in place of an unusable image, there is the reason
                        unusable = [image for image in images if isinstance(image, str)]
                        if strict and unusable:
                            raise UnusableImageError(unusable[0])
                        with timer.timed("compute"):
                            finish = start_batch(batch, images, tools.compute)
                        with timer.timed("wait"):
                            background.put(finish)
                finally:
                    shard_numbers.put(_END)
        except BaseException as error:
            self._on_failed(error)


def _timed_next(loaded: Iterator[list[Any]], timer: Timer) -> list[Any] | None:
    """The images of the next batch, None at the end; raises `_MachineFailure` if this machine cannot load them."""
    try:
        with timer.timed("load"):
            return next(loaded, None)
    except RuntimeFailure as error:  # of the disk, the network or memory; for an unusable image, its reason is returned
        raise _MachineFailure(str(error)) from error


class _ReportingWriter(BackgroundWriter):
    """A `BackgroundWriter` that reports an error in its threads at once, even if the main thread waits for work."""

    def __init__(self, *args: Any, on_failed: Callable[[BaseException], object]) -> None:
        super().__init__(*args)
        self._on_failed = on_failed

    def _run(self) -> None:
        super()._run()
        if self._error is not None:
            self._on_failed(self._error)


class _UnrecordedTimer(Timer):
    """A timer that writes no file; the driver records the timing."""

    def _append_record(self) -> None:
        pass


class _LogCollector(logging.Handler):
    """Collects the warnings that refdet logs in this process, for the driver to log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: list[str] = []
        logging.getLogger("refdet").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    def take(self) -> tuple[str, ...]:
        """Remove and return the collected messages."""
        messages, self._messages = self._messages, []
        return tuple(messages)


def _failed_message(error: BaseException) -> Failed:
    """Convert an exception to a message for the driver, without advice: the driver adds that."""
    if isinstance(error, RefdetError):
        message = error.message
    else:
        message = f"{type(error).__name__}: {str(error) or type(error).__name__}"
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and len(chain) < 10:  # a chain may be a cycle
        chain.append(cause)
    kinds: tuple[type[RefdetError], ...] = (InputError, UnusableImageError)  # others become a RuntimeFailure
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeFailure)
    return Failed(" ".join(message.split()), any(map(_is_machine_error, chain)), kind)


def _is_machine_error(error: BaseException) -> bool:
    if isinstance(error, _MachineFailure) or is_disk_full(error) or is_system_error(error):
        return True
    return "OutOfMemory" in type(error).__name__  # torch's, by name as this module does not import torch
