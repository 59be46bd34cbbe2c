"""How an image becomes the network's input: resized and normalised."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from refdet.frames import InputSize
from refdet.recipe import InputOptions


def input_size(height: int, width: int, options: InputOptions, short_side: int | None = None) -> InputSize:
    """The size that an image is brought to: short side as the recipe says, unless the long one would be too long."""
    short = short_side if short_side is not None else options.short_sides[-1]
    scale, limit = short / min(height, width), options.long_side / max(height, width)
    if options.resize == "opencv":
        if round(scale * max(height, width)) > options.long_side:
            scale = limit
        # what is sampled, and by what boxes are scaled, is `scale` itself
        return InputSize(max(round(height * scale), 1), max(round(width * scale), 1), scale, scale, height, width)
    scale = min(scale, limit)
    new_height, new_width = max(round(height * scale), 1), max(round(width * scale), 1)
    return InputSize(new_height, new_width, new_width / width, new_height / height, height, width)


def network_input(
    pixels: np.ndarray, size: InputSize, options: InputOptions, device: torch.device | None = None
) -> Tensor:
    """(H, W, 3) uint8 RGB -> (3, size.height, size.width) float32, resized (bilinear) and normalised.

    On `device`, to which the bytes go as they are: a quarter of what the floats would be.
    """
    sent = torch.from_numpy(np.ascontiguousarray(pixels))
    if device is not None and device.type == "cuda":
        sent = sent.pin_memory().to(device, non_blocking=True)
    image = sent.permute(2, 0, 1).float()
    if options.order == "bgr":
        image = image.flip(0)
    mean, std = (torch.tensor(values, device=image.device) for values in (options.mean, options.std))
    if options.resize == "opencv":  # in the order of the original, since the order of rounding shows in the end
        image = _resize_opencv(image - mean[:, None, None], size)
        return image / std[:, None, None]
    if image.shape[1:] != (size.height, size.width):
        image = F.interpolate(
            image[None], size=(size.height, size.width), mode="bilinear", align_corners=False, antialias=True
        )[0]
    return (image - mean[:, None, None]) / std[:, None, None]


def _resize_opencv(image: Tensor, size: InputSize) -> Tensor:
    """Bilinear without antialiasing, sampling at the scale given and not at the ratio of the sizes.

    As ``cv2.resize(image, None, fx=scale, fy=scale)`` does.
    """
    rows, below, y = _taps(size.height, image.shape[1], size.scale_y, image.device)
    columns, right, x = _taps(size.width, image.shape[2], size.scale_x, image.device)
    wide = image[:, :, columns] * (1 - x) + image[:, :, right] * x
    return wide[:, rows] * (1 - y)[:, None] + wide[:, below] * y[:, None]


def _taps(count: int, limit: int, scale: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `count` positions the two pixels of `limit` beside it and the weight of the second."""
    position = (torch.arange(count, dtype=torch.float64, device=device) + 0.5) * (1 / scale) - 0.5
    position = position.clamp(0, limit - 1)
    low = position.floor().long()
    return low, (low + 1).clamp(max=limit - 1), (position - low).float()
