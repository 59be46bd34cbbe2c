"""Which of several scores are best: of anchors, and of detections.

Ours: by logit, equal ones by index, so that every device and every batch gives the same answer.

The seed's: by float32 probability. A confident network has hundreds of anchors whose probability is exactly 1, and
which of them comes first decides which NMS keeps. The seed leaves that to torch.sort, which is not stable, once for the
candidates and once more in each NMS. For the same boxes to come out, so is it here; between processors of different
vector width the answer may differ in such boxes, as the seed's does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refdet.ops.nms import nms


def best_anchors(logits: Tensor, count: int, seed_ranking: bool) -> tuple[Tensor, Tensor]:
    """The `count` best of each row of logits (B, N).

    Returns:
        scores (B, count), best first, and their places (B, count).
    """
    if not seed_ranking:
        scores, places = logits.topk(count, dim=1)
        return scores, places
    # row by row: sorted together, rows could come out in another order than alone
    rows = [row.sigmoid().sort(descending=True) for row in logits]
    return torch.stack([row.values[:count] for row in rows]), torch.stack([row.indices[:count] for row in rows])


def ranked_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int, seed_ranking: bool) -> Tensor:
    """`nms` of boxes (N, 4) that takes equal scores (N,) in the order asked for. Returns indices (K,)."""
    if not seed_ranking:
        return nms(boxes, scores, iou_threshold, max_keep)
    order = scores.sort(descending=True).indices
    return order[nms(boxes[order], scores[order], iou_threshold, max_keep)]


def reached(boxes: Tensor, scores: Tensor, threshold: float) -> float:
    """The threshold, lowered by 0.1 until one of boxes (P, classes, 4) that has an area reaches it: MAttNet's rule."""
    solid = _solid(boxes)
    if solid.any():
        highest = scores[solid].amax()
        while highest < threshold:  # as tensors, so that it is the comparison of `best_detections`
            threshold -= 0.1
    return threshold


def best_detections(
    boxes: Tensor,
    scores: Tensor,
    score_threshold: float,
    nms_threshold: float,
    max_regions: int,
    seed_ranking: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of boxes (P, classes, 4) with scores (P, classes), after NMS within each class; none without area.

    Returns:
        boxes (n, 4), scores (n,) and labels (n,), 1..classes, best first.
    """
    kept_boxes, kept_scores, kept_labels = [], [], []
    candidates = (scores >= score_threshold) & _solid(boxes)
    for label in candidates.any(dim=0).nonzero()[:, 0].tolist():
        rows = candidates[:, label].nonzero()[:, 0]
        kept = rows[ranked_nms(boxes[rows, label], scores[rows, label], nms_threshold, max_regions, seed_ranking)]
        kept_boxes.append(boxes[kept, label])
        kept_scores.append(scores[kept, label])
        kept_labels.append(torch.full_like(kept, label + 1))
    if not kept_boxes:
        return boxes.new_zeros(0, 4), scores.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=boxes.device)
    all_boxes, all_scores, all_labels = torch.cat(kept_boxes), torch.cat(kept_scores), torch.cat(kept_labels)
    best = all_scores.argsort(descending=True, stable=True)[:max_regions]
    return all_boxes[best], all_scores[best], all_labels[best]


def _solid(boxes: Tensor) -> Tensor:
    return ((boxes[..., 2:] - boxes[..., :2]) > 0).all(dim=-1)
