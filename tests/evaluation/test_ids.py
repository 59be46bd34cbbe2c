"""COCO's AP of unusual files: any ids, no info, degenerate boxes, only crowds."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import coco as pycoco
from pycocotools.cocoeval import COCOeval
from random_detections import ap_by_cocoeval, random_case

from refdet.data.coco import CocoIndex
from refdet.evaluation import average_precision
from refdet.evaluation.average_precision import METRICS, coco_ap, why_undefined

ODD_IDS = [0, -1, 1, -7, 2, 2**31 - 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, -(2**63), 10]
BOXES = [[10, 10, 20, 20], [60, 60, 30, 30], [20, 90, 60, 40]]


@pytest.fixture(params=["faster_coco_eval", "pycocotools"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with each of the libraries that compute AP."""
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    else:
        pytest.importorskip("faster_coco_eval")
    return str(request.param)


def load(folder: Path, data: dict[str, Any]) -> CocoIndex:
    path = folder / "instances.json"
    path.write_text(json.dumps(data))
    return CocoIndex.load(path)


def three_objects(first_id: int = 0, **fields: Any) -> dict[str, Any]:
    """One image with three objects, whose ids start at ``first_id``."""
    annotations = [
        {"id": first_id + i, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, box in enumerate(BOXES)
    ]
    images = [{"id": 1, "file_name": "1.jpg", "height": 150, "width": 200}]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]} | fields


def perfect_results(image_id: int = 1, category_id: int = 1) -> list[dict[str, Any]]:
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": [float(v) for v in box], "score": 0.9 - i / 10}
        for i, box in enumerate(BOXES)
    ]


