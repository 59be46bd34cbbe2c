"""Worker processes that prefetch training batches.

Each worker has its own pipe, so that the death of a worker is always noticed and waiting for a batch can be
interrupted. In torch's DataLoader all workers share a queue, and training hangs if a batch cannot be sent for lack of
shared memory, as the error is lost in a thread of the worker.
"""

from __future__ import annotations

import gc
import multiprocessing.util
import os
import queue
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing as torch_multiprocessing

from refdet.data.training_batches import Batch, TrainingBatches, max_image_bytes
from refdet.errors import RuntimeFailure
from refdet.files.short_text import format_count
from refdet.interrupt import Stop, StopRequested, ignore_signals

SHARED_MEMORY = Path("/dev/shm")  # holds tensors sent between processes
_SHARED_MEMORY_FIX = "in docker start the container with docker run --shm-size={}m, or train with `train.workers=0`"
_PREFETCH_FACTOR = 2  # batches prefetched per worker
_POLL_SECONDS = 0.2  # between checks for a signal
_JOIN_SECONDS = 1.0  # for a worker to exit before it is killed


@contextmanager
def prefetch_batches(
    batches: TrainingBatches, steps: range, workers: int, device: torch.device, stop: Stop
) -> Iterator[Iterator[Batch]]:
    """Context manager that yields an iterator over the batches of some steps, prefetched by worker processes.

    Args:
        batches: makes the batch of a step.
        steps: the steps, in order.
        workers: number of processes; 0 to make the batches in this one.
        device: device to train on; batches for a GPU are pinned.
        stop: a signal interrupts waiting for a batch with StopRequested.

    Raises:
        RefdetError: from the iterator: an image cannot be used.
        RuntimeFailure: from the iterator: a worker died or cannot send its batches.
    """
    if workers == 0:
        yield _make_in_this_process(batches, steps, device, stop)
        return
    pool = _WorkerPool(batches, steps, workers, device)
    try:
        yield pool.batches(stop)
    finally:
        pool.shut_down()


@contextmanager
def freeze_gc() -> Iterator[None]:
    """Context manager that hides existing objects from the garbage collector.

    Otherwise it would write to their memory pages, which would then be copied in every worker.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _make_in_this_process(batches: TrainingBatches, steps: range, device: torch.device, stop: Stop) -> Iterator[Batch]:
    for step in steps:
        with stop.interrupt_waits():
            batch = _pin(_batch_or_raise(batches[step]), device)
        yield batch


def _pin(batch: Batch, device: torch.device) -> Batch:
    return batch.pin_memory() if device.type == "cuda" else batch


def _batch_or_raise(result: Batch | BaseException) -> Batch:
    """Return a batch; raise an error, which `TrainingBatches` returns if an image cannot be used."""
    if isinstance(result, Batch):
        return result
    raise result


class _WorkerDied(Exception):
    """A worker's pipe was closed."""


class _Worker:
    """One worker process and the pipe to it."""

    def __init__(self, batches: TrainingBatches) -> None:
        self.pipe, worker_end = torch_multiprocessing.Pipe()
        self.process = torch_multiprocessing.Process(
            target=_serve_batches, args=(batches, worker_end, self.pipe), daemon=True
        )
        self.process.start()
        worker_end.close()  # so that only the worker has it open, and the pipe closes with the worker

    def request(self, step: int) -> None:
        """Queue the batch of a step."""
        with suppress(OSError):  # the worker is dead, which `receive` reports
            self.pipe.send(step)

    def receive(self) -> Batch:
        """Wait for the next batch."""
        try:
            received = self.pipe.recv()
        except (EOFError, ConnectionError, FileNotFoundError) as error:  # tensors come through a separate socket
            self.process.join(_JOIN_SECONDS)
            raise _WorkerDied from error
        if isinstance(received, tuple):
            raised, trace = received
            raise raised from RuntimeError(trace)
        return _batch_or_raise(received)


