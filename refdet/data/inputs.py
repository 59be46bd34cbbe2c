"""How an image becomes the network's input: resized and normalised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from refdet.recipe import InputOptions


@dataclass(frozen=True)
class InputSize:
    """Size in pixels of an image as the network sees it, and what it was scaled by."""

    height: int
    width: int
    scale_x: float
    scale_y: float

    @property
    def scale(self) -> tuple[float, float]:
        """(sx, sy): pixels of the network's input for one of the original image."""
        return self.scale_x, self.scale_y


def input_size(height: int, width: int, options: InputOptions, short_side: int | None = None) -> InputSize:
    """The size that an image is brought to: short side as the recipe says, unless the long one would be too long."""
    short = short_side if short_side is not None else options.short_sides[-1]
    scale = min(short / min(height, width), options.long_side / max(height, width))
    new_height, new_width = max(round(height * scale), 1), max(round(width * scale), 1)
    return InputSize(new_height, new_width, new_width / width, new_height / height)


def network_input(pixels: np.ndarray, size: InputSize, options: InputOptions) -> Tensor:
    """(H, W, 3) uint8 RGB -> (3, size.height, size.width) float32, resized (bilinear) and normalised."""
    image = torch.from_numpy(pixels).permute(2, 0, 1).float()
    if image.shape[1:] != (size.height, size.width):
        image = F.interpolate(
            image[None], size=(size.height, size.width), mode="bilinear", align_corners=False, antialias=True
        )[0]
    mean, std = torch.tensor(options.mean), torch.tensor(options.std)
    return (image - mean[:, None, None]) / std[:, None, None]
