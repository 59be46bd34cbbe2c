"""Comprehension metrics: MDETR's protocol, ranked answers, invalid answers, gRefCOCO's crowds, empty masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_examples import regions, scalar_giou, scalar_iou, write_grefer, write_refer, write_store, xyxy
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from refdet.errors import InputError
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refer import REFER

pytestmark = pytest.mark.slow


def evaluate(folder: Path, answers: list[dict[str, Any]], **how: Any) -> dict[str, Any]:
    (folder / "p.json").write_text(json.dumps(answers))
    found = evaluate_on_refer(folder / "a.h5", folder / "refer", "toy", "me", predictions=folder / "p.json", **how)
    return found["splits"]


def write_one_object(folder: Path, box: list[float], stored: list[list[float]]) -> None:
    write_refer(folder / "refer", [{"image_id": 1, "bbox": box, "category_id": 1, "split": "val"}])
    write_store(folder / "a.h5", [regions(1, stored)], masks=False)


corner = st.floats(0, 30, width=32)
box = st.tuples(corner, corner, st.floats(1, 40, width=32), st.floats(1, 40, width=32))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(truth=box, ranked=st.lists(box, min_size=1, max_size=12), single=box)
def test_ranked_answers_equal_brute_force(
    tmp_path_factory: pytest.TempPathFactory, truth: tuple, ranked: list[tuple], single: tuple
) -> None:
    """P@k: whether the best of the first k boxes reaches an IoU of 0.5, or a generalized IoU in MDETR's protocol."""
    folder = tmp_path_factory.mktemp("ranked")
    write_one_object(folder, list(truth), [xyxy(truth), [60, 60, 70, 70]])
    answers = [{"sent_id": 0, "ranked_boxes": [list(b) for b in ranked]}, {"sent_id": 1, "box": list(single)}]
    for protocol, overlap in (("standard", scalar_iou), ("mdetr", scalar_giou)):
        found = evaluate(folder, answers, protocol=protocol)["val"]["comprehension"]
        ranked_overlaps = [overlap(xyxy(b), xyxy(truth)) for b in ranked]
        single_overlap = overlap(xyxy(single), xyxy(truth))
        if min(abs(v - 0.5) for v in [*ranked_overlaps, single_overlap]) < 1e-6:
            continue  # too close to the threshold: rounding would decide
        expected = {k: ((max(ranked_overlaps[:k]) >= 0.5) + (single_overlap >= 0.5)) / 2 for k in (1, 5, 10)}
        assert {k: found[f"P@{k}"] for k in expected} == expected
        assert found["accuracy@0.5"] == found["precision@0.5"] == expected[1]
        ious = [scalar_iou(xyxy(b), xyxy(truth)) for b in (ranked[0], single)]
        assert found["mean_iou"] == pytest.approx(np.mean(ious))


def test_mdetr_protocol_uses_generalized_iou(tmp_path: Path) -> None:
    """The first answer has IoU 68/132 = 0.52 but GIoU 0.47: 6 of the 138 pixels of the enclosing box are in neither."""
    write_one_object(tmp_path, [0, 0, 10, 10], [[0, 0, 10, 10], [3, 3, 13, 13]])
    answers = [{"sent_id": 0, "box": [2, 1.5, 10, 10]}, {"sent_id": 1, "box": [0, 0, 10, 10]}]
    standard, mdetr = (evaluate(tmp_path, answers, protocol=p)["val"] for p in ("standard", "mdetr"))
    assert scalar_iou([2, 1.5, 12, 11.5], [0, 0, 10, 10]) > 0.5 > scalar_giou([2, 1.5, 12, 11.5], [0, 0, 10, 10])
    assert standard["comprehension"]["accuracy@0.5"] == 1.0 and mdetr["comprehension"]["accuracy@0.5"] == 0.5
    assert mdetr["comprehension"]["precision@0.5"] == 0.5
    for same in ("mean_iou", "missing"):
        assert mdetr["comprehension"][same] == standard["comprehension"][same]
    assert "P@1" not in standard["comprehension"] and "P@1" not in mdetr["comprehension"]
    assert mdetr["referent_recall"] == standard["referent_recall"]  # unaffected by the protocol


