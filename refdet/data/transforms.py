"""How an image becomes the network's input: resized and normalised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from refdet.config.recipe import InputOptions
from refdet.device import on_device
from refdet.structures.box_convention import InputSize


def input_size(height: int, width: int, options: InputOptions, short_side: int | None = None) -> InputSize:
    """The size that an image is brought to: short side as the recipe says, unless the long one would be too long."""
    short = short_side if short_side is not None else options.min_sizes[-1]
    scale, limit = short / min(height, width), options.max_size / max(height, width)
    if options.resize == "opencv":
        if round(scale * max(height, width)) > options.max_size:
            scale = limit
        # what is sampled, and by what boxes are scaled, is `scale` itself
        return InputSize(max(round(height * scale), 1), max(round(width * scale), 1), scale, scale, height, width)
    scale = min(scale, limit)
    new_height, new_width = max(round(height * scale), 1), max(round(width * scale), 1)
    return InputSize(new_height, new_width, new_width / width, new_height / height, height, width)


def network_input(pixels: np.ndarray, size: InputSize, options: InputOptions) -> Tensor:
    """(H, W, 3) uint8 RGB -> (3, size.height, size.width) float32; see `network_inputs`."""
    return network_inputs([pixels], [size], options)[0]


def network_inputs(
    images: Sequence[np.ndarray], sizes: Sequence[InputSize], options: InputOptions, device: torch.device | None = None
) -> Tensor:
    """Images (H, W, 3) uint8 RGB -> (B, 3, height, width) float32, resized (bilinear) and normalised, channels_last.

    On `device`, to which the bytes go as they are: a quarter of what the floats would be. From memory that is pinned,
    see `refdet.device.pinned`, they go while the host goes on, so it must not change before they are there.

    Args:
        sizes: of each image, all of one height and width.
    """
    where = device or torch.device("cpu")
    mean, std = (on_device(torch.tensor(values), where)[:, None, None] for values in (options.mean, options.std))
    resized = []
    for pixels, size in zip(images, sizes, strict=True):
        # mirrored pixels; numpy takes a single column of them for contiguous as it is, with its negative stride
        pixels = pixels.copy() if min(pixels.strides) < 0 else np.ascontiguousarray(pixels)
        image = on_device(torch.from_numpy(pixels), where).permute(2, 0, 1).float()
        if options.order == "bgr":
            image = image.flip(0)
        # in the order of the original, since the order of rounding shows in the end
        resized.append(_resize_opencv(image - mean, size) if options.resize == "opencv" else _resize(image, size))
    together = torch.stack([image.permute(1, 2, 0) for image in resized]).permute(0, 3, 1, 2)  # channels_last
    return together / std if options.resize == "opencv" else (together - mean) / std


def _resize(image: Tensor, size: InputSize) -> Tensor:
    """Bilinear, with antialiasing."""
    if image.shape[1:] == (size.height, size.width):
        return image
    shape = (size.height, size.width)
    return F.interpolate(image[None], size=shape, mode="bilinear", align_corners=False, antialias=True)[0]


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
