"""Extraction of regions and features of a list of images into a store, by a trained detector."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from refdet.errors import InputError
from refdet.extraction.image_list import ImageList
from refdet.extraction.job import prepare
from refdet.extraction.options import ExtractOptions, check_count
from refdet.extraction.part import Part
from refdet.extraction.ray_cluster import check_address
from refdet.extraction.shard_folder import shards_folder
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
    job = prepare(
        checkpoint,
        images,
        out,
        image_list,
        options=options or ExtractOptions(),
        boxes=boxes,
        box_format=box_format,
        batch_size=batch_size,
        resume=resume or part is not None,  # a part resumes whatever another part has started
        say=say,
    )
    if parsed_part is not None:
        parsed_part.check(shards_folder(out))
    # Torch is imported only now, after all checks that need none, as it takes seconds.
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
    from refdet.extraction.extract_on_device import extract_on_device

    return extract_on_device(
        job,
        out,
        device,
        parsed_part,
        batch_size=batch_size,
        workers=workers,
        resume=resume,
        strict=strict,
        say=say,
        announce=announce,
    )