class _WorkerPool:
    """The workers of a training run, and the thread that receives their batches.

    A *position* is an index into `steps`. The workers take turns: worker i of n makes the batches at positions i,
    i + n, and so on.
    """

    def __init__(self, batches: TrainingBatches, steps: range, workers: int, device: torch.device) -> None:
        self._steps, self._device = steps, device
        # not SimpleQueue, which waits forever if a signal arrives just as a timeout ends (CPython 3.11)
        self._received: queue.Queue[Batch | BaseException] = queue.Queue()  # in order; ends after an exception
        self._workers: list[_Worker] = []
        multiprocessing.util.get_temp_dir()  # shared by all workers; a killed worker would leave its own behind
        for _ in range(min(workers, max(len(steps), 1))):
            self._workers.append(_Worker(batches))
        for position in range(min(_PREFETCH_FACTOR * len(self._workers), len(steps))):
            self._request(position)
        # receives and pins batches while the main thread computes; ends with the workers
        self._thread = threading.Thread(target=self._receive, name="receive batches", daemon=True)
        self._thread.start()

    def _worker_of(self, position: int) -> _Worker:
        return self._workers[position % len(self._workers)]

    def _request(self, position: int) -> None:
        if position < len(self._steps):
            self._worker_of(position).request(self._steps[position])

    def _receive(self) -> None:
        """Receive all batches, one after the other, until the first error."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is per thread
        for position in range(len(self._steps)):
            worker = self._worker_of(position)
            try:
                self._received.put(_pin(worker.receive(), self._device))
            except _WorkerDied:
                self._received.put(RuntimeFailure(_cause_of_death(worker.process.exitcode)))
                return
            except BaseException as error:
                self._received.put(error)
                return

    def batches(self, stop: Stop) -> Iterator[Batch]:
        """Iterate over the batches in order."""
        for position in range(len(self._steps)):
            batch = _batch_or_raise(self._next(stop))
            self._request(position + _PREFETCH_FACTOR * len(self._workers))  # only now, to bound the memory
            yield batch
            del batch  # frees its memory while the next one is awaited

    def _next(self, stop: Stop) -> Batch | BaseException:
        """Wait for the next batch or error; raises StopRequested after a signal."""
        while not stop.requested:
            try:
                return self._received.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                pass
        raise StopRequested

    def shut_down(self) -> None:
        """Stop the workers; those that do not exit in time, such as in a hanging read, are killed."""
        for worker in self._workers:
            with suppress(OSError):
                worker.pipe.send(None)
        deadline = time.monotonic() + _JOIN_SECONDS
        for worker in self._workers:
            worker.process.join(max(deadline - time.monotonic(), 0))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join(_JOIN_SECONDS)
        self._thread.join(_JOIN_SECONDS)


def _serve_batches(batches: TrainingBatches, pipe: Connection, parent_pipe: Connection) -> None:
    """Main loop of a worker process, which answers each step with its batch; ends on None or when the parent dies.

    If an image cannot be used, the answer is the RefdetError that `TrainingBatches` returns for it. For an unexpected
    error, it is the error and its traceback.
    """
    ignore_signals()
    parent_pipe.close()  # an inherited copy would keep the pipe open after the parent's death
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while (step := pipe.recv()) is not None:
            try:
                result: Any = batches[step]
            except Exception as error:
                result = (error, traceback.format_exc())
            try:
                pipe.send(result)
            except ConnectionError:
                raise
            except Exception as error:
                pipe.send(RuntimeFailure(_send_failure(error)))


def _cause_of_death(code: int | None) -> str:
    """Error message for a worker that died."""
    if code == -signal.SIGBUS:
        return f"worker process: died of SIGBUS, probably as {SHARED_MEMORY} is full; {_SHARED_MEMORY_FIX.format(1024)}"
    if code == -signal.SIGKILL:
        return (
            "worker process: killed, possibly because memory ran out (see dmesg); lower train.workers or "
            "train.batch_size if it was memory"
        )
    how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    return f"worker process: ended {how}; use `train.workers=0` to avoid worker processes"


def _send_failure(error: Exception) -> str:
    """Error message for a batch that could not be sent."""
    text = " ".join(str(error).split())
    if "No space left" in text or "shared memory" in text or "shm" in text:
        return _shared_memory_failure("no room for a batch of a worker process")
    return f"worker process: cannot send its batch ({text}); use `train.workers=0` to avoid worker processes"


def check_shared_memory(batches: TrainingBatches, workers: int, local_world_size: int = 1) -> None:
    """Check that the prefetched batches fit into /dev/shm.

    Args:
        batches: the batches.
        workers: number of worker processes of each training process.
        local_world_size: number of training processes on this machine, which share its /dev/shm.

    Raises:
        RuntimeFailure: they do not fit.
    """
    free = _free_bytes()
    if free is None or workers == 0:
        return
    sizes = _image_bytes(batches)
    # for each image of a step: one in each prefetched batch, of typical size, and one in the current batch
    bytes_per_image = int(_PREFETCH_FACTOR * workers * statistics.median(sizes) + max(sizes))
    needed = bytes_per_image * batches.recipe.train.batch_size // batches.world_size * local_world_size
    if free < needed:
        all_workers = format_count(workers * local_world_size, "worker")
        raise RuntimeFailure(_shared_memory_failure(f"batches of {all_workers} need about {_mib(needed)}", needed))


def _image_bytes(batches: TrainingBatches) -> Sequence[int]:
    """The largest size in bytes that each training image can have in a batch."""
    options = batches.recipe.input
    bytes_of_shape: dict[tuple[int, int], int] = {}
    for record in batches.records:
        if (shape := (record.height, record.width)) not in bytes_of_shape:
            bytes_of_shape[shape] = max_image_bytes(*shape, options)
    return [bytes_of_shape[record.height, record.width] for record in batches.records]


def _shared_memory_failure(reason: str, needed: int = 2**29) -> str:
    """Error message for too little shared memory, which suggests twice the bytes needed, in whole MiB."""
    free = _free_bytes()
    free_text = "" if free is None else f", {_mib(free)} are free"
    suggested = -(-2 * needed // 2**20)
    return f"{SHARED_MEMORY} is too small: {reason}{free_text}; {_SHARED_MEMORY_FIX.format(suggested)}"


def _free_bytes() -> int | None:
    """Free bytes of shared memory; None on systems without /dev/shm."""
    try:
        stats = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return stats.f_bavail * stats.f_frsize


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
