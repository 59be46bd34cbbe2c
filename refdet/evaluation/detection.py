"""Detection AP of a checkpoint on an instances file."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.image_orientation import OrientationNote
from refdet.data.image_source import ImageSource
from refdet.detector.checkpoint import load_meta
from refdet.errors import InputError, RuntimeFailure
from refdet.evaluation.average_precision import box_and_mask_ap, coco_results, why_undefined
from refdet.evaluation.evaluation_data import EvaluationData
from refdet.evaluation.regions_on_ray import regions_on_ray
from refdet.extraction.load_ahead import load_ahead
from refdet.extraction.options import check_count
from refdet.extraction.pipeline import start_batch
from refdet.extraction.steps import Finish
from refdet.files.progress import progress_bar
from refdet.files.short_text import format_share
from refdet.structures.detection_options import DetectionOptions
from refdet.structures.regions import Regions

if TYPE_CHECKING:
    from refdet.detector.loading import TrainedDetector

log = logging.getLogger(__name__)


def evaluate(
    run: Path,
    instances: Path,
    images: Path,
    *,
    batch_size: int | None = None,
    device: str | None = None,
    precision: str = "float32",
    workers: int | None = None,
    exif: str = "ignore",
    crowd_as_object: bool = False,
    ray: str | None = None,
) -> dict[str, dict[str, float | None] | None]:
    """Box and mask AP of a detector on all images of an instances file.

    Evaluates the same regions as `refdet.extraction.extract.extract_features` writes with its default thresholds. An
    image that cannot be used is an error, since its objects would count as missed.

    Args:
        run: run directory of the detector.
        instances: COCO instances JSON.
        images: folder or zip of its images.
        batch_size: images per batch; None for 4, or on a GPU as many as fit.
        device: "cpu", "cuda", "cuda:1"; None for a GPU if there is one.
        precision: "float32", or "tf32" or "bfloat16" if the device has it.
        workers: threads that read images ahead; None for 2, or on a GPU 8, but not more than there are cores.
        exif: "ignore" or "apply" the EXIF orientation of the images.
        crowd_as_object: take annotations of ``iscrowd`` 1 as objects.
        ray: detect on a Ray cluster, as `refdet.extraction.extract.extract_features` does.

    Returns:
        {"bbox": values, "segm": values or None without a mask branch}; the values of `coco_ap`, None if there are no
        objects.

    Raises:
        ArgumentError: ``batch_size`` or ``workers`` is not a number of 1 or more.
        InputError: the categories of detector and file differ, an image cannot be read, or the cluster cannot be used.
        RuntimeFailure: the device has too little memory for an image, or no worker of the cluster is left.
    """
    batch_size, workers = check_count("batch_size", batch_size), check_count("workers", workers)
    meta = load_meta(run)
    for line in meta.warnings():
        log.warning("%s", line)
    data = EvaluationData.open(instances, images, exif, crowd_as_object)
    data.check_categories(meta.categories, f"`run` {run}")
    warn_about_annotations(data.index, meta.recipe.model.masks)
    if ray is None:
        return detection_ap(_load_detector(run, device, precision), data, batch_size, workers)
    regions = regions_on_ray(
        run,
        data.index,
        images,
        ray,
        batch_size=batch_size,
        device=device,
        precision=precision,
        workers=workers,
        exif=exif,
        crowd_as_object=crowd_as_object,
    )
    return box_and_mask_ap(data.index, data.index.images, coco_results(regions), meta.recipe.model.masks)


def detection_ap(
    detector: TrainedDetector,
    data: EvaluationData,
    batch_size: int | None = None,
    workers: int | None = None,
    *,
    desc: str = "evaluate",
    leave: bool = True,
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float | None] | None]:
    """Like `evaluate`, for a loaded detector and checked data.

    Args:
        detector: loaded with ``for_inference=True``; computes in its precision.
        data: the images and their annotations.
        batch_size: as in `evaluate`.
        workers: as in `evaluate`.
        desc: label of the progress bar.
        leave: whether the finished bar stays on the terminal.
        on_image: called after each image; may raise to end early.

    Returns:
        As `evaluate`.

    Raises:
        InputError: an image cannot be read.
        RuntimeFailure: the device has too little memory for an image.
    """
    results: list[dict[str, Any]] = []
    with (
        OrientationNote(data.source),
        progress_bar(len(data.records), desc, "image", leave=leave) as bar,
    ):
        for regions in detect_regions(detector, data.source, data.records, batch_size, workers):
            results += coco_results([regions])
            bar.update()
            on_image()
    return box_and_mask_ap(data.index, data.index.images, results, detector.meta.recipe.model.masks)


def _load_detector(run: Path, device: str | None, precision: str) -> TrainedDetector:
    """Load the detector of a run, in float32 (with a warning) if the device does not support the precision."""
    from refdet.detector import loading
    from refdet.device import resolve_device, supported_precision

    torch_device = resolve_device(device)
    if supported_precision(precision, torch_device) != precision:
        log.warning(
            "note: `precision` %s: this processor has no %s arithmetic: computing in float32", precision, precision
        )
        precision = "float32"
    return loading.load(run, torch_device, for_inference=True, precision=precision)


def detect_regions(
    detector: TrainedDetector,
    source: ImageSource,
    records: Sequence[ImageRecord],
    batch_size: int | None = None,
    workers: int | None = None,
) -> Iterator[Regions]:
    """Detect regions as an extraction with its default options does, without features.

    Args:
        detector: loaded with ``for_inference=True``; computes in its precision.
        source: folder or zip of the images.
        records: the images.
        batch_size: as in `evaluate`.
        workers: as in `evaluate`.

    Raises:
        InputError: an image cannot be read.
        RuntimeFailure: the device has too little memory for an image.
    """
    import torch

    from refdet.data.training_batches import group_by_input_size
    from refdet.extraction.batch_size import auto_batch_size, split_on_oom
    from refdet.extraction.computing import make_detect
    from refdet.extraction.defaults import default_batch_size, default_workers

    device, options = next(detector.model.parameters()).device, DetectionOptions()
    out_of_memory = f"{device} has too little memory for one image; free some of it"

    compute = split_on_oom(make_detect(detector, options, ()))  # () for no features, as below
    try:
        with detector.inference():
            size = batch_size or default_batch_size(device) or auto_batch_size(detector, records, options, ())
    except torch.cuda.OutOfMemoryError as error:
        raise RuntimeFailure(out_of_memory) from error
    batches = group_by_input_size(records, detector.meta.recipe.input, size)
    pending: deque[Finish] = deque()  # while one batch is being finished, a GPU computes the next one
    with closing(load_ahead(source.read, batches, workers or default_workers(device))) as loaded:
        for batch, images in zip(batches, loaded, strict=True):
            # `load_ahead` returns the reason instead of an image that cannot be read
            error_message = next((image for image in images if isinstance(image, str)), None)
            if error_message is not None:
                raise InputError(error_message)
            try:
                with detector.inference():
                    pending.append(start_batch(batch, images, compute))
            except torch.cuda.OutOfMemoryError as error:
                raise RuntimeFailure(out_of_memory) from error
            if len(pending) > 1:
                yield from pending.popleft()()
        while pending:
            yield from pending.popleft()()


def warn_about_annotations(index: CocoIndex, masks: bool) -> None:
    """Warn if AP is undefined, or, with ``masks``, if mask AP will use boxes in the place of missing masks."""
    annotations = [annotation for image_annotations in index.annotations.values() for annotation in image_annotations]
    reason = why_undefined(index, index.images)
    if reason:
        has_crowds = any(annotation.iscrowd for annotation in annotations)
        log.warning("note: %s: %s%s", index.path, reason, ", or give `crowd_as_object=True`" if has_crowds else "")
    without_masks = sum(not annotation.segmentation for annotation in annotations)
    if masks and without_masks:
        log.warning(
            "note: %s: %s no segmentation; mask AP uses boxes instead",
            index.path,
            format_share(without_masks, len(annotations), "annotation", "has"),
        )
