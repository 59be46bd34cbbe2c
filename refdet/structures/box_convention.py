"""Conversion of boxes between the original image and the network's input, in either box convention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refdet.structures import boxes as box_ops

Weights = tuple[float, float, float, float]
Scale = tuple[float, float] | Tensor
"""Scale factors (sx, sy) of x and y, or a tensor (..., 2) with a pair for each box."""


@dataclass(frozen=True)
class InputSize:
    """Size in pixels of the network's input for an image, its scale factors, and the original size.

    The input is the resized image or, with large-scale jitter in training, a crop of it.

    Attributes:
        height: height of the input.
        width: width of the input.
        scale_x: width of the resized image / width of the original.
        scale_y: height of the resized image / height of the original.
        image_height: height of the original image.
        image_width: width of the original image.
        cropped_from: height and width of the resized image if the input is a crop of it, else None.
        crop_origin: x and y of the crop's top left corner in the resized image.
    """

    height: int
    width: int
    scale_x: float
    scale_y: float
    image_height: int
    image_width: int
    cropped_from: tuple[int, int] | None = None
    crop_origin: tuple[int, int] = (0, 0)

    @property
    def resized_size(self) -> tuple[int, int]:
        """Height and width of the resized image, before any crop."""
        return self.cropped_from or (self.height, self.width)

    @property
    def crop(self) -> tuple[slice, slice]:
        """Rows and columns of the resized image that are the input."""
        x, y = self.crop_origin
        return slice(y, y + self.height), slice(x, x + self.width)

    @property
    def scale(self) -> tuple[float, float]:
        """(sx, sy): size of the resized image, before any crop / size of the original image."""
        return self.scale_x, self.scale_y


@dataclass(frozen=True)
class BoxConvention:
    """How boxes are decoded, clipped and scaled: half-open, or with the reference's inclusive arithmetic.

    Boxes are always half-open. The reference (lichengunc/mask-faster-rcnn) uses inclusive boxes of width
    ``x2 - x1 + 1``, equal to half-open ones that end at ``x2 + 1``, so IoU, NMS and deltas are the same. Two
    differences remain, which ``inclusive`` reproduces:

    - decoding does not subtract the 1 again, so boxes are one pixel larger;
    - scaling and pooling use the last pixel instead of the edge after it.
    """

    inclusive: bool = False

    @property
    def _corner_offset(self) -> float:
        """Pixels subtracted from x2 and y2 before scaling or pooling."""
        return 1.0 if self.inclusive else 0.0

    @property
    def _max_log_scale(self) -> float:
        """Upper limit of dw and dh. The reference has none; 60 is beyond any image and still finite."""
        return 60.0 if self.inclusive else box_ops.MAX_LOG_SCALE

    def decode(self, deltas: Tensor, anchors: Tensor, weights: Weights) -> Tensor:
        """Apply deltas (..., 4) to anchors (..., 4); returns boxes (..., 4) in the same pixels."""
        return self._shift_max(box_ops.decode(deltas, anchors, weights, self._max_log_scale), self._corner_offset)

    def clip(self, boxes: Tensor, height: float, width: float) -> Tensor:
        """Clip boxes (..., 4) to an image of the given size in pixels; inclusive ones keep at least one pixel."""
        if not self.inclusive:
            return box_ops.clip(boxes, height, width)
        lows, highs = [], []  # x1 and y1, x2 and y2
        for low, high, limit in zip(boxes[..., :2].unbind(-1), boxes[..., 2:].unbind(-1), (width, height), strict=True):
            low = low.clamp(0, limit - 1)
            lows.append(low)
            highs.append(torch.maximum(high, low + 1).clamp(max=limit))
        return torch.stack([*lows, *highs], dim=-1)

    def scale(self, boxes: Tensor, scale: Scale) -> Tensor:
        """Scale boxes (..., 4) by (sx, sy)."""
        return self._shift_max(self.pooling_corners(boxes) * _factors(scale, boxes), self._corner_offset)

    def unscale(self, boxes: Tensor, scale: Scale) -> Tensor:
        """The inverse of `scale`."""
        return self._shift_max(self.pooling_corners(boxes) / _factors(scale, boxes), self._corner_offset)

    def pooling_corners(self, boxes: Tensor) -> Tensor:
        """Boxes (..., 4) xyxy as RoI pooling takes them; inclusive ones end at their last pixel, x2 - 1 and y2 - 1."""
        return self._shift_max(boxes, -self._corner_offset)

    def _shift_max(self, boxes: Tensor, offset: float) -> Tensor:
        """Add an offset in pixels to x2 and y2."""
        return torch.cat((boxes[..., :2], boxes[..., 2:] + offset), dim=-1) if offset else boxes


def _factors(scale: Scale, boxes: Tensor) -> Tensor:
    """Factors (sx, sy, sx, sy) of boxes (..., 4), (..., 4).

    They are a tensor, as on a GPU, division by a Python number rounds differently.
    """
    pair = scale if isinstance(scale, Tensor) else box_ops.new_tensor(scale, boxes)
    return torch.cat((pair, pair), dim=-1)
