"""Large-scale jitter (Ghiasi et al., 2021): an image is resized by a random scale, and cropped or padded to a square.

Boxes, and windows (the visible part of an image), are half-open xyxy in pixels of the original image. (N, 4) boxes are
float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from refdet.config.recipe import InputOptions
from refdet.structures.box_convention import InputSize

Box = tuple[float, float, float, float]

_MIN_SIDE = 0.01  # pixels


def sample_jittered_size(height: int, width: int, options: InputOptions, rng: np.random.Generator) -> InputSize:
    """Draw a random scale, and a random crop of the resized image.

    At a random scale of 1, the long side of the resized image is ``options.crop_size``.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        options: input options with a ``crop_size``; the random scale is uniform in ``scale_range``.
        rng: the generator, from which three numbers are drawn: the scale, and the position of the crop along x and y.

    Returns:
        The input size: that of the crop, at most ``crop_size`` on a side. Padding to the square comes later.
    """
    scale = rng.uniform(*options.scale_range) * options.crop_size / max(height, width)
    resized_height, resized_width = max(round(height * scale), 1), max(round(width * scale), 1)
    crop_height, crop_width = min(resized_height, options.crop_size), min(resized_width, options.crop_size)
    x = round(rng.random() * (resized_width - crop_width))
    y = round(rng.random() * (resized_height - crop_height))
    scales = (scale, scale) if options.resize == "opencv" else (resized_width / width, resized_height / height)
    resized = (resized_height, resized_width)
    return InputSize(crop_height, crop_width, *scales, height, width, cropped_from=resized, crop_origin=(x, y))


def visible_window(size: InputSize, flip: bool) -> Box:
    """Compute the part of the original image that the network's input shows.

    Args:
        size: input size with a crop.
        flip: whether the image is mirrored before it is cropped.

    Returns:
        The window in the image as stored, not mirrored.
    """
    (x, y), (sx, sy) = size.crop_origin, size.scale
    left, right = x / sx, min((x + size.width) / sx, size.image_width)
    if flip:
        left, right = size.image_width - right, size.image_width - left
    return left, y / sy, right, min((y + size.height) / sy, size.image_height)


def crop_boxes(boxes: Tensor, masks: Sequence[dict | None], window: Box) -> tuple[list[int], Tensor]:
    """Clip boxes to a window.

    If the window cuts a box, it becomes the box of the visible part of the object's mask, as with detectron2's
    ``recompute_boxes``; without a mask it is clipped. Objects of which less than 0.01 pixels are visible in width or
    height are removed, unless their whole box is in the window.

    Args:
        boxes: N boxes.
        masks: N pycocotools RLEs in pixels of the original image; None for an object without a mask.
        window: the visible part of the image.

    Returns:
        Indices of the K visible objects, in order, and their boxes (K, 4).
    """
    low, high = torch.tensor(window[:2]), torch.tensor(window[2:])
    inside = ((boxes[:, :2] >= low) & (boxes[:, 2:] <= high)).all(dim=1)
    visible = torch.cat((torch.maximum(boxes[:, :2], low), torch.minimum(boxes[:, 2:], high)), dim=1)
    visible = torch.where(inside[:, None], boxes, visible)
    for row in (~inside & (visible[:, :2] < visible[:, 2:]).all(dim=1)).nonzero()[:, 0].tolist():
        if (mask := masks[row]) is not None:
            visible[row] = torch.tensor(_visible_box(mask, window))
    kept = ((visible[:, 2:] - visible[:, :2] >= _MIN_SIDE).all(dim=1) | inside).nonzero()[:, 0]
    return kept.tolist(), visible[kept]


def _visible_box(mask: dict, window: Box) -> Box:
    """The box of the part of a mask in a window; an empty box if there is none."""
    left, top, right, bottom = window
    rows, columns = slice(int(top), int(np.ceil(bottom))), slice(int(left), int(np.ceil(right)))
    pixels = coco_mask.decode(mask)[rows, columns]
    ys, xs = pixels.any(axis=1).nonzero()[0], pixels.any(axis=0).nonzero()[0]
    if len(ys) == 0:
        return left, top, left, top
    return (
        max(float(columns.start + xs[0]), left),
        max(float(rows.start + ys[0]), top),
        min(float(columns.start + xs[-1] + 1), right),
        min(float(rows.start + ys[-1] + 1), bottom),
    )
