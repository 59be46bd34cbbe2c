"""`GroundTruth`: the annotated objects of a training image, in the network's input.

Shape shorthand in this module:

    G: objects
    K: crowds
"""

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
        masks: G pycocotools RLEs in pixels of the original image, None for an object without a mask; None if masks are
            not trained.
        crowds: (K, 4) boxes of crowds in pixels of the network's input, ignored in training.
        scale: (sx, sy), size of the network's input / size of the original image.
        flipped_width: width of the original image if it was flipped, else None.
    """

    boxes: Tensor
    labels: Tensor
    masks: list[dict | None] | None
    crowds: Tensor
    scale: tuple[float, float]
    flipped_width: float | None = None

    def to(self, device: torch.device) -> GroundTruth:
        """Copy to a device; masks stay RLE."""
        return GroundTruth(
            self.boxes.to(device),
            self.labels.to(device),
            self.masks,
            self.crowds.to(device),
            self.scale,
            self.flipped_width,
        )
