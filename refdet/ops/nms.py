"""Greedy non-maximum suppression: the compiled kernel, and the same in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from refdet.ops._library import DEVICES

BLOCK = 512  # boxes nms_plain takes at a time: two synchronisations with the device for each


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int = -1) -> Tensor:
    """Indices of the boxes that no better box overlaps too much, best score first.

    Boxes are visited from the best score down, equal scores by index, NaN as -inf; a box is kept unless its
    IoU with one kept before exceeds the threshold. Computed in float32, and the threshold is rounded to
    float32 too, so that an IoU of exactly 3/10 is not above 0.3. Boxes without area and boxes with a NaN
    coordinate suppress nothing and always stay. The answer is the same with the compiled kernel and without.

    Args:
        boxes: (N, 4) half-open xyxy, any floating type.
        scores: (N,) on the same device.
        iou_threshold: in 0..1.
        max_keep: stop as soon as this many are kept; negative for no limit.
    Returns:
        (K,) int64.

    Raises:
        TypeError: boxes or scores are not floating point.
        ValueError: shapes or devices do not fit, or the threshold is not in 0..1.
    """
    if not (boxes.is_floating_point() and scores.is_floating_point()):
        raise TypeError(f"nms needs floating-point boxes and scores, got {boxes.dtype} and {scores.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"nms needs boxes (N, 4), got {tuple(boxes.shape)}")
    if scores.dim() != 1 or scores.shape[0] != boxes.shape[0]:
        raise ValueError(f"nms needs scores ({boxes.shape[0]},), one a box, got {tuple(scores.shape)}")
    if boxes.device != scores.device:
        raise ValueError(f"nms needs boxes and scores on one device, got {boxes.device} and {scores.device}")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"nms needs a threshold in 0..1, got {iou_threshold}")
    boxes, scores = boxes.detach().float(), scores.detach().float()
    if boxes.device.type in DEVICES:
        return torch.ops.refdet.nms(boxes, scores, iou_threshold, max_keep)
    return nms_plain(boxes, scores, iou_threshold, max_keep)


def nms_plain(boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int = -1) -> Tensor:
    """`nms` in plain PyTorch, for float32 boxes and scores, which it does not check.

    Takes the boxes in blocks: each block is compared with the boxes kept so far, and what is left of it is
    settled on the host from its matrix of overlaps.
    """
    limit = len(boxes) if max_keep < 0 else min(max_keep, len(boxes))
    order = scores.masked_fill(scores.isnan(), -torch.inf).argsort(descending=True, stable=True)
    threshold = boxes.new_tensor(iou_threshold)
    kept = order[:0]
    for block in order.split(BLOCK):
        if len(kept) == limit:
            break
        block = block[~(_iou(boxes[block], boxes[kept]) > threshold).any(dim=1)]
        suppresses = (_iou(boxes[block], boxes[block]) > threshold).cpu().numpy()
        alive = torch.ones(len(block), dtype=torch.bool).numpy()
        for row in range(len(block)):
            if alive[row]:
                alive[row + 1 :] &= ~suppresses[row, row + 1 :]
        kept = torch.cat((kept, block[torch.from_numpy(alive).to(block.device)]))[:limit]
    return kept


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU (N, M), operation by operation as in csrc/nms_cpu.cpp; NaN where the union is 0."""
    area_a, area_b = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    width, height = (high - low).clamp(min=0).unbind(dim=2)
    overlap = width * height
    return overlap / (area_a[:, None] + area_b - overlap)


if DEVICES:

    @torch.library.register_fake("refdet::nms")
    def _nms_fake(boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
        kept = torch.library.get_ctx().new_dynamic_size()
        return boxes.new_empty((kept,), dtype=torch.int64)
