"""Mask coverage and mask pasting against brute force in float64."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from refdet.ops.masks import mask_coverage, masks_to_rle

seeds = st.integers(0, 2**31)


def encode(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def overlap(low: float, high: float, pixel: int) -> float:
    """Length of the part of a pixel, from `pixel` to `pixel + 1`, that lies between `low` and `high`."""
    return max(0.0, min(high, pixel + 1) - max(low, pixel))


def brute_force_coverage(mask: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Fraction of each cell of a box that the mask covers, pixel by pixel."""
    x1, y1, x2, y2 = box.astype(np.float64)
    found = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            top, bottom = y1 + (y2 - y1) * row / size, y1 + (y2 - y1) * (row + 1) / size
            left, right = x1 + (x2 - x1) * column / size, x1 + (x2 - x1) * (column + 1) / size
            for y, x in np.argwhere(mask):
                found[row, column] += overlap(top, bottom, y) * overlap(left, right, x)
            found[row, column] /= (bottom - top) * (right - left)
    return found


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seeds)
def test_coverage_is_the_covered_fraction_of_each_cell(seed: int) -> None:
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 14, 2)
    mask = random.random((height, width)) < 0.5
    corner = random.uniform(-5, 10, 2)
    box = np.concatenate((corner, corner + random.uniform(0.2, 12, 2))).astype(np.float32)
    found = mask_coverage([encode(mask)], torch.tensor([0]), torch.from_numpy(box)[None], 3)[0]
    np.testing.assert_allclose(found.numpy(), brute_force_coverage(mask, box, 3), atol=1e-5)


def test_coverage_outside_the_image_is_0() -> None:
    rle = encode(np.ones((10, 10)))
    boxes = torch.tensor([[20.0, 20, 30, 30], [-8, 0, 8, 8]])
    found = mask_coverage([rle], torch.tensor([0, 0]), boxes, 2)
    assert found[0].eq(0).all()
    assert found[1].tolist() == [[0, 1], [0, 1]]


def brute_force_pasting(probability: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear value at each pixel center inside the box, in float64; -1 outside."""
    x1, y1, x2, y2 = box.astype(np.float64)
    size = len(probability)
    found = np.full((height, width), -1.0)
    for row in range(height):
        for column in range(width):
            y, x = row + 0.5, column + 0.5
            if not (x1 <= x < x2 and y1 <= y < y2):
                continue
            v = np.clip((y - y1) / (y2 - y1) * size - 0.5, 0, size - 1)
            u = np.clip((x - x1) / (x2 - x1) * size - 0.5, 0, size - 1)
            top, left = min(int(v), size - 2), min(int(u), size - 2)
            b, a = v - top, u - left
            found[row, column] = (
                probability[top, left] * (1 - a) * (1 - b)
                + probability[top, left + 1] * a * (1 - b)
                + probability[top + 1, left] * (1 - a) * b
                + probability[top + 1, left + 1] * a * b
            )
    return found


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds)
def test_pasting_samples_at_pixel_centers(seed: int) -> None:
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 40, 2)
    corner = random.uniform(-8, 30, 2)
    box = np.concatenate((corner, corner + random.uniform(0.1, 30, 2))).astype(np.float32)
    probability = random.random((6, 6)).astype(np.float32)
    counts = masks_to_rle(torch.from_numpy(probability)[None], torch.from_numpy(box)[None], height, width)[0]
    found = coco_mask.decode({"size": [height, width], "counts": counts})
    expected = brute_force_pasting(probability, box, height, width)
    rounding_decides = np.abs(expected - 0.5) < 1e-5
    np.testing.assert_array_equal(found[~rounding_decides], (expected >= 0.5)[~rounding_decides])


def test_a_full_mask_fills_its_box_at_sub_pixel_precision() -> None:
    boxes = torch.tensor([[2.4, 3.0, 7.6, 9.0], [2.6, 3.0, 7.4, 9.0]])
    counts = masks_to_rle(torch.ones(2, 14, 14), boxes, 20, 20)
    masks = [coco_mask.decode({"size": [20, 20], "counts": c}) for c in counts]
    assert masks[0][3:9, 2:8].all() and masks[0].sum() == 36
    assert masks[1][3:9, 3:7].all() and masks[1].sum() == 24


def test_pasting_the_coverage_of_a_mask_restores_the_mask() -> None:
    y, x = np.mgrid[:60, :80] + 0.5
    disc = (x - 40) ** 2 + (y - 30) ** 2 < 20**2
    box = torch.tensor([[19.5, 9.5, 60.5, 50.5]])
    pasted = masks_to_rle(mask_coverage([encode(disc)], torch.tensor([0]), box, 28), box, 60, 80)[0]
    found = coco_mask.decode({"size": [60, 80], "counts": pasted}).astype(bool)
    assert (found & disc).sum() / (found | disc).sum() > 0.97


def test_pasting_no_masks_gives_an_empty_list() -> None:
    assert masks_to_rle(torch.zeros(0, 14, 14), torch.zeros(0, 4), 10, 10) == []
