"""evaluate-on-refer, compared with brute force, with masks in NumPy and with hand-computed values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_examples import (
    PROVENANCE,
    regions,
    scalar_iou,
    write_grefer,
    write_refer,
    write_store,
    xyxy,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from refdet.data.coco import CocoIndex
from refdet.data.segmentations import to_rle
from refdet.errors import InputError
from refdet.evaluation.average_precision import coco_ap
from refdet.evaluation.refer_benchmark import evaluate_on_refer
from refdet.extraction.given_regions import regions_from_annotations
from refer import ReferError

corner = st.floats(0, 50, width=32)
box = st.tuples(corner, corner, st.floats(0.25, 40, width=32), st.floats(0.25, 40, width=32))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(refs=st.lists(st.tuples(st.integers(1, 3), box, st.integers(1, 2)), min_size=1, max_size=6),
       found=st.lists(st.tuples(st.integers(1, 3), box, st.integers(1, 2)), max_size=9))  # fmt: skip
def test_recall_equals_brute_force(tmp_path_factory: pytest.TempPathFactory, refs: list, found: list) -> None:
    folder = tmp_path_factory.mktemp("refer")
    objects = [{"image_id": i, "bbox": list(b), "category_id": c, "split": "val"} for i, b, c in refs]
    root = write_refer(folder / "r", objects)
    images = [
        regions(i, [xyxy(b) for j, b, _ in found if i == j], [c for j, _, c in found if i == j]) for i in (1, 2, 3)
    ]
    write_store(folder / "a.h5", images, masks=False)
    split = evaluate_on_refer(folder / "a.h5", root, "toy", "me")["splits"]["val"]

    stored = {i: list(zip(r.boxes.tolist(), r.category_ids.tolist(), strict=True)) for i, r in enumerate(images, 1)}
    best = [max((scalar_iou(xyxy(b), box) for box, _ in stored[i]), default=0) for i, b, _ in refs]
    same = [max((scalar_iou(xyxy(b), box) for box, k in stored[i] if k == c), default=0) for i, b, c in refs]
    expected = {str(t): sum(v >= t for v in best) / len(refs) for t in (0.5, 0.6, 0.7, 0.8, 0.9)}
    expected |= {f"with_category@{t}": sum(v >= t for v in same) / len(refs) for t in (0.5, 0.6, 0.7, 0.8, 0.9)}
    expected["mean_best_iou"] = sum(best) / len(refs)
    assert split["referent_recall"] == pytest.approx(expected, abs=1e-9)
    kept = {str(k): [max((scalar_iou(xyxy(b), box) for box, _ in stored[i][:k]), default=0) for i, b, _ in refs]
            for k in (1, 2, 5, 10, 20, 50, 100)} | {"all": best}  # fmt: skip
    assert split["recall@k"] == {k: pytest.approx(np.mean([v >= 0.5 for v in of_k])) for k, of_k in kept.items()}
    assert split["recall@k_with_category"]["all"] == pytest.approx(expected["with_category@0.5"])
    assert split["regions_per_image"] == pytest.approx(np.mean([len(stored[i]) for i in {i for i, _, _ in refs}]))
    assert split["detection"]["segm"] is None
    assert (split["images"], split["refs"], split["sentences"]) == (len({r[0] for r in refs}), len(refs), 2 * len(refs))


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
    for image_id, image_boxes in boxes.items():
        masks = []
        for x1, y1, x2, y2 in image_boxes:
            mask = np.zeros((100, 120), np.uint8, order="F")
            mask[y1:y2, x1:x2] = 1
            masks.append(coco_mask.encode(mask)["counts"])
        images.append(regions(image_id, image_boxes, [image_id] * len(image_boxes), tuple(masks)))
    write_store(tmp_path / "a.h5", images, masks=True)
    return tmp_path / "a.h5", root


def test_predictions_as_regions_masks_and_boxes(toy: tuple[Path, Path], tmp_path: Path) -> None:
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
    precisions = {f"precision@{threshold}": 0.5 for threshold in (0.5, 0.6, 0.7, 0.8, 0.9)}
    assert val["comprehension"] == {
        "accuracy@0.5": 0.5,
        "missing": 0,
        "random_baseline@0.5": 0.5,
        "mean_iou": 0.5,
        **precisions,
    }
    assert val["segmentation"]["precision@0.9"] == 0.5
    assert val["segmentation"]["overall_iou"] == pytest.approx(400 / 900)
    assert (test["comprehension"]["accuracy@0.5"], test["comprehension"]["missing"]) == (0.0, 1)
    assert test["comprehension"]["random_baseline@0.5"] == 1.0  # the one region has IoU 0.5
    assert test["segmentation"]["mean_iou"] == pytest.approx((640 / 1600) / 2)
    assert test["segmentation"]["overall_iou"] == pytest.approx(640 / 3200)
    assert val["detection"]["segm"]["AP"] == pytest.approx(1.0)

    boxes = [{"sent_id": s, "box": [10, 10, 20, 10]} for s in (0, 1)]
    (tmp_path / "p.json").write_text(json.dumps(boxes))
    found = evaluate_on_refer(features, root, "toy", "me", splits=["val"], predictions=tmp_path / "p.json")
    val = found["splits"]["val"]
    assert val["comprehension"]["accuracy@0.5"] == 1.0
    assert val["segmentation"] is None


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({}, "a list"),
        ([3], "entry 0"),
        ([{"sent_id": 77, "region": 0}], "sentence 77 is not in"),
        ([{"sent_id": 0, "region": 0}, {"sent_id": 0, "region": 0}], "entry 1: duplicate entry for sentence 0"),
        ([{"sent_id": 0}], "one of region, box and segmentation"),
        ([{"sent_id": 0, "region": 3}], "region 3 is not a row .* rows are 0 to 2"),
        ([{"sent_id": 0, "region": -1}], "region -1 is not a row"),
        ([{"sent_id": 0, "region": 2}], "region 2 is of image 2, the sentence is of image 1"),
        ([{"sent_id": 0, "box": [1, 2, 3]}], "four numbers"),
        ([{"sent_id": 0, "box": [1, 2, -3, 4]}], "four numbers"),
        ([{"sent_id": 0, "boxes": []}], "boxes is for gRefCOCO"),
        ([{"sent_id": 0, "box": [1, 2, 10**400, 4]}], "entry 0 .*four numbers"),
        ([{"sent_id": 0, "box": [1, 2, float("nan"), 4]}], "four numbers"),
        ([{"sent_id": 0, "box": [float("-inf"), 2, 3, 4]}], "four numbers"),
        ([{"sent_id": 0, "box": [1e308, 2, 1e308, 1e308]}], "four numbers"),
        ([{"sent_id": 0, "segmentation": {"size": [5, 5], "counts": [25]}}], r"size \[5, 5\]"),
        ([{"sent_id": 0, "segmentation": {"size": "ab", "counts": [12000]}}], "size 'ab'"),
        ([{"sent_id": 0, "segmentation": {"size": [100, 120]}}], "neither polygons nor RLE"),
    ],
)
def test_invalid_predictions_are_named(toy: tuple[Path, Path], tmp_path: Path, predictions: Any, message: str) -> None:
    (tmp_path / "p.json").write_text(json.dumps(predictions))
    with pytest.raises(InputError, match=message) as raised:
        evaluate_on_refer(toy[0], toy[1], "toy", "me", predictions=tmp_path / "p.json")
    assert "p.json" in str(raised.value)


BAD_COUNTS = [[], [0, 5], [-5, 12005], [0, 12001], [2**40, 1], [2**32 + 12000], [0.5, 11999.5], [0.0, 12000.0], [[1]],
              [True, 11999], None, 5, "", "05", "0oooo1", "PPPP", "P" * 100_000, "1" * 100_000, "~~~~", "\xe9",
              "\ud800"]  # fmt: skip


@pytest.mark.parametrize("counts", BAD_COUNTS, ids=lambda value: f"{value!a:.20}")
@pytest.mark.parametrize("several", [False, True])
def test_invalid_rles_never_reach_pycocotools(
    toy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Any, several: bool
) -> None:
    """pycocotools would crash, hang or make up a mask."""
    features, root = toy
    wrong: Any = {"size": [100, 120], "counts": counts}
    if several:
        objects = [{"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1}]
        root = write_grefer(tmp_path / "generalized", objects, [(1, [0], "val")])
    monkeypatch.setattr("refdet.evaluation.predictions.coco_mask.toBbox", fail_unchecked)
    answer = {"segmentations": [wrong]} if several else {"segmentation": wrong}
    (tmp_path / "p.json").write_text(json.dumps([{"sent_id": 0} | answer]))
    with pytest.raises(InputError, match=r"p\.json: entry 0 \(sentence 0\): counts of an RLE"):
        evaluate_on_refer(features, root, "toy", "me", splits=["val"], predictions=tmp_path / "p.json")


@pytest.mark.parametrize(
    "polygons",
    [[[0, 0, 9000, 0, 0, 9000] * 40_000], [[0, 0, 9000, 0, 0, 9000]] * 40_000, [[0, 0, 1e12, 0, 0, 1e12]],
     [[0, 0, 4, 0, 4, 4, 0]], [[0, 0, 10**400, 0, 4, 4]], [[0, 0, 4, 0, 4, float("nan")]], [[None] * 6]],
    ids=lambda value: f"{value!a:.30}",
)  # fmt: skip
def test_huge_and_invalid_polygons_never_reach_pycocotools(
    toy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, polygons: Any
) -> None:
    monkeypatch.setattr("refdet.data.segmentations.coco_mask.frPyObjects", fail_unchecked)
    with pytest.raises(InputError, match="polygon is not a list of numbers"):
        to_rle(polygons, 100, 120)
    features, root = toy
    path = root / "toy/instances.json"
    instances = json.loads(path.read_text())
    instances["annotations"][0]["segmentation"] = polygons
    path.write_text(json.dumps(instances))
    with pytest.raises(InputError, match=r"instances\.json: annotation 100: .*polygon"):
        evaluate_on_refer(features, root, "toy", "me", splits=["val"])


def test_a_huge_box_is_refused_as_a_mask(toy: tuple[Path, Path]) -> None:
    """For annotations without a segmentation, the box is used as the mask."""
    path = toy[1] / "toy/instances.json"
    instances = json.loads(path.read_text())
    instances["annotations"][0] |= {"segmentation": None, "bbox": [0, 0, 1e12, 5]}
    path.write_text(json.dumps(instances))
    with pytest.raises(InputError, match=r"instances\.json: annotation 100: .*polygon"):
        coco_ap(CocoIndex.load(path), [1], [], "segm")


def test_omitted_mask_ap_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    objects = [{"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1, "split": "val"}] * 2
    root = write_refer(tmp_path / "refer", objects)
    whole = coco_mask.encode(np.ones((100, 120), np.uint8, order="F"))["counts"]
    write_store(tmp_path / "a.h5", [regions(1, [[10, 10, 30, 30]], masks=(whole,))], masks=True)
    path = root / "toy/instances.json"
    for missing in (0, 1):
        data = json.loads(path.read_text())
        for annotation in data["annotations"][:missing]:
            annotation["segmentation"] = []
        path.write_text(json.dumps(data))
        detection = evaluate_on_refer(tmp_path / "a.h5", root, "toy", "me")["splits"]["val"]["detection"]
        noted = f"split val: 1 of 2 annotations in {path} has no segmentation; mask AP is left out" in caplog.text
        assert (detection["segm"] is None) == noted == bool(missing)


def test_answers_with_a_box_among_masks_are_noted(
    toy: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features, root = toy
    mask, box_only = {"segmentation": rle([10, 10, 30, 30])}, {"box": [10, 10, 20, 20]}
    # Answers to two sentences; how many of these have no answer, and how many no mask (None: no mask metrics).
    cases = [([mask, box_only], (0, 1)), ([mask, mask], (0, 0)), ([mask], (1, 1)), ([box_only, box_only], (0, None))]
    for answers, missing in cases:
        caplog.clear()
        (tmp_path / "p.json").write_text(json.dumps([{"sent_id": k} | answer for k, answer in enumerate(answers)]))
        found = evaluate_on_refer(features, root, "toy", "me", splits=["val"], predictions=tmp_path / "p.json")
        val = found["splits"]["val"]
        masks = val["segmentation"]
        assert (val["comprehension"]["missing"], masks and masks["missing"]) == missing
        noted = "val: 1 of 2 sentences is answered with a box where others have a mask" in caplog.text
        assert noted == (missing == (0, 1))


@pytest.mark.parametrize("box", [[10**400, 1, 5, 5], [1, 1, 1e300, 5]])
def test_an_annotation_with_an_infinite_box_is_named(tmp_path: Path, box: list[float]) -> None:
    objects = [{"image_id": 1, "bbox": [1, 1, 5, 5], "category_id": 1, "split": "val"}]
    root = write_refer(tmp_path / "refer", objects)
    path = root / "toy" / "instances.json"
    tree = json.loads(path.read_text())
    tree["annotations"][0]["bbox"] = box
    path.write_text(json.dumps(tree))
    write_store(tmp_path / "a.h5", [regions(1, [[1, 1, 9, 9]])], masks=False)
    with pytest.raises(ReferError, match="toy: bbox of annotation 100 is not finite"):
        evaluate_on_refer(tmp_path / "a.h5", root, "toy", "me")


def fail_unchecked(*_: Any) -> None:
    raise AssertionError("a mask reached pycocotools unchecked")


@pytest.mark.parametrize(
    ("predictions", "is_worse"),
    [
        ([], False),
        ([{"sent_id": 0, "region": 0}], False),  # the only answer is right; the missing one counts as wrong elsewhere
        ([{"sent_id": 0, "region": 1}], True),
        ([{"sent_id": 0, "box": [90, 90, 5, 5]}, {"sent_id": 1, "region": 1}], True),
    ],
)
def test_answers_worse_than_guessing_are_noted_without_the_missing_ones(
    toy: tuple[Path, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    predictions: list[dict[str, Any]],
    is_worse: bool,
) -> None:
    (tmp_path / "p.json").write_text(json.dumps(predictions))
    found = evaluate_on_refer(*toy, "toy", "me", splits=["val"], predictions=tmp_path / "p.json")
    assert found["splits"]["val"]["comprehension"]["missing"] == 2 - len(predictions)
    notes = [text for text in caplog.messages if "below that of guessing" in text]
    assert len(notes) == is_worse
    if is_worse:
        assert notes[0].startswith(f"note: split val: the accuracy of {len(predictions)} answer")
        assert "0.000, is below that of guessing a region (0.500): if they are boxes, are they in pixels" in notes[0]


def test_images_missing_from_the_store_are_named(toy: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"lacks 1 of 1 image of split train \(3\).*extract-features"):
        evaluate_on_refer(toy[0], toy[1], "toy", "me", splits=["train"])
    with pytest.raises(InputError, match="`splits` testB: no such split"):
        evaluate_on_refer(toy[0], toy[1], "toy", "me", splits=["testB"])


@pytest.mark.parametrize(("dataset", "split_by"), [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")])
def test_real_annotations_cover_every_ref(shared: Path, tmp_path: Path, dataset: str, split_by: str) -> None:
    data = shared / "data/coco_mini"
    index = CocoIndex.load(data / "annotations/instances_train2017.json")
    images = [regions_from_annotations(record, index.annotations[i]) for i, record in index.images.items()]
    write_store(tmp_path / "a.h5", images, masks=True)
    found = evaluate_on_refer(tmp_path / "a.h5", data / "refer", dataset, split_by)
    assert found["splits"]
    for split in found["splits"].values():
        assert split["referent_recall"]["0.9"] == 1.0
        assert split["referent_recall"]["with_category@0.5"] == 1.0
        assert split["detection"]["segm"]["AP"] == pytest.approx(1.0)


def test_generalized_predictions(tmp_path: Path) -> None:
    """Refs to two objects, to none and to one, each with two sentences."""
    objects = [{"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1},
               {"image_id": 1, "bbox": [50, 50, 10, 10], "category_id": 2}]  # fmt: skip
    root = write_grefer(tmp_path / "refer", objects, [(1, [0, 1], "val"), (1, [], "val"), (1, [1], "val")])
    write_store(tmp_path / "a.h5", [regions(1, [[10, 10, 30, 30], [50, 50, 60, 60]], [1, 1])], masks=False)
    answers = [
        {"sent_id": 0, "regions": [1, 0]},
        {"sent_id": 1, "boxes": [[10, 10, 20, 20]]},
        {"sent_id": 10, "regions": []},
        {"sent_id": 11, "region": 0},
        {"sent_id": 20, "box": [50, 50, 10, 8]},
    ]
    (tmp_path / "p.json").write_text(json.dumps(answers))
    val = evaluate_on_refer(tmp_path / "a.h5", root, "toy", "me", predictions=tmp_path / "p.json")["splits"]["val"]
    assert "comprehension" not in val and "segmentation" not in val
    scores = val["generalized"]
    assert (scores["no_target"], scores["missing"], scores["N-acc"], scores["T-acc"]) == (2, 1, 0.5, 0.75)
    assert scores["precision@F1=1,IoU>=0.5"] == pytest.approx(3 / 6) and scores["gIoU"] is None
    # The regions cover all three referred objects, but the second region has another category.
    assert val["referent_recall"]["0.9"] == 1.0
    assert val["referent_recall"]["with_category@0.5"] == pytest.approx(1 / 3)
    assert val["recall@k"]["1"] == pytest.approx(1 / 3)

    masks = [{"sent_id": 0, "segmentations": [rle([10, 10, 30, 30]), rle([0, 0, 0, 0])]},
             {"sent_id": 10, "segmentations": []}, {"sent_id": 11, "segmentation": rle([0, 0, 10, 10])},
             {"sent_id": 20, "segmentation": rle([50, 50, 60, 55])}]  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(masks))
    val = evaluate_on_refer(tmp_path / "a.h5", root, "toy", "me", predictions=tmp_path / "p.json")["splits"]["val"]
    scores = val["generalized"]
    assert scores["gIoU"] == pytest.approx((400 / 500 + 0 + 1 + 0 + 50 / 100 + 0) / 6)
    assert scores["cIoU"] == pytest.approx((400 + 50) / (500 + 500 + 0 + 100 + 100 + 100))
    assert (scores["precision@0.5"], scores["precision@0.8"]) == (2 / 4, 1 / 4)

    for entry, message in (
        ({"boxes": 3}, r"entry 0 \(sentence 0\): boxes must be a list, \[\] for no object"),
        ({"ranked_boxes": [[1, 2, 3, 4]]}, "ranked_boxes is not for gRefCOCO, .* refers to, unranked: give boxes$"),
    ):
        (tmp_path / "p.json").write_text(json.dumps([{"sent_id": 0, **entry}]))
        with pytest.raises(InputError, match=message):
            evaluate_on_refer(tmp_path / "a.h5", root, "toy", "me", predictions=tmp_path / "p.json")


def rle(box: list[int]) -> dict[str, Any]:
    mask = np.zeros((100, 120), np.uint8, order="F")
    mask[box[1] : box[3], box[0] : box[2]] = 1
    encoded = coco_mask.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}
