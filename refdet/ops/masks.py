"""Between mask arrays of a RoI and RLE of an image."""

from __future__ import annotations

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor


def mask_coverage(rle: dict, boxes: Tensor, size: int) -> Tensor:
    """How much of each cell of a grid over each box the mask covers, exactly.

    The mask's integral image, linear between pixel corners, is read at the corners of the cells; a
    difference of four such values is the covered area, whatever fractions of pixels it is made of.

    Args:
        rle: pycocotools RLE of one object.
        boxes: (N, 4) half-open xyxy in pixels of the mask's image; what lies outside the image is empty.
        size: cells on a side, m.
    Returns:
        (N, m, m) float32 in 0..1.
    """
    mask = coco_mask.decode(rle)
    height, width = mask.shape
    integral = np.zeros((height + 1, width + 1), np.float64)
    integral[1:, 1:] = mask.astype(np.float64).cumsum(0).cumsum(1)
    table = torch.from_numpy(integral)
    edges = boxes.detach().to("cpu", torch.float64)
    steps = torch.arange(size + 1, dtype=torch.float64) / size
    xs = edges[:, 0:1] + (edges[:, 2:3] - edges[:, 0:1]) * steps
    ys = edges[:, 1:2] + (edges[:, 3:4] - edges[:, 1:2]) * steps
    x0, fx = _floor_and_fraction(xs, width)
    y0, fy = _floor_and_fraction(ys, height)
    rows = table[y0] * (1 - fy)[:, :, None] + table[y0 + 1] * fy[:, :, None]  # (N, m+1, W+1)
    left = rows.gather(2, x0[:, None, :].expand(-1, size + 1, -1))
    right = rows.gather(2, (x0 + 1)[:, None, :].expand(-1, size + 1, -1))
    corners = left * (1 - fx)[:, None, :] + right * fx[:, None, :]
    covered = corners.diff(dim=1).diff(dim=2)
    cell = ((edges[:, 2] - edges[:, 0]) * (edges[:, 3] - edges[:, 1]) / size**2).clamp(min=1e-12)
    return (covered / cell[:, None, None]).clamp(0, 1).float()


def _floor_and_fraction(positions: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    inside = positions.clamp(0, limit)
    floor = inside.floor().clamp(max=limit - 1)
    return floor.long(), inside - floor


def masks_to_rle(probabilities: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> list[bytes]:
    """Masks of RoIs as RLE of the whole image, at sub-pixel precision.

    A pixel whose centre lies in the box takes the bilinear interpolation of the cells about it, cells
    having their value at their middle and the outer half-cells that of their edge; it belongs to the
    mask where that reaches the threshold. The box is never rounded.

    Args:
        probabilities: (N, m, m) in 0..1.
        boxes: (N, 4) half-open xyxy in pixels of the image.
        height, width: of the image.
    Returns:
        N COCO compressed RLE ``counts`` of ``size`` [height, width].
    """
    full = np.zeros((height, width, 1), np.uint8, order="F")
    counts = []
    for probability, box in zip(probabilities.float().cpu(), boxes.float().cpu().tolist(), strict=True):
        top, row_weights = _interpolation(box[1], box[3], len(probability), height)
        left, column_weights = _interpolation(box[0], box[2], len(probability), width)
        window = (row_weights @ probability @ column_weights.T >= threshold).numpy()
        place = (slice(top, top + window.shape[0]), slice(left, left + window.shape[1]), 0)
        full[place] = window
        counts.append(coco_mask.encode(full)[0]["counts"])
        full[place] = 0
    return counts


def _interpolation(low: float, high: float, size: int, limit: int) -> tuple[int, Tensor]:
    """First pixel whose centre is in [low, high), and the weights (pixels, size) of the cells for each."""
    first = max(int(np.ceil(low - 0.5)), 0)
    last = min(int(np.ceil(high - 0.5)), limit)  # one past the end
    if last <= first:
        return min(first, limit), torch.zeros(0, size)
    centres = torch.arange(first, last, dtype=torch.float32) + 0.5
    position = ((centres - low) * (size / (high - low)) - 0.5).clamp(0, size - 1)
    cells = torch.arange(size, dtype=torch.float32)
    return first, (1 - (position[:, None] - cells).abs()).clamp(min=0)
