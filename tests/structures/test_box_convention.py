"""`BoxConvention` and half-open boxes against the reference's arithmetic on inclusive boxes, with its +1."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refdet.ops.nms import nms
from refdet.structures import boxes as box_ops
from refdet.structures.box_convention import BoxConvention

INCLUSIVE, HALF_OPEN = BoxConvention(inclusive=True), BoxConvention()
# from an inclusive box to the half-open one
PIXEL = torch.tensor([0.0, 0, 1, 1], dtype=torch.float64)


def inclusive_boxes(seed: int, count: int) -> np.ndarray:
    """Random boxes (count, 4) of first and last pixels, float64."""
    random = np.random.default_rng(seed)
    first = random.uniform(0, 300, (count, 2))
    return np.concatenate((first, first + random.uniform(0, 200, (count, 2))), axis=1)


def to_half_open(boxes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(boxes) + PIXEL


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_iou_equals_the_formula_with_plus_one(seed: int) -> None:
    a, b = inclusive_boxes(seed, 6), inclusive_boxes(seed + 1, 5)
    found = box_ops.iou(to_half_open(a), to_half_open(b)).numpy()
    for i, (ax1, ay1, ax2, ay2) in enumerate(a):
        for j, (bx1, by1, bx2, by2) in enumerate(b):
            width = max(min(ax2, bx2) - max(ax1, bx1) + 1, 0)
            height = max(min(ay2, by2) - max(ay1, by1) + 1, 0)
            areas = (ax2 - ax1 + 1) * (ay2 - ay1 + 1) + (bx2 - bx1 + 1) * (by2 - by1 + 1)
            assert found[i, j] == pytest.approx(width * height / (areas - width * height), abs=1e-12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_decode_equals_the_formula_that_never_subtracts_the_one(seed: int) -> None:
    """The reference adds 1 to an anchor's sides, but does not subtract it from the decoded corners."""
    anchors, deltas = inclusive_boxes(seed, 6), np.random.default_rng(seed).normal(0, 0.5, (6, 4))
    found = (INCLUSIVE.decode(torch.from_numpy(deltas), to_half_open(anchors), (1, 1, 1, 1)) - PIXEL).numpy()
    widths, heights = anchors[:, 2] - anchors[:, 0] + 1, anchors[:, 3] - anchors[:, 1] + 1
    x, y = anchors[:, 0] + widths / 2 + deltas[:, 0] * widths, anchors[:, 1] + heights / 2 + deltas[:, 1] * heights
    w, h = widths * np.exp(deltas[:, 2]), heights * np.exp(deltas[:, 3])
    np.testing.assert_allclose(found, np.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), 1), atol=1e-9)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_encode_equals_the_formula_with_plus_one(seed: int) -> None:
    anchors, boxes = inclusive_boxes(seed, 6), inclusive_boxes(seed + 1, 6)
    found = box_ops.encode(to_half_open(boxes), to_half_open(anchors), (1, 1, 1, 1)).numpy()
    aw, ah = anchors[:, 2] - anchors[:, 0] + 1, anchors[:, 3] - anchors[:, 1] + 1
    bw, bh = boxes[:, 2] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 1] + 1
    dx = (boxes[:, 0] + bw / 2 - anchors[:, 0] - aw / 2) / aw
    dy = (boxes[:, 1] + bh / 2 - anchors[:, 1] - ah / 2) / ah
    np.testing.assert_allclose(found, np.stack((dx, dy, np.log(bw / aw), np.log(bh / ah)), 1), atol=1e-9)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.3, 4))
def test_scaling_and_pooling_use_the_last_pixel_as_corner(seed: int, scale: float) -> None:
    boxes = inclusive_boxes(seed, 4)
    scaled = INCLUSIVE.scale(to_half_open(boxes), (scale, scale))
    np.testing.assert_allclose(INCLUSIVE.pooling_corners(scaled).numpy(), boxes * scale, atol=1e-9)
    np.testing.assert_allclose(INCLUSIVE.unscale(scaled, (scale, scale)).numpy(), boxes + PIXEL.numpy(), atol=1e-9)
    assert torch.equal(HALF_OPEN.scale(to_half_open(boxes), (scale, scale)), to_half_open(boxes) * scale)


def test_clip_keeps_at_least_one_pixel_of_each_side() -> None:
    boxes = torch.tensor([[-9.0, -9, 500, 500], [120, 50, 130, 60], [-30, 10, -20, 20]])
    found = INCLUSIVE.clip(boxes, height=80, width=100)
    assert (found - PIXEL.float()).tolist() == [[0, 0, 99, 79], [99, 50, 99, 59], [0, 10, 0, 19]]


def test_decode_of_a_huge_delta_is_finite() -> None:
    found = INCLUSIVE.decode(torch.tensor([[0.0, 0, 1e9, 1e9]]), torch.tensor([[0.0, 0, 16, 16]]), (1, 1, 1, 1))
    assert found.isfinite().all()
    assert INCLUSIVE.clip(found, 80, 100).tolist() == [[0, 0, 100, 80]]


def test_nms_of_half_open_boxes_equals_nms_with_plus_one() -> None:
    boxes = inclusive_boxes(3, 200)
    scores = np.random.default_rng(4).permutation(200) / 200
    kept: list[int] = []
    for row in np.argsort(-scores):
        x1, y1, x2, y2 = boxes[row]
        for other in kept:
            a1, b1, a2, b2 = boxes[other]
            overlap = max(min(x2, a2) - max(x1, a1) + 1, 0) * max(min(y2, b2) - max(y1, b1) + 1, 0)
            areas = (x2 - x1 + 1) * (y2 - y1 + 1) + (a2 - a1 + 1) * (b2 - b1 + 1)
            if overlap / (areas - overlap) > 0.3:
                break
        else:
            kept.append(row)
    assert nms(to_half_open(boxes).float(), torch.from_numpy(scores).float(), 0.3).tolist() == kept
