"""Matching of candidate boxes to objects by IoU, by a compiled kernel or plain PyTorch.

Shape shorthand in this module:

    B: images in a batch
    N: candidates of an image
    M: objects of an image
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refdet.ops._library import DEVICES
from refdet.structures import boxes as box_ops


class Matches(NamedTuple):
    """Result of `match_boxes`.

    Attributes:
        max_iou: (N,) or (B, N) float32, highest IoU of each candidate with an object; 0 if it overlaps none.
        object: (N,) or (B, N) int64, index of the first object with that IoU; 0 if it overlaps none.
        is_best: (N,) or (B, N) bool, whether the candidate has the highest IoU of all candidates of the image, above 0,
            with some object; ties included.
    """

    max_iou: Tensor
    object: Tensor
    is_best: Tensor


def match_boxes(candidates: Tensor, objects: Tensor) -> Matches:
    """Find the best object of each candidate and the best candidates of each object, by IoU.

    The kernels never store the (N, M) IoU matrix. The arithmetic is float32 in a fixed order, so that the result is the
    same with and without the compiled kernels. Boxes with a NaN coordinate or with zero or infinite area overlap
    nothing.

    For a batch, the caller pads the objects of each image with empty boxes to the same number.

    Args:
        candidates: (N, 4), the same for all images of a batch, or (B, N, 4); half-open xyxy, any floating dtype.
        objects: (M, 4), or (B, M, 4) for a batch; half-open xyxy, on the same device.

    Raises:
        TypeError: the boxes are not floating point.
        ValueError: shapes or devices do not match.
    """
    if not (candidates.is_floating_point() and objects.is_floating_point()):
        raise TypeError(f"matching needs floating-point boxes, got {candidates.dtype} and {objects.dtype}")
    shapes = f"{tuple(candidates.shape)} and {tuple(objects.shape)}"
    if any(boxes.dim() not in (2, 3) or boxes.shape[-1] != 4 for boxes in (candidates, objects)):
        raise ValueError(f"matching needs boxes (N, 4) and (M, 4), or (B, N, 4) and (B, M, 4), got {shapes}")
    if candidates.dim() == 3 and candidates.shape[:1] != objects.shape[:-2]:
        raise ValueError(f"matching needs candidates and objects of the same images, got {shapes}")
    if candidates.device != objects.device:
        raise ValueError(f"matching needs boxes on one device, got {candidates.device} and {objects.device}")
    candidates, objects = candidates.detach().float(), objects.detach().float()
    if candidates.device.type in DEVICES:
        return Matches(*torch.ops.refdet.match_boxes(candidates, objects))
    return match_boxes_plain(candidates, objects)


def match_boxes_plain(candidates: Tensor, objects: Tensor) -> Matches:
    """`match_boxes` in plain PyTorch, for float32 boxes; arguments are not checked."""
    if objects.dim() == 3:
        per_image = candidates if candidates.dim() == 3 else [candidates] * len(objects)
        matches = [match_boxes_plain(*pair) for pair in zip(per_image, objects, strict=True)]
        if matches:
            return Matches(*map(torch.stack, zip(*matches, strict=True)))
        candidates = candidates.new_zeros(0, candidates.shape[-2])
    shape = candidates.shape[: objects.dim() - 1]
    if objects.shape[-2] == 0 or 0 in shape:
        zeros = candidates.new_zeros(shape)
        return Matches(zeros, zeros.long(), zeros.bool())
    overlaps = box_ops.iou(candidates, objects)
    max_iou, matched = overlaps.max(dim=1)
    object_max = overlaps.amax(dim=0)
    return Matches(max_iou, matched, ((overlaps == object_max) & (object_max > 0)).any(dim=1))


if DEVICES:

    @torch.library.register_fake("refdet::match_boxes")
    def _match_boxes_fake(candidates: Tensor, objects: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*objects.shape[:-2], candidates.shape[-2])
        return (
            candidates.new_empty(shape),
            candidates.new_empty(shape, dtype=torch.int64),
            candidates.new_empty(shape, dtype=torch.bool),
        )
