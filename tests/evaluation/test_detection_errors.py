"""AP by category, calibration and confusions: counted by hand on a small image, and compared with COCO's mean AP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from refdet.data.coco import CocoIndex
from refdet.evaluation.average_precision import METRICS, ap_by_category, coco_ap
from refdet.evaluation.detection_errors import detection_errors
from refdet.structures.regions import Regions

BOXES = [[10, 10, 50, 50], [60, 10, 90, 40], [10, 60, 30, 95]]


def index_of(path: Path, rows: list[tuple[int, list[float], int, int]], images: int = 1) -> CocoIndex:
    """An index of annotations given as (image id, xyxy box, category id, iscrowd)."""
    annotations = [
        {"id": i + 1, "image_id": image, "category_id": category, "iscrowd": crowd,
         "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        for i, (image, (x1, y1, x2, y2), category, crowd) in enumerate(rows)
    ]  # fmt: skip
    image_entries = [{"id": i + 1, "file_name": f"{i}.jpg", "height": 100, "width": 100} for i in range(images)]
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 5, "name": "cow"}]
    path.write_text(json.dumps({"images": image_entries, "annotations": annotations, "categories": categories}))
    return CocoIndex.load(path)


def regions(image: int, boxes: list[list[float]], scores: list[float], categories: list[int]) -> Regions:
    return Regions(image, "", 100, 100, np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32),
                   np.array(categories, np.int64))  # fmt: skip


def test_regions_per_score_bin_and_confusions(tmp_path: Path) -> None:
    crowd = [0.0, 50.0, 100.0, 100.0]
    index = index_of(tmp_path / "a.json", [(1, BOXES[0], 7, 0), (1, BOXES[1], 3, 0), (1, BOXES[2], 3, 0),
                                           (1, crowd, 5, 1)])  # fmt: skip
    found = detection_errors(index, [regions(
        1, [BOXES[0], BOXES[0], BOXES[1], [70, 70, 80, 80], [0, 0, 5, 5]], [0.95, 0.94, 0.72, 0.5, 1.0], [7, 7, 7, 5, 3]
    )])  # fmt: skip
    assert (found.images, found.objects, found.missed) == (1, 3, 1)
    assert found.confusions == {(7, 7): 1, (3, 7): 1} and found.objects_by_category == {7: 1, 3: 2}
    assert found.regions.tolist() == [0] * 7 + [1, 0, 3]  # by tenths of the score, without the region on the crowd
    assert found.correct.tolist() == [0] * 9 + [1]  # the second region on the same object is a duplicate
    assert found.score_sums[9] == pytest.approx(2.89)


def test_images_without_regions_or_objects(tmp_path: Path) -> None:
    index = index_of(tmp_path / "a.json", [(1, BOXES[0], 7, 0)], images=2)
    found = detection_errors(index, [regions(1, [], [], []), regions(2, [BOXES[0]], [0.0], [7])])
    assert (found.objects, found.missed, found.regions.sum(), found.correct.sum()) == (1, 1, 1, 0)
    assert ap_by_category(index, [], [], "bbox") == {}
    assert ap_by_category(index, [1, 2], [], "bbox")[7]["AP"] == 0
    assert ap_by_category(index, [1, 2], [], "bbox")[3]["AP"] is None


def test_scores_outside_0_to_1_fall_into_the_first_and_last_bins(tmp_path: Path) -> None:
    index = index_of(tmp_path / "a.json", [(1, BOXES[0], 7, 0)])
    scores = [3e38, 1e30, 25.0, 1.0, 0.95, 0.05, -3.0, -3e38]
    found = detection_errors(index, [regions(1, [BOXES[1]] * len(scores), scores, [7] * len(scores))])
    assert found.regions.tolist() == [3] + [0] * 8 + [5]
    assert found.outside == 5


def test_the_mean_over_categories_equals_coco_ap(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows, results = [], []
    for image in range(1, 9):
        for _ in range(4):
            x, y, side = (float(v) for v in (*random.uniform(0, 50, 2), random.choice([8, 20, 40])))
            category = int(random.choice([7, 3]))
            rows.append((image, [x, y, x + side, y + side], category, 0))
            dx, dy = random.normal(0, side / 8, 2)
            guess = category if random.random() < 0.8 else 5
            results.append({"image_id": image, "category_id": guess, "bbox": [x + dx, y + dy, side, side],
                            "score": float(random.random())})  # fmt: skip
    index = index_of(tmp_path / "a.json", rows, images=8)
    mean, by_category = (
        coco_ap(index, list(index.images), results, "bbox"),
        ap_by_category(index, list(index.images), results, "bbox"),
    )
    for name in METRICS:
        values = [rate for rates in by_category.values() if (rate := rates[name]) is not None]
        assert mean[name] == (pytest.approx(np.mean(values)) if values else -1)
    assert by_category[5]["AP"] is None and by_category[7]["AP"] != by_category[3]["AP"]
