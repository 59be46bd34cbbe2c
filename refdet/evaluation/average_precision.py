"""COCO's box and mask AP, as computed by pycocotools. No torch.

faster-coco-eval (the extra ``fast``: ``pip install ".[fast]"``) is used if installed; it returns the same
numbers faster.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refdet.data.coco import CocoIndex
from refdet.data.coco_validation import is_finite
from refdet.data.segmentations import check_polygons
from refdet.errors import InputError
from refdet.structures.regions import Regions

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# Axes of COCOeval's precision: IoU thresholds 0.5, 0.55, ..., 0.95, and areas of any, small, medium and large objects.
_ALL_IOUS, _IOU_50, _IOU_75 = slice(None), slice(0, 1), slice(5, 6)
_ANY_AREA, _SMALL, _MEDIUM, _LARGE = range(4)


def coco_results(regions: Iterable[Regions]) -> list[dict[str, Any]]:
    """The entries of a COCO results JSON (`Regions.to_coco`) of several images."""
    return [result for image in regions for result in image.to_coco()]


def coco_ap(
    index: CocoIndex, image_ids: Collection[int], results: Sequence[dict[str, Any]], iou_type: str
) -> dict[str, float]:
    """AP of results, as pycocotools computes it.

    Ids may be any integers: images, categories and annotations are renumbered from 1, since COCOeval treats annotation
    id 0 as no match and its libraries store ids as C integers and floats.

    For "segm" the area of a result is that of its mask, as in COCO's evaluation, not of its box. An annotation
    without a segmentation uses its box as mask. Results of other images and categories are ignored.

    Args:
        index: the annotations.
        image_ids: the images to evaluate on.
        results: entries of a COCO results JSON.
        iou_type: "bbox" or "segm".

    Returns:
        AP (IoU 0.5 to 0.95), AP50, AP75 and AP of small, medium and large objects, 0..1; -1 if there are no such
        objects.

    Raises:
        InputError: an annotation's polygons are too far outside the image or too long to be rasterized.
    """
    ids = _ContiguousIds.from_index(index, image_ids)
    if not ids.images:
        return dict.fromkeys(METRICS, -1.0)
    evaluation = _evaluate(index, ids, results, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    # the values after these are COCO's average recalls
    return {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=False)}


def box_and_mask_ap(
    index: CocoIndex, image_ids: Collection[int], results: Sequence[dict[str, Any]], masks: bool
) -> dict[str, dict[str, float | None] | None]:
    """Box and mask AP as in metrics.json.

    Args:
        index: the annotations.
        image_ids: the images to evaluate on.
        results: entries of a COCO results JSON.
        masks: whether to compute mask AP.

    Returns:
        {"bbox": values, "segm": values, or None without masks}; the values of `coco_ap`, with None instead of -1.
    """

    def compute(iou_type: str) -> dict[str, float | None]:
        values = coco_ap(index, image_ids, results, iou_type)
        return {name: value if value >= 0 else None for name, value in values.items()}

    return {"bbox": compute("bbox"), "segm": compute("segm") if masks else None}


def ap_by_category(
    index: CocoIndex, image_ids: Collection[int], results: Sequence[dict[str, Any]], iou_type: str
) -> dict[int, dict[str, float | None]]:
    """`coco_ap` of each category; the mean of a metric over the categories with such objects is that of `coco_ap`.

    Args:
        index: the annotations.
        image_ids: the images to evaluate on.
        results: entries of a COCO results JSON.
        iou_type: "bbox" or "segm".

    Returns:
        Category id -> `METRICS`, 0..1; None if there are no such objects. Empty without images.
    """
    ids = _ContiguousIds.from_index(index, image_ids)
    if not ids.images or not ids.categories:
        return {}
    # (IoU thresholds, recalls, categories, areas, maximum numbers of detections), -1 where there are no objects
    precision = np.asarray(_evaluate(index, ids, results, iou_type).eval["precision"])
    precision = precision[..., -1]  # at most 100 detections per image, as for `coco_ap`
    selections = (  # IoU thresholds and area of each of `METRICS`
        (_ALL_IOUS, _ANY_AREA),
        (_IOU_50, _ANY_AREA),
        (_IOU_75, _ANY_AREA),
        (_ALL_IOUS, _SMALL),
        (_ALL_IOUS, _MEDIUM),
        (_ALL_IOUS, _LARGE),
    )

    def mean_precision(category: int, ious: slice, area: int) -> float | None:
        values = precision[ious, :, category, area]
        return float(values.mean()) if (values > -1).all() else None

    return {
        id_: {
            name: mean_precision(contiguous_id - 1, ious, area)  # contiguous ids start at 1
            for name, (ious, area) in zip(METRICS, selections, strict=True)
        }
        for id_, contiguous_id in ids.categories.items()
    }


def _evaluate(index: CocoIndex, ids: _ContiguousIds, results: Sequence[dict[str, Any]], iou_type: str) -> Any:
    """Evaluate results; returns the COCOeval after ``accumulate()``."""
    entries = _renumber_results(results, iou_type, ids)
    COCO, COCOeval = _evaluator()
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = _renumbered_dataset(index, iou_type, ids)
        ground_truth.createIndex()
        detections = ground_truth.loadRes(entries) if entries else COCO()
        if not entries:  # which loadRes does not accept
            detections.dataset = {**ground_truth.dataset, "annotations": []}
            detections.createIndex()
        evaluation = COCOeval(ground_truth, detections, iou_type)
        evaluation.params.imgIds = list(ids.images.values())
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def why_undefined(index: CocoIndex, image_ids: Iterable[int]) -> str | None:
    """Why AP is undefined on these images, with counts; None if it is defined."""
    annotations = [annotation for image_id in image_ids for annotation in index.annotations[image_id]]
    if not annotations:
        return "AP is not defined: no usable annotation is on these images"
    if all(annotation.iscrowd for annotation in annotations):
        count = len(annotations)
        which = f"all {count} annotations" if count > 1 else "the only annotation"
        return (
            f"AP is not defined: iscrowd is 1 on {which} (CVAT writes that for masks); "
            "COCO counts crowds neither as found nor as missed: set iscrowd to 0 where each is one object"
        )
    return None


def _evaluator() -> tuple[Any, Any]:
    """The classes COCO and COCOeval of the fastest library installed."""
    try:
        fast = importlib.import_module("faster_coco_eval")
        return fast.COCO, fast.COCOeval_faster
    except ImportError:
        coco, evaluation = (importlib.import_module(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
        return coco.COCO, evaluation.COCOeval


@dataclass(frozen=True)
class _ContiguousIds:
    """Ids renumbered from 1, in ascending order, so that equal scores are ranked as with the original ids.

    Attributes:
        images: image id -> new id.
        categories: category id -> new id.
    """

    images: dict[int, int]
    categories: dict[int, int]

    @classmethod
    def from_index(cls, index: CocoIndex, image_ids: Iterable[int]) -> _ContiguousIds:
        return cls(*({id_: n for n, id_ in enumerate(sorted(set(ids)), 1)} for ids in (image_ids, index.categories)))


def _renumber_results(results: Sequence[dict[str, Any]], iou_type: str, ids: _ContiguousIds) -> list[dict[str, Any]]:
    """Copy results with either the box or the mask: with both, COCO would take the area from the box."""
    key = "bbox" if iou_type == "bbox" else "segmentation"
    return [
        {"image_id": image, "category_id": category, "score": result["score"], key: result[key]}
        for result in results
        if (image := ids.images.get(result["image_id"])) is not None
        and (category := ids.categories.get(result["category_id"])) is not None
    ]


def _renumbered_dataset(index: CocoIndex, iou_type: str, ids: _ContiguousIds) -> dict[str, Any]:
    """A dataset for COCOeval, which modifies it. pycocotools 2.0.10 needs ``info``, which files may lack."""
    records = [index.images[image_id] for image_id in ids.images]
    return {
        "info": {},
        "licenses": [],
        "images": [{"id": ids.images[r.id], "height": r.height, "width": r.width} for r in records],
        "categories": [{"id": n, "name": index.categories[id_]} for id_, n in ids.categories.items()],
        "annotations": _renumber_annotations(index, iou_type, ids),
    }


def _renumber_annotations(index: CocoIndex, iou_type: str, ids: _ContiguousIds) -> list[dict[str, Any]]:
    """Copies of the annotations for COCOeval; for "segm" without those that `CocoIndex` dropped as unusable."""
    usable = {a.id: a for image_id in ids.images for a in index.annotations[image_id]}
    annotations: list[dict[str, Any]] = []
    for entry in index.raw["annotations"]:
        if entry["image_id"] not in ids.images:
            continue
        annotation, (x, y, w, h) = usable.get(entry["id"]), entry["bbox"]
        # an empty box is kept and never matched, as in COCO; one that is not finite would match everything
        if annotation is None and not (iou_type == "bbox" and all(map(is_finite, (x, y, w, h)))):
            continue
        area, crowd = (
            (annotation.area, annotation.iscrowd) if annotation else (entry.get("area"), entry.get("iscrowd", 0))
        )
        copy: dict[str, Any] = {
            "id": len(annotations) + 1,
            "image_id": ids.images[entry["image_id"]],
            "category_id": ids.categories[entry["category_id"]],
            "bbox": [float(x), float(y), float(w), float(h)],
            "area": float(area) if is_finite(area) else float(w) * float(h),
            "iscrowd": int(crowd),
            "segmentation": [],
        }
        if iou_type == "segm" and annotation is not None:
            copy["segmentation"] = annotation.segmentation or [[x, y, x, y + h, x + w, y + h, x + w, y]]
            if isinstance(copy["segmentation"], list):
                image = index.images[annotation.image_id]
                try:
                    check_polygons(copy["segmentation"], image.height, image.width)
                except InputError as error:
                    raise InputError(f"{index.path}: annotation {annotation.id}: {error}") from None
        annotations.append(copy)
    return annotations
