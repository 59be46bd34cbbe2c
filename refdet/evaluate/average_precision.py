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
    """AP of results on images, exactly as pycocotools has it on the file.

    Args:
        index: the annotations.
        image_ids: the images to evaluate on.
        results: entries of a COCO results JSON.
        kind: "bbox" or "segm".
    Returns:
        AP (IoU 0.5 to 0.95), AP50, AP75 and AP of small, medium and large objects, 0..1; -1 where the images
        have no such object.
    """
    # COCOeval wants a segmentation in each annotation even for boxes, and writes into what it is given
    annotations = []
    for annotation in index.raw["annotations"]:
        copy = dict(annotation)
        if kind == "bbox":
            copy["segmentation"] = []
        copy.setdefault("iscrowd", 0)
        copy.setdefault("area", copy["bbox"][2] * copy["bbox"][3])
        annotations.append(copy)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {**index.raw, "annotations": annotations}
        truth.createIndex()
        wanted = set(image_ids)
        found = [dict(r) for r in results if r["image_id"] in wanted]
        if kind == "bbox":
            found = [{k: v for k, v in r.items() if k != "segmentation"} for r in found]
        if not found:
            present = any(index.annotations[i] for i in image_ids)
            return dict.fromkeys(METRICS, 0.0 if present else -1.0)
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.params.imgIds = sorted(wanted)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, (float(value) for value in evaluation.stats), strict=False))
