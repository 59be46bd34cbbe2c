"""Which of several scores are best: of anchors, and of detections.

Ours: by logit, equal ones by index, so that the same logits give the same answer on every device and in every batch.
In bfloat16 a fair part of the logits of an image are equal to others.

The reference's: by float32 probability. A confident network has hundreds of anchors whose probability is exactly 1, and
which of them comes first decides which NMS keeps. The reference leaves that to torch.sort, which is not stable, once
for the candidates and once more in each NMS. For the same boxes to come out, so is it here on the CPU; between
processors of different vector width the answer may differ in such boxes, as the reference's does. On another device its
order of equal ones cannot be had, and they come by index, as ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from refdet.ops.nms import nms
from refdet.structures.boxes import numbers


def best_anchors(logits: Tensor, count: int, legacy_tie_order: bool) -> tuple[Tensor, Tensor]:
    """The `count` best of each row of logits (B, N).

    Returns:
        scores (B, count), best first, and their places (B, count).
    """
    if not legacy_tie_order:
        places = _distinct(logits).topk(count, dim=1).indices
        return logits.gather(1, places), places
    if logits.device.type != "cpu":
        scores, places = logits.sigmoid().sort(dim=1, descending=True, stable=True)
        return scores[:, :count], places[:, :count]
    # row by row: sorted together, rows could come out in another order than alone
    rows = [row.sigmoid().sort(descending=True) for row in logits]
    return torch.stack([row.values[:count] for row in rows]), torch.stack([row.indices[:count] for row in rows])


def _distinct(values: Tensor) -> Tensor:
    """Distinct keys (B, N) int64 in the order of float32 values (B, N), equal values in the order of their index.

    A float's bits, read as an integer, ascend with it above 0 and descend below. `topk`, which is not stable, of these
    numbers takes a fifth longer than of the floats; a stable sort takes three times as long.
    """
    bits = (values + 0.0).view(torch.int32)  # there are two zeros: -0.0 becomes 0.0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ascending.long() << 32) - torch.arange(values.shape[1], device=values.device)


def ranked_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    images: Tensor,
    iou_threshold: float,
    max_keep: int,
    legacy_tie_order: bool,
) -> Tensor:
    """`nms` of boxes (N, 4) of several images and groups that takes equal scores (N,) in the order asked for.

    Args:
        groups, images: (N,) int64; the boxes of one group of one image are next to each other.

    Returns:
        indices (K,), by image, of an image best first.
    """
    if not legacy_tie_order or boxes.device.type != "cpu":
        return nms(boxes, scores, iou_threshold, max_keep, groups=groups, images=images)
    runs = torch.stack((groups, images)).unique_consecutive(dim=1, return_counts=True)[1].tolist()
    order, start = [torch.zeros_like(groups[:0])], 0
    for run in scores.split(runs):  # run by run: sorted together, they could come out in another order than alone
        order.append(run.sort(descending=True).indices + start)
        start += len(run)
    places = torch.cat(order)
    kept = nms(boxes[places], scores[places], iou_threshold, max_keep, groups=groups[places], images=images[places])
    return places[kept]


def counts_of(images: Tensor, count: int) -> list[int]:
    """How often each of the numbers 0..count - 1 is among `images` (K,) int64."""
    every = torch.arange(count, device=images.device)
    return (images == every[:, None]).sum(dim=1).tolist()  # `bincount` would wait for a GPU twice more


def reached(boxes: Tensor, scores: Tensor, images: Tensor, count: int, threshold: float) -> Tensor:
    """Thresholds (B,), each lowered by 0.1 until a box of the image that has an area reaches it: MAttNet's rule.

    Args:
        boxes: (P, classes, 4), of all images.
        scores: (P, classes).
        images: (P,) int64, the image of each row, 0..count - 1.
        count: of images, B.
    """
    best = scores.masked_fill(~_solid(boxes), -torch.inf).amax(dim=1)
    highest = best.new_full((count,), -torch.inf).scatter_reduce(0, images, best, "amax")
    lowered = []
    for most in highest.tolist():
        own = threshold
        while -np.inf < most < np.float32(own):  # compared in float32, as `best_detections` does
            own -= 0.1
        lowered.append(own)
    return numbers(lowered, highest)


def best_detections(
    boxes: Tensor,
    scores: Tensor,
    images: Tensor,
    score_thresholds: Tensor,
    nms_threshold: float,
    max_regions: int,
    legacy_tie_order: bool,
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The best of boxes (P, classes, 4) with scores (P, classes), after NMS within each class; none without area.

    Args:
        images: (P,) int64, the image of each row, 0..B - 1.
        score_thresholds: (B,) float32, what a score must reach.

    Returns:
        boxes (N, 4), scores (N,) and labels (N,), 1..classes, image after image, of each image best first; and how
        many there are of each.
    """
    candidates = (scores >= score_thresholds[images, None]) & _solid(boxes)
    labels, rows = candidates.t().nonzero().unbind(dim=1)  # by label, then row: equal scores are kept in this order
    kept = ranked_nms(
        boxes[rows, labels], scores[rows, labels], labels, images[rows], nms_threshold, max_regions, legacy_tie_order
    )
    rows, labels = rows[kept], labels[kept]
    counts = counts_of(images[rows], len(score_thresholds))
    return boxes[rows, labels], scores[rows, labels], labels + 1, counts


def _solid(boxes: Tensor) -> Tensor:
    return ((boxes[..., 2:] - boxes[..., :2]) > 0).all(dim=-1)
