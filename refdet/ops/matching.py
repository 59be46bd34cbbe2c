"""Which objects boxes overlap most: the compiled kernel, and the same in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refdet.ops._library import DEVICES
from refdet.structures import boxes as box_ops


class Matches(NamedTuple):
    """How N candidates and M objects overlap.

    Attributes:
        best: (N,) float32, the largest IoU of each candidate with an object; 0 where it overlaps none.
        object: (N,) int64, the first object with that IoU; 0 where there is none.
        reaches: (N,) bool, the candidates whose IoU with some object is the largest of all candidates and above 0.
            Several reach it where they overlap the object alike.
    """

    best: Tensor
    object: Tensor
    reaches: Tensor


def match_boxes(candidates: Tensor, objects: Tensor) -> Matches:
    """Best overlaps of candidates and objects, both ways, as `refdet.structures.boxes.iou` computes them.

    The kernels never hold the (N, M) matrix of overlaps. All is float32, in one order of operations, so that
    the answer is the same with the compiled kernels and without. A box with a NaN coordinate overlaps nothing,
    nor does one of infinite area or without any.

    Args:
        candidates: (N, 4) half-open xyxy, any floating type.
        objects: (M, 4) likewise, on the same device.

    Raises:
        TypeError: the boxes are not floating point.
        ValueError: shapes or devices do not fit.
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
    """`match_boxes` in plain PyTorch, for float32 boxes, which it does not check."""
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
