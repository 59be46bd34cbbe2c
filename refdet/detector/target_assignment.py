"""Training targets: labels of anchors and RoIs, their sampling, and masks of RoIs.

Shape shorthand in this module:

    N: candidates of an image, anchors or RoIs
    P, Q: positive and negative candidates
    m: side of a mask in cells

Boxes are xyxy in pixels of the network's input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refdet.ops.masks import mask_coverage
from refdet.ops.matching import match_boxes
from refdet.structures import boxes as box_ops
from refdet.structures.box_convention import BoxConvention
from refdet.structures.ground_truth import GroundTruth

IGNORE, NEGATIVE, POSITIVE = -1, 0, 1


def assign_labels(
    candidates: Tensor, truth: GroundTruth, positive_iou: float, negative_iou: float, best_for_each: bool
) -> tuple[Tensor, Tensor]:
    """Label candidates as positive, negative or ignored.

    Args:
        candidates: (N, 4) anchors or RoIs.
        truth: annotated objects of the image.
        positive_iou: candidates with this IoU or more are positive.
        negative_iou: candidates below it are negative; those between the two are ignored.
        best_for_each: also label the candidates that overlap each object most as positive, as in the RPN
            (Ren et al., "Faster R-CNN", section 3.1.2).

    Returns:
        kinds (N,) int64 of IGNORE, NEGATIVE and POSITIVE, and the index (N,) int64 of the object that each candidate
        overlaps most (0 if there are none).
    """
    count = len(candidates)
    kinds = torch.full((count,), NEGATIVE, dtype=torch.int64, device=candidates.device)
    matched = torch.zeros_like(kinds)
    if len(truth.crowds):
        inside = box_ops.intersection(candidates, truth.crowds).amax(dim=1)
        kinds[inside > 0.5 * box_ops.area(candidates).clamp(min=1e-12)] = IGNORE
    if len(truth.boxes) == 0 or count == 0:
        return kinds, matched
    found = match_boxes(candidates, truth.boxes)
    kinds[(found.best >= negative_iou) & (found.best < positive_iou)] = IGNORE
    kinds[found.best >= positive_iou] = POSITIVE
    if best_for_each:
        kinds[found.reaches] = POSITIVE
    return kinds, found.object


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Whether boxes (N, 4) lie within an image of this size, (N,) bool."""
    return ((boxes[:, :2] >= 0) & (boxes[:, 2:] <= boxes.new_tensor([width, height]))).all(dim=1)


def subsample_labels(
    kinds: Tensor,
    count: int,
    positive_fraction: float,
    generator: torch.Generator | None,
    sample_with_replacement: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sample candidates at random.

    Args:
        kinds: (N,) labels from `assign_labels`.
        count: number of samples, at most.
        positive_fraction: largest fraction of positives among them.
        generator: on the device of `kinds`.
        sample_with_replacement: return exactly `count`, with repeats if there are too few negatives; positives only if
            there are no negatives, as in the reference.

    Returns:
        indices (P,) of positives and (Q,) of negatives.
    """
    objects, background = ((kinds == kind).nonzero()[:, 0] for kind in (POSITIVE, NEGATIVE))
    everything = sample_with_replacement and len(background) == 0
    positive = _choose(objects, count if everything else int(count * positive_fraction), generator, everything)
    return positive, _choose(background, count - len(positive), generator, sample_with_replacement)


def _choose(found: Tensor, count: int, generator: torch.Generator | None, sample_with_replacement: bool) -> Tensor:
    if len(found) > count:
        return found[torch.randperm(len(found), generator=generator, device=found.device)[:count]]
    if sample_with_replacement and 0 < len(found) < count:
        return found[torch.randint(len(found), (count,), generator=generator, device=found.device)]
    return found


def compute_mask_targets(
    rois: Tensor, objects: Tensor, truth: GroundTruth, size: int, convention: BoxConvention | None = None
) -> Tensor:
    """Mask targets of RoIs.

    A cell is 1 if the object covers at least half of it. The coverage is exact and computed in the original image, so
    nothing is resized.

    Args:
        rois: (P, 4) in pixels of the network's input.
        objects: (P,) index of the object of each RoI; each has a mask.
        truth: annotated objects of the image.
        size: side m of a mask.
        convention: box convention of the RoIs; half-open by default.

    Returns:
        (P, m, m) float32 of 0 and 1.
    """
    if truth.masks is None:
        raise ValueError("truth: has no masks; make the targets with masks")
    boxes = (convention or BoxConvention()).unscale(rois.detach().cpu(), truth.scale)
    if truth.flipped_width is not None:
        boxes = torch.stack(
            (truth.flipped_width - boxes[:, 2], boxes[:, 1], truth.flipped_width - boxes[:, 0], boxes[:, 3]), dim=1
        )
    drawn = torch.tensor([mask is not None for mask in truth.masks], dtype=torch.int64)
    place = drawn.cumsum(0) - 1  # index of an object's mask in `rles`
    rles = [mask for mask in truth.masks if mask is not None]
    found = mask_coverage(rles, place[objects.cpu()], boxes, size)
    if truth.flipped_width is not None:
        found = found.flip(2)
    return (found >= 0.5).float().to(rois.device)
