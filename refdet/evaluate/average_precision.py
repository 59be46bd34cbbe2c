"""COCO's box and mask AP, computed by pycocotools. No torch."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from refdet.data.coco import CocoIndex
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
    """
    wanted, other = set(image_ids), "segmentation" if kind == "bbox" else "bbox"
    # COCO takes the size of a result from its box if it has one, so only what is judged is given
    found = [{k: v for k, v in r.items() if k != other} for r in results if r["image_id"] in wanted]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {**index.raw, "annotations": _annotations(index, kind)}
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


def _annotations(index: CocoIndex, kind: str) -> list[dict[str, Any]]:
    """Copies of the annotations, since COCOeval writes into what it is given, with what it needs to be there."""
    checked = {a.id: a for of_image in index.annotations.values() for a in of_image}
    annotations = []
    for annotation in index.raw["annotations"]:
        x, y, w, h = annotation["bbox"]
        copy: dict[str, Any] = {"iscrowd": 0, "area": w * h, **annotation}
        if kind == "bbox":
            copy["segmentation"] = []
        elif (known := checked.get(annotation["id"])) is None:
            continue  # it has no area
        else:
            copy["segmentation"] = known.segmentation or [[x, y, x, y + h, x + w, y + h, x + w, y]]
        annotations.append(copy)
    return annotations
