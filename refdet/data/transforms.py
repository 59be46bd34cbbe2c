"""Resize and normalize images for the network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from refdet.config.recipe import InputOptions
from refdet.device import to_device
from refdet.structures.box_convention import InputSize


def input_size(height: int, width: int, options: InputOptions, short_side: int | None = None) -> InputSize:
    """Compute the input size of an image from the target of its short side and the limit of its long side.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        options: input options of the recipe.
        short_side: target length of the short side in pixels, by default the last of ``options.min_sizes``.

    Returns:
        The input size, with the scale factors of x and y.
    """
    short_side = options.min_sizes[-1] if short_side is None else short_side
    scale, max_scale = short_side / min(height, width), options.max_size / max(height, width)
    if options.resize == "opencv":
        if round(scale * max(height, width)) > options.max_size:  # as in the reference, only after rounding
            scale = max_scale
        # sampling and boxes use the exact `scale`, not the ratio of the rounded sizes
        return InputSize(max(round(height * scale), 1), max(round(width * scale), 1), scale, scale, height, width)
    if options.resize == "pillow":
        new_height, new_width = _detectron2_size(height, width, short_side, options.max_size)
    elif options.resize == "torchvision":
        new_height, new_width = _torchvision_size(height, width, short_side, options.max_size)
    else:
        scale = min(scale, max_scale)
        new_height, new_width = round(height * scale), round(width * scale)
    new_height, new_width = max(new_height, 1), max(new_width, 1)
    return InputSize(new_height, new_width, new_width / width, new_height / height, height, width)


def network_input(pixels: np.ndarray, size: InputSize, options: InputOptions) -> Tensor:
    """Resize and normalize an image.

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
    """Resize (bilinear) and normalize images of equal input size.

    Images are copied to the device as uint8, a quarter of the size of floats, without waiting for a GPU. The caller may
    change the arrays as soon as this function returns.

    Args:
        images: B arrays (H, W, 3) uint8 RGB.
        sizes: input size of each image, all with the same height and width.
        options: input options of the recipe.
        device: device of the result, CPU by default.

    Returns:
        (B, 3, height, width) float32, channels_last; zero-padded to multiples of ``options.size_divisibility``.
    """
    target = device or torch.device("cpu")
    mean, std = (to_device(torch.tensor(values), target)[:, None, None] for values in (options.mean, options.std))
    resized = []
    if options.resize == "pillow":
        images = [resize_pillow(pixels, size) for pixels, size in zip(images, sizes, strict=True)]
    groups = _group_by_shape(images, target)
    for group in groups:
        pixels, size = _stack_on_device([images[i] for i in group], target), sizes[group[0]]
        image = pixels.permute(0, 3, 1, 2).float()
        if options.order == "bgr":
            image = image.flip(1)
        # the reference subtracts the mean before it resizes, and rounding depends on the order
        image = _resize_opencv(image - mean, size) if options.resize == "opencv" else _resize(image, size, options)
        resized.append(image.permute(0, 2, 3, 1))
    batch = torch.cat(resized)
    if 1 < len(groups) < len(images):  # restore the order of the images
        batch = batch[to_device(torch.tensor([i for group in groups for i in group]).argsort(), target)]
    batch = batch.permute(0, 3, 1, 2)  # channels_last
    inputs = batch / std if options.resize == "opencv" else (batch - mean) / std
    return _pad(inputs, options.size_divisibility)


def padded_inputs(
    images: Sequence[Tensor], sizes: Sequence[InputSize], options: InputOptions, shape: tuple[int, int]
) -> Tensor:
    """Resize (bilinear) and normalize images on their device, and zero-pad them at the bottom and right.

    Args:
        images: B tensors (H, W, 3) uint8 RGB; or `network_input` of an image, (3, height, width) float32.
        sizes: input size of each image.
        options: input options of the recipe.
        shape: height and width of the result.

    Returns:
        (B, 3, *shape) float32, channels_last. Zero is the mean color.
    """
    device, opencv = images[0].device, options.resize == "opencv"
    mean, std = (to_device(torch.tensor(values), device)[:, None, None] for values in (options.mean, options.std))
    # channels_last
    canvas = torch.empty(len(images), *shape, 3, device=device).permute(0, 3, 1, 2)
    if any((size.height, size.width) != shape for size in sizes):
        canvas.copy_(torch.zeros_like(mean) if opencv else mean)  # the padding, which normalization turns into 0
    for output, image, size in zip(canvas, images, sizes, strict=True):
        if image.dtype != torch.uint8:  # already normalized; copied below
            continue
        image = image.permute(2, 0, 1)[None].float()
        if options.order == "bgr":
            image = image.flip(1)
        # the reference subtracts the mean before it resizes, and rounding depends on the order
        resized = _resize_opencv(image - mean, size) if opencv else _resize(image, size, options)
        output[:, : size.height, : size.width] = resized[0]
    inputs = canvas.div_(std) if opencv else canvas.sub_(mean).div_(std)
    for output, image, size in zip(inputs, images, sizes, strict=True):
        if image.dtype != torch.uint8:
            output[:, : size.height, : size.width] = image
    return inputs


