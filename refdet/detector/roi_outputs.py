"""Outputs of the RoI head.

Shape shorthand in this module:

    K: RoIs of the batch
    D: channels of fc7 (D' of the features that masks are predicted from)
    m: side of a mask in cells
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoiFeatures:
    """Features of K RoIs.

    Attributes:
        fc7: (K, D) input of the box predictor.
        spatial: (K, D', 7, 7) input of the mask predictor; fc7 is its mean in a C4 network.
    """

    fc7: Tensor
    spatial: Tensor

    def __getitem__(self, rows: Tensor) -> RoiFeatures:
        return RoiFeatures(self.fc7[rows], self.spatial[rows])


@dataclass(frozen=True)
class RoiOutput:
    """Outputs of `RoiHead.forward_inference`.

    Attributes:
        fc7: (K, D) float32.
        spatial: (K, D', 7, 7), or None.
        mask_logits: (K, m, m) float32, or None.
    """

    fc7: Tensor
    spatial: Tensor | None
    mask_logits: Tensor | None

    def __getitem__(self, rows: slice) -> RoiOutput:
        return RoiOutput(
            self.fc7[rows],
            None if self.spatial is None else self.spatial[rows],
            None if self.mask_logits is None else self.mask_logits[rows],
        )

    @classmethod
    def cat(cls, parts: Sequence[RoiOutput]) -> RoiOutput:
        """Concatenate at least one output; a field is None in all of them or in none. Does not copy a single output."""
        if len(parts) == 1:
            return parts[0]
        spatial = [part.spatial for part in parts if part.spatial is not None]
        mask_logits = [part.mask_logits for part in parts if part.mask_logits is not None]
        return cls(
            torch.cat([part.fc7 for part in parts]),
            torch.cat(spatial) if spatial else None,
            torch.cat(mask_logits) if mask_logits else None,
        )
