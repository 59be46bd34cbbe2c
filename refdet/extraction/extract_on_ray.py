"""Extraction of a list of images by a trained detector on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from refdet import store
from refdet.data.image_orientation import OrientationNote
from refdet.data.training_batches import group_by_input_size
from refdet.errors import InputError
from refdet.extraction.defaults import CPU_BATCH_SIZE
from refdet.extraction.job import Job
from refdet.extraction.pipeline import extract
from refdet.extraction.ray_cluster import connect
from refdet.extraction.ray_engine import RayEngine
from refdet.extraction.ray_pool import worker_pool
from refdet.extraction.ray_tools import DetectorTools
from refdet.extraction.shard_folder import read_batch_size, read_plan, shards_folder
from refdet.extraction.start_lines import start_lines
from refdet.extraction.summary import Summary, summarize_store


def extract_on_ray(
    job: Job,
    out: Path,
    address: str,
    *,
    device: str | None,
    batch_size: int | Literal["auto"] | None,
    workers: int | None,
    resume: bool,
    strict: bool,
    say: Callable[[str], object],
    announce: Callable[[str], object],
) -> Summary:
    """Write the regions and features of images to a store, computed by all GPUs or CPUs of a Ray cluster.

    Args:
        job: the extraction.
        out: the store. A worker that sees its folder of shards writes shards there; another one sends them to this
            process.
        address: "local", "auto" or "HOST:PORT".
        device: "cpu", "cuda", or "auto" or None for GPUs if the cluster has any.
        batch_size: as in `refdet.extraction.extract.extract_features`.
        workers: threads of each Ray worker that prefetch images; None for the default of its device.
        resume: as in `refdet.extraction.extract.extract_features`.
        strict: fail at an image that cannot be used.
        say: called with each warning.
        announce: called with each line about the workers, the images, the detector and the size of the store.

    Returns:
        Numbers and timings; the seconds of the stages are means over the workers.

    Raises:
        InputError: the cluster cannot be used, or no worker sees the checkpoint and the images.
        RuntimeFailure: as `refdet.extraction.pipeline.extract`, or no worker is left; finished shards are kept.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; finished shards are kept.
    """
    if resume and not strict and _is_complete(job, out):
        return summarize_store(out, timer=None, compute_seconds=dict, batch_size=read_batch_size(out) or 0)
    with connect(address, device) as cluster:
        tools = DetectorTools.from_job(job, "cuda" if cluster.gpus else "cpu", workers)
        with worker_pool(cluster, tools) as pool, OrientationNote(job.source) as orientation:
            first_worker = pool.start()
            job = job.with_precision(first_worker.precision, say)  # the pool refuses workers of another precision
            for line in start_lines(job, pool.description(), first_worker.kernels):
                announce(line)
            size = (
                job.plan.batch_size  # 0 unless `batch_size` is a number
                or (resume and read_batch_size(out))
                or (batch_size is None and not cluster.gpus and CPU_BATCH_SIZE)
                or pool.auto_batch_size()
            )
            plan = replace(job.plan, batch_size=size)
            batches = group_by_input_size(job.records, job.meta.recipe.input, size)
            engine = RayEngine(pool, None if job.given_regions is None else job.given_regions.for_image, strict)
            try:
                return extract(
                    out,
                    plan,
                    job.header,
                    batches,
                    job.records,
                    job.source.read,
                    compute=None,  # the engine computes
                    resume=resume,
                    strict=strict,
                    compute_seconds=lambda: engine.computing,
                    engine=engine,
                    source=job.source,
                )
            finally:
                orientation.add(engine.orientations)


def _is_complete(job: Job, out: Path) -> bool:
    """Whether the store is complete and none of its unusable images can now be read, so that no worker is needed."""
    if read_plan(shards_folder(out)) is not None or not out.exists():
        return False
    with store.open(out) as finished:
        # Whether this is another setting is known only once a worker has said which precision it supports.
        if finished.options.get("precision") != job.options.precision:
            return False
        errors = finished.errors
    for record in job.records:
        if record.id in errors:
            with suppress(InputError):
                job.source.read(record)
                return False
    return True
