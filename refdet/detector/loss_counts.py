"""Numbers of samples in a batch, or in several, by which the sums of the loss terms are divided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from refdet.device import to_device

Count: TypeAlias = int | Tensor  # a scalar int64 tensor if it was computed on a device


@dataclass(frozen=True)
class LossCounts:
    """Numbers of samples by which the sums of the loss terms are divided.

    Attributes:
        anchors: sampled anchors, for both RPN losses.
        rois: sampled RoIs, for the classification and box losses.
        mask_pixels: pixels of the m x m masks of positive RoIs, for the mask loss.
    """

    anchors: Count
    rois: Count
    mask_pixels: Count

    def __add__(self, other: LossCounts) -> LossCounts:
        return LossCounts(self.anchors + other.anchors, self.rois + other.rois, self.mask_pixels + other.mask_pixels)

    def to_tensor(self, device: torch.device) -> Tensor:
        """The counts, in the order of the attributes, as (3,) int64 on a device; does not synchronize with a GPU."""
        counts = (self.anchors, self.rois, self.mask_pixels)
        return torch.stack([c if isinstance(c, Tensor) else to_device(torch.tensor(c), device) for c in counts])

    @classmethod
    def from_tensor(cls, values: Tensor) -> LossCounts:
        """The inverse of `to_tensor`; the counts stay on the device."""
        return cls(*values.unbind())

    def at_least_one(self) -> LossCounts:
        """The counts with 1 instead of 0, to divide by."""
        counts = (self.anchors, self.rois, self.mask_pixels)
        return LossCounts(*(c.clamp(min=1) if isinstance(c, Tensor) else max(c, 1) for c in counts))


ReduceCounts: TypeAlias = Callable[[LossCounts], LossCounts]
"""Function that adds the counts of the other batches of a step to the counts of a batch."""


def no_reduction(counts: LossCounts) -> LossCounts:
    """Return the counts unchanged, for a step of a single batch."""
    return counts