def _group_by_shape(images: Sequence[np.ndarray], device: torch.device) -> list[list[int]]:
    """Group indices of images to process together: those of the same shape on a GPU, where fewer kernels are faster.

    On a CPU each image is processed on its own, which needs less memory.
    """
    if device.type == "cpu":
        return [[i] for i in range(len(images))]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, pixels in enumerate(images):
        by_shape.setdefault(pixels.shape, []).append(i)
    return list(by_shape.values())


def _stack_on_device(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Copy B images (H, W, 3) uint8 of the same shape to a device, as (B, H, W, 3).

    The images are combined on the host first: one copy from pinned memory starts sooner than one per image, as each
    call lets other threads take the interpreter's lock.
    """
    # torch does not accept the negative strides of mirrored pixels, which NumPy keeps for an image of a single column,
    # as it calls that contiguous.
    contiguous = [pixels.copy() if min(pixels.strides) < 0 else np.ascontiguousarray(pixels) for pixels in images]
    tensors = [torch.from_numpy(pixels) for pixels in contiguous]
    if len(tensors) == 1:
        return to_device(tensors[0], device)[None]
    shape = (len(tensors), *tensors[0].shape)
    batch = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return to_device(torch.stack(tensors, out=batch), device)


def _pad(images: Tensor, divisor: int) -> Tensor:
    """Zero-pad images (B, 3, H, W) at the bottom and right to multiples of a divisor, 0 for no padding."""
    height, width = images.shape[2:]
    bottom, right = (-height % divisor, -width % divisor) if divisor else (0, 0)
    if not (bottom or right):
        return images
    return F.pad(images, (0, right, 0, bottom)).contiguous(memory_format=torch.channels_last)


def _detectron2_size(height: int, width: int, short_side: int, max_size: int) -> tuple[int, int]:
    """Height and width of detectron2's resized image, which rounds halves up."""
    scale = short_side / min(height, width)
    sides = [float(short_side) if side == min(height, width) else scale * side for side in (height, width)]
    if max(sides) > max_size:
        shrink = max_size / max(sides)
        sides = [side * shrink for side in sides]
    return int(sides[0] + 0.5), int(sides[1] + 0.5)


def _torchvision_size(height: int, width: int, short_side: int, max_size: int) -> tuple[int, int]:
    """Height and width of torchvision's resized image, which rounds down."""
    scale = min(short_side / min(height, width), max_size / max(height, width))
    return math.floor(height * scale), math.floor(width * scale)


def resize_pillow(pixels: np.ndarray, size: InputSize) -> np.ndarray:
    """Resize (H, W, 3) uint8 as Pillow does, bilinear with antialiasing, and crop it if ``size`` has a crop."""
    height, width = size.resized_size
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.array(resized)[size.crop])


def _resize(image: Tensor, size: InputSize, options: InputOptions) -> Tensor:
    """Bilinear resize and crop of (B, 3, H, W); images that `resize_pillow` has resized are returned unchanged."""
    antialias = options.resize == "antialias"
    if options.resize == "pillow" and image.shape[2:] == (size.height, size.width):
        return image
    if image.shape[2:] != size.resized_size:
        image = F.interpolate(image, size=size.resized_size, mode="bilinear", align_corners=False, antialias=antialias)
    return image[(..., *size.crop)]


def _resize_opencv(image: Tensor, size: InputSize) -> Tensor:
    """Bilinear resize and crop of (B, 3, H, W) without antialiasing, at the exact scale instead of the ratio of sizes.

    Without a crop, equivalent to ``cv2.resize(image, None, fx=scale, fy=scale)``.
    """
    height, width = size.resized_size
    crop_rows, crop_columns = size.crop
    top, bottom, y = (taps[crop_rows] for taps in _bilinear_taps(height, image.shape[2], size.scale_y, image.device))
    left, right, x = (taps[crop_columns] for taps in _bilinear_taps(width, image.shape[3], size.scale_x, image.device))
    resized_rows = image[..., left] * (1 - x) + image[..., right] * x
    return resized_rows[:, :, top] * (1 - y)[:, None] + resized_rows[:, :, bottom] * y[:, None]


def _bilinear_taps(count: int, limit: int, scale: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the two source pixels that each output pixel along an axis is interpolated from.

    Args:
        count: number of output pixels along the axis.
        limit: number of source pixels along the axis.
        scale: output pixels per source pixel.
        device: device of the result.

    Returns:
        (count,) each: index of the first and of the second source pixel, int64, and weight of the second, float32.
    """
    position = (torch.arange(count, dtype=torch.float64, device=device) + 0.5) * (1 / scale) - 0.5
    position = position.clamp(0, limit - 1)
    low = position.floor().long()
    return low, (low + 1).clamp(max=limit - 1), (position - low).float()
