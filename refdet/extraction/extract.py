"""Extraction of regions and features of a list of images into a store, by a trained detector."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from refdet.data.coco import ImageRecord
from refdet.errors import ArgumentError, InputError, RuntimeFailure
from refdet.extraction.given_regions import GivenRegions, given_regions
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions
from refdet.extraction.pipeline import extract
from refdet.extraction.plan import Plan
from refdet.extraction.shard_folder import begun_batch_size, check_begun, check_new
from refdet.extraction.start_lines import start_lines
from refdet.extraction.steps import Compute, Finish
from refdet.extraction.summary import Summary
from refdet.store import Header

if TYPE_CHECKING:
    from refdet.detector.checkpoint import CheckpointMetadata
    from refdet.detector.loading import TrainedDetector
    from refdet.structures.detection_options import DetectionOptions


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
        batch_size: images per batch, or "auto" for as many as fit into memory; None for 4, or on a GPU "auto". It
            changes results only by rounding.
        workers: threads that read images ahead; None for 2, or on a GPU 8, but not more than there are cores.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one.
        resume: continue an interrupted extraction into ``out``.
        strict: stop at an image that cannot be used, instead of recording the reason in its row.
        say: called with each warning.
        announce: called with lines about the device, the images, the detector and the size of the store.

    Returns:
        The numbers of images, regions and unusable images, and the time.

    Raises:
        ArgumentError: ``image_list`` was read with another ``crowd_as_object`` than ``options`` has.
        InputError: there is no checkpoint, none of the images is found, ``out`` exists, or the extraction to resume
            was started with different settings.
        RuntimeFailure: the device has too little memory for one image, no image could be used, or the disk is full;
            finished shards are kept.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; finished shards are kept.
    """
    checkpoint, out, boxes = Path(checkpoint), Path(out), None if boxes is None else Path(boxes)
    options = options or ExtractOptions()
    if boxes is not None:
        options = replace(options, regions="boxes")
    elif options.regions == "boxes":
        raise InputError("`regions='boxes'`: needs a file of them; give `boxes=FILE`")
    if options.regions == "annotations" and options.crowd_as_object != image_list.crowd_as_object:
        raise ArgumentError(
            "crowd_as_object",
            f"is {options.crowd_as_object}, but the image list was read with {image_list.crowd_as_object}",
        )
    from refdet.data.image_orientation import OrientationNote
    from refdet.data.image_source import ImageSource
    from refdet.detector.checkpoint import load_meta
    from refdet.detector.feature_names import check_features

    meta = load_meta(checkpoint)
    check_features(options.features, meta.recipe)
    if not resume:
        check_new(out)
    for line in meta.warnings():
        say(line)
    records, source = image_list.records, ImageSource.open(images, options.exif)
    if not records:
        raise InputError(f"{image_list.index.path}: has no images to extract")
    missing = source.locate(records, image_list.index.images.values())
    if len(missing) == len(records):
        source.refuse_missing(records, missing, image_list.index.path)
    if missing:
        say(
            f"note: `images` {images}: {len(missing)} of the {len(records)} images of {image_list.name} are missing "
            f"and get no regions; the first is {missing[0]}"
        )
    given = given_regions(image_list, options.regions, boxes, box_format, say)
    _check_masks(options, meta, given, checkpoint)

    explicit = batch_size if isinstance(batch_size, int) else None
    plan, header = _planned(image_list, given, boxes, options, explicit, meta, checkpoint)
    # whether the device has another arithmetic is known only after torch is imported
    check_begun(out, plan, header, resume, undecided=("precision",) if options.precision != "float32" else ())

    import torch  # takes seconds, so the checks above come first

    from refdet.data.training_batches import group_by_input_size
    from refdet.detector import loading
    from refdet.detector.profiler import Stages
    from refdet.device import pinned, usable_device, usable_precision
    from refdet.extraction.batch_size import auto_batch_size, split_on_oom
    from refdet.extraction.defaults import default_batch_size, default_workers, precision_hint

    where = usable_device(device)
    precision = usable_precision(options.precision, where)
    if precision != options.precision:
        say(
            f"`precision` {options.precision}: this processor has no {options.precision} arithmetic: "
            f"computing in {precision}, which is {'faster here and ' if options.precision == 'bfloat16' else ''}exact"
        )
        options = replace(options, precision=precision)
        plan = replace(plan, options=plan.options | {"precision": precision})
        header = replace(header, options=plan.options)
    for line in start_lines(image_list, meta, options, device, plan, header, None if given is None else given.count):
        announce(line)
    if hint := precision_hint(where, options.precision):
        announce(hint)
    detector = loading.load(checkpoint, where, for_inference=True, precision=options.precision)
    compute = split_on_oom(
        detecting(detector, options, options.features, options.dtype)
        if given is None
        else _described(detector, given, options)
    )

    def load(record: ImageRecord) -> np.ndarray:
        pixels = source.read(record)
        return pinned(pixels) if where.type == "cuda" else pixels

    try:
        with detector.inference(), OrientationNote(source):
            size = explicit or (resume and begun_batch_size(out))
            size = size or (default_batch_size(where) if batch_size is None else None)
            size = size or auto_batch_size(detector, records, options, options.features)
            detector.model.stages = parts = Stages(where)  # after measuring batch sizes
            batches = group_by_input_size(records, meta.recipe.input, size)
            return extract(
                out,
                replace(plan, batch_size=size),
                header,
                batches,
                records,
                load,
                compute,
                resume,
                workers or default_workers(where),
                strict=strict,
                parts_of_computing=parts.seconds,
            )
    except torch.cuda.OutOfMemoryError as error:
        raise RuntimeFailure(
            f"{where} has too little memory for one image; finished images are kept: "
            "free some memory and continue with `resume=True`"
        ) from error


