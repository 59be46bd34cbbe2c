"""Metrics compared with brute force in float64 on random cases, and with pycocotools where possible."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from evaluate_examples import regions, scalar_giou, scalar_iou, xyxy
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from refdet.evaluation.grefcoco import Answer, generalized_scores
from refdet.evaluation.metrics import box_iou, generalized_iou, mask_overlap, precisions, segmentation_scores
from refdet.evaluation.recall import TOP_K, coverage, recall_at_k, referent_recall
from refdet.evaluation.targets import empty_mask

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
# Quarters of pixels are exact in float64, so that "one pixel of overlap" is too.
quarter = st.integers(0, 200).map(lambda n: n / 4)
side = st.integers(1, 160).map(lambda n: n / 4)
box = st.tuples(quarter, quarter, side, side)
boxes = st.lists(box, max_size=6)


def mattnet_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """MAttNet's IoU of xywh boxes: inclusive corners, so widths are x2 - x1 + 1."""
    ax2, ay2, bx2, by2 = a[0] + a[2] - 1, a[1] + a[3] - 1, b[0] + b[2] - 1, b[1] + b[3] - 1
    x1, y1, x2, y2 = max(a[0], b[0]), max(a[1], b[1]), min(ax2, bx2), min(ay2, by2)
    both = (x2 - x1 + 1) * (y2 - y1 + 1) if x1 < x2 and y1 < y2 else 0
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def to_array(boxes: list[tuple[float, ...]]) -> np.ndarray:
    return np.array([xyxy(b) for b in boxes], np.float64).reshape(-1, 4)


@EXAMPLES
@given(boxes, boxes)
def test_box_iou_equals_brute_force_and_pycocotools(a: list, b: list) -> None:
    found = box_iou(to_array(a), to_array(b))
    assert found.shape == (len(a), len(b)) and found.dtype == np.float64
    assert found.tolist() == [[pytest.approx(scalar_iou(xyxy(p), xyxy(q)), abs=1e-12) for q in b] for p in a]
    if a and b:
        expected = coco_mask.iou([list(p) for p in a], [list(q) for q in b], [0] * len(b))
        np.testing.assert_allclose(found, expected, atol=1e-12)


@EXAMPLES
@given(boxes, boxes)
def test_mattnet_iou_equals_brute_force(a: list, b: list) -> None:
    found = box_iou(to_array(a), to_array(b), "mattnet")
    assert found.tolist() == [[pytest.approx(mattnet_iou(p, q), abs=1e-12) for q in b] for p in a]


def test_mattnet_iou_of_thin_boxes_is_0() -> None:
    thin = np.array([[10, 10, 11, 40]])
    assert box_iou(thin, thin)[0, 0] == 1 and box_iou(thin, thin, "mattnet")[0, 0] == 0
    wide = np.array([[10, 10, 12, 40]])
    assert box_iou(wide, wide, "mattnet")[0, 0] == 1


@EXAMPLES
@given(boxes, boxes)
def test_generalized_iou_equals_brute_force(a: list, b: list) -> None:
    found = generalized_iou(to_array(a), to_array(b))
    assert found.tolist() == [[pytest.approx(scalar_giou(xyxy(p), xyxy(q)), abs=1e-12) for q in b] for p in a]


def test_boxes_without_area_have_overlap_0() -> None:
    for overlap in (box_iou, generalized_iou):
        assert overlap(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0]]


@EXAMPLES
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20))
def test_mask_overlap_equals_numpy(seed: int, height: int, width: int) -> None:
    a, b = np.random.default_rng(seed).random((2, height, width)) < 0.4
    assert mask_overlap(encode(a), encode(b)) == ((a & b).sum(), (a | b).sum())


def encode(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


@EXAMPLES
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=12))
def test_segmentation_scores_equal_brute_force(pairs: list[tuple[int, int]]) -> None:
    overlaps = [(min(p), max(p)) for p in pairs]
    ious = [i / u if u else 0.0 for i, u in overlaps]
    expected = {f"precision@{t}": sum(v >= t for v in ious) / max(len(ious), 1) for t in (0.5, 0.6, 0.7, 0.8, 0.9)}
    assert precisions(ious) == pytest.approx(expected)
    expected["overall_iou"] = sum(i for i, _ in overlaps) / max(sum(u for _, u in overlaps), 1)
    expected["mean_iou"] = sum(ious) / max(len(ious), 1)
    assert segmentation_scores(overlaps) == pytest.approx(expected)


@EXAMPLES
@given(st.lists(st.tuples(box, st.integers(1, 2)), min_size=1, max_size=4),
       st.lists(st.tuples(box, st.integers(1, 2), st.integers(0, 3)), max_size=30))  # fmt: skip
