"""Matching of candidate boxes to objects by IoU, by a compiled kernel or plain PyTorch.

Shape shorthand in this module:

    N: candidates
    M: objects
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
        best: (N,) float32, highest IoU of each candidate with an object; 0 if it overlaps none.
        object: (N,) int64, index of the first object with that IoU; 0 if it overlaps none.
        reaches: (N,) bool, whether the candidate has the highest IoU of all candidates, above 0, with some object; ties
            included.
    """

    best: Tensor
    object: Tensor
    reaches: Tensor


def match_boxes(candidates: Tensor, objects: Tensor) -> Matches:
    """Find the best object of each candidate and the best candidates of each object, by IoU.

    The kernels never store the (N, M) IoU matrix. Computed in float32 in a fixed order, so that the result is the same
    with and without the compiled kernels. Boxes with a NaN coordinate or with zero or infinite area overlap nothing.

    Args:
        candidates: (N, 4) half-open xyxy, any floating dtype.
        objects: (M, 4) half-open xyxy, on the same device.

    Raises:
        TypeError: the boxes are not floating point.
        ValueError: shapes or devices do not match.
    """
    if not (candidates.is_floating_point() and objects.is_floating_point()):
        raise TypeError(f"matching needs floating-point boxes, got {candidates.dtype} and {objects.dtype}")
    if candidates.dim() != 2 or candidates.shape[1] != 4 or objects.dim() != 2 or objects.shape[1] != 4:
        shapes = f"{tuple(candidates.shape)} and {tuple(objects.shape)}"
        raise ValueError(f"matching needs boxes (N, 4) and (M, 4), got {shapes}")
    if candidates.device != objects.device:
        raise ValueError(f"matching needs boxes on one device, got {candidates.device} and {objects.device}")
    candidates, objects = candidates.detach().float(), objects.detach().float()
    if candidates.device.type in DEVICES:
        return Matches(*torch.ops.refdet.match_boxes(candidates, objects))
    return match_boxes_plain(candidates, objects)


def match_boxes_plain(candidates: Tensor, objects: Tensor) -> Matches:
    """`match_boxes` in plain PyTorch, for float32 boxes; arguments are not checked."""
    count = len(candidates)
    if count == 0 or len(objects) == 0:
        none = candidates.new_zeros(count)
        return Matches(none, none.long(), none.bool())
    overlaps = box_ops.iou(candidates, objects)
    best, matched = overlaps.max(dim=1)
    most = overlaps.amax(dim=0)
    return Matches(best, matched, ((overlaps == most) & (most > 0)).any(dim=1))


if DEVICES:

    @torch.library.register_fake("refdet::match_boxes")
    def _match_boxes_fake(candidates: Tensor, objects: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = candidates.shape[0]
        return (
            candidates.new_empty((count,)),
            candidates.new_empty((count,), dtype=torch.int64),
            candidates.new_empty((count,), dtype=torch.bool),
        )
