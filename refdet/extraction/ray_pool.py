"""The workers on a Ray cluster: starting, calling and losing them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from refdet.errors import InputError, RuntimeFailure
from refdet.extraction.ray_cluster import Cluster
from refdet.extraction.ray_messages import Failed, MakeTools, Started
from refdet.extraction.ray_worker import ShardWorker
from refdet.files.short_text import format_count

log = logging.getLogger(__name__)

SHARDS_PER_WORKER = 2  # one that it computes, and one whose images it loads
MAX_LOST = 3  # fail when this many workers are lost on the same shard, or since the last shard was finished
_POLL_SECONDS = 1.0  # seconds between checks of the cluster
_STOP_TIMEOUT = 5.0  # seconds for workers to stop before they are killed
_SLOW_START = 60.0  # seconds without a started worker until a note is logged


@dataclass(eq=False)
class Worker:
    """The driver's view of a worker.

    Attributes:
        actor: its Ray actor, of a `ShardWorker`.
        node: Ray's id of the machine.
        name: host and a number, such as "gpu7/0"; "" before the worker has started.
        started: message of the worker when it had started; None before.
        work_sent: whether the `Work`, the description of the extraction in `ray_messages`, was sent to the worker.
        ready: whether the worker has received the `Work`, and accepts shards.
        shards: numbers of the shards assigned to the worker, in the order of computation.
        finished: number of images that the worker has finished.
        work_sent_at: when the `Work` was sent to the worker, in seconds of ``time.monotonic``; 0 before.
        updated: when the worker last finished a shard, in seconds of ``time.monotonic``; 0 before the first.
    """

    actor: Any
    node: str
    name: str = ""
    started: Started | None = None
    work_sent: bool = False
    ready: bool = False
    shards: list[int] = field(default_factory=list)
    finished: int = 0
    work_sent_at: float = 0.0
    updated: float = 0.0

    @property
    def speed(self) -> float:
        """Images per second up to the last finished shard."""
        return self.finished / (self.updated - self.work_sent_at) if self.finished else 0.0

    def state(self) -> dict[str, Any]:
        """Progress of a started worker, for `refdet.extraction.workers_file.write_workers`."""
        assert self.started is not None
        now = time.monotonic()
        return {
            "worker": self.name,
            "host": self.started.host,
            "pid": self.started.pid,
            "state": "computing",
            "shards": self.shards,
            "finished": self.finished,
            "images_per_second": round(self.speed, 2),
            "updated": time.time() - (now - (self.updated or self.work_sent_at or now)),
        }


class Pool:
    """Workers on a cluster; created by `worker_pool`.

    Args:
        cluster: the cluster.
        make: prepares a worker: called on its machine, it loads the detector.
        timeout: seconds without any worker after which the extraction fails.

    Attributes:
        ray: the package ``ray``.
        workers: the workers that are starting or have started, without dropped ones.
        lost: number of workers that were lost since the last shard was finished.
    """

    def __init__(self, cluster: Cluster, make: MakeTools, timeout: float) -> None:
        self.ray, self._cluster, self._timeout = cluster.ray, cluster, timeout
        self._make = self.ray.put(make)
        options = {"max_concurrency": 2 + SHARDS_PER_WORKER, "max_restarts": 0, **cluster.resources}
        self._actor_class = self.ray.remote(**options)(ShardWorker)
        self.workers: list[Worker] = []
        self.lost = 0
        self._calls: dict[Any, tuple[Worker, str]] = {}  # reference -> worker and method
        self._refused: Counter[str] = Counter()  # node -> number of its slots that cannot be used
        self._refusal: Failed | None = None  # the last reason why a slot cannot be used
        self._loss_reason = ""  # why the last worker was lost
        self._on_host: Counter[str] = Counter()  # host -> number of workers that have started there
        self._logged: set[str] = set()
        self._last_alive = time.monotonic()

    def start(self) -> Started:
        """Start a worker in each slot, and wait for the first one.

        Raises:
            InputError: no worker finds the software, checkpoint or images; the message is that of the last worker.
            RuntimeFailure: no worker starts.
        """
        started_at = time.monotonic()
        while True:
            self.fill_slots()
            for worker, _, answer in self.answers():
                self.handle_start(worker, answer)
            for worker in self.workers:
                if worker.started:
                    return worker.started
            self.check_alive(fix="")
            if time.monotonic() - started_at > _SLOW_START:
                self.log_once("note: waiting for the Ray cluster to start a worker; others may be using it")

    def fill_slots(self) -> None:
        """Start workers in free slots, also on machines that have joined the cluster since.

        A slot is room for one worker: a GPU, or a group of CPUs.
        """
        if self.lost >= MAX_LOST:
            return
        used = self._refused + Counter(worker.node for worker in self.workers)
        for node, count in self._cluster.count_slots().items():
            for _ in range(count - used[node]):
                on_node = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
                actor = self._actor_class.options(scheduling_strategy=on_node).remote(self._make)
                worker = Worker(actor, node)
                self.workers.append(worker)
                self.call(worker, "start")

    def handle_start(self, worker: Worker, answer: Started | Failed | None) -> None:
        """Handle the answer of a worker to ``start``, None if it was lost."""
        if isinstance(answer, Started):
            first = next((other.started for other in self.workers if other.started), answer)
            if (answer.precision, answer.kernels) == (first.precision, first.kernels):
                worker.started = answer
                worker.name = f"{answer.host}/{self._on_host[answer.host]}"
                self._on_host[answer.host] += 1
                return
            actual, expected = (f"{start.precision}, {start.kernels}" for start in (answer, first))
            answer = Failed(
                f"{answer.host} has {actual}, and others {expected}", is_machine_error=True, kind=InputError
            )
        if answer is None:
            self.drop(worker, lost=True)
        else:
            self.refuse(worker, answer)

    def refuse(self, worker: Worker, failure: Failed) -> None:
        """Drop a worker that cannot compute on its machine, and do not use its slot again."""
        self._refused[worker.node] += 1
        self._refusal = failure
        self.drop(worker)
        self.log_once(f"note: a worker is left out: {failure.message}")

    def drop(self, worker: Worker, lost: bool = False) -> None:
        """Kill and remove a worker, whose calls will not be answered; ``lost`` counts it towards `MAX_LOST`."""
        if worker in self.workers:
            self.workers.remove(worker)
            self.lost += lost
        self._calls = {call: target for call, target in self._calls.items() if target[0] is not worker}
        with suppress(Exception):
            self.ray.kill(worker.actor)

    def check_alive(self, fix: str) -> None:
        """Raise an error if there is no worker and none can be expected; if one can be expected, wait a moment.

        Args:
            fix: what the user can do, for the end of the message; "" before any shard is computed.

        Raises:
            InputError: no worker finds the software, checkpoint or images, and ``fix`` is "".
            RuntimeFailure: all workers were lost or refused, or there has been no worker for `timeout` seconds.
        """
        if self.workers:
            self._last_alive = time.monotonic()
            return
        slots = self._cluster.count_slots().items()
        refusal = self._refusal if all(count <= self._refused[node] for node, count in slots) else None
        if refusal and not fix:
            raise refusal.kind(refusal.message)
        if refusal or self.lost >= MAX_LOST or time.monotonic() - self._last_alive > self._timeout:
            reason = refusal.message if refusal else self._loss_reason
            problem = f"no worker is left ({reason})" if reason else "the Ray cluster has no room for a worker"
            if fix:
                raise RuntimeFailure(problem, fix=fix)
            raise RuntimeFailure(f"{problem}; check the cluster with ray status")
        time.sleep(_POLL_SECONDS / 10)

    def call(self, worker: Worker, method: str, *arguments: Any) -> None:
        """Call a method of a worker without waiting; `answers` yields the answer."""
        self._calls[getattr(worker.actor, method).remote(*arguments)] = (worker, method)

    def answers(self) -> Iterator[tuple[Worker, str, Any]]:
        """Wait up to a second for calls to finish, and yield (worker, method, answer); None if the worker was lost."""
        waiting = list(self._calls)
        if not waiting:
            return
        done = self._wait(waiting, count=1, seconds=_POLL_SECONDS)
        if done:  # take all that have finished
            done = self._wait(waiting, count=len(waiting), seconds=0)
        for reference in done:
            call = self._calls.pop(reference, None)
            if call is None:  # of a worker that was dropped meanwhile
                continue
            answer: Any = None
            try:
                answer = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                answer = Failed(one_line(error), is_machine_error=False)
            except self.ray.exceptions.RayError as error:
                log.info("%s: %s", call[0].name, error)
                self._loss_reason = one_line(error)
            yield (*call, answer)

    def _wait(self, calls: list[Any], count: int, seconds: float | None = None) -> list[Any]:
        """Wait until ``count`` of the calls are answered or the time, if any, is over; returns the answered calls."""
        try:
            done: list[Any] = self.ray.wait(calls, num_returns=count, timeout=seconds)[0]
        except SystemError as error:  # raised by Ray for an exception of a signal handler while it waits
            if isinstance(error.__cause__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
        return done

    def auto_batch_size(self) -> int:
        """Let a started worker measure the number of images that fit into its memory.

        Raises:
            RuntimeFailure: the worker was lost or failed.
        """
        worker = next(worker for worker in self.workers if worker.started)
        try:
            call = worker.actor.auto_batch_size.remote()
            self._wait([call], count=1)  # raises KeyboardInterrupt for Ctrl-C, which `get` alone may not
            size = self.ray.get(call)
        except self.ray.exceptions.RayError as error:
            raise RuntimeFailure(f"{worker.name}: lost while it measured the batch size ({one_line(error)})") from error
        if isinstance(size, Failed):
            raise RuntimeFailure(f"{worker.name}: {size.message}")
        return int(size)

    def description(self) -> str:
        """Description of the workers that have started, such as "Ray, 2 workers on 1 machine: cpu"."""
        started = [worker.started for worker in self.workers if worker.started]
        devices = Counter(worker.device for worker in started)
        device_text = "; ".join(
            devices if len(devices) == 1 else (f"{count} with {device}" for device, count in devices.items())
        )
        starting = len(self.workers) - len(started)
        starting_text = f", {starting} starting" if starting else ""
        machines = format_count(len({worker.host for worker in started}), "machine")
        return f"Ray, {format_count(len(started), 'worker')} on {machines}{starting_text}: {device_text}"

    def stop(self) -> list[tuple[dict[str, float], dict[str, float]]]:
        """Stop the workers, and kill those that do not stop within `_STOP_TIMEOUT`.

        Returns:
            For each worker that stopped, the results of `ShardWorker.stop`: seconds per stage, and per part of the
            network.
        """
        calls = [worker.actor.stop.remote() for worker in self.workers if worker.work_sent]
        reports = []
        for call in self._wait(calls, len(calls), _STOP_TIMEOUT) if calls else ():
            with suppress(self.ray.exceptions.RayError):  # the worker was lost
                reports.append(self.ray.get(call))
        self.close()
        return reports

    def close(self) -> None:
        """Kill the workers."""
        for worker in list(self.workers):
            self.drop(worker)

    def log_once(self, line: str) -> None:
        """Log a line as a warning, unless it was logged before."""
        if line not in self._logged:
            self._logged.add(line)
            log.warning("%s", line)


@contextmanager
def worker_pool(cluster: Cluster, make: MakeTools, timeout: float = 60.0) -> Iterator[Pool]:
    """Context manager that yields a `Pool` on a cluster, and kills its workers at the end of the block."""
    pool = Pool(cluster, make, timeout)
    try:
        yield pool
    finally:
        pool.close()


def one_line(error: BaseException) -> str:
    """Shorten one of Ray's long error messages to its first line, or to the last one if it has a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if any(line.startswith("Traceback") or line.startswith("File ") for line in lines) else lines[0]
