"""Outputs of the RoI head.

Shape shorthand in this module:

    K: RoIs of the batch
    C: channels of the feature map that RoIs are pooled from
    D: channels of fc7
    m: height and width of a mask, before it is pasted into the image
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
        spatial: with a `C4Head`, the output (K, D, 7, 7) of conv5, whose mean is fc7 and from which masks are
            predicted. With a `StandardHead` or `VGGHead`, the pooled RoIs (K, C, 7, 7) that fc6 and fc7 start from;
            the masks of a `StandardHead` are predicted from 14x14 bins that it pools separately.
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
        spatial: as in `RoiFeatures`; None if it was not requested, or from a `VGGHead`.
        mask_logits: (K, m, m) float32, each RoI's mask of the class that was given for it; None if no classes were
            given, or without a mask branch.
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
        """Concatenate one or more outputs, without a copy if it is one; a field is None in all or in none."""
        if len(parts) == 1:
            return parts[0]
        spatial = [part.spatial for part in parts if part.spatial is not None]
        mask_logits = [part.mask_logits for part in parts if part.mask_logits is not None]
        return cls(
            torch.cat([part.fc7 for part in parts]),
            torch.cat(spatial) if spatial else None,
            torch.cat(mask_logits) if mask_logits else None,
        )
