"""Resize and normalise images for the network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from refdet.config.recipe import InputOptions
from refdet.device import on_device
from refdet.structures.box_convention import InputSize


def input_size(height: int, width: int, options: InputOptions, short_side: int | None = None) -> InputSize:
    """Compute the input size of an image from the short side and the limit on the long side.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        options: input options of the recipe.
        short_side: target length of the short side in pixels, by default the last of ``options.min_sizes``.

    Returns:
        Input height and width, and the scale in x and y.
    """
    short = short_side if short_side is not None else options.min_sizes[-1]
    scale, limit = short / min(height, width), options.max_size / max(height, width)
    if options.resize in _SIZES:
        new_height, new_width = (
            max(side, 1) for side in _SIZES[options.resize](height, width, short, options.max_size)
        )
        return InputSize(new_height, new_width, new_width / width, new_height / height, height, width)
    if options.resize == "opencv":
        if round(scale * max(height, width)) > options.max_size:
            scale = limit
        # sampling and boxes use the exact `scale`, not the ratio of the rounded sizes
        return InputSize(max(round(height * scale), 1), max(round(width * scale), 1), scale, scale, height, width)
    scale = min(scale, limit)
    new_height, new_width = max(round(height * scale), 1), max(round(width * scale), 1)
    return InputSize(new_height, new_width, new_width / width, new_height / height, height, width)


def network_input(pixels: np.ndarray, size: InputSize, options: InputOptions) -> Tensor:
    """Resize and normalise an image.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        size: input size from `input_size`.
        options: input options of the recipe.

    Returns:
        (3, size.height, size.width) float32.
    """
    return network_inputs([pixels], [size], options)[0, :, : size.height, : size.width]


def network_inputs(
    images: Sequence[np.ndarray], sizes: Sequence[InputSize], options: InputOptions, device: torch.device | None = None
) -> Tensor:
    """Resize (bilinear) and normalise images of equal input size.

    Images are copied to the device as uint8, a quarter of the size of floats. Copies from pinned memory
    (`refdet.device.pinned`) are asynchronous, so the arrays must not change until they are done.

    Args:
        images: B arrays (H, W, 3) uint8 RGB.
        sizes: input size of each image, all with the same height and width.
        options: input options of the recipe.
        device: device of the result, CPU by default.

    Returns:
        (B, 3, height, width) float32, channels_last; zero-padded to multiples of ``options.size_divisibility``.
    """
    where = device or torch.device("cpu")
    mean, std = (on_device(torch.tensor(values), where)[:, None, None] for values in (options.mean, options.std))
    resized = []
    for pixels, size in zip(images, sizes, strict=True):
        # mirrored pixels; numpy reports a single column with a negative stride as contiguous
        pixels = pixels.copy() if min(pixels.strides) < 0 else np.ascontiguousarray(pixels)
        if options.resize == "pillow":
            pixels = np.array(Image.fromarray(pixels).resize((size.width, size.height), Image.Resampling.BILINEAR))
        image = on_device(torch.from_numpy(pixels), where).permute(2, 0, 1).float()
        if options.order == "bgr":
            image = image.flip(0)
        # in the order of the reference, as rounding depends on it
        if options.resize == "opencv":
            resized.append(_resize_opencv(image - mean, size))
        else:
            resized.append(_resize(image, size, antialias=options.resize == "antialias"))
    together = torch.stack([image.permute(1, 2, 0) for image in resized]).permute(0, 3, 1, 2)  # channels_last
    inputs = together / std if options.resize == "opencv" else (together - mean) / std
    return pad_to_multiple(inputs, options.size_divisibility)


def pad_to_multiple(images: Tensor, divisor: int) -> Tensor:
    """Zero-pad images (B, 3, H, W) at the bottom and right to multiples of `divisor`; zero is the mean colour."""
    height, width = images.shape[2:]
    if height % divisor == width % divisor == 0:
        return images
    return F.pad(images, (0, -width % divisor, 0, -height % divisor)).contiguous(memory_format=torch.channels_last)


def _rounded_size(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """Height and width of detectron2's resized image: halves are rounded up."""
    scale = short / min(height, width)
    sides = [float(short) if side == min(height, width) else scale * side for side in (height, width)]
    if max(sides) > longest:
        shrink = longest / max(sides)
        sides = [side * shrink for side in sides]
    return int(sides[0] + 0.5), int(sides[1] + 0.5)


def _floored_size(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """Height and width of torchvision's resized image: rounded down."""
    scale = min(short / min(height, width), longest / max(height, width))
    return math.floor(height * scale), math.floor(width * scale)


_SIZES = {"pillow": _rounded_size, "torchvision": _floored_size}


def _resize(image: Tensor, size: InputSize, antialias: bool) -> Tensor:
    """Bilinear resize."""
    if image.shape[1:] == (size.height, size.width):
        return image
    shape = (size.height, size.width)
    return F.interpolate(image[None], size=shape, mode="bilinear", align_corners=False, antialias=antialias)[0]


def _resize_opencv(image: Tensor, size: InputSize) -> Tensor:
    """Bilinear resize without antialiasing that samples at the exact scale, not at the ratio of the sizes.

    Equivalent to ``cv2.resize(image, None, fx=scale, fy=scale)``.
    """
    rows, below, y = _taps(size.height, image.shape[1], size.scale_y, image.device)
    columns, right, x = _taps(size.width, image.shape[2], size.scale_x, image.device)
    wide = image[:, :, columns] * (1 - x) + image[:, :, right] * x
    return wide[:, rows] * (1 - y)[:, None] + wide[:, below] * y[:, None]


def _taps(count: int, limit: int, scale: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two neighbouring pixels (of ``limit``) of each of ``count`` positions, and the weight of the second."""
    position = (torch.arange(count, dtype=torch.float64, device=device) + 0.5) * (1 / scale) - 0.5
    position = position.clamp(0, limit - 1)
    low = position.floor().long()
    return low, (low + 1).clamp(max=limit - 1), (position - low).float()
