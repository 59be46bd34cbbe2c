"""Small stores and REFER folders for the tests of refdet.evaluation, and the IoU of a pair of boxes in plain Python."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from store_examples import write_regions

from refdet import store
from refdet.structures.regions import Regions

PROVENANCE = {"source": "x.json", "source_sha256": "0" * 64, "images": 1, "annotations": 1,
              "image_ids_sha256": "1" * 64, "excluded": {}, "weights": None, "note": ""}  # fmt: skip


def scalar_iou(a: list[float], b: list[float]) -> float:
    """IoU of two half-open xyxy boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def scalar_giou(a: list[float], b: list[float]) -> float:
    """Generalized IoU of two half-open xyxy boxes with positive areas."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    enclosing = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection / union - (enclosing - union) / enclosing


def xyxy(box: tuple[float, ...]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def write_store(
    path: Path,
    images: list[Regions],
    masks: bool,
    names: Mapping[int, str] | None = None,
    provenance: Mapping[str, Any] = PROVENANCE,
) -> None:
    header = store.Header([{"id": i, "name": name} for i, name in (names or {}).items()], "", dict(provenance), {})
    write_regions(path, images, header, store.Columns(masks=masks))


def write_refer(root: Path, objects: list[dict[str, Any]], size: tuple[int, int] = (100, 120)) -> Path:
    """Write a REFER folder with a ref per object, which has image_id, bbox, category_id, split and perhaps sents."""
    refs = []
    for i, obj in enumerate(objects):
        refs.append({"ref_id": i, "ann_id": 100 + i, "image_id": obj["image_id"], "category_id": obj["category_id"],
                     "split": obj["split"], **sentences(i, obj.get("sents", ("it", "it"))),
                     "file_name": f"{obj['image_id']}.jpg"})  # fmt: skip
    write_instances(root / "toy", objects, size)
    (root / "toy" / "refs(me).p").write_bytes(pickle.dumps(refs, protocol=2))
    return root


def write_grefer(root: Path, objects: list[dict[str, Any]], refs: list[tuple[int, list[int], str]]) -> Path:
    """Write a folder like gRefCOCO's; refs are (image_id, indices into ``objects``, split), of two sentences each."""
    records = []
    for i, (image_id, rows, split) in enumerate(refs):
        ann_ids = [100 + row for row in rows] or [-1]
        categories = [objects[row]["category_id"] for row in rows] or [-1]
        records.append({"ref_id": i, "ann_id": ann_ids, "image_id": image_id, "category_id": categories, "split": split,
                        "no_target": not rows, "file_name": f"{image_id}.jpg", **sentences(i)})  # fmt: skip
    write_instances(root / "toy", objects)
    (root / "toy" / "grefs(me).json").write_text(json.dumps(records))
    return root


def sentences(ref_id: int, sents: tuple[str, ...] = ("it", "it")) -> dict[str, Any]:
    """The fields of a ref with its sentences, whose ids count from 10 * ref_id."""
    records = [{"sent_id": 10 * ref_id + k, "sent": s, "raw": s, "tokens": s.split()} for k, s in enumerate(sents)]
    return {"sentences": records, "sent_ids": [record["sent_id"] for record in records]}


def write_instances(folder: Path, objects: list[dict[str, Any]], size: tuple[int, int] = (100, 120)) -> None:
    folder.mkdir(parents=True)
    annotations = []
    for i, o in enumerate(objects):
        x, y, w, h = o["bbox"]
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.append({"id": 100 + i, "image_id": o["image_id"], "category_id": o["category_id"], "iscrowd": 0,
                            "bbox": o["bbox"], "area": w * h, "segmentation": outline})  # fmt: skip
    ids = sorted({o["image_id"] for o in objects})
    images = [{"id": i, "file_name": f"{i}.jpg", "height": size[0], "width": size[1]} for i in ids]
    categories = [{"id": i, "name": f"c{i}", "supercategory": ""} for i in (1, 2)]
    data = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(data))


def regions(image_id: int, boxes: list[list[float]], categories: list[int] | None = None, masks: Any = None) -> Regions:
    """Regions of an image of 120 x 100 pixels, the first with the highest score."""
    n = len(boxes)
    return Regions(image_id, f"{image_id}.jpg", 100, 120, np.array(boxes, np.float32).reshape(n, 4),
                   np.linspace(1, 0.5, n, dtype=np.float32), np.array(categories or [1] * n, np.int64),
                   masks=masks)  # fmt: skip
