"""Random instances files and results, and their AP as computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

HEIGHT, WIDTH = 150, 200


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An instances file of 3 images with crowds and odd areas, and results with tied scores."""
    rng = np.random.default_rng(seed)
    images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in (3, 5, 9)]
    annotations = []
    for i in range(int(rng.integers(0, 12))):
        x, y = (rng.random(2) * [150, 100]).round(1).tolist()
        w, h = (1 + rng.random(2) * [49, 49]).round(1).tolist()
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.append({
            "id": i + 1, "image_id": int(rng.choice([3, 5, 9])), "category_id": int(rng.choice([2, 7])),
            "bbox": [x, y, w, h], "area": w * h if rng.random() < 0.8 else 1024.0, "iscrowd": int(rng.random() < 0.2),
            "segmentation": rle(outline) if rng.random() < 0.3 else outline,
        })  # fmt: skip
    results = []
    for _ in range(int(rng.integers(0, 25))):
        if annotations and rng.random() < 0.6:
            near = annotations[int(rng.integers(len(annotations)))]
            x, y, w, h = (np.array(near["bbox"]) + rng.normal(0, 2, 4)).clip([0, 0, 1, 1], [190, 140, 80, 80]).tolist()
            image_id = near["image_id"]
        else:
            x, y, w, h = (rng.random(4) * [150, 100, 49, 49] + [0, 0, 1, 1]).tolist()
            image_id = int(rng.choice([3, 5, 9]))
        results.append({
            "image_id": image_id, "category_id": int(rng.choice([2, 7])), "bbox": [x, y, w, h],
            "score": float(rng.random().__round__(1)),
            "segmentation": coco_mask.merge(coco_mask.frPyObjects([[x, y, x + w, y, x + w, y + h]], HEIGHT, WIDTH)),
        })  # fmt: skip
    categories = [{"id": 2, "name": "a"}, {"id": 7, "name": "b"}]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def rle(outline: list[list[float]]) -> dict[str, Any]:
    found = coco_mask.merge(coco_mask.frPyObjects(outline, HEIGHT, WIDTH))
    return {"size": found["size"], "counts": found["counts"].decode()}


def ap_by_cocoeval(data: dict[str, Any], results: list[dict[str, Any]], ids: list[int], kind: str) -> list[float]:
    """AP, AP50, AP75, APs, APm and APl of results by pycocotools; ``kind`` is "bbox" or "segm"."""
    other = "segmentation" if kind == "bbox" else "bbox"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps({**data, "info": {}}))
        truth.createIndex()
        detected = truth.loadRes([{k: v for k, v in r.items() if k != other} for r in results])
        evaluation = COCOeval(truth, detected, kind)
        evaluation.params.imgIds = ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6].tolist()
