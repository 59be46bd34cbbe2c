"""Which of several scores are best: of anchors, and of detections.

Ours: by logit, equal ones by index, so that every device and every batch gives the same answer.

The seed's: by float32 probability. A confident network has hundreds of anchors whose probability is exactly 1, and
which of them comes first decides which NMS keeps. The seed leaves that to torch.sort, which is not stable, once for the
candidates and once more in each NMS. For the same boxes to come out, so is it here; between processors of different
vector width the answer may differ in such boxes, as the seed's does.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def ranked_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    images: Tensor,
    iou_threshold: float,
    max_keep: int,
    seed_ranking: bool,
) -> Tensor:
    """`nms` of boxes (N, 4) of several images and groups that takes equal scores (N,) in the order asked for.

    Args:
        groups, images: (N,) int64; the boxes of one group of one image are next to each other.

    Returns:
        indices (K,), by image, of an image best first.
    """
    if not seed_ranking:
        return nms(boxes, scores, iou_threshold, max_keep, groups=groups, images=images)
    runs = torch.stack((groups, images)).unique_consecutive(dim=1, return_counts=True)[1].tolist()
    order, start = [torch.zeros_like(groups[:0])], 0
    for run in scores.split(runs):  # run by run: sorted together, they could come out in another order than alone
        order.append(run.sort(descending=True).indices + start)
        start += len(run)
    places = torch.cat(order)
    kept = nms(boxes[places], scores[places], iou_threshold, max_keep, groups=groups[places], images=images[places])
    return places[kept]


def reached(boxes: Tensor, scores: Tensor, counts: Sequence[int], threshold: float) -> Tensor:
    """Thresholds (B,), each lowered by 0.1 until a box of the image that has an area reaches it: MAttNet's rule.

    Args:
        boxes: (P, classes, 4), of all images.
        scores: (P, classes).
        counts: how many of the P rows each of the B images has.
    """
    solid = scores.masked_fill(~_solid(boxes), -torch.inf)
    best = [part.amax() if part.numel() else part.new_tensor(-torch.inf) for part in solid.split(list(counts))]
    highest = torch.stack(best).cpu()
    lowered = torch.full_like(highest, threshold)  # compared in float32, as `best_detections` does
    for image in (highest > -torch.inf).nonzero()[:, 0].tolist():
        own = threshold
        while highest[image] < own:
            own -= 0.1
        lowered[image] = own
    return lowered.to(scores.device)


def best_detections(
    boxes: Tensor,
    scores: Tensor,
    counts: Sequence[int],
    score_thresholds: Tensor,
    nms_threshold: float,
    max_regions: int,
    seed_ranking: bool,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The best of boxes (P, classes, 4) with scores (P, classes), after NMS within each class; none without area.

    Args:
        counts: how many of the P rows each of the B images has.
        score_thresholds: (B,) float32, what a score must reach.

    Returns:
        of each image boxes (n, 4), scores (n,) and labels (n,), 1..classes, best first.
    """
    image_of_row = torch.repeat_interleave(
        torch.arange(len(counts), device=boxes.device),
        torch.tensor(counts, device=boxes.device),
        output_size=len(boxes),
    )
    candidates = (scores >= score_thresholds[image_of_row, None]) & _solid(boxes)
    labels, rows = candidates.t().nonzero().unbind(dim=1)  # by label, then row: equal scores are kept in this order
    images = image_of_row[rows]
    kept = ranked_nms(
        boxes[rows, labels], scores[rows, labels], labels, images, nms_threshold, max_regions, seed_ranking
    )
    rows, labels = rows[kept], labels[kept]
    parts = torch.bincount(images[kept], minlength=len(counts)).tolist()
    found = (boxes[rows, labels].split(parts), scores[rows, labels].split(parts), (labels + 1).split(parts))
    return list(zip(*found, strict=True))


def _solid(boxes: Tensor) -> Tensor:
    return ((boxes[..., 2:] - boxes[..., :2]) > 0).all(dim=-1)