@pytest.mark.parametrize("first_id", [-5, -2, -1, 0, 1, 7])
def test_an_annotation_with_id_0_is_matched_like_any_other(library: str, tmp_path: Path, first_id: int) -> None:
    index = load(tmp_path, three_objects(first_id))
    assert coco_ap(index, [1], perfect_results(), "bbox")["AP"] == pytest.approx(1.0)
    two_of_three = coco_ap(index, [1], perfect_results()[:2], "bbox")
    assert two_of_three["AP"] == pytest.approx(67 / 101)  # precision is 1 at the 67 of 101 recall thresholds up to 2/3


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ap_does_not_depend_on_ids(library: str, kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Image and category ids keep their order, which decides between equal scores; annotation ids are arbitrary."""

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1), st.permutations(ODD_IDS), st.lists(st.sampled_from(ODD_IDS), min_size=5,
                                                                        max_size=5, unique=True))  # fmt: skip
    def check(seed: int, ids: list[int], others: list[int]) -> None:
        data, results = random_case(seed)
        folder = tmp_path_factory.mktemp("ids")
        plain = coco_ap(load(folder, data), [3, 5, 9], results, kind)
        images = dict(zip((3, 5, 9), sorted(others[:3]), strict=True))
        categories = dict(zip((2, 7), sorted(others[3:]), strict=True))
        changed = copy.deepcopy(data)
        for image in changed["images"]:
            image["id"] = images[image["id"]]
        for category in changed["categories"]:
            category["id"] = categories[category["id"]]
        for annotation, id_ in zip(changed["annotations"], ids, strict=False):
            annotation |= {"id": id_, "image_id": images[annotation["image_id"]],
                           "category_id": categories[annotation["category_id"]]}  # fmt: skip
        moved = [r | {"image_id": images[r["image_id"]], "category_id": categories[r["category_id"]]} for r in results]
        assert coco_ap(load(folder, changed), list(images.values()), moved, kind) == pytest.approx(plain, abs=1e-12)
        if results:
            assert list(plain.values()) == pytest.approx(ap_by_cocoeval(data, results, [3, 5, 9], kind), abs=1e-9)

    check()


def test_results_of_other_images_and_categories_are_ignored(library: str, tmp_path: Path) -> None:
    index = load(tmp_path, three_objects())
    foreign = perfect_results(image_id=2) + perfect_results(category_id=5)
    assert coco_ap(index, [1], perfect_results() + foreign, "bbox") == coco_ap(index, [1], perfect_results(), "bbox")
    assert coco_ap(index, [1], foreign, "bbox")["AP"] == 0
    assert coco_ap(index, [], perfect_results(), "bbox") == dict.fromkeys(METRICS, -1.0)


def test_only_the_best_100_results_per_image_and_category_count(library: str, tmp_path: Path) -> None:
    """COCO uses the best 100 results of each category and image."""
    index, rng = load(tmp_path, three_objects()), np.random.default_rng(0)
    noise = [
        {"image_id": 1, "category_id": 1, "bbox": [*(rng.random(2) * 20).tolist(), 3.0, 3.0], "score": 0.95}
        for _ in range(300)
    ]
    assert coco_ap(index, [1], perfect_results() + noise[:50], "bbox")["AP"] == pytest.approx(3 / 53, abs=0.01)
    assert coco_ap(index, [1], noise + perfect_results(), "bbox")["AP"] == 0


@pytest.mark.parametrize("info", ["missing", None, {}, {"year": 2014}, "a text"])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_info_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, info: Any, kind: str) -> None:
    """pycocotools 2.0.9 and 2.0.10 require ``info`` in the dataset."""

    class RequireInfo(pycoco.COCO):
        def loadRes(self, resFile: Any) -> Any:
            copy.deepcopy(self.dataset["info"])
            _ = self.dataset["licenses"]
            return super().loadRes(resFile)

    monkeypatch.setattr(average_precision, "_evaluator", lambda: (RequireInfo, COCOeval))
    data = three_objects() if info == "missing" else three_objects(info=info)
    results = [r | {"segmentation": rectangle(r["bbox"])} for r in perfect_results()]
    assert coco_ap(load(tmp_path, data), [1], results, kind)["AP"] == pytest.approx(1.0)


def rectangle(box: list[float]) -> dict[str, Any]:
    x, y, w, h = box
    drawn = pycoco.maskUtils.frPyObjects([[x, y, x, y + h, x + w, y + h, x + w, y]], 150, 200)
    return dict(pycoco.maskUtils.merge(drawn))


def test_arguments_are_not_modified(library: str, tmp_path: Path) -> None:
    index, results = load(tmp_path, three_objects()), perfect_results()
    before = copy.deepcopy((index.raw, results))
    coco_ap(index, [1], results, "bbox")
    assert (index.raw, results) == before


@pytest.mark.parametrize("odd", [{"area": "x"}, {"area": None}, {}])
def test_boxes_without_area_count_as_missed_and_infinite_ones_are_dropped(
    library: str, tmp_path: Path, odd: dict
) -> None:
    data = three_objects()
    thin = {"image_id": 1, "category_id": 1, "iscrowd": 0} | odd
    data["annotations"] += [thin | {"id": 50, "bbox": [5, 5, 0, 5]}]
    assert coco_ap(load(tmp_path, data), [1], perfect_results(), "bbox")["AP"] == pytest.approx(76 / 101)  # recall 3/4
    data["annotations"] += [thin | {"id": 51, "bbox": [5, 5, float("nan"), 5]},
                            thin | {"id": 52, "bbox": [5, 5, float("inf"), 5]}]  # fmt: skip
    assert coco_ap(load(tmp_path, data), [1], perfect_results(), "bbox")["AP"] == pytest.approx(76 / 101)


def test_ap_is_undefined_if_all_annotations_are_crowds(library: str, tmp_path: Path) -> None:
    data = three_objects()
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 1
    index = load(tmp_path, data)
    assert coco_ap(index, [1], perfect_results(), "bbox") == dict.fromkeys(METRICS, -1.0)
    assert "iscrowd is 1 on all 3 annotations" in (why_undefined(index, [1]) or "")
    data["annotations"][1]["iscrowd"] = 0
    index = load(tmp_path, data)
    assert why_undefined(index, [1]) is None and coco_ap(index, [1], perfect_results(), "bbox")["AP"] == pytest.approx(
        1.0
    )
    assert "no usable annotation" in (why_undefined(load(tmp_path, three_objects(annotations=[])), [1]) or "")