def _planned(
    image_list: ImageList,
    given: GivenRegions | None,
    boxes: Path | None,
    options: ExtractOptions,
    batch_size: int | None,
    meta: CheckpointMetadata,
    checkpoint: Path,
) -> tuple[Plan, Header]:
    """The plan of the extraction, and the header of the store."""
    from refdet.detector.checkpoint import MODEL, run_directory
    from refdet.detector.feature_names import HEAD, of_regions
    from refdet.structures.provenance import file_sha256

    what: dict[str, Any] = {
        "regions": options.regions,
        "features": list(options.features),
        "dtype": options.dtype,
        "precision": options.precision,
        "compression": options.compression,
    }
    if boxes is not None:
        what |= {"boxes_sha256": file_sha256(boxes), "masks": options.masks}
        if given is not None and given.box_format != "xywh":
            what["box_format"] = given.box_format
    elif given is not None:
        what["instances_sha256"] = file_sha256(image_list.index.path)
        what["masks"] = options.masks
        if options.crowd_as_object:  # only if set, so that extractions of older versions can be resumed
            what["crowd_as_object"] = True
    else:
        what |= {
            "score_threshold": options.score_threshold,
            "nms_threshold": options.nms_threshold,
            "max_regions": options.max_regions,
            "at_least_one": options.lower_threshold_if_empty,
        }
    if options.exif != "ignore":  # the default is left out
        what["exif"] = options.exif
    what |= {
        "image_list": image_list.name,
        "image_list_sha256": image_list.sha256(),
        "checkpoint_sha256": file_sha256(run_directory(checkpoint) / MODEL),
    }
    predicted = options.masks == "predicted" or given is None
    masks = meta.recipe.model.masks if predicted else given is not None and given.masks
    categories = dict(meta.categories) if given is None else given.categories
    classes = [{"id": id_, "name": name} for id_, name in categories.items()]
    header = Header(classes, json.dumps(meta.recipe.to_dict()), meta.provenance.to_json(), what)
    plan = Plan(
        what,
        of_regions(options.features),
        options.dtype,
        masks,
        given is not None and given.ann_ids,
        batch_size or 0,
        tuple(name for name in options.features if name == HEAD),
        options.compression,
    )
    return plan, header


def detecting(
    detector: TrainedDetector, options: DetectionOptions, features: Sequence[str], dtype: str = "float32"
) -> Compute:
    """The function that `refdet.extraction.pipeline.extract` calls to detect regions of a batch of one input size."""
    import torch

    from refdet.detector.predictor import start_detecting

    ids, of_features = detector.meta.category_ids, getattr(torch, dtype)

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        return start_detecting(detector.model, images, batch, ids, options, features=features, dtype=of_features)

    return compute


def _check_masks(
    options: ExtractOptions, meta: CheckpointMetadata, given: GivenRegions | None, checkpoint: Path
) -> None:
    """Raise InputError if masks cannot be predicted."""
    if options.masks != "predicted":
        return
    if given is None:
        raise InputError(
            "`masks='predicted'`: detections have their own masks; it is for `regions='annotations'` or `boxes`"
        )
    if not meta.recipe.model.masks:
        raise InputError(f"`masks='predicted'`: {checkpoint} has no mask branch")
    strange = sorted(given.categories.items() - dict(meta.categories).items())
    if strange:
        raise InputError(
            f"`masks='predicted'`: the detector has no category {strange[0][0]} ({strange[0][1]}), "
            "which the regions may have"
        )


def _described(detector: TrainedDetector, given: GivenRegions, options: ExtractOptions) -> Compute:
    import torch

    from refdet.detector.predictor import start_describing

    dtype = getattr(torch, options.dtype)
    label_of = {category: label for label, category in enumerate(detector.meta.category_ids, start=1)}
    predicted = options.masks == "predicted"

    def compute(batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        bare = [given.of(record) for record in batch]
        labels = (
            [np.array([label_of[c] for c in r.category_ids.tolist()], np.int64) for r in bare] if predicted else None
        )
        rows = [r.boxes for r in bare]
        finish = start_describing(detector.model, images, rows, features=options.features, labels=labels, dtype=dtype)
        return lambda: [
            replace(
                r, features=f.features, masks=r.masks if f.masks is None else f.masks, maps=f.maps, im_info=f.im_info
            )
            for r, f in zip(bare, finish(), strict=True)
        ]

    return compute
