"""The metrics against brute force in float64 on random cases, and against pycocotools where it has them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from evaluate_examples import brute_iou, regions, xyxy
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
    """As defined by MAttNet, on x y w h: inclusive corners, widths with + 1."""
    ax2, ay2, bx2, by2 = a[0] + a[2] - 1, a[1] + a[3] - 1, b[0] + b[2] - 1, b[1] + b[3] - 1
    x1, y1, x2, y2 = max(a[0], b[0]), max(a[1], b[1]), min(ax2, bx2), min(ay2, by2)
    both = (x2 - x1 + 1) * (y2 - y1 + 1) if x1 < x2 and y1 < y2 else 0
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def brute_giou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union - (around - union) / around


def arrays(some: list[tuple[float, ...]]) -> np.ndarray:
    return np.array([xyxy(b) for b in some], np.float64).reshape(-1, 4)


@EXAMPLES
@given(boxes, boxes)
def test_box_iou_is_brute_force_and_pycocotools(a: list, b: list) -> None:
    found = box_iou(arrays(a), arrays(b))
    assert found.shape == (len(a), len(b)) and found.dtype == np.float64
    assert found.tolist() == [[pytest.approx(brute_iou(xyxy(p), xyxy(q)), abs=1e-12) for q in b] for p in a]
    if a and b:
        theirs = coco_mask.iou([list(p) for p in a], [list(q) for q in b], [0] * len(b))
        np.testing.assert_allclose(found, theirs, atol=1e-12)


@EXAMPLES
@given(boxes, boxes)
def test_mattnets_iou_is_its_own(a: list, b: list) -> None:
    found = box_iou(arrays(a), arrays(b), "mattnet")
    assert found.tolist() == [[pytest.approx(mattnet_iou(p, q), abs=1e-12) for q in b] for p in a]


def test_where_mattnets_iou_differs() -> None:
    thin = np.array([[10, 10, 11, 40]])
    assert box_iou(thin, thin)[0, 0] == 1 and box_iou(thin, thin, "mattnet")[0, 0] == 0
    wide = np.array([[10, 10, 12, 40]])
    assert box_iou(wide, wide, "mattnet")[0, 0] == 1


@EXAMPLES
@given(boxes, boxes)
def test_generalized_iou_is_brute_force(a: list, b: list) -> None:
    found = generalized_iou(arrays(a), arrays(b))
    assert found.tolist() == [[pytest.approx(brute_giou(xyxy(p), xyxy(q)), abs=1e-12) for q in b] for p in a]


def test_boxes_without_area_overlap_nothing() -> None:
    for overlap in (box_iou, generalized_iou):
        assert overlap(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0]]


@EXAMPLES
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20))
def test_mask_overlap_is_numpy(seed: int, height: int, width: int) -> None:
    a, b = np.random.default_rng(seed).random((2, height, width)) < 0.4
    assert mask_overlap(encode(a), encode(b)) == ((a & b).sum(), (a | b).sum())


def encode(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


@EXAMPLES
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=12))
def test_segmentation_scores_are_brute_force(pairs: list[tuple[int, int]]) -> None:
    overlaps = [(min(p), max(p)) for p in pairs]
    ious = [i / u if u else 0.0 for i, u in overlaps]
    wanted = {f"precision@{t}": sum(v >= t for v in ious) / max(len(ious), 1) for t in (0.5, 0.6, 0.7, 0.8, 0.9)}
    assert precisions(ious) == pytest.approx(wanted)
    wanted["overall_iou"] = sum(i for i, _ in overlaps) / max(sum(u for _, u in overlaps), 1)
    wanted["mean_iou"] = sum(ious) / max(len(ious), 1)
    assert segmentation_scores(overlaps) == pytest.approx(wanted)


@EXAMPLES
@given(st.lists(st.tuples(box, st.integers(1, 2)), min_size=1, max_size=4),
       st.lists(st.tuples(box, st.integers(1, 2), st.integers(0, 3)), max_size=30))  # fmt: skip
def test_recall_by_regions_is_brute_force(objects: list, found: list) -> None:
    image = regions(1, [xyxy(b) for b, _, _ in found], [c for _, c, _ in found])
    scores = np.array([s / 4 for _, _, s in found], np.float32)  # with ties: the first of equals is kept
    image = type(image)(1, "", 100, 120, image.boxes, scores, image.category_ids)
    covered = coverage(arrays([b for b, _ in objects]), [c for _, c in objects], image)

    order = sorted(range(len(found)), key=lambda i: (-found[i][2], i))
    for with_category in (False, True):
        wanted = {}
        for name, k in [*((str(k), k) for k in TOP_K), ("all", len(found))]:
            kept = [found[i] for i in order[:k]]
            hits = [any(brute_iou(xyxy(b), xyxy(r)) >= 0.5 and (not with_category or c == rc) for r, rc, _ in kept)
                    for b, c in objects]  # fmt: skip
            wanted[name] = sum(hits) / len(objects)
        assert recall_at_k(covered, with_category) == pytest.approx(wanted)
    assert recall_at_k(covered)["all"] == referent_recall(covered)["0.5"]


def test_rates_of_nothing() -> None:
    assert referent_recall([])["mean_best_iou"] == 0
    assert recall_at_k([]) == dict.fromkeys([*map(str, TOP_K), "all"], 0.0)
    assert segmentation_scores([])["overall_iou"] == 0


def masks_of(some: list[tuple[float, ...]]) -> np.ndarray:
    mask = np.zeros((100, 100), bool)
    for x, y, w, h in some:
        mask[int(y) : int(y + h) + 1, int(x) : int(x + w) + 1] = True
    return mask


def all_paired(truth: list, said: list, overlap: Callable[[list[float], list[float]], float]) -> bool:
    """Whether pairs, the best first, use up both lists before one overlaps too little."""
    truth, said = list(truth), list(said)
    while truth and said:
        value, p, q = max(((overlap(xyxy(p), xyxy(q)), p, q) for p in said for q in truth), key=lambda pair: pair[0])
        if value < 0.5:
            return False
        said.remove(p)
        truth.remove(q)
    return not truth and not said


few = st.lists(box, max_size=3)


@EXAMPLES
@given(st.lists(st.tuples(few, st.none() | few, st.booleans()), min_size=1, max_size=6), st.booleans())
def test_generalized_scores_are_brute_force(sentences: list, with_masks: bool) -> None:
    answers, none, some, right, ious, both, either = [], [], [], [], [], 0, 0
    for truth, said, same in sentences:
        said = list(reversed(truth)) if same and said is not None else said
        masks = (masks_of(truth), masks_of(said or []))
        answers.append(Answer(
            arrays(truth), encode(masks[0]) if with_masks else None,
            None if said is None else arrays(said), encode(masks[1]) if with_masks else None,
        ))  # fmt: skip
        (some if truth else none).append(said is not None and bool(said) == bool(truth))
        right.append([said is not None and all_paired(truth, said, overlap) for overlap in (brute_iou, brute_giou)])
        union = int((masks[0] | masks[1]).sum())
        both, either = both + int((masks[0] & masks[1]).sum()), either + union
        ious.append((masks[0] & masks[1]).sum() / union if truth else float(said == []))
    scores = generalized_scores(answers)
    assert scores["N-acc"] == (pytest.approx(np.mean(none)) if none else None)
    assert scores["T-acc"] == (pytest.approx(np.mean(some)) if some else None)
    assert (scores["no_target"], scores["missing"]) == (len(none), sum(said is None for _, said, _ in sentences))
    assert scores["precision@F1=1,IoU>=0.5"] == pytest.approx(np.mean([iou for iou, _ in right]))
    assert scores["precision@F1=1,GIoU>=0.5"] == pytest.approx(np.mean([giou for _, giou in right]))
    if with_masks:
        assert scores["gIoU"] == pytest.approx(np.mean(ious))
        assert scores["cIoU"] == pytest.approx(both / either if either else 0)
    else:
        assert scores["gIoU"] is None and scores["precision@0.5"] is None


def test_all_objects_and_nothing_else() -> None:
    """F1 is 1 only if every object has its box; one box on two objects, or two on one, will not do."""
    a, b = [0, 0, 10, 10], [50, 50, 70, 70]
    none = empty_mask(9, 9)

    def precision(truth: list, said: list) -> float | int | None:
        answer = Answer(np.array(truth, float).reshape(-1, 4), none, np.array(said, float).reshape(-1, 4), none)
        return generalized_scores([answer])["precision@F1=1,IoU>=0.5"]

    assert precision([a, b], [b, a]) == 1 and precision([], []) == 1
    assert precision([a, b], [a, a]) == 0 and precision([a], [a, a]) == 0 and precision([a, b], [a]) == 0
