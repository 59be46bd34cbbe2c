"""`Job`: an extraction that has passed all checks that need no torch, to be computed by one or many processes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from refdet.data.coco import ImageRecord
from refdet.errors import ArgumentError, InputError
from refdet.extraction.boxes_from_file import load_boxes, report_images_without_boxes, report_unused_boxes
from refdet.extraction.given_regions import GivenRegions, annotated_regions
from refdet.extraction.image_list import ImageList
from refdet.extraction.options import ExtractOptions
from refdet.extraction.plan import Plan
from refdet.extraction.shard_folder import check_new, check_resumable, read_classes
from refdet.files.short_text import agree, format_share, short_repr
from refdet.store import Header

if TYPE_CHECKING:
    from refdet.detector.checkpoint import CheckpointMetadata
    from refdet.extraction.stamped_source import StampedSource


@dataclass(frozen=True)
class Job:
    """What to extract, by which detector, from which images.

    Attributes:
        checkpoint: run directory of the detector.
        image_list: the images.
        options: what to compute and write.
        meta: metadata of the detector.
        source: the files of the images, already located.
        given_regions: the regions to extract features for; None to detect them.
        plan: what determines the store; its batch size is 0 unless it was requested as a number.
        header: metadata of the store.
    """

    checkpoint: Path
    image_list: ImageList
    options: ExtractOptions
    meta: CheckpointMetadata
    source: StampedSource
    given_regions: GivenRegions | None
    plan: Plan
    header: Header

    @property
    def records(self) -> list[ImageRecord]:
        """The images in the order of the store."""
        return self.image_list.records

    def check_checkpoint(self) -> None:
        """Check, after loading the weights, that the checkpoint is still the one whose hash the store records.

        Raises:
            InputError: the checkpoint has been replaced since `prepare` read it.
        """
        from refdet.detector.checkpoint import MODEL, load_meta, run_directory
        from refdet.structures.provenance import file_sha256

        sha256 = file_sha256(run_directory(self.checkpoint) / MODEL)
        if sha256 != self.plan.options["checkpoint_sha256"] or load_meta(self.checkpoint) != self.meta:
            raise InputError(
                f"`checkpoint` {self.checkpoint}: was replaced while it was loaded, perhaps by a running training; "
                "copy the run directory and use the copy"
            )

    def with_precision(self, precision: str, say: Callable[[str], object]) -> Job:
        """Change the precision to one that the device supports; ``say`` is called with a line if it differs."""
        requested = self.options.precision
        if precision == requested:
            return self
        say(
            f"note: `precision` {requested}: this processor has no {requested} arithmetic: "
            f"computing in {precision}, which is {'faster here and ' if requested == 'bfloat16' else ''}exact"
        )
        plan = replace(self.plan, options=self.plan.options | {"precision": precision})
        return replace(
            self,
            options=replace(self.options, precision=precision),
            plan=plan,
            header=replace(self.header, options=plan.options),
        )


def prepare(
    checkpoint: str | Path,
    images: str | Path,
    out: Path,
    image_list: ImageList,
    *,
    options: ExtractOptions,
    boxes: str | Path | None,
    box_format: str,
    batch_size: int | Literal["auto"] | None,
    resume: bool,
    say: Callable[[str], object],
) -> Job:
    """Check an extraction and plan it, without torch.

    Arguments and errors are those of `refdet.extraction.extract.extract_features`; ``resume`` is True for a part too.
    """
    checkpoint, boxes = Path(checkpoint), None if boxes is None else Path(boxes)
    if boxes is not None:
        options = replace(options, regions="boxes")
    elif options.regions == "boxes":
        raise InputError("`regions='boxes'`: no file with the boxes; give `boxes=FILE`")
    if options.regions == "annotations" and options.crowd_as_object != image_list.crowd_as_object:
        raise ArgumentError(
            "crowd_as_object",
            f"is {options.crowd_as_object}, but {image_list.crowd_as_object} for the image list; use the same for both",
        )
    from refdet.detector.checkpoint import load_meta
    from refdet.detector.feature_names import check_features
    from refdet.extraction.stamped_source import StampedSource

    meta = load_meta(checkpoint)
    check_features(options.features, meta.recipe)
    if not resume:
        check_new(out)
    for line in meta.warnings():
        say(line)
    records, source = image_list.records, StampedSource.open(images, options.exif)
    if not records:
        raise InputError(f"{image_list.index.path}: no images to extract; give a file with images")
    if repeated := [image_id for image_id, count in Counter(record.id for record in records).items() if count > 1]:
        raise ArgumentError("image_list", f"has image {repeated[0]} more than once")
    missing = source.locate(records, image_list.index.images.values())
    if len(missing) == len(records):
        source.raise_missing(records, missing, image_list.index.path)
    if missing:
        say(
            f"note: `images` {images}: {format_share(len(missing), len(records), 'image')} of {image_list.name} "
            f"{agree(len(missing), 'is')} missing and {agree(len(missing), 'gets')} no regions"
            f"{', except those that have them already' if resume else ''}; the first is {missing[0]}"
        )
    given_regions = None
    if boxes is not None:
        given_regions = load_boxes(boxes, image_list.index, box_format, options.exif)
        report_images_without_boxes(boxes, given_regions.count, records, say)
        report_unused_boxes(boxes, given_regions.count, image_list, say)
    elif options.regions == "annotations":
        given_regions = annotated_regions(image_list, say)
    _check_masks(options, meta, given_regions, checkpoint)

    fixed_batch_size = batch_size if isinstance(batch_size, int) else 0
    plan, header = _make_plan(image_list, given_regions, boxes, options, fixed_batch_size, meta, checkpoint)
    if resume and given_regions is not None:
        header = _keep_older_classes(out, header, given_regions, options.features)
    # A precision that the device does not support will be replaced by float32, but that is known only after torch is
    # imported. The precisions are compared when the extraction starts.
    check_resumable(out, plan, header, resume, ignored=("precision",) if options.precision != "float32" else ())
    return Job(checkpoint, image_list, options, meta, source, given_regions, plan, header)


def _make_plan(
    image_list: ImageList,
    given_regions: GivenRegions | None,
    boxes: Path | None,
    options: ExtractOptions,
    batch_size: int,
    meta: CheckpointMetadata,
    checkpoint: Path,
) -> tuple[Plan, Header]:
    """Make the plan of the extraction, with a batch size of 0 if it is not chosen yet, and the header of the store."""
    from refdet.detector.checkpoint import MODEL, run_directory
    from refdet.detector.feature_names import FEATURE_MAP, region_features
    from refdet.structures.provenance import file_sha256

    plan_options: dict[str, Any] = {
        "regions": options.regions,
        "features": list(options.features),
        "dtype": options.dtype,
        "precision": options.precision,
        "compression": options.compression,
    }
    if given_regions is None:
        plan_options |= {
            "score_threshold": options.score_threshold,
            "nms_threshold": options.nms_threshold,
            "max_regions": options.max_regions,
            "at_least_one": options.lower_threshold_if_empty,
        }
    elif boxes is None:
        plan_options |= {"instances_sha256": file_sha256(image_list.index.path), "masks": options.masks}
        if options.crowd_as_object:  # only if set, so that extractions of older versions can be resumed
            plan_options["crowd_as_object"] = True
    else:
        plan_options |= {"boxes_sha256": file_sha256(boxes), "masks": options.masks}
        if given_regions.box_format != "xywh":
            plan_options["box_format"] = given_regions.box_format
    if options.exif != "ignore":  # also only if set
        plan_options["exif"] = options.exif
    plan_options |= {
        "image_list": image_list.name,
        "image_list_sha256": image_list.sha256(),
        "checkpoint_sha256": file_sha256(run_directory(checkpoint) / MODEL),
    }
    if given_regions is None or options.masks == "predicted":
        masks = meta.recipe.model.masks
    else:
        masks = given_regions.has_masks
    categories = dict(meta.categories)
    if given_regions is not None:
        categories = _merge_categories(categories, given_regions, options.features)
    classes = [{"id": id_, "name": name} for id_, name in categories.items()]
    header = Header(classes, json.dumps(meta.recipe.to_dict()), meta.provenance.to_json(), plan_options)
    plan = Plan(
        plan_options,
        features=region_features(options.features),
        dtype=options.dtype,
        masks=masks,
        ann_ids=given_regions is not None and given_regions.has_ann_ids,
        batch_size=batch_size,
        maps=tuple(name for name in options.features if name == FEATURE_MAP),
        compression=options.compression,
    )
    return plan, header


def _merge_categories(
    detected: Mapping[int, str], given_regions: GivenRegions, features: Sequence[str]
) -> dict[int, str]:
    """The classes of a store of given regions: those of the detector, in its order, and then all others of the regions.

    So they are the columns of class_prob, and categories have the same index as in a store of detections.

    Args:
        detected: category id -> name of the detector.
        given_regions: the given regions.
        features: names of the features to extract.

    Returns:
        Category id -> name. If some ids have other names in the detector, the categories of the regions alone.

    Raises:
        InputError: some ids have other names in the detector, and class_prob would have columns without a class.
    """
    from refdet.detector.feature_names import CLASS_PROB

    given = given_regions.categories
    renamed = [category for category, name in detected.items() if given.get(category, name) != name]
    if not renamed:
        return {**detected, **given}
    if CLASS_PROB in features:
        category = renamed[0]
        raise InputError(
            f"`features` {CLASS_PROB}: category {category} is {short_repr(detected[category])} in the detector, but "
            f"{short_repr(given[category])} in {given_regions.categories_from}, so its probabilities would get a wrong "
            f"name; omit {CLASS_PROB}, or correct the categories"
        )
    return dict(given)


def _keep_older_classes(out: Path, header: Header, given_regions: GivenRegions, features: Sequence[str]) -> Header:
    """The header with the classes of the extraction to resume, if an older version chose them.

    It listed the categories of the given regions alone, which is wrong only as names of the columns of class_prob.
    """
    from refdet.detector.feature_names import CLASS_PROB

    older = [{"id": id_, "name": name} for id_, name in given_regions.categories.items()]
    return replace(header, classes=older) if CLASS_PROB not in features and read_classes(out) == older else header


def _check_masks(
    options: ExtractOptions, meta: CheckpointMetadata, given_regions: GivenRegions | None, checkpoint: Path
) -> None:
    """Raise InputError if masks are to be predicted but cannot be."""
    if options.masks != "predicted":
        return
    if given_regions is None:
        raise InputError(
            "`masks='predicted'`: detections have their own masks; it is for `regions='annotations'` or `boxes`"
        )
    if not meta.recipe.model.masks:
        raise InputError(f"`masks='predicted'`: {checkpoint} has no mask branch")
    unknown = sorted(given_regions.categories.items() - dict(meta.categories).items())
    if unknown:
        raise InputError(
            f"`masks='predicted'`: the detector has no category {unknown[0][0]} ({unknown[0][1]}), "
            "which the regions may have"
        )