def test_recall_at_k_equals_brute_force(objects: list, found: list) -> None:
    image = regions(1, [xyxy(b) for b, _, _ in found], [c for _, c, _ in found])
    scores = np.array([s / 4 for _, _, s in found], np.float32)  # with ties, where the first region wins
    image = type(image)(1, "", 100, 120, image.boxes, scores, image.category_ids)
    covered = coverage(to_array([b for b, _ in objects]), [c for _, c in objects], image)

    order = sorted(range(len(found)), key=lambda i: (-found[i][2], i))
    for with_category in (False, True):
        expected = {}
        for name, k in [*((str(k), k) for k in TOP_K), ("all", len(found))]:
            kept = [found[i] for i in order[:k]]
            hits = [any(scalar_iou(xyxy(b), xyxy(r)) >= 0.5 and (not with_category or c == rc) for r, rc, _ in kept)
                    for b, c in objects]  # fmt: skip
            expected[name] = sum(hits) / len(objects)
        assert recall_at_k(covered, with_category) == pytest.approx(expected)
    assert recall_at_k(covered)["all"] == referent_recall(covered)["0.5"]


def test_metrics_of_no_targets_are_0() -> None:
    assert referent_recall([])["mean_best_iou"] == 0
    assert recall_at_k([]) == dict.fromkeys([*map(str, TOP_K), "all"], 0.0)
    assert segmentation_scores([])["overall_iou"] == 0


def draw_mask(boxes: list[tuple[float, ...]]) -> np.ndarray:
    mask = np.zeros((100, 100), bool)
    for x, y, w, h in boxes:
        mask[int(y) : int(y + h) + 1, int(x) : int(x + w) + 1] = True
    return mask


def all_paired(truth: list, answered: list, overlap: Callable[[list[float], list[float]], float]) -> bool:
    """Whether greedy matching by overlap pairs all boxes of both lists with an overlap of at least 0.5."""
    truth, answered = list(truth), list(answered)
    while truth and answered:
        value, p, q = max(
            ((overlap(xyxy(p), xyxy(q)), p, q) for p in answered for q in truth), key=lambda pair: pair[0]
        )
        if value < 0.5:
            return False
        answered.remove(p)
        truth.remove(q)
    return not truth and not answered


few_boxes = st.lists(box, max_size=3)


@EXAMPLES
@given(st.lists(st.tuples(few_boxes, st.none() | few_boxes, st.booleans()), min_size=1, max_size=6), st.booleans())
def test_generalized_scores_equal_brute_force(sentences: list, with_masks: bool) -> None:
    answers, none, some, right, ious, both, either = [], [], [], [], [], 0, 0
    for truth, answered, same in sentences:
        answered = list(reversed(truth)) if same and answered is not None else answered
        masks = (draw_mask(truth), draw_mask(answered or []))
        answers.append(Answer(
            to_array(truth), encode(masks[0]) if with_masks else None,
            None if answered is None else to_array(answered), encode(masks[1]) if with_masks else None,
        ))  # fmt: skip
        (some if truth else none).append(answered is not None and bool(answered) == bool(truth))
        right.append(
            [answered is not None and all_paired(truth, answered, overlap) for overlap in (scalar_iou, scalar_giou)]
        )
        union = int((masks[0] | masks[1]).sum())
        both, either = both + int((masks[0] & masks[1]).sum()), either + union
        ious.append((masks[0] & masks[1]).sum() / union if truth else float(answered == []))
    scores = generalized_scores(answers)
    assert scores["N-acc"] == (pytest.approx(np.mean(none)) if none else None)
    assert scores["T-acc"] == (pytest.approx(np.mean(some)) if some else None)
    assert (scores["no_target"], scores["missing"]) == (
        len(none),
        sum(answered is None for _, answered, _ in sentences),
    )
    assert scores["precision@F1=1,IoU>=0.5"] == pytest.approx(np.mean([iou for iou, _ in right]))
    assert scores["precision@F1=1,GIoU>=0.5"] == pytest.approx(np.mean([giou for _, giou in right]))
    if with_masks:
        assert scores["gIoU"] == pytest.approx(np.mean(ious))
        assert scores["cIoU"] == pytest.approx(both / either if either else 0)
    else:
        assert scores["gIoU"] is None and scores["precision@0.5"] is None


def test_f1_is_1_only_if_boxes_match_objects_one_to_one() -> None:
    """F1 is 1 only if boxes and objects match one to one."""
    a, b = [0, 0, 10, 10], [50, 50, 70, 70]
    none = empty_mask(9, 9)

    def precision(truth: list, answered: list) -> float | int | None:
        answer = Answer(np.array(truth, float).reshape(-1, 4), none, np.array(answered, float).reshape(-1, 4), none)
        return generalized_scores([answer])["precision@F1=1,IoU>=0.5"]

    assert precision([a, b], [b, a]) == 1 and precision([], []) == 1
    assert precision([a, b], [a, a]) == 0 and precision([a], [a, a]) == 0 and precision([a, b], [a]) == 0
