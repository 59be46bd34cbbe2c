"""Box operations. Boxes are half-open ``x1 y1 x2 y2`` (xyxy) in pixels, so the width is ``x2 - x1``.

Shape shorthand in this module:

    B: images in the batch
    N, M: number of boxes
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from refdet.device import to_device

# Upper limit of dw and dh, as in detectron2 and torchvision, which keeps exp() from overflowing: a 16 px anchor becomes
# at most 1000 px wide.
MAX_LOG_SCALE = math.log(1000.0 / 16)


def new_tensor(values: Sequence[float], like: Tensor) -> Tensor:
    """`like.new_tensor(values)`, but without synchronizing with the GPU."""
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)


def gather(boxes: Tensor, index: Tensor) -> Tensor:
    """Select boxes or deltas (B, N, 4) of each image by their indices (B, M) -> (B, M, 4)."""
    return boxes.gather(1, index[:, :, None].expand(-1, -1, 4))


def area(boxes: Tensor) -> Tensor:
    """Areas (N,) of boxes (N, 4)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Intersection areas (N, M) of boxes a (N, 4) and b (M, 4)."""
    ax1, ay1, ax2, ay2 = a[:, :, None].unbind(dim=1)  # (N, 1) each
    bx1, by1, bx2, by2 = b[:, :, None].transpose(0, 2).unbind(dim=1)  # (1, M) each
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    return width * (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (N, M) of boxes a (N, 4) and b (M, 4); 0 for two empty boxes."""
    overlap = intersection(a, b)
    union = area(a)[:, None] + area(b)[None, :] - overlap
    return torch.where(union > 0, overlap / union.clamp(min=1e-12), torch.zeros_like(overlap))


def clip(boxes: Tensor, height: float, width: float) -> Tensor:
    """Clip boxes (..., 4) to an image of the given size in pixels."""
    x = boxes[..., 0::2].clamp(0, width)
    y = boxes[..., 1::2].clamp(0, height)
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), dim=-1)


def clip_to_images(boxes: Tensor, limits: Tensor) -> Tensor:
    """Clip boxes (..., 4) to their images; a box outside its image gets a negative width or height.

    Args:
        boxes: (..., 4) xyxy.
        limits: (..., 2) width and height of the image of each box, in pixels.
    """
    return torch.cat((boxes[..., :2].clamp(min=0), torch.minimum(boxes[..., 2:], limits)), dim=-1)


def encode(boxes: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Deltas (N, 4) that transform anchors (N, 4) into boxes (N, 4).

    ``dx = wx (x - xa) / wa``, ``dw = ww log(w / wa)``, likewise for y and h, where x, y are centers, w, h sizes, and a
    stands for the anchor (Girshick et al., "Rich feature hierarchies", appendix C, with weights added).

    Args:
        boxes: (N, 4) xyxy, not empty.
        anchors: (N, 4) xyxy, not empty.
        weights: factors (wx, wy, ww, wh) of the deltas.
    """
    anchor_size = anchors[:, 2:] - anchors[:, :2]
    size = boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + 0.5 * size - anchors[:, :2] - 0.5 * anchor_size) / anchor_size
    deltas = torch.cat((shift, torch.log(size / anchor_size)), dim=1)
    return deltas * new_tensor(weights, deltas)


def decode(
    deltas: Tensor, anchors: Tensor, weights: tuple[float, float, float, float], max_log_scale: float = MAX_LOG_SCALE
) -> Tensor:
    """Apply deltas (..., 4) to anchors (..., 4): the inverse of `encode`.

    Args:
        deltas: (..., 4) ``dx dy dw dh``.
        anchors: (..., 4) xyxy.
        weights: factors (wx, wy, ww, wh) that the deltas were multiplied by.
        max_log_scale: upper limit of dw and dh: a side grows by a factor of at most ``exp(max_log_scale)``.
    """
    deltas = deltas / new_tensor(weights, deltas)
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    center = anchors[..., :2] + 0.5 * anchor_size + deltas[..., :2] * anchor_size
    half_size = 0.5 * anchor_size * torch.exp(deltas[..., 2:].clamp(max=max_log_scale))
    return torch.cat((center - half_size, center + half_size), dim=-1)
