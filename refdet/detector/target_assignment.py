"""Training targets: labels of anchors and RoIs, and masks of RoIs.

Shape shorthand in this module:

    B: images in the batch
    N: candidates of an image, anchors or RoIs
    P: positive candidates
    m: height and width of a mask target

Boxes are xyxy in pixels of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refdet.ops.masks import mask_coverage
from refdet.ops.matching import match_boxes
from refdet.structures import boxes as box_ops
from refdet.structures.box_convention import BoxConvention
from refdet.structures.ground_truth import GroundTruth, PaddedGroundTruth

IGNORE, NEGATIVE, POSITIVE = -1, 0, 1


def assign_labels(
    candidates: Tensor,
    truth: PaddedGroundTruth,
    positive_iou: float,
    negative_iou: float,
    allow_low_quality_matches: bool,
) -> tuple[Tensor, Tensor]:
    """Label candidates as positive, negative or ignored.

    Candidates that are not positive and have more than half of their area in a crowd region are ignored.

    Args:
        candidates: (B, N, 4) RoIs, or (N, 4) anchors of all images.
        truth: annotated objects of the images.
        positive_iou: candidates with this IoU or more are positive.
        negative_iou: candidates with a lower IoU are negative; candidates between the two thresholds are ignored.
        allow_low_quality_matches: also label the best candidates of each object as positive, whatever their IoU, as in
            the RPN (Ren et al., "Faster R-CNN", section 3.1.2) and torchvision's ``Matcher``.

    Returns:
        labels (B, N) int8 of IGNORE, NEGATIVE and POSITIVE, and the index (B, N) int64 of the object that each
        candidate overlaps most (0 if it overlaps none).
    """
    matches = match_boxes(candidates, truth.boxes)
    labels = torch.full_like(matches.max_iou, NEGATIVE, dtype=torch.int8)
    for crowd in truth.crowds.unbind(dim=1):
        overlap = _intersection(candidates, crowd[:, None])
        labels.masked_fill_(overlap > 0.5 * _area(candidates).clamp(min=1e-12), IGNORE)
    has_objects = truth.valid.any(dim=1, keepdim=True)
    positive = matches.max_iou >= positive_iou
    labels.masked_fill_((matches.max_iou >= negative_iou) & ~positive & has_objects, IGNORE)
    if allow_low_quality_matches:
        positive = positive | matches.is_best
    return labels.masked_fill_(positive & has_objects, POSITIVE), matches.object


def _intersection(boxes: Tensor, other: Tensor) -> Tensor:
    """Areas (B, N) of the intersections of boxes (B, N, 4) or (N, 4) with one box per image (B, 1, 4)."""
    sides = torch.minimum(boxes[..., 2:], other[..., 2:]) - torch.maximum(boxes[..., :2], other[..., :2])
    width, height = sides.clamp(min=0).unbind(dim=-1)
    return width * height


def _area(boxes: Tensor) -> Tensor:
    """Areas (...) of boxes (..., 4)."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(dim=-1)
    return width * height


def anchors_inside(anchors: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Whether each anchor (N, 4) is inside each image of the given (height, width), (B, N) bool."""
    limits = box_ops.new_tensor([side for height, width in sizes for side in (width, height)], anchors).view(-1, 1, 2)
    return (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2:] <= limits).all(dim=2)


def compute_mask_targets(
    rois: Tensor, objects: Tensor, truth: GroundTruth, size: int, convention: BoxConvention | None = None
) -> Tensor:
    """Compute mask targets of RoIs on the CPU, where the annotations are.

    A pixel of the target is 1 if the object covers at least half of it. The coverage is computed exactly from the
    object's mask in the original image; masks are not resized.

    Args:
        rois: (P, 4) in pixels of the network's input, on the CPU.
        objects: (P,) index of the object of each RoI, on the CPU; each has a mask.
        truth: annotated objects of the image.
        size: height and width of a target, m.
        convention: box convention of the RoIs; half-open by default.

    Returns:
        (P, m, m) float32 of 0 and 1.
    """
    if truth.masks is None:
        raise ValueError("truth: has no masks; make the targets with masks")
    uncropped = rois + rois.new_tensor(truth.crop_origin * 2)  # pixels of the resized image before it was cropped
    boxes = (convention or BoxConvention()).unscale(uncropped, truth.scale)
    if truth.flipped_width is not None:
        boxes = torch.stack(
            (truth.flipped_width - boxes[:, 2], boxes[:, 1], truth.flipped_width - boxes[:, 0], boxes[:, 3]), dim=1
        )
    has_mask = torch.tensor([mask is not None for mask in truth.masks], dtype=torch.int64)
    mask_index = has_mask.cumsum(0) - 1  # index of an object's mask in `rles`
    rles = [mask for mask in truth.masks if mask is not None]
    coverage = mask_coverage(rles, mask_index[objects], boxes, size)
    if truth.flipped_width is not None:
        coverage = coverage.flip(2)
    return (coverage >= 0.5).float()
