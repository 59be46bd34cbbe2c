"""What the network should have said: which anchors and RoIs stand for which objects, and the masks of RoIs."""

from __future__ import annotations

import torch
from torch import Tensor

from refdet import boxes as box_ops
from refdet.ground_truth import GroundTruth
from refdet.ops.masks import mask_coverage

IGNORED, BACKGROUND, OBJECT = -1, 0, 1


def match(
    candidates: Tensor, truth: GroundTruth, positive_iou: float, negative_iou: float, best_for_each: bool
) -> tuple[Tensor, Tensor]:
    """Which candidates are objects, background, or neither.

    Args:
        candidates: (N, 4) boxes, anchors or RoIs.
        positive_iou: a candidate at or above it is an object.
        negative_iou: one below it is background; what lies between is ignored.
        best_for_each: also take for each object the candidates that overlap it most, as the RPN does
            (Ren et al., "Faster R-CNN", section 3.1.2).
    Returns:
        kinds (N,) int64 of IGNORED, BACKGROUND and OBJECT, and object (N,), the index of the object
        that each candidate overlaps most (0 where there are no objects).
    """
    count = len(candidates)
    kinds = torch.full((count,), BACKGROUND, dtype=torch.int64, device=candidates.device)
    matched = torch.zeros_like(kinds)
    if len(truth.crowds):
        inside = box_ops.intersection(candidates, truth.crowds).amax(dim=1)
        kinds[inside > 0.5 * box_ops.area(candidates).clamp(min=1e-12)] = IGNORED
    if len(truth.boxes) == 0 or count == 0:
        return kinds, matched
    overlaps = box_ops.iou(candidates, truth.boxes)
    best, matched = overlaps.max(dim=1)
    kinds[(best >= negative_iou) & (best < positive_iou)] = IGNORED
    kinds[best >= positive_iou] = OBJECT
    if best_for_each:
        most = overlaps.amax(dim=0)
        is_most = ((overlaps == most) & (most > 0)).any(dim=1)
        kinds[is_most] = OBJECT
    return kinds, matched


def sample(
    kinds: Tensor, count: int, positive_fraction: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Indices of at most `count` random candidates: (P,) objects, a fraction at most, and (Q,) background."""
    positive = _choose(kinds == OBJECT, int(count * positive_fraction), generator)
    negative = _choose(kinds == BACKGROUND, count - len(positive), generator)
    return positive, negative


def _choose(mask: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    found = mask.nonzero()[:, 0]
    if len(found) <= count:
        return found
    return found[torch.randperm(len(found), generator=generator, device=found.device)[:count]]


def mask_targets(rois: Tensor, objects: Tensor, truth: GroundTruth, size: int) -> Tensor:
    """The masks that RoIs should get.

    Each cell is 1 where the object covers at least half of it; the coverage is exact, measured in the
    original image, so nothing is resized.

    Args:
        rois: (P, 4) in pixels of the network's input.
        objects: (P,) index of the object of each RoI.
        size: side m of a mask.
    Returns:
        (P, m, m) float32 of 0 and 1.
    """
    if truth.masks is None:
        raise ValueError("these targets were made without masks")
    boxes = rois.detach().cpu().clone()
    if truth.flipped_width is not None:
        boxes[:, 0::2] = truth.flipped_width - boxes[:, [2, 0]]
    boxes = boxes / boxes.new_tensor([*truth.scale, *truth.scale])
    found = torch.zeros(len(rois), size, size)
    for index in objects.unique().tolist():
        rows = (objects == index).nonzero()[:, 0].cpu()
        found[rows] = mask_coverage(truth.masks[index], boxes[rows], size)
    if truth.flipped_width is not None:
        found = found.flip(2)
    return (found >= 0.5).float().to(rois.device)
