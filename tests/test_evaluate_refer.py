"""evaluate-on-refer: against brute force, numpy masks and hand-made cases."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from refdet import store
from refdet.data.coco import CocoIndex
from refdet.errors import InputError
from refdet.evaluate.metrics import box_iou, mask_overlap, referent_recall, segmentation_scores
from refdet.evaluate.refer import evaluate_on_refer
from refdet.extract import annotated_regions
from refdet.regions import Regions

corner = st.floats(0, 50, width=32)
box = st.tuples(corner, corner, st.floats(0.25, 40, width=32), st.floats(0.25, 40, width=32))
PROVENANCE = {"source": "x.json", "note": ""}


def brute_iou(a: list[float], b: list[float]) -> float:
    """Of half-open xyxy boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def xyxy(box: tuple[float, ...]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def write_store(path: Path, images: list[Regions], masks: bool) -> None:
    rows = [
        store.ImageRow(r.image_id, r.file_name, r.height, r.width, r.error, len(r), sum(map(len, r.masks or ())))
        for r in images
    ]
    header = store.Header([], "", PROVENANCE, {})
    with store.create(path, header, store.Columns(masks=masks), rows) as writer:
        for image in images:
            writer.put(image)


def write_refer(root: Path, objects: list[dict[str, Any]]) -> Path:
    """A REFER folder of objects with image_id, bbox, category_id and split; each has two sentences."""
    folder = root / "toy"
    folder.mkdir(parents=True)
    annotations, refs = [], []
    for i, o in enumerate(objects):
        x, y, w, h = o["bbox"]
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.append({"id": 100 + i, "image_id": o["image_id"], "category_id": o["category_id"], "iscrowd": 0,
                            "bbox": o["bbox"], "area": w * h, "segmentation": outline})  # fmt: skip
        sentences = [{"sent_id": 10 * i + k, "sent": "it", "raw": "it", "tokens": ["it"]} for k in range(2)]
        refs.append({"ref_id": i, "ann_id": 100 + i, "image_id": o["image_id"], "category_id": o["category_id"],
                     "split": o["split"], "sentences": sentences, "sent_ids": [s["sent_id"] for s in sentences],
                     "file_name": f"{o['image_id']}.jpg"})  # fmt: skip
    ids = sorted({o["image_id"] for o in objects})
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 100, "width": 120} for i in ids]
    categories = [{"id": i, "name": f"c{i}", "supercategory": ""} for i in (1, 2)]
    data = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(data))
    (folder / "refs(me).p").write_bytes(pickle.dumps(refs, protocol=2))
    return root


def regions(image_id: int, boxes: list[list[float]], categories: list[int] | None = None, masks: Any = None) -> Regions:
    n = len(boxes)
    return Regions(image_id, f"{image_id}.jpg", 100, 120, np.array(boxes, np.float32).reshape(n, 4),
                   np.linspace(1, 0.5, n, dtype=np.float32), np.array(categories or [1] * n, np.int64),
                   masks=masks)  # fmt: skip


@settings(max_examples=30, deadline=None, derandomize=True)
@given(refs=st.lists(st.tuples(st.integers(1, 3), box, st.integers(1, 2)), min_size=1, max_size=6),
       found=st.lists(st.tuples(st.integers(1, 3), box, st.integers(1, 2)), max_size=9))  # fmt: skip
