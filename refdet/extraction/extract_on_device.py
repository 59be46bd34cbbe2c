"""Extraction of a list of images, or one part of it, by a trained detector in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from refdet.data.coco import ImageRecord
from refdet.data.image_orientation import OrientationNote
from refdet.data.training_batches import group_by_input_size
from refdet.detector import loading
from refdet.detector.profiler import Profiler
from refdet.device import describe_device, resolve_device, supported_precision
from refdet.errors import RuntimeFailure
from refdet.extraction.batch_size import auto_batch_size
from refdet.extraction.computing import make_compute
from refdet.extraction.defaults import default_batch_size, default_workers, precision_hint
from refdet.extraction.job import Job
from refdet.extraction.part import Part
from refdet.extraction.parts import extract_part
from refdet.extraction.pipeline import extract
from refdet.extraction.shard_folder import read_batch_size
from refdet.extraction.start_lines import start_lines
from refdet.extraction.summary import Summary
from refdet.ops._library import describe_kernels


def extract_on_device(
    job: Job,
    out: Path,
    device: str,
    part: Part | None,
    *,
    batch_size: int | Literal["auto"] | None,
    workers: int | None,
    resume: bool,
    strict: bool,
    say: Callable[[str], object],
    announce: Callable[[str], object],
) -> Summary:
    """Write the regions and features of images to a store, computed by this process.

    Args:
        job: the extraction.
        out: the store.
        device: "cpu", "cuda", "cuda:1" or "auto".
        part: the part to compute, None to compute all images.
        batch_size: as in `refdet.extraction.extract.extract_features`.
        workers: threads that prefetch images; None for the default of the device.
        resume: as in `refdet.extraction.extract.extract_features`.
        strict: fail at an image that cannot be used.
        say: called with each warning.
        announce: called with each line about the device, the images, the detector and the size of the store.

    Returns:
        Numbers and timings.

    Raises:
        InputError: the checkpoint is replaced while it is loaded, or as `refdet.extraction.pipeline.extract`.
        RuntimeFailure: the device has too little memory for one image, or as `refdet.extraction.pipeline.extract`;
            finished shards are kept.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; finished shards are kept.
    """
    torch_device = resolve_device(device)
    job = job.with_precision(supported_precision(job.options.precision, torch_device), say)
    for line in start_lines(job, describe_device(device), describe_kernels()):
        announce(line)
    if hint := precision_hint(torch_device, job.options.precision):
        announce(hint)
    detector = loading.load(job.checkpoint, torch_device, for_inference=True, precision=job.options.precision)
    job.check_checkpoint()
    compute = make_compute(detector, job.options, None if job.given_regions is None else job.given_regions.for_image)
    records, header, load = job.records, job.header, job.source.read

    def make_batches(size: int) -> list[list[ImageRecord]]:
        return group_by_input_size(records, job.meta.recipe.input, size)

    try:
        with detector.inference(), OrientationNote(job.source):
            size = (
                job.plan.batch_size  # 0 unless `batch_size` is a number
                or ((resume or part is not None) and read_batch_size(out))  # a part resumes what another has started
                or (batch_size is None and default_batch_size(torch_device))
                or auto_batch_size(detector, records, job.options, job.options.features)
            )
            detector.model.profiler = profiler = Profiler(torch_device)
            plan, workers = replace(job.plan, batch_size=size), workers or default_workers(torch_device)
            if part is not None:
                return extract_part(
                    out,
                    plan,
                    header,
                    make_batches,
                    records,
                    load,
                    compute,
                    part,
                    fixed_batch_size=job.plan.batch_size > 0,
                    workers=workers,
                    strict=strict,
                    compute_seconds=profiler.seconds,
                    source=job.source,
                )
            return extract(
                out,
                plan,
                header,
                make_batches(size),
                records,
                load,
                compute,
                resume=resume,
                workers=workers,
                strict=strict,
                compute_seconds=profiler.seconds,
                source=job.source,
            )
    except torch.cuda.OutOfMemoryError as error:
        raise RuntimeFailure(
            f"{torch_device} has too little memory for one image; finished shards are kept: "
            "free some memory and continue with `resume=True`"
        ) from error
