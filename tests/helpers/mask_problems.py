"""Random mask predictions and boxes, masks as RLE, and arguments of the kernels."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch import Tensor

from refdet.ops._library import DEVICES

compiled = pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here")
f32 = np.float32


def some_boxes(random: np.random.Generator, count: int, odd: bool) -> np.ndarray:
    """Boxes (count, 4) float32 xyxy in and around an image of about 40 pixels, with or without rounding to a grid."""
    corner = random.uniform(-15, 50, (count, 2))
    boxes = np.hstack((corner, corner + random.uniform(0, random.choice([4, 40, 200]), (count, 2))))
    grid = random.choice([0, 1, 2])
    if grid:
        boxes = np.round(boxes * grid) / grid
    if odd:
        at = random.random(boxes.shape) < 0.1
        boxes[at] = random.choice([np.nan, np.inf, -np.inf, 1e30, -3e38, 1e-40, 0.0], at.sum())
    return boxes.astype(np.float32)


@st.composite
def pasting_problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int, float]:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, size = draw(st.sampled_from([0, 1, 5, 9])), draw(st.sampled_from([1, 2, 3, 7, 14, 28]))
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    cells = random.random((count, size, size)).astype(np.float32)
    kind = draw(st.sampled_from(["noise", "steps", "near", "smooth", "no probabilities"]))
    if kind == "steps":
        cells = np.round(cells * 4) / 4
    if kind == "near":
        cells = f32(0.5) + (cells - f32(0.5)) * f32(2e-7)
    if kind == "smooth":
        cells = cells * f32(0.2) + np.linspace(0, 0.8, size, dtype=np.float32)
    if kind == "no probabilities":
        at = random.random(cells.shape) < 0.1
        cells[at] = random.choice([np.nan, np.inf, -np.inf, -1.0, 3e38, 1e-42], at.sum())
    boxes = torch.from_numpy(some_boxes(random, count, draw(st.booleans())))
    return torch.from_numpy(cells), boxes, height, width, draw(st.sampled_from([0.5, 0.5, 0.3, 0.0, 1.0]))


def coded(masks: Iterable[np.ndarray]) -> list[dict]:
    return [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]


KERNEL_ARGUMENTS = {
    "masks_to_rle": (torch.rand(5, 14, 14), torch.tensor([[1.5, 2, 20, 30]] * 5), 40, 30, 0.5),
    "mask_coverage": (
        torch.tensor(list(coded(np.eye(5)[None])[0]["counts"]), dtype=torch.uint8),
        torch.tensor([0, 10]), 5, 5, torch.tensor([[0.0, 1, 4, 5]] * 3).double(), torch.zeros(3).long(), 7,
    ),
}  # fmt: skip