def test_recall_is_brute_force(tmp_path_factory: pytest.TempPathFactory, refs: list, found: list) -> None:
    folder = tmp_path_factory.mktemp("refer")
    objects = [{"image_id": i, "bbox": list(b), "category_id": c, "split": "val"} for i, b, c in refs]
    root = write_refer(folder / "r", objects)
    images = [
        regions(i, [xyxy(b) for j, b, _ in found if i == j], [c for j, _, c in found if i == j]) for i in (1, 2, 3)
    ]
    write_store(folder / "a.h5", images, masks=False)
    split = evaluate_on_refer(folder / "a.h5", root, "toy", "me")["splits"]["val"]

    stored = {i: list(zip(r.boxes.tolist(), r.category_ids.tolist(), strict=True)) for i, r in enumerate(images, 1)}
    best = [max((brute_iou(xyxy(b), box) for box, _ in stored[i]), default=0) for i, b, _ in refs]
    same = [max((brute_iou(xyxy(b), box) for box, k in stored[i] if k == c), default=0) for i, b, c in refs]
    wanted = {str(t): sum(v >= t for v in best) / len(refs) for t in (0.5, 0.6, 0.7, 0.8, 0.9)}
    wanted |= {"mean_best_iou": sum(best) / len(refs), "with_category@0.5": sum(v >= 0.5 for v in same) / len(refs)}
    assert split["referent_recall"] == pytest.approx(wanted, abs=1e-9)
    assert split["detection"]["segm"] is None
    assert (split["images"], split["refs"], split["sentences"]) == (len({r[0] for r in refs}), len(refs), 2 * len(refs))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 20), width=st.integers(1, 20))
def test_mask_overlap_is_numpy(seed: int, height: int, width: int) -> None:
    a, b = np.random.default_rng(seed).random((2, height, width)) < 0.4
    encoded = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8))) for m in (a, b)]
    assert mask_overlap(encoded[0], encoded[1]) == ((a & b).sum(), (a | b).sum())


