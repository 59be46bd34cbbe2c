"""The two frames of boxes, the original image and the network's input, and the way between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refdet.structures import boxes as box_ops

Weights = tuple[float, float, float, float]
Scale = tuple[float, float] | Tensor
"""(sx, sy), pixels of one frame for one of another; or such a pair for each box, (..., 2)."""


@dataclass(frozen=True)
class InputSize:
    """Size in pixels of an image as the network sees it, what it was scaled by, and its own size."""

    height: int
    width: int
    scale_x: float
    scale_y: float
    image_height: int
    image_width: int

    @property
    def scale(self) -> tuple[float, float]:
        """(sx, sy): pixels of the network's input for one of the original image."""
        return self.scale_x, self.scale_y


@dataclass(frozen=True)
class BoxConvention:
    """How boxes are decoded, clipped and scaled: half-open, or with the reference's inclusive arithmetic.

    Boxes are half-open for everyone, of either convention. The reference (lichengunc/mask-faster-rcnn) counts a box
    from its first to its last pixel, so that its width is ``x2 - x1 + 1``; such a box is the half-open one to ``x2 +
    1``. With that its IoU, NMS and deltas are the usual ones, and what is left of the difference is here:

    - it does not take the 1 off again when it decodes, so its boxes come out one pixel larger;
    - it scales and pools the last pixel, not the edge behind it.
    """

    inclusive: bool = False

    @property
    def _far(self) -> float:
        """From the far corner that is scaled and pooled to the edge of the half-open box, in pixels."""
        return 1.0 if self.inclusive else 0.0

    @property
    def _max_log_scale(self) -> float:
        """The reference does not limit the growth of a box; 60 is far beyond any image and still finite."""
        return 60.0 if self.inclusive else box_ops.MAX_LOG_SCALE

    def decode(self, deltas: Tensor, anchors: Tensor, weights: Weights) -> Tensor:
        """Boxes (..., 4) that deltas (..., 4) make of anchors (..., 4); see `refdet.structures.boxes.decode`."""
        return self._shifted(box_ops.decode(deltas, anchors, weights, self._max_log_scale), self._far)

    def clip(self, boxes: Tensor, height: float, width: float) -> Tensor:
        """Boxes (..., 4) cut to an image of the given size; inclusive ones keep at least one pixel."""
        if not self.inclusive:
            return box_ops.clip(boxes, height, width)
        sides = []
        for low, high, limit in zip(boxes[..., :2].unbind(-1), boxes[..., 2:].unbind(-1), (width, height), strict=True):
            low = low.clamp(0, limit - 1)
            sides.append((low, torch.maximum(high, low + 1).clamp(max=limit)))
        return torch.stack([side[end] for end in (0, 1) for side in sides], dim=-1)

    def scale(self, boxes: Tensor, scale: Scale) -> Tensor:
        """Boxes (..., 4) in a frame that has (sx, sy) pixels for one of theirs."""
        return self._shifted(self.corners(boxes) * _factors(scale, boxes), self._far)

    def unscale(self, boxes: Tensor, scale: Scale) -> Tensor:
        """The inverse of `scale`."""
        return self._shifted(self.corners(boxes) / _factors(scale, boxes), self._far)

    def corners(self, boxes: Tensor) -> Tensor:
        """The corners (..., 4) at which boxes (..., 4) are pooled."""
        return self._shifted(boxes, -self._far)

    def _shifted(self, boxes: Tensor, by: float) -> Tensor:
        return torch.cat((boxes[..., :2], boxes[..., 2:] + by), dim=-1) if by else boxes


def _factors(scale: Scale, boxes: Tensor) -> Tensor:
    """What boxes (..., 4) are multiplied by, as a tensor: a GPU rounds a division by a number otherwise."""
    pair = scale if isinstance(scale, Tensor) else box_ops.numbers(scale, boxes)
    return torch.cat((pair, pair), dim=-1)
