"""Extraction of regions and features of a list of images into a store, by a trained detector."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from refdet.data.coco import ImageRecord
from refdet.errors import InputError, RuntimeFailure
from refdet.extraction.image_list import ImageList
from refdet.extraction.job import prepare
from refdet.extraction.options import ExtractOptions, check_count
from refdet.extraction.part import Part
from refdet.extraction.parts import extract_part
from refdet.extraction.pipeline import extract
from refdet.extraction.ray_cluster import check_address
from refdet.extraction.shard_folder import read_batch_size, shards_folder
from refdet.extraction.start_lines import start_lines
from refdet.extraction.summary import Summary


def extract_features(
    checkpoint: str | Path,
    images: str | Path,
    out: str | Path,
    image_list: ImageList,
    *,
    options: ExtractOptions | None = None,
    boxes: str | Path | None = None,
    box_format: str = "xywh",
    batch_size: int | Literal["auto"] | None = None,
    workers: int | None = None,
    device: str = "auto",
    resume: bool = False,
    part: str | None = None,
    ray: str | None = None,
    strict: bool = False,
    say: Callable[[str], object] = warnings.warn,
    announce: Callable[[str], object] = lambda line: None,
) -> Summary:
    """Write the regions and features of images to a store.

    Examples:
        >>> images = refdet.ImageList.of_refer("demo/data/refer", "refcoco", "unc", splits=["val"])
        >>> done = refdet.extract_features("demo/run", "demo/data/train2014", "val.h5", images,
        ...                                options=refdet.ExtractOptions(max_regions=20))
        >>> done.images == len(images.records), done.errors
        (True, 0)

    Args:
        checkpoint: run directory of the detector.
        images: folder or zip of the image files.
        out: HDF5 file to write.
        image_list: the images, and the annotations of their objects.
        options: what to compute and write; the defaults of `ExtractOptions` if None.
        boxes: file of boxes to use instead of detections: COCO results JSON or another store.
        box_format: format of the boxes in ``boxes``, as in `refdet.extraction.boxes_from_file.load_boxes`.
        batch_size: images per batch, or "auto" for as many as fit into memory; None for 4, or on a GPU "auto". An
            extraction that is resumed keeps its batch size unless it is given as a number, which must be the same. It
            changes results only by rounding.
        workers: threads that prefetch images; None for 2, or on a GPU for as many as there are cores, 2 to 8.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one. With ``ray``, "cpu", "cuda" or "auto".
        resume: continue an interrupted extraction into ``out``, or if ``out`` is complete, compute its unusable images
            that can now be read.
        part: "3/8" to compute the third of eight parts, while other processes compute the others into the same folder;
            the part that finishes last writes ``out``. A part resumes what was started, with or without ``resume``.
        ray: compute on all GPUs, or else CPUs, of a Ray cluster: "local" to start one on this machine, "auto" for the
            cluster that this machine belongs to, or an address "HOST:PORT".
        strict: fail at an image that cannot be used, instead of recording the reason in its row.
        say: called with each warning.
        announce: called with each line about the device, the images, the detector and the size of the store.

    Returns:
        The numbers of images, regions and unusable images, and the time.

    Raises:
        ArgumentError: ``image_list`` contains an image twice or was read with another ``crowd_as_object`` than that of
            ``options``, or ``batch_size`` or ``workers`` is not an integer of 1 or more.
        InputError: the checkpoint is missing or is replaced while it is loaded, none of the images is found, ``out``
            exists, the extraction to resume was started with different settings, or the Ray cluster cannot be used.
        RuntimeFailure: the device has too little memory for one image, no image could be used, an image could not be
            used and ``strict`` is True (UnusableImageError), or the disk is full; finished shards are kept.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; finished shards are kept.
    """
    if batch_size != "auto":
        batch_size = check_count("batch_size", batch_size)
    workers = check_count("workers", workers)
    out, parsed_part = Path(out), None if part is None else Part.parse(part)
    if ray is not None:
        check_address(ray)
        if part is not None:
            raise InputError(f"`part` {part}: not together with `ray`, which divides the work itself; give one of them")
    resume_or_part = resume or part is not None  # a part resumes whatever another part has started
    job = prepare(
        checkpoint,
        images,
        out,
        image_list,
        options=options or ExtractOptions(),
        boxes=boxes,
        box_format=box_format,
        batch_size=batch_size,
        resume=resume_or_part,
        say=say,
    )
    if parsed_part is not None:
        parsed_part.check(shards_folder(out))
    if ray is not None:
        from refdet.extraction.extract_on_ray import extract_on_ray

        return extract_on_ray(
            job,
            out,
            ray,
            device=device,
            batch_size=batch_size,
            workers=workers,
            resume=resume,
            strict=strict,
            say=say,
            announce=announce,
        )

    import torch  # imported after the checks above, as it takes seconds

    from refdet.data.image_orientation import OrientationNote
    from refdet.data.training_batches import group_by_input_size
    from refdet.detector import loading
    from refdet.detector.profiler import Profiler
    from refdet.device import describe_device, resolve_device, supported_precision
    from refdet.extraction.batch_size import auto_batch_size
    from refdet.extraction.computing import make_compute
    from refdet.extraction.defaults import default_batch_size, default_workers, precision_hint
    from refdet.ops._library import describe_kernels

    torch_device = resolve_device(device)
    job = job.with_precision(supported_precision(job.options.precision, torch_device), say)
    for line in start_lines(job, describe_device(device), describe_kernels()):
        announce(line)
    if hint := precision_hint(torch_device, job.options.precision):
        announce(hint)
    detector = loading.load(job.checkpoint, torch_device, for_inference=True, precision=job.options.precision)
    job.check_checkpoint()
    compute = make_compute(detector, job.options, None if job.given_regions is None else job.given_regions.for_image)
    records = job.records

    def make_batches(size: int) -> list[list[ImageRecord]]:
        return group_by_input_size(records, job.meta.recipe.input, size)

    try:
        with detector.inference(), OrientationNote(job.source):
            size = (
                job.plan.batch_size  # 0 unless `batch_size` is a number
                or (resume_or_part and read_batch_size(out))
                or (batch_size is None and default_batch_size(torch_device))
                or auto_batch_size(detector, records, job.options, job.options.features)
            )
            detector.model.profiler = profiler = Profiler(torch_device)
            plan, workers = replace(job.plan, batch_size=size), workers or default_workers(torch_device)
            if parsed_part is not None:
                return extract_part(
                    out,
                    plan,
                    job.header,
                    make_batches,
                    records,
                    job.source.read,
                    compute,
                    parsed_part,
                    fixed_batch_size=job.plan.batch_size > 0,
                    workers=workers,
                    strict=strict,
                    compute_seconds=profiler.seconds,
                    source=job.source,
                )
            return extract(
                out,
                plan,
                job.header,
                make_batches(size),
                records,
                job.source.read,
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
