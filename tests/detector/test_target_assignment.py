import numpy as np
import torch
from pycocotools import mask as coco_mask

from refdet.detector.target_assignment import (
    IGNORE,
    NEGATIVE,
    POSITIVE,
    assign_labels,
    compute_mask_targets,
    inside,
    subsample_labels,
)
from refdet.structures.box_convention import BoxConvention
from refdet.structures.ground_truth import GroundTruth


def truth_of(boxes: list, crowds: list = (), **more: object) -> GroundTruth:
    given = {"masks": None, "scale": (1.0, 1.0), **more}
    return GroundTruth(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.ones(len(boxes), dtype=torch.int64),
        crowds=torch.tensor(crowds, dtype=torch.float32).reshape(-1, 4),
        **given,
    )


def test_match_by_thresholds() -> None:
    truth = truth_of([[0, 0, 10, 10]])
    candidates = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2], [50, 50, 60, 60]])
    kinds, matched = assign_labels(candidates, truth, 0.7, 0.3, best_for_each=False)
    assert kinds.tolist() == [POSITIVE, IGNORE, NEGATIVE, NEGATIVE]
    assert matched[:3].tolist() == [0, 0, 0]


def test_each_object_gets_its_best_anchor() -> None:
    truth = truth_of([[0, 0, 10, 10], [100, 100, 101, 101]])
    candidates = torch.tensor([[0.0, 0, 10, 4], [0, 0, 10, 3], [99, 99, 109, 109]])
    kinds, matched = assign_labels(candidates, truth, 0.7, 0.3, best_for_each=True)
    assert kinds.tolist() == [POSITIVE, IGNORE, POSITIVE]
    assert matched.tolist() == [0, 0, 1]


def test_an_object_that_no_anchor_touches_makes_none_positive() -> None:
    kinds, _ = assign_labels(torch.tensor([[0.0, 0, 5, 5]]), truth_of([[50, 50, 60, 60]]), 0.7, 0.3, best_for_each=True)
    assert kinds.tolist() == [NEGATIVE]


def test_crowds_are_neither_object_nor_background() -> None:
    truth = truth_of([[0, 0, 10, 10]], crowds=[[20, 0, 60, 40]])
    kinds, _ = assign_labels(
        torch.tensor([[30.0, 5, 40, 15], [0, 0, 10, 10], [70, 70, 80, 80]]), truth, 0.5, 0.5, False
    )
    assert kinds.tolist() == [IGNORE, POSITIVE, NEGATIVE]


def test_without_objects_all_is_background() -> None:
    kinds, matched = assign_labels(torch.zeros(3, 4), truth_of([]), 0.5, 0.5, best_for_each=True)
    assert kinds.tolist() == [NEGATIVE] * 3
    assert matched.tolist() == [0, 0, 0]


def test_sample_counts() -> None:
    kinds = torch.tensor([POSITIVE] * 50 + [NEGATIVE] * 500 + [IGNORE] * 30)
    positive, negative = subsample_labels(kinds, 64, 0.25, torch.Generator().manual_seed(0))
    assert len(positive) == 16 and len(negative) == 48
    assert (kinds[positive] == POSITIVE).all() and (kinds[negative] == NEGATIVE).all()
    assert len(set(positive.tolist())) == 16
    positive, negative = subsample_labels(kinds[49:], 64, 0.25, None)  # one object: background fills up
    assert len(positive) == 1 and len(negative) == 63


def test_refilled_samples_have_the_count_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.tensor([POSITIVE] * 3 + [NEGATIVE] * 5 + [IGNORE] * 4)
    positive, negative = subsample_labels(kinds, 64, 0.25, generator, sample_with_replacement=True)
    assert sorted(positive.tolist()) == [0, 1, 2]  # objects are drawn once
    assert len(negative) == 61 and set(negative.tolist()) == {3, 4, 5, 6, 7}
    positive, negative = subsample_labels(
        kinds[:3], 64, 0.25, generator, sample_with_replacement=True
    )  # no background: objects fill up
    assert len(positive) == 64 and set(positive.tolist()) == {0, 1, 2} and len(negative) == 0
    positive, negative = subsample_labels(torch.full((5,), IGNORE), 64, 0.25, generator, sample_with_replacement=True)
    assert len(positive) == len(negative) == 0
    many = torch.tensor([POSITIVE] * 50 + [NEGATIVE] * 100)
    positive, negative = subsample_labels(many, 64, 0.25, generator, sample_with_replacement=True)
    assert len(positive) == len(set(positive.tolist())) == 16 and len(set(negative.tolist())) == 48


def test_inside_the_image() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 10], [-1, 0, 5, 5], [0, 0, 21, 5], [0, 0, 5, 11]])
    assert inside(boxes, height=10, width=20).tolist() == [True, False, False, False]


def test_inclusive_rois_get_the_mask_under_their_pixels() -> None:
    """At scale 2 the reference's RoI 0..38 is the pixels 0..19 of the image."""
    mask = np.zeros((20, 40), np.uint8)
    mask[:, :10] = 1
    truth = truth_of([[0, 0, 20, 40]], masks=[coco_mask.encode(np.asfortranarray(mask))], scale=(2.0, 2.0))
    seed = BoxConvention(inclusive=True)
    roi = seed.scale(torch.tensor([[0.0, 0, 20, 20]]), (2.0, 2.0))
    assert roi.tolist() == [[0, 0, 39, 39]]
    assert compute_mask_targets(roi, torch.tensor([0]), truth, 2, seed)[0].tolist() == [[1, 0]] * 2


def test_mask_targets_go_through_scale_and_mirror() -> None:
    mask = np.zeros((20, 40), np.uint8)
    mask[:, :10] = 1  # the left quarter
    rle = coco_mask.encode(np.asfortranarray(mask))
    roi = torch.tensor([[0.0, 0, 80, 40]])  # the whole image at twice the size
    plain = truth_of([[0, 0, 20, 40]], masks=[rle], scale=(2.0, 2.0))
    found = compute_mask_targets(roi, torch.tensor([0]), plain, 4)
    assert found[0].tolist() == [[1, 0, 0, 0]] * 4
    mirrored = truth_of([[60, 0, 80, 40]], masks=[rle], scale=(2.0, 2.0), flipped_width=40.0)
    assert compute_mask_targets(roi, torch.tensor([0]), mirrored, 4)[0].tolist() == [[0, 0, 0, 1]] * 4
    right_half = torch.tensor([[40.0, 0, 80, 40]])
    assert compute_mask_targets(right_half, torch.tensor([0]), mirrored, 2)[0].tolist() == [[0, 1]] * 2


def test_each_roi_gets_the_mask_of_its_object() -> None:
    masks = []
    for columns in (slice(0, 5), slice(5, 10)):
        mask = np.zeros((10, 10), np.uint8)
        mask[:, columns] = 1
        masks.append(coco_mask.encode(np.asfortranarray(mask)))
    truth = truth_of([[0, 0, 5, 10], [5, 0, 10, 10]], masks=masks)
    rois = torch.tensor([[0.0, 0, 10, 10]] * 3)
    found = compute_mask_targets(rois, torch.tensor([1, 0, 1]), truth, 2)
    assert found[:, 0].tolist() == [[0, 1], [1, 0], [0, 1]]
