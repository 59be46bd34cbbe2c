"""Large-scale jitter (Ghiasi et al., 2021): an image is resized by a random scale, and cropped or padded to a square.

Boxes in this module are (N, 4) float32, half-open xyxy in pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from refdet.config.recipe import InputOptions
from refdet.structures.box_convention import InputSize

Window = tuple[float, float, float, float]
"""A part of the original image, x1 y1 x2 y2 in pixels."""

_MIN_SIDE = 0.01  # pixels; objects with a smaller visible part are removed


def sample_jittered_size(height: int, width: int, options: InputOptions, random: np.random.Generator) -> InputSize:
    """Draw a scale and a crop of the resized image.

    At scale 1 the image fits exactly into the square of ``options.crop_size``.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        options: input options with a ``crop_size``; the scale is uniform in ``scale_range``.
        random: three numbers are drawn: the scale, and the position of the crop along x and y.

    Returns:
        The size of the crop, at most ``crop_size`` on a side.
    """
    scale = random.uniform(*options.scale_range) * options.crop_size / max(height, width)
    resized = max(round(height * scale), 1), max(round(width * scale), 1)
    sides = min(resized[0], options.crop_size), min(resized[1], options.crop_size)
    x, y = (round(random.random() * (resized[axis] - sides[axis])) for axis in (1, 0))
    scales = (scale, scale) if options.resize == "opencv" else (resized[1] / width, resized[0] / height)
    return InputSize(*sides, *scales, height, width, cropped_from=resized, crop_origin=(x, y))


def visible_window(size: InputSize, flip: bool) -> Window:
    """The part of the original image that the network's input shows; with `flip`, that of the mirrored image."""
    (x, y), (sx, sy) = size.crop_origin, size.scale
    left, right = x / sx, min((x + size.width) / sx, size.image_width)
    if flip:
        left, right = size.image_width - right, size.image_width - left
    return left, y / sy, right, min((y + size.height) / sy, size.image_height)


def crop_boxes(boxes: Tensor, masks: Sequence[dict | None], window: Window) -> tuple[list[int], Tensor]:
    """Clip boxes to a window.

    The box of an object that is cut becomes that of the visible part of its mask, as with detectron2's
    ``recompute_boxes``; without a mask it is clipped. Invisible objects are removed.

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


def _visible_box(mask: dict, window: Window) -> Window:
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
