"""COCO's AP by faster_coco_eval and by pycocotools: both agree with COCOeval called directly, and with each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from random_detections import ap_by_cocoeval, random_case

from refdet.data.coco import CocoIndex
from refdet.evaluation.average_precision import METRICS, coco_ap


@pytest.mark.parametrize("library", ["faster_coco_eval", "pycocotools"])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ap_equals_plain_pycocotools(
    library: str, kind: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    else:
        pytest.importorskip("faster_coco_eval")

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1), st.booleans())
    def check(seed: int, all_images: bool) -> None:
        data, results = random_case(seed)
        path = tmp_path_factory.mktemp("ap") / "instances.json"
        path.write_text(json.dumps(data))
        ids = [3, 5, 9] if all_images else [3, 9]
        found = coco_ap(CocoIndex.load(path), ids, results, kind)
        selected_results = [r for r in results if r["image_id"] in ids]
        assert list(found) == list(METRICS)
        if selected_results:
            assert list(found.values()) == pytest.approx(ap_by_cocoeval(data, selected_results, ids, kind), abs=1e-9)
        else:
            assert set(found.values()) <= {0.0, -1.0}

    check()


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_both_libraries_agree_on_real_annotations(shared: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faster_coco_eval")
    index = CocoIndex.load(shared / "data/coco_mini/annotations/instances_val2017.json")
    rng = np.random.default_rng(1)
    results = []
    for image_id, image_annotations in index.annotations.items():
        image = index.images[image_id]
        for a in image_annotations:
            box = np.array(a.box) + rng.normal(0, 3, 4)
            x, y, w, h = (*box[:2], *(box[2:] - box[:2]).clip(2))
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            mask = coco_mask.merge(coco_mask.frPyObjects(polygon, image.height, image.width))
            score = float(np.float32(rng.random()))
            results.append({"image_id": image_id, "category_id": a.category_id, "score": score,
                            "bbox": [float(v) for v in (x, y, w, h)], "segmentation": mask})  # fmt: skip
    fast = coco_ap(index, list(index.images), results, kind)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    slow = coco_ap(index, list(index.images), results, kind)
    assert fast == pytest.approx(slow, abs=1e-9) and 0.1 < slow["AP"] < 0.9