def test_ranked_regions_are_scored_by_boxes_and_masks(tmp_path: Path) -> None:
    whole = coco_mask.encode(np.asfortranarray(np.ones((100, 120), np.uint8)))["counts"]
    square = np.zeros((100, 120), np.uint8, order="F")
    square[10:30, 10:30] = 1
    objects = [{"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1, "split": s} for s in ("val", "testA")]
    write_refer(tmp_path / "refer", objects)
    boxes = [[0, 0, 120, 100], [10, 10, 30, 30]]
    write_store(tmp_path / "a.h5", [regions(1, boxes, masks=(whole, coco_mask.encode(square)["counts"]))], masks=True)
    found = evaluate(tmp_path, [{"sent_id": 0, "ranked_regions": [0, 1]}, {"sent_id": 1, "ranked_regions": [1, 0]}])
    of_boxes, of_masks = found["val"]["comprehension"], found["val"]["segmentation"]
    assert (of_boxes["P@1"], of_boxes["P@5"], of_boxes["P@10"]) == (0.5, 1.0, 1.0) and of_boxes["accuracy@0.5"] == 0.5
    assert of_masks["precision@0.9"] == 0.5 and of_masks["mean_iou"] == pytest.approx((400 / 12000 + 1) / 2)
    # The split without answers has the same metrics.
    assert found["testA"]["comprehension"] == dict.fromkeys(of_boxes, 0.0) | {"missing": 2, "random_baseline@0.5": 0.5}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"ranked_boxes": []}, "a list of at least one, the best first, not .*; leave out"),
        ({"ranked_boxes": [1, 2, 3, 4]}, "box 1 must be four numbers"),
        ({"ranked_boxes": [[1, 2, 3, 4], [1, 2, -3, 4]]}, r"box \[1, 2, -3, 4\] must be four numbers"),
        ({"ranked_boxes": 3}, "a list of at least one"),
        ({"ranked_boxes": [None]}, "box None must be four numbers"),
        ({"box": None}, "box None must be four numbers"),
        ({"box": {}}, "must be four numbers"),
        ({"ranked_regions": [0, 9]}, "region 9 is not a row"),
        ({"ranked_regions": [0], "box": [1, 2, 3, 4]}, r"it has \['box', 'ranked_regions'\]"),
        ({"boxes": [[1, 2, 3, 4]]}, "boxes is for gRefCOCO; .*: box, or ranked_regions or ranked_boxes"),
        ({}, "or a list of them: ranked_regions, ranked_boxes; it has none"),
    ],
)
def test_invalid_ranked_answers_are_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    write_one_object(tmp_path, [0, 0, 10, 10], [[0, 0, 10, 10]])
    with pytest.raises(InputError, match=rf"p\.json: entry 0 \(sentence 0\): .*{message}"):
        evaluate(tmp_path, [{"sent_id": 0, **entry}])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sent_id": "12", "box": [1, 2, 3, 4]}, "; its sent_id is '12'"),
        ({"sent_id": 1.0}, "; its sent_id is 1.0"),
        ({"sent_id": True}, "; its sent_id is True"),
        ({"sent_id": None}, "; its sent_id is None"),
        ({"box": [1, 2, 3, 4]}, "; it has no sent_id"),
        ([], r", not \[\]"),
        ({"sent_id": "1" * 10_000}, "; its sent_id is '1111"),
    ],
)
def test_invalid_sentence_ids_are_shown(tmp_path: Path, entry: Any, message: str) -> None:
    write_one_object(tmp_path, [0, 0, 10, 10], [[0, 0, 10, 10]])
    with pytest.raises(
        InputError, match=rf"p\.json: entry 0: it must be an object with an integer sent_id{message}"
    ) as raised:
        evaluate(tmp_path, [entry])
    assert len(str(raised.value)) < 300


