"""Paste the masks of boxes into the image with the recipe's ``model.mask_pasting``, and encode them as RLE.

Shape shorthand in this module:

    N: boxes of an image
    m: height and width of a mask before pasting
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from refdet.ops.masks import masks_to_rle


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, pasting: str) -> list[bytes]:
    """Paste the masks of boxes into the image.

    Args:
        masks: (N, m, m) probabilities within each box, on the CPU.
        boxes: (N, 4) half-open xyxy in pixels of the image.
        height: height of the image in pixels.
        width: width of the image in pixels.
        pasting: what the values are between the centers of a mask's outer pixels and the edges of the box. "clamped":
            the values of the outer pixels. "padded": interpolated to 0, as in detectron2. "torchvision": as "padded",
            with boxes rounded to whole pixels, as in torchvision.

    Returns:
        N COCO compressed RLE ``counts``.
    """
    if pasting != "clamped":
        size = masks.shape[-1]
        masks = F.pad(masks, (1, 1, 1, 1))  # a border of zeros; the boxes grow with the masks
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        half = (boxes[:, 2:] - boxes[:, :2]) / 2 * ((size + 2) / size)
        boxes = torch.cat((center - half, center + half), dim=1)
        if pasting == "torchvision":
            boxes = boxes.trunc() + torch.tensor([0.0, 0.0, 1.0, 1.0])  # torchvision includes pixels x2 and y2
    return masks_to_rle(masks, boxes, height, width)
