"""COCO's box and mask AP, as pycocotools computes it. No torch.

faster-coco-eval, the extra ``refdet[fast]``, gives the same numbers sooner and is used where it is installed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from refdet.data.coco import CocoIndex
from refdet.data.segmentations import check_polygons
from refdet.errors import InputError
from refdet.regions import Regions

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def coco_results(regions: Iterable[Regions]) -> list[dict[str, Any]]:
    """Regions as the entries of a COCO results JSON: box as xywh, mask as RLE where there is one."""
    results = []
    for image in regions:
        rles = image.rles()
        boxes = image.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        for row in range(len(image)):
            result: dict[str, Any] = {
                "image_id": image.image_id,
                "category_id": int(image.category_ids[row]),
                "bbox": boxes[row].tolist(),
                "score": float(image.scores[row]),
            }
            if rles:
                result["segmentation"] = rles[row]
            results.append(result)
    return results


def coco_ap(
    index: CocoIndex, image_ids: Sequence[int], results: Sequence[dict[str, Any]], kind: str
) -> dict[str, float]:
    """AP of results on images, exactly as pycocotools has it.

    For "segm" a result's size is the area of its mask, as in COCO's own evaluation, not that of its box. An
    annotation without a segmentation has its box as its mask.

    Args:
        index: the annotations.
        image_ids: the images to evaluate on.
        results: entries of a COCO results JSON.
        kind: "bbox" or "segm".
    Returns:
        AP (IoU 0.5 to 0.95), AP50, AP75 and AP of small, medium and large objects, 0..1; -1 where the images
        have no such object.
    Raises:
        InputError: an annotation's polygons are too far away or too long to be drawn.
    """
    wanted, other = set(image_ids), "segmentation" if kind == "bbox" else "bbox"
    # COCO takes the size of a result from its box if it has one, so only what is judged is given
    found = [{k: v for k, v in r.items() if k != other} for r in results if r["image_id"] in wanted]
    COCO, COCOeval = _evaluator()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        images = [image for image in index.raw["images"] if image["id"] in wanted]
        truth.dataset = {**index.raw, "images": images, "annotations": _annotations(index, kind, wanted)}
        truth.createIndex()
        detected = truth.loadRes(found) if found else COCO()
        if not found:
            detected.dataset = {**truth.dataset, "annotations": []}
            detected.createIndex()
        evaluation = COCOeval(truth, detected, kind)
        evaluation.params.imgIds = sorted(wanted)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, (float(value) for value in evaluation.stats), strict=False))


def _evaluator() -> tuple[Any, Any]:
    """The classes COCO and COCOeval of the fastest library there is."""
    try:
        fast = importlib.import_module("faster_coco_eval")
        return fast.COCO, fast.COCOeval_faster
    except ImportError:
        coco, evaluation = (importlib.import_module(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
        return coco.COCO, evaluation.COCOeval


def _annotations(index: CocoIndex, kind: str, wanted: set[int]) -> list[dict[str, Any]]:
    """Copies of the images' annotations with what COCOeval needs to be there, since it writes into them."""
    checked = {a.id: a for image_id in wanted for a in index.annotations[image_id]}
    annotations = []
    for annotation in index.raw["annotations"]:
        if annotation["image_id"] not in wanted:
            continue
        x, y, w, h = annotation["bbox"]
        image = index.images[annotation["image_id"]]
        copy: dict[str, Any] = {"iscrowd": 0, "area": w * h, **annotation}
        if kind == "bbox":
            copy["segmentation"] = []
        elif (known := checked.get(annotation["id"])) is None:
            continue  # it has no area
        else:
            copy["segmentation"] = known.segmentation or [[x, y, x, y + h, x + w, y + h, x + w, y]]
            if isinstance(copy["segmentation"], list):
                try:
                    check_polygons(copy["segmentation"], image.height, image.width)
                except InputError as error:
                    raise InputError(f"{index.path}: annotation {annotation['id']}: {error}") from None
        annotations.append(copy)
    return annotations
