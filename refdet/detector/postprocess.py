"""Select top-scoring anchors and detections, with a defined order of ties.

Shape shorthand in this module:

    B: images in the batch
    N: anchors of a level, or boxes of all images
    P: proposals of all images

Default order: by logit, ties by index, so that the same logits give the same result on every device and in every batch.
Ties are common: in bfloat16 many logits of an image are equal.

Legacy order (`legacy_tie_order`): by float32 probability, as in the reference. A confident network has hundreds of
anchors with probability exactly 1, and their order decides which ones NMS keeps. The reference leaves the order to
torch.sort, which is not stable, once for the candidates and once in each NMS. On the CPU this module does the same to
get the same boxes; ties may differ between processors of different vector width, as in the reference. On other devices
the reference's order cannot be reproduced, and ties are in index order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from refdet.ops.nms import nms_padded, unpad
from refdet.structures.boxes import new_tensor


def top_anchors(logits: Tensor, count: int, legacy_tie_order: bool) -> tuple[Tensor, Tensor]:
    """Find the `count` highest of each row of logits (B, N).

    Returns:
        scores (B, count), highest first: logits, or probabilities in the legacy order; and their indices (B, count).
    """
    if not legacy_tie_order:
        indices = _sort_keys(logits).topk(count, dim=1).indices
        return logits.gather(1, indices), indices
    if logits.device.type != "cpu":
        scores, indices = logits.sigmoid().sort(dim=1, descending=True, stable=True)
        return scores[:, :count], indices[:, :count]
    # row by row: sorting rows together can order ties differently
    rows = [row.sigmoid().sort(descending=True) for row in logits]
    return torch.stack([row.values[:count] for row in rows]), torch.stack([row.indices[:count] for row in rows])


def _sort_keys(values: Tensor) -> Tensor:
    """Distinct int64 keys (B, N) in the order of float32 values (B, N), ties in index order.

    Read as integers, the bits of floats are in the same order for positive floats and in reverse for negative ones.
    `topk` of these keys takes a fifth longer than of the floats; a stable sort takes three times as long.
    """
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ascending.long() << 32) - torch.arange(values.shape[1], device=values.device)


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    images: Tensor,
    num_images: int,
    iou_threshold: float,
    max_keep: int,
    legacy_tie_order: bool,
) -> tuple[Tensor, list[int]]:
    """NMS within each group of each image, with ties in default or legacy order; synchronizes with a GPU once.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,).
        groups: (N,) int64; the boxes of one group of one image are contiguous. None for a single group.
        images: (N,) int64 image indices; boxes of image -1 are left out.
        num_images: number of images, B.
        iou_threshold: IoU above which the lower-scoring box is dropped.
        max_keep: boxes to keep per image.
        legacy_tie_order: order ties as the reference does, on the CPU.

    Returns:
        indices of the kept boxes, ordered by image, then by descending score; and the number of them in each image.
    """
    order = _legacy_order(scores, groups, images) if legacy_tie_order and boxes.device.type == "cpu" else None
    if order is None:
        return unpad(*nms_padded(boxes, scores, iou_threshold, max_keep, images, num_images, groups=groups))
    groups = None if groups is None else groups[order]
    kept = nms_padded(boxes[order], scores[order], iou_threshold, max_keep, images[order], num_images, groups=groups)
    indices, counts = unpad(*kept)
    return order[indices], counts


def _legacy_order(scores: Tensor, groups: Tensor | None, images: Tensor) -> Tensor:
    """Indices of the boxes in the order in which the reference sorts them, without boxes of image -1.

    Each group of each image is sorted by descending score.
    """
    rows = (images >= 0).nonzero()[:, 0]
    keys = images[rows][None] if groups is None else torch.stack((groups[rows], images[rows]))
    group_sizes = keys.unique_consecutive(dim=1, return_counts=True)[1].tolist()
    order, start = [rows[:0]], 0
    for group in scores[rows].split(group_sizes):  # one by one: sorting groups together can order ties differently
        order.append(group.sort(descending=True).indices + start)
        start += len(group)
    return rows[torch.cat(order)]


def lower_thresholds(boxes: Tensor, scores: Tensor, images: Tensor, num_images: int, threshold: float) -> Tensor:
    """Score thresholds (B,), each lowered in steps of 0.1 until a non-empty box reaches it, as in MAttNet.

    Args:
        boxes: (P, classes, 4), of all images.
        scores: (P, classes), 0 or more.
        images: (P,) int64 image index of each row.
        num_images: number of images, B.
        threshold: the threshold to start from.
    """
    best = scores.masked_fill(~_is_nonempty(boxes), -torch.inf).amax(dim=1)
    highest = best.new_full((num_images,), -torch.inf).scatter_reduce(0, images, best, "amax")
    lowered = [threshold]
    while np.float32(lowered[-1]) > 0:
        lowered.append(lowered[-1] - 0.1)
    steps = new_tensor(lowered, highest)  # float32, as in `select_detections`
    # number of steps that the best box does not reach; the threshold stays where there is no box
    too_high = (highest[:, None] < steps).sum(dim=1) * highest.isfinite()
    return steps[too_high.clamp(max=len(lowered) - 1)]


def select_detections(
    boxes: Tensor,
    scores: Tensor,
    images: Tensor,
    score_thresholds: Tensor,
    nms_threshold: float,
    max_regions: int,
    legacy_tie_order: bool,
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Apply the score thresholds and NMS within each class; boxes without area are dropped.

    Args:
        boxes: (P, classes, 4), of all images.
        scores: (P, classes).
        images: (P,) int64 image index of each row.
        score_thresholds: (B,) float32, the lowest score to keep.
        nms_threshold: IoU above which the lower-scoring box is dropped.
        max_regions: boxes to keep per image.
        legacy_tie_order: order ties as the reference does, on the CPU.

    Returns:
        boxes (N, 4), scores (N,) and labels (N,), 1..classes, ordered by image, then by descending score; and the
        number of boxes of each image.
    """
    candidates = (scores >= score_thresholds[images, None]) & _is_nonempty(boxes)
    labels, rows = candidates.t().nonzero().unbind(dim=1)  # by label, then row, which decides ties
    kept, counts = batched_nms(
        boxes[rows, labels],
        scores[rows, labels],
        labels,
        images[rows],
        num_images=len(score_thresholds),
        iou_threshold=nms_threshold,
        max_keep=max_regions,
        legacy_tie_order=legacy_tie_order,
    )
    rows, labels = rows[kept], labels[kept]
    return boxes[rows, labels], scores[rows, labels], labels + 1, counts


def _is_nonempty(boxes: Tensor) -> Tensor:
    """Whether each box (..., 4) has an area, (...) bool."""
    return ((boxes[..., 2:] - boxes[..., :2]) > 0).all(dim=-1)
