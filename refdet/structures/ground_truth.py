"""`GroundTruth`: what is in one training image, as the network sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroundTruth:
    """The objects of one training image.

    Attributes:
        boxes: (G, 4) float32, half-open xyxy in pixels of the network's input.
        labels: (G,) int64, 1..number of classes; 0 is the background.
        masks: G pycocotools RLEs in the frame of the original image, None for an object whose mask nobody drew; or
            None where masks are not trained.
        crowds: (K, 4) boxes of crowds, in pixels of the network's input: what lies in them is neither
            object nor background.
        scale: (sx, sy), pixels of the network's input for one of the original image.
        flipped_width: the width of the original image where it was mirrored, else None.
    """

    boxes: Tensor
    labels: Tensor
    masks: list[dict | None] | None
    crowds: Tensor
    scale: tuple[float, float]
    flipped_width: float | None = None

    def to(self, device: torch.device) -> GroundTruth:
        """The same on another device (masks stay RLE)."""
        return GroundTruth(
            self.boxes.to(device), self.labels.to(device), self.masks,
            self.crowds.to(device), self.scale, self.flipped_width,
        )  # fmt: skip
