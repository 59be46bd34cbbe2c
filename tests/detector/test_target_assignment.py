"""Labels of anchors and RoIs, mask targets, and the sampling of both."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from refdet.config.recipe import HeadOptions
from refdet.detector.roi_sampling import sample_rois
from refdet.detector.sampling import image_seeds, random_numbers, subsample_labels
from refdet.detector.target_assignment import (
    IGNORE,
    NEGATIVE,
    POSITIVE,
    anchors_inside,
    assign_labels,
    compute_mask_targets,
)
from refdet.structures.box_convention import BoxConvention
from refdet.structures.ground_truth import GroundTruth, PaddedGroundTruth

CPU = torch.device("cpu")


def truth_of(boxes: list, crowds: list = (), **more: object) -> GroundTruth:
    given = {"masks": None, "scale": (1.0, 1.0), **more}
    return GroundTruth(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.ones(len(boxes), dtype=torch.int64),
        crowds=torch.tensor(crowds, dtype=torch.float32).reshape(-1, 4),
        **given,
    )


def assign_labels_of_one(candidates: torch.Tensor, truth: GroundTruth, *given: float, **more: bool) -> tuple:
    """`assign_labels` of one image."""
    labels, matched = assign_labels(candidates, PaddedGroundTruth.pad([truth], CPU), *given, **more)
    return labels[0], matched[0]


def subsample_one(labels: torch.Tensor, count: int, fraction: float, seed: int = 0, **more: bool) -> tuple:
    """`subsample_labels` of one image: indices of the positives and of the negatives."""
    found = subsample_labels(labels[None], count, fraction, torch.tensor([seed]), **more)
    index, positive, valid = found.index[0], found.positive[0], found.valid[0]
    assert not (positive & ~valid).any() and torch.equal(positive, positive.sort(descending=True, stable=True).values)
    return index[positive], index[valid & ~positive]


def test_labels_by_iou_thresholds() -> None:
    truth = truth_of([[0, 0, 10, 10]])
    candidates = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2], [50, 50, 60, 60]])
    labels, matched = assign_labels_of_one(candidates, truth, 0.7, 0.3, allow_low_quality_matches=False)
    assert labels.tolist() == [POSITIVE, IGNORE, NEGATIVE, NEGATIVE]
    assert matched[:3].tolist() == [0, 0, 0]


def test_low_quality_matches_label_the_best_anchor_of_each_object() -> None:
    truth = truth_of([[0, 0, 10, 10], [100, 100, 101, 101]])
    candidates = torch.tensor([[0.0, 0, 10, 4], [0, 0, 10, 3], [99, 99, 109, 109]])
    labels, matched = assign_labels_of_one(candidates, truth, 0.7, 0.3, allow_low_quality_matches=True)
    assert labels.tolist() == [POSITIVE, IGNORE, POSITIVE]
    assert matched.tolist() == [0, 0, 1]


def test_an_object_that_no_anchor_touches_makes_none_positive() -> None:
    labels, _ = assign_labels_of_one(
        torch.tensor([[0.0, 0, 5, 5]]), truth_of([[50, 50, 60, 60]]), 0.7, 0.3, allow_low_quality_matches=True
    )
    assert labels.tolist() == [NEGATIVE]


def test_candidates_on_crowds_are_ignored() -> None:
    truth = truth_of([[0, 0, 10, 10]], crowds=[[20, 0, 60, 40]])
    labels, _ = assign_labels_of_one(
        torch.tensor([[30.0, 5, 40, 15], [0, 0, 10, 10], [70, 70, 80, 80]]), truth, 0.5, 0.5, False
    )
    assert labels.tolist() == [IGNORE, POSITIVE, NEGATIVE]


def test_without_objects_all_candidates_are_negative() -> None:
    labels, matched = assign_labels_of_one(torch.zeros(3, 4), truth_of([]), 0.5, 0.5, allow_low_quality_matches=True)
    assert labels.tolist() == [NEGATIVE] * 3
    assert matched.tolist() == [0, 0, 0]


def test_numbers_of_sampled_positives_and_negatives() -> None:
    labels = torch.tensor([POSITIVE] * 50 + [NEGATIVE] * 500 + [IGNORE] * 30)
    positive, negative = subsample_one(labels, 64, 0.25)
    assert len(positive) == 16 and len(negative) == 48
    assert (labels[positive] == POSITIVE).all() and (labels[negative] == NEGATIVE).all()
    assert len(set(positive.tolist())) == 16
    positive, negative = subsample_one(labels[49:], 64, 0.25)  # negatives replace missing positives
    assert len(positive) == 1 and len(negative) == 63


def test_sampling_with_replacement_fills_the_batch() -> None:
    labels = torch.tensor([POSITIVE] * 3 + [NEGATIVE] * 5 + [IGNORE] * 4)
    positive, negative = subsample_one(labels, 64, 0.25, sample_with_replacement=True)
    assert sorted(positive.tolist()) == [0, 1, 2]  # positives are not repeated
    assert len(negative) == 61 and set(negative.tolist()) == {3, 4, 5, 6, 7}
    positive, negative = subsample_one(
        labels[:3], 64, 0.25, sample_with_replacement=True
    )  # without negatives, positives are repeated
    assert len(positive) == 64 and set(positive.tolist()) == {0, 1, 2} and len(negative) == 0
    positive, negative = subsample_one(torch.full((5,), IGNORE), 64, 0.25, sample_with_replacement=True)
    assert len(positive) == len(negative) == 0
    many = torch.tensor([POSITIVE] * 50 + [NEGATIVE] * 100)
    positive, negative = subsample_one(many, 64, 0.25, sample_with_replacement=True)
    assert len(positive) == len(set(positive.tolist())) == 16 and len(set(negative.tolist())) == 48


def test_anchors_inside_each_image() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 10], [-1, 0, 5, 5], [0, 0, 21, 5], [0, 0, 5, 11]])
    assert anchors_inside(boxes, [(10, 20), (11, 21)]).tolist() == [
        [True, False, False, False],
        [True, False, True, True],
    ]


def test_inclusive_rois_get_the_mask_under_their_pixels() -> None:
    """At scale 2, pixels 0 to 19 of the image are 0 to 38 in the reference, which is 0 to 39 half-open."""
    mask = np.zeros((20, 40), np.uint8)
    mask[:, :10] = 1
    truth = truth_of([[0, 0, 20, 40]], masks=[coco_mask.encode(np.asfortranarray(mask))], scale=(2.0, 2.0))
    inclusive = BoxConvention(inclusive=True)
    roi = inclusive.scale(torch.tensor([[0.0, 0, 20, 20]]), (2.0, 2.0))
    assert roi.tolist() == [[0, 0, 39, 39]]
    assert compute_mask_targets(roi, torch.tensor([0]), truth, 2, inclusive)[0].tolist() == [[1, 0]] * 2


def test_mask_targets_of_scaled_and_flipped_images() -> None:
    mask = np.zeros((20, 40), np.uint8)
    mask[:, :10] = 1  # the left quarter
    rle = coco_mask.encode(np.asfortranarray(mask))
    roi = torch.tensor([[0.0, 0, 80, 40]])  # the whole image at twice the size
    plain = truth_of([[0, 0, 20, 40]], masks=[rle], scale=(2.0, 2.0))
    found = compute_mask_targets(roi, torch.tensor([0]), plain, 4)
    assert found[0].tolist() == [[1, 0, 0, 0]] * 4
    mirrored = truth_of([[60, 0, 80, 40]], masks=[rle], scale=(2.0, 2.0), flipped_width=40)
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


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), images=st.integers(1, 4), best=st.booleans(), shared=st.booleans())
def test_labels_of_a_batch_are_those_of_each_image(seed: int, images: int, best: bool, shared: bool) -> None:
    random = np.random.default_rng(seed)

    def boxes(count: int) -> list[list[float]]:
        corner = random.integers(0, 40, (count, 2))
        return np.hstack((corner, corner + random.integers(0, 30, (count, 2)))).tolist()

    truths = [truth_of(boxes(random.integers(0, 5)), boxes(random.integers(0, 3))) for _ in range(images)]
    rows = [torch.tensor(boxes(60), dtype=torch.float32) for _ in range(1 if shared else images)]
    candidates = rows[0] if shared else torch.stack(rows)
    labels, matched = assign_labels(
        candidates, PaddedGroundTruth.pad(truths, CPU), 0.5, 0.3, allow_low_quality_matches=best
    )
    for image, truth in enumerate(truths):
        own = assign_labels_of_one(rows[0 if shared else image], truth, 0.5, 0.3, allow_low_quality_matches=best)
        assert torch.equal(labels[image], own[0]) and torch.equal(matched[image], own[1])


@pytest.mark.parametrize("replacement", [False, True])
def test_samples_of_an_image_depend_on_its_seed_alone(replacement: bool) -> None:
    random = torch.Generator().manual_seed(0)
    labels, seeds = torch.randint(-1, 2, (3, 200), generator=random), image_seeds(3, 2, random)[0]
    whole = subsample_labels(labels, 64, 0.25, seeds, replacement)
    for image in range(3):
        alone = subsample_labels(labels[image : image + 1], 64, 0.25, seeds[image : image + 1], replacement)
        assert torch.equal(alone.index[0], whole.index[image])
    other = subsample_labels(labels, 64, 0.25, seeds + 1, replacement)
    assert (other.index != whole.index).float().mean() > 0.5


def test_seeds_of_an_image_do_not_depend_on_the_images_after_it() -> None:
    few, many = (image_seeds(count, 2, torch.Generator().manual_seed(7)) for count in (2, 30))
    assert torch.equal(few, many[:, :2]) and len(many.unique()) == 60


def test_all_candidates_are_sampled_equally_often() -> None:
    labels = torch.tensor([POSITIVE] * 40 + [NEGATIVE] * 160).expand(2000, -1)
    found = subsample_labels(labels, 20, 0.5, torch.arange(2000))  # consecutive seeds are the hardest
    times = torch.bincount(found.index.flatten(), minlength=200)
    # 10 of 40 positives, and 10 of 160 negatives, 2000 times; within five standard deviations
    for expected, part in ((500, times[:40]), (125, times[40:])):
        assert (part - expected).abs().max() < 5 * expected**0.5
    first = torch.bincount(found.index[:, 0], minlength=200)[:40]
    assert first.sum() == 2000 and (first - 50).abs().max() < 5 * 50**0.5


def test_random_numbers_are_nonnegative_distinct_and_unbiased() -> None:
    numbers = random_numbers(torch.tensor([0, 1, -(2**63), 2**63 - 1]), 50_000)
    assert numbers.min() >= 0 and len(numbers.unique()) == numbers.numel()
    assert numbers[0, :3].tolist() == random_numbers(torch.tensor([0]), 3)[0].tolist()
    bits = (numbers[:, :, None] >> torch.arange(62)) & 1
    assert (bits.float().mean(dim=(0, 1)) - 0.5).abs().max() < 0.006


def rois_of(proposals: list[list[list[float]]], truths: list[GroundTruth], append: bool, count: int = 8):  # type: ignore[no-untyped-def]
    options = HeadOptions(batch_size_per_image=count, positive_fraction=0.5, append_gt_boxes=append)
    given = [torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) for boxes in proposals]
    return sample_rois(given, PaddedGroundTruth.pad(truths, CPU), options, torch.arange(len(given)))


def test_rois_of_an_image_do_not_depend_on_the_proposals_and_objects_of_others() -> None:
    many = [[10 * x, 10 * y, 10 * x + 10, 10 * y + 10] for x in range(5) for y in range(4)]
    few = [[a + 1, b, c, d] for a, b, c, d in many[:3]]
    alone = rois_of([few], [truth_of(many)], append=True).rois
    together = rois_of([few, many], [truth_of(many), truth_of([*many, *many])], append=True).rois
    assert torch.equal(alone, together[together[:, 0] == 0])


def test_seeds_drawn_in_parts_equal_those_drawn_at_once() -> None:
    one, parts = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    whole = image_seeds(37, 2, one)
    assert torch.equal(whole, torch.cat([image_seeds(count, 2, parts) for count in (1, 20, 16)], dim=1))


def test_sampled_rois_and_their_matches_in_a_batch() -> None:
    truths = [truth_of([[0, 0, 10, 10], [20, 20, 40, 40]]), truth_of([]), truth_of([[5, 5, 9, 9]])]
    proposals = [[[20, 20, 40, 38], [60, 60, 70, 70]], [[1, 1, 9, 9]], []]
    found = rois_of(proposals, truths, append=True)
    rows = sorted(zip(found.rois.tolist(), found.labels.tolist(), strict=True))
    assert rows == [([0, 0, 0, 10, 10], 1), ([0, 20, 20, 40, 38], 1), ([0, 20, 20, 40, 40], 1),
                    ([0, 60, 60, 70, 70], 0), ([1, 1, 1, 9, 9], 0), ([2, 5, 5, 9, 9], 1)]  # fmt: skip
    positive = found.positive
    assert positive.image.tolist() == [0, 0, 0, 2] and found.labels[positive.row].tolist() == [1] * 4
    for row, image, index, box in zip(positive.row, positive.image, positive.object, positive.boxes, strict=True):
        assert torch.equal(found.rois[row, 1:], box) and found.rois[row, 0] == image
        assert torch.equal(found.matched_boxes[row], truths[image].boxes[index])
    assert (
        len(rois_of(proposals, truths, append=True, count=2).rois) == 4
    )  # at most one of the two RoIs of an image is positive


def test_annotated_boxes_are_rois_only_if_no_proposal_is_positive() -> None:
    """With `append_gt_boxes` off, as in the reference."""
    truths = [truth_of([[0, 0, 10, 10], [20, 20, 40, 40]]), truth_of([[0, 0, 10, 10]])]
    found = rois_of([[[20, 20, 40, 38]], [[60, 60, 70, 70]]], truths, append=False)
    assert sorted(found.rois.tolist()) == [[0, 20, 20, 40, 38], [1, 0, 0, 10, 10], [1, 60, 60, 70, 70]]
