"""Detection AP of a checkpoint on an instances file."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.image_orientation import OrientationNote
from refdet.data.image_source import ImageSource
from refdet.detector.checkpoint import load_meta
from refdet.errors import InputError, RuntimeFailure
from refdet.evaluation.average_precision import coco_ap, coco_results, why_undefined
from refdet.extraction.pipeline import begin_batch, load_ahead
from refdet.extraction.steps import Finish
from refdet.files.progress import progress_bar
from refdet.structures.coco_categories import used
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
    batch_size: int = 4,
    device: str | None = None,
    precision: str = "float32",
    workers: int = 2,
    exif: str = "ignore",
    crowd_as_object: bool = False,
) -> dict[str, dict[str, float | None] | None]:
    """Box and mask AP of a detector on all images of an instances file.

    Evaluates the same regions as `refdet.extraction.extract.extract_features` writes with its default thresholds. An
    image that cannot be used is an error, since its objects would count as missed.

    Args:
        run: run directory of the detector.
        instances: COCO instances JSON.
        images: folder or zip of its images.
        batch_size: images per batch.
        device: "cpu", "cuda", "cuda:1"; None for a GPU if there is one.
        precision: "float32", or "tf32" or "bfloat16" if the device has it.
        workers: threads that read images ahead.
        exif: "ignore" or "apply" the EXIF orientation of the images.
        crowd_as_object: take annotations of ``iscrowd`` 1 as objects.

    Returns:
        {"bbox": rates, "segm": rates or None without a mask branch}; the rates of `coco_ap`, None if there are no
        objects.

    Raises:
        InputError: the categories of detector and file differ, or an image cannot be read.
        RuntimeFailure: the device has too little memory for an image.
    """
    meta = load_meta(run)
    for line in meta.warnings():
        log.warning("%s", line)
    data = EvaluationData.open(instances, images, exif, crowd_as_object)
    data.check_categories(meta.categories, f"`run` {run}")
    log_odd_annotations(data.index, meta.recipe.model.masks)

    from refdet.detector import loading
    from refdet.device import usable_device, usable_precision

    where = usable_device(device)
    if usable_precision(precision, where) != precision:
        log.warning(
            "note: `precision` %s: this processor has no %s arithmetic: computing in float32", precision, precision
        )
        precision = "float32"
    detector = loading.load(run, where, for_inference=True, precision=precision)
    return detection_ap(detector, data, batch_size, workers)


@dataclass(frozen=True)
class EvaluationData:
    """Images and annotations to evaluate a detector on.

    Attributes:
        index: the instances file.
        source: folder or zip of the images, which all have been found.
    """

    index: CocoIndex
    source: ImageSource

    @classmethod
    def open(cls, instances: Path, images: Path, exif: str = "ignore", crowd_as_object: bool = False) -> EvaluationData:
        """Read an instances file and find its images.

        Raises:
            InputError: the file is invalid or has no images, or an image is missing.
        """
        index = CocoIndex.load(instances, crowd_as_object=crowd_as_object)
        source = ImageSource.open(images, exif)
        if not index.images:
            raise InputError(f"{instances}: has no images to evaluate on")
        source.check(list(index.images.values()), instances)
        return cls(index, source)

    @property
    def records(self) -> list[ImageRecord]:
        """The images, in file order."""
        return list(self.index.images.values())

    def check_categories(self, categories: Sequence[tuple[int, str]], owner: str) -> None:
        """Check that the annotations have the categories of a detector.

        Args:
            categories: COCO id and name of each class of the detector.
            owner: what has them, for the error message.

        Raises:
            InputError: they differ.
        """
        ours, theirs = used(dict(categories)), self.index.categories
        if ours != theirs:
            odd = sorted(set(ours.items()) ^ set(theirs.items()))
            raise InputError(
                f"{owner} has {len(ours)} classes, {self.index.path} has {len(theirs)}, and they differ "
                f"({', '.join(f'{i} {name}' for i, name in odd[:3])} ...); evaluate on the dataset it was trained for"
            )


def detection_ap(
    detector: TrainedDetector,
    data: EvaluationData,
    batch_size: int = 4,
    workers: int = 2,
    *,
    desc: str = "evaluate",
    leave: bool = True,
    between: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float | None] | None]:
    """`evaluate` of a loaded detector on checked data; returns the same.

    Args:
        detector: loaded with ``for_inference=True``; computes in its precision.
        data: the images and their annotations.
        batch_size: images per batch.
        workers: threads that read images ahead.
        desc: label of the progress bar.
        leave: whether the finished bar stays on the terminal.
        between: called after each image; may raise to end early.
    """
    index, results = data.index, []
    with (
        OrientationNote(data.source),
        progress_bar(len(index.images), desc, "image", leave=leave) as bar,
    ):
        for regions in detected_regions(detector, data.source, data.records, batch_size, workers):
            results += coco_results([regions])
            bar.update()
            between()
    kinds = ("bbox", "segm") if detector.meta.recipe.model.masks else ("bbox",)
    found = {kind: coco_ap(index, index.images, results, kind) for kind in kinds}
    return {
        kind: {name: rate if rate >= 0 else None for name, rate in found[kind].items()} if kind in found else None
        for kind in ("bbox", "segm")
    }


def detected_regions(
    detector: TrainedDetector,
    source: ImageSource,
    records: Sequence[ImageRecord],
    batch_size: int = 4,
    workers: int = 2,
) -> Iterator[Regions]:
    """Regions of images as an extraction computes them by default, without features.

    Args:
        detector: loaded with ``for_inference=True``; computes in its precision.
        source: folder or zip of the images.
        records: the images.
        batch_size: images per batch.
        workers: threads that read images ahead.

    Raises:
        InputError: an image cannot be read.
        RuntimeFailure: the device has too little memory for an image.
    """
    import torch

    from refdet.data.training_batches import group_by_input_size
    from refdet.device import pinned
    from refdet.extraction.batch_size import split_on_oom
    from refdet.extraction.extract import detecting

    device = next(detector.model.parameters()).device

    def load(record: ImageRecord) -> np.ndarray:
        pixels = source.read(record)
        return pinned(pixels) if device.type == "cuda" else pixels

    compute = split_on_oom(detecting(detector, DetectionOptions(), ()))
    batches = group_by_input_size(records, detector.meta.recipe.input, batch_size)
    begun: deque[Finish] = deque()  # a GPU computes a batch while the previous one is finished
    with closing(load_ahead(load, batches, workers)) as loaded:
        for batch, images in zip(batches, loaded, strict=True):
            bad = next((image for image in images if isinstance(image, str)), None)
            if bad is not None:
                raise InputError(bad)
            try:
                with detector.inference():
                    begun.append(begin_batch(batch, images, compute))
            except torch.cuda.OutOfMemoryError as error:
                raise RuntimeFailure(f"{device} has too little memory for one image; free some of it") from error
            if len(begun) > 1:
                yield from begun.popleft()()
        while begun:
            yield from begun.popleft()()


def log_odd_annotations(index: CocoIndex, masks: bool) -> None:
    """Warn if AP is undefined, or if boxes replace missing masks."""
    reason = why_undefined(index, index.images)
    if reason:
        crowds = any(annotation.iscrowd for of_image in index.annotations.values() for annotation in of_image)
        log.warning("note: %s: %s%s", index.path, reason, ", or give `crowd_as_object=True`" if crowds else "")
    annotations = [annotation for of_image in index.annotations.values() for annotation in of_image]
    bare = sum(not annotation.segmentation for annotation in annotations)
    if masks and bare:
        log.warning(
            "note: %s: %d of %d annotations have no segmentation; mask AP uses their boxes instead",
            index.path,
            bare,
            len(annotations),
        )
