"""Which of several scores is best.

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