def test_rates_of_nothing_and_of_known_overlaps() -> None:
    assert referent_recall([], [])["mean_best_iou"] == 0
    assert referent_recall([0.5, 0.95], [0.0, 0.95])["0.5"] == 1
    scores = segmentation_scores([(6, 10), (0, 10), (0, 0), (10, 10)])
    assert scores["overall_iou"] == pytest.approx(16 / 30)
    assert scores["mean_iou"] == pytest.approx(1.6 / 4)
    assert (scores["precision@0.5"], scores["precision@0.6"], scores["precision@0.7"]) == (0.5, 0.5, 0.25)
    assert box_iou(np.zeros((1, 4)), np.zeros((1, 4))) == 0


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, Path]:
    """A store and a REFER folder: image 1 of val has two regions, image 2 of testA one, image 3 of train none."""
    objects = [
        {"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1, "split": "val"},
        {"image_id": 2, "bbox": [0, 0, 40, 40], "category_id": 2, "split": "testA"},
        {"image_id": 3, "bbox": [0, 0, 40, 40], "category_id": 2, "split": "train"},
    ]
    root = write_refer(tmp_path / "refer", objects)
    boxes = {1: [[10, 10, 30, 30], [50, 50, 60, 60]], 2: [[0, 0, 40, 20]]}
    images = []
    for image_id, its in boxes.items():
        masks = []
        for x1, y1, x2, y2 in its:
            mask = np.zeros((100, 120), np.uint8, order="F")
            mask[y1:y2, x1:x2] = 1
            masks.append(coco_mask.encode(mask)["counts"])
        images.append(regions(image_id, its, [image_id] * len(its), tuple(masks)))
    write_store(tmp_path / "a.h5", images, masks=True)
    return tmp_path / "a.h5", root


def test_predictions_in_all_three_forms(toy: tuple[Path, Path], tmp_path: Path) -> None:
    features, root = toy
    half = np.zeros((100, 120), np.uint8, order="F")
    half[0:40, 0:16] = 1
    rle = coco_mask.encode(half)
    predictions = [
        {"sent_id": 0, "region": 0},
        {"sent_id": 1, "region": 1},
        {"sent_id": 10, "segmentation": {"size": [100, 120], "counts": rle["counts"].decode()}},
    ]
    (tmp_path / "p.json").write_text(json.dumps(predictions))
    found = evaluate_on_refer(features, root, "toy", "me", predictions=tmp_path / "p.json")
    assert (found["dataset"], found["split_by"], found["provenance"]) == ("toy", "me", PROVENANCE)
    assert set(found["splits"]) == {"val", "testA"}
    val, test = found["splits"]["val"], found["splits"]["testA"]
    assert val["comprehension"] == {"accuracy@0.5": 0.5, "missing": 0}
    assert val["segmentation"]["precision@0.9"] == 0.5
    assert val["segmentation"]["overall_iou"] == pytest.approx(400 / 900)
    assert test["comprehension"] == {"accuracy@0.5": 0.0, "missing": 1}
    assert test["segmentation"]["mean_iou"] == pytest.approx((640 / 1600) / 2)
    assert test["segmentation"]["overall_iou"] == pytest.approx(640 / 3200)
    assert val["detection"]["segm"]["AP"] == pytest.approx(1.0)

    boxes = [{"sent_id": s, "box": [10, 10, 20, 10]} for s in (0, 1)]
    (tmp_path / "p.json").write_text(json.dumps(boxes))
    val = evaluate_on_refer(features, root, "toy", "me", ["val"], tmp_path / "p.json")["splits"]["val"]
    assert val["comprehension"]["accuracy@0.5"] == 1.0
    assert val["segmentation"] is None


@pytest.mark.parametrize(
    ("predictions", "says"),
    [
        ({}, "a list"),
        ([3], "entry 0"),
        ([{"sent_id": 77, "region": 0}], "sentence 77 is not in"),
        ([{"sent_id": 0, "region": 0}, {"sent_id": 0, "region": 0}], "entry 1: sentence 0 has a prediction already"),
        ([{"sent_id": 0}], "one of region, box and segmentation"),
        ([{"sent_id": 0, "region": 3}], "region 3 is no row .* rows 0 to 2"),
        ([{"sent_id": 0, "region": -1}], "region -1 is no row"),
        ([{"sent_id": 0, "region": 2}], "region 2 is of image 2, the sentence is of image 1"),
        ([{"sent_id": 0, "box": [1, 2, 3]}], "four numbers"),
        ([{"sent_id": 0, "box": [1, 2, -3, 4]}], "four numbers"),
        ([{"sent_id": 0, "segmentation": {"size": [5, 5], "counts": [25]}}], r"size \[5, 5\]"),
    ],
)
def test_bad_predictions_are_named(toy: tuple[Path, Path], tmp_path: Path, predictions: Any, says: str) -> None:
    (tmp_path / "p.json").write_text(json.dumps(predictions))
    with pytest.raises(InputError, match=says) as raised:
        evaluate_on_refer(toy[0], toy[1], "toy", "me", predictions=tmp_path / "p.json")
    assert "p.json" in str(raised.value)


def test_images_that_the_store_lacks_are_named(toy: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"lacks 1 of the 1 images of split train \(3\).*extract-features"):
        evaluate_on_refer(toy[0], toy[1], "toy", "me", ["train"])
    with pytest.raises(InputError, match="--split testB: no such split"):
        evaluate_on_refer(toy[0], toy[1], "toy", "me", ["testB"])


@pytest.mark.parametrize(("dataset", "split_by"), [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")])
def test_real_annotations_recall_every_ref(shared: Path, tmp_path: Path, dataset: str, split_by: str) -> None:
    data = shared / "data/coco_mini"
    index = CocoIndex.load(data / "annotations/instances_train2017.json")
    images = [annotated_regions(record, index.annotations[i]) for i, record in index.images.items()]
    write_store(tmp_path / "a.h5", images, masks=True)
    found = evaluate_on_refer(tmp_path / "a.h5", data / "refer", dataset, split_by)
    assert found["splits"]
    for split in found["splits"].values():
        assert split["referent_recall"]["0.9"] == 1.0
        assert split["referent_recall"]["with_category@0.5"] == 1.0
        assert split["detection"]["segm"]["AP"] == pytest.approx(1.0)
