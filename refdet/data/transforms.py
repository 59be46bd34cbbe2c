"""Resize and normalise images for the network."""

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
    return network_inputs([pixels], [size], options)[0]


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
        (B, 3, height, width) float32, channels_last.
    """
    where = device or torch.device("cpu")
    pixels = []
    for image in images:
        # mirrored pixels; numpy reports a single column with a negative stride as contiguous
        image = image.copy() if min(image.strides) < 0 else np.ascontiguousarray(image)
        pixels.append(on_device(torch.from_numpy(image), where))
    return padded_inputs(pixels, sizes, options, (sizes[0].height, sizes[0].width))


def padded_inputs(
    images: Sequence[Tensor], sizes: Sequence[InputSize], options: InputOptions, shape: tuple[int, int]
) -> Tensor:
    """Resize (bilinear) and normalise images on their device, and zero-pad them at the bottom and right.

    Args:
        images: B tensors (H, W, 3) uint8 RGB; or `network_input` of an image, (3, height, width) float32.
        sizes: input size of each image.
        options: input options of the recipe.
        shape: height and width of the result, in pixels.

    Returns:
        (B, 3, *shape) float32, channels_last. Zero is the mean colour.
    """
    where, opencv = images[0].device, options.resize == "opencv"
    mean, std = (on_device(torch.tensor(values), where)[:, None, None] for values in (options.mean, options.std))
    # rows of pixels in memory: channels_last
    canvas = torch.empty(len(images), *shape, 3, device=where).permute(0, 3, 1, 2)
    if any((size.height, size.width) != shape for size in sizes):
        canvas.copy_(torch.zeros_like(mean) if opencv else mean)  # 0 once it is normalised
    for row, image, size in zip(canvas, images, sizes, strict=True):
        if image.dtype != torch.uint8:
            continue
        image = image.permute(2, 0, 1).float()
        if options.order == "bgr":
            image = image.flip(0)
        # in the order of the reference, as rounding depends on it
        resized = _resize_opencv(image - mean, size) if opencv else _resize(image, size)
        row[:, : size.height, : size.width] = resized
    inputs = canvas.div_(std) if opencv else canvas.sub_(mean).div_(std)
    for row, image, size in zip(inputs, images, sizes, strict=True):
        if image.dtype != torch.uint8:
            row[:, : size.height, : size.width] = image
    return inputs


def _resize(image: Tensor, size: InputSize) -> Tensor:
    """Bilinear resize with antialiasing."""
    if image.shape[1:] == (size.height, size.width):
        return image
    shape = (size.height, size.width)
    return F.interpolate(image[None], size=shape, mode="bilinear", align_corners=False, antialias=True)[0]


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
