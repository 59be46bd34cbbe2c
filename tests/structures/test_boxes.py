"""IoU, box deltas and clipping against torchvision, the Faster R-CNN paper's formulas and simple examples."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from refdet.structures import boxes as box_ops

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
seeds = st.integers(0, 2**31)


def some_boxes(random: np.random.Generator, count: int) -> torch.Tensor:
    corner = random.uniform(-20, 100, (count, 2))
    return torch.from_numpy(np.hstack((corner, corner + random.uniform(0.5, 80, (count, 2))))).float()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, st.integers(0, 12), st.integers(0, 12))
def test_iou_equals_torchvision(seed: int, n: int, m: int) -> None:
    random = np.random.default_rng(seed)
    a, b = some_boxes(random, n), some_boxes(random, m)
    torch.testing.assert_close(box_ops.iou(a, b), box_iou(a, b))


def test_iou_of_boxes_without_area_is_0() -> None:
    point = torch.tensor([[5.0, 5, 5, 5]])
    assert box_ops.iou(point, point).item() == 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, st.integers(1, 20))
def test_decode_undoes_encode(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    boxes, anchors = some_boxes(random, count).double(), some_boxes(random, count).double()
    # decode limits a box to 62.5 (1000 / 16) times the width and height of its anchor
    decodable = ((boxes[:, 2:] - boxes[:, :2]) / (anchors[:, 2:] - anchors[:, :2]) < 60).all(dim=1)
    boxes, anchors = boxes[decodable], anchors[decodable]
    found = box_ops.decode(box_ops.encode(boxes, anchors, WEIGHTS), anchors, WEIGHTS)
    torch.testing.assert_close(found, boxes, atol=1e-9, rtol=0)


def test_encode_equals_the_formula_of_the_paper() -> None:
    box, anchor = torch.tensor([[10.0, 20, 30, 60]]), torch.tensor([[0.0, 10, 40, 30]])
    # centers (20, 40) and (20, 20), sizes 20x40 and 40x20
    expected = torch.tensor([[0.0, 10 * (40 - 20) / 20, 5 * np.log(0.5), 5 * np.log(2)]], dtype=torch.float32)
    torch.testing.assert_close(box_ops.encode(box, anchor, WEIGHTS), expected)


def test_decode_passes_gradcheck() -> None:
    torch.manual_seed(0)
    anchors = torch.tensor([[0.0, 0, 10, 20], [5, 5, 50, 25]], dtype=torch.float64)
    deltas = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: box_ops.decode(d, anchors, WEIGHTS), deltas)


def test_decode_limits_the_size_of_a_box() -> None:
    found = box_ops.decode(torch.tensor([[0.0, 0, 1e9, 1e9]]), torch.tensor([[0.0, 0, 16, 16]]), (1, 1, 1, 1))
    torch.testing.assert_close(found[0, 2:] - found[0, :2], torch.tensor([1000.0, 1000.0]))  # 62.5 times 16


def test_clip_cuts_to_the_image() -> None:
    found = box_ops.clip(torch.tensor([[-5.0, -5, 500, 500], [3, 4, 5, 6]]), height=100, width=200)
    assert found.tolist() == [[0, 0, 200, 100], [3, 4, 5, 6]]
