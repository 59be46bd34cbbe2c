"""The extraction of `interrupted_extraction` by workers on a Ray cluster of several nodes on this machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from interrupted_extraction import BATCHES, RECORDS, compute, environment, load
from store_examples import HEADER, PLAN

from refdet.data.coco import ImageRecord
from refdet.errors import InputError
from refdet.extraction.pipeline import extract
from refdet.extraction.ray_cluster import connect
from refdet.extraction.ray_engine import RayEngine
from refdet.extraction.ray_messages import Tools
from refdet.extraction.ray_pool import worker_pool
from refdet.extraction.steps import Finish
from refdet.extraction.summary import Summary
from refdet.structures.regions import Regions

# loopback only, no telemetry, no token in the user's folder, and quick detection of dead nodes
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_enable_metrics_collection": "0",
}
NODE = {
    "num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 80 * 2**20,
    "no_monitor": True, "include_log_monitor": False,  # no autoscaling, and no output of the workers' logs
}  # fmt: skip


@contextmanager
def cluster_of(nodes: int) -> Iterator[Any]:
    """A Ray cluster of nodes with one CPU each, on the loopback interface."""
    before = dict(os.environ)
    os.environ.update(environment() | ENVIRONMENT)
    try:
        from ray._private import ray_constants
        from ray.cluster_utils import Cluster

        ray_constants.ENABLE_RAY_CLUSTER = False  # use loopback addresses even if Ray was imported before
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        try:
            for _ in range(nodes - 1):
                cluster.add_node(**NODE)
            yield cluster
        finally:
            cluster.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail if the block takes longer, with an exception that retries do not catch."""

    def fail(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class SlowTools:
    """Makes the tools of a slow worker, which records its batches in a folder, and may fail.

    Attributes:
        folder: folder of the records.
        seconds: duration of a batch.
        die_at: id of an image at which a worker is killed, None for none.
        always: whether every worker is killed there, or only the first.
        missing_on: number of the worker, in order of start from 0, that finds no images; -1 for all.
        missing_node: Ray's id of a node whose workers find no images.
        full_on: number of the worker whose disk is full.
        precision: precision that the worker reports.
        together: number of workers that must have started before any of them computes.
    """

    folder: Path
    seconds: float = 0.1
    die_at: int | None = None
    always: bool = False
    missing_on: int | None = None
    missing_node: str = ""
    full_on: int | None = None
    precision: str = "float32"
    together: int = 1

    def __call__(self, given: Callable[[ImageRecord], Regions]) -> Tools:
        import ray

        number = next(n for n in range(100) if self._first(f"started-{n}"))
        if self.missing_on in (number, -1) or ray.get_runtime_context().get_node_id() == self.missing_node:
            raise InputError(f"`images` /data: not found on node {number}")

        def computing(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
            until = time.monotonic() + 60
            while not (self.folder / f"started-{self.together - 1}").exists():
                assert time.monotonic() < until, f"fewer than {self.together} workers have started"
                time.sleep(0.01)
            time.sleep(self.seconds)
            (self.folder / f"{os.getpid()}-{batch[0].id}").touch()
            if self.die_at in [record.id for record in batch] and (self.always or self._first("died")):
                os.kill(os.getpid(), signal.SIGKILL)
            if number == self.full_on:
                raise OSError(28, "No space left on device", str(self.folder))
            return compute(batch, images)

        return Tools(load, computing, precision=self.precision)

    def _first(self, name: str) -> bool:
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def run_on(address: str, out: Path, make: SlowTools, resume: bool = False, **changes: Any) -> Summary:
    """Extract on a cluster."""
    header = replace(HEADER, options=PLAN.options)
    make.folder.mkdir(exist_ok=True)
    with connect(address, "cpu") as cluster, worker_pool(cluster, make, timeout=5.0) as pool:
        pool.start()
        engine = RayEngine(pool, strict=changes.pop("strict", False))
        given: dict[str, Any] = {"batches": BATCHES, "records": RECORDS, "shard_images": 2} | changes
        return extract(
            out, PLAN, header, load=load, compute=compute, resume=resume, engine=engine, **given
        )  # fmt: skip
