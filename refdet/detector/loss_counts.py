"""What the loss terms are divided by: numbers of samples, of a batch or of several together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from refdet.device import to_device

Count: TypeAlias = int | Tensor  # a scalar int64 on the device, where the host does not know it


@dataclass(frozen=True)
class LossCounts:
    """Numbers of samples that the sums of the loss terms are divided by.

    Attributes:
        anchors: sampled anchors, of both losses of the RPN.
        rois: sampled RoIs, of the losses of classes and boxes.
        mask_cells: cells of the masks of positive RoIs, of the mask loss.
    """

    anchors: Count
    rois: Count
    mask_cells: Count

    def __add__(self, other: LossCounts) -> LossCounts:
        return LossCounts(self.anchors + other.anchors, self.rois + other.rois, self.mask_cells + other.mask_cells)

    def to_tensor(self, device: torch.device) -> Tensor:
        """(3,) int64 on a device, without waiting for it."""
        counts = (self.anchors, self.rois, self.mask_cells)
        return torch.stack([c if isinstance(c, Tensor) else to_device(torch.tensor(c), device) for c in counts])

    @classmethod
    def from_tensor(cls, values: Tensor) -> LossCounts:
        """The inverse of `to_tensor`; the counts stay on the device."""
        return cls(*values.unbind())

    def at_least_one(self) -> LossCounts:
        """The same, with 1 in the place of 0, to divide by."""
        counts = (self.anchors, self.rois, self.mask_cells)
        return LossCounts(*(c.clamp(min=1) if isinstance(c, Tensor) else max(c, 1) for c in counts))


Total: TypeAlias = Callable[[LossCounts], LossCounts]


def of_this_batch(counts: LossCounts) -> LossCounts:
    """The counts themselves: what the losses of a batch are divided by if it is the whole of a step."""
    return counts