def test_crowds_of_grefcoco_have_boxes_but_no_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in its authors' evaluation, and in REFER.getMask."""
    objects = [{"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1},
               {"image_id": 1, "bbox": [50, 50, 30, 30], "category_id": 1}]  # fmt: skip
    root = write_grefer(tmp_path / "refer", objects, [(1, [0, 1], "val"), (1, [1], "testA")])
    path = root / "toy/instances.json"
    data = json.loads(path.read_text())
    data["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(data))
    write_store(tmp_path / "a.h5", [regions(1, [[10, 10, 30, 30], [50, 50, 80, 80]])], masks=False)
    mask = REFER(root, "toy", "me").getMask(REFER(root, "toy", "me").Refs[0])["mask"]
    rle = coco_mask.encode(np.asfortranarray(mask))
    first = {"size": rle["size"], "counts": rle["counts"].decode()}
    assert mask.sum() == 400
    answers = [{"sent_id": s, "segmentations": [first]} for s in (0, 1, 10)]
    found = evaluate(tmp_path, [*answers, {"sent_id": 11, "segmentations": []}])
    val, test = found["val"]["generalized"], found["testA"]["generalized"]
    assert val["gIoU"] == val["cIoU"] == val["precision@0.9"] == 1.0
    assert val["precision@F1=1,IoU>=0.5"] == 0.0  # the mask gives one box, but there are two objects
    # A ref whose only target is a crowd has a target but an empty mask.
    assert (test["no_target"], test["T-acc"], test["gIoU"], test["cIoU"]) == (0, 0.5, 0.0, 0.0)
    boxes = [{"sent_id": s, "boxes": [[10, 10, 20, 20], [50, 50, 30, 30]]} for s in (0, 1)]
    assert evaluate(tmp_path, boxes)["val"]["generalized"]["precision@F1=1,IoU>=0.5"] == 1.0
    assert found["val"]["referent_recall"]["0.9"] == 1.0


def test_regions_with_empty_masks_keep_their_boxes(tmp_path: Path) -> None:
    """Box metrics use the box; mask metrics use the empty mask."""
    objects = [{"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1}]
    write_grefer(tmp_path / "refer", objects, [(1, [0], "val"), (1, [], "testA")])
    empty = coco_mask.encode(np.zeros((100, 120), np.uint8, order="F"))
    write_store(tmp_path / "a.h5", [regions(1, [[10, 10, 30, 30]], masks=(empty["counts"],))], masks=True)
    nothing = {"size": empty["size"], "counts": empty["counts"].decode()}
    answers = [{"sent_id": 0, "region": 0}, {"sent_id": 1, "regions": [0]}]
    found = evaluate(tmp_path, [*answers, {"sent_id": 10, "region": 0}, {"sent_id": 11, "segmentation": nothing}])
    val, test = found["val"]["generalized"], found["testA"]["generalized"]
    assert (val["T-acc"], val["precision@F1=1,IoU>=0.5"], val["precision@F1=1,GIoU>=0.5"]) == (1.0, 1.0, 1.0)
    assert (val["gIoU"], val["cIoU"], val["precision@0.5"]) == (0.0, 0.0, 0.0)
    assert (test["N-acc"], test["precision@F1=1,IoU>=0.5"], test["gIoU"]) == (0.5, 0.5, 1.0)


def test_undefined_ap_and_unknown_categories_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_one_object(tmp_path, [0, 0, 10, 10], [[0, 0, 10, 10]])
    path = tmp_path / "refer/toy/instances.json"
    evaluate_on_refer(tmp_path / "a.h5", tmp_path / "refer", "toy", "me")
    assert caplog.text == ""
    data = json.loads(path.read_text())
    data["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(data))
    found = evaluate_on_refer(tmp_path / "a.h5", tmp_path / "refer", "toy", "me")["splits"]["val"]
    assert found["detection"]["bbox"]["AP"] is None
    assert "split val: AP is not defined: iscrowd is 1 on the only annotation" in caplog.text
    write_store(tmp_path / "b.h5", [regions(1, [[0, 0, 10, 10]] * 3, [1, 7, 9])], masks=False)
    evaluate_on_refer(tmp_path / "b.h5", tmp_path / "refer", "toy", "me")
    assert "2 of 3 regions are in a category that" in caplog.text
