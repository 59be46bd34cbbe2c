"""Paste the masks of boxes into the image with the recipe's ``model.mask_pasting``, and encode them as RLE.

Shape shorthand in this module:

    N: boxes of an image
    m: side of a mask in cells
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from refdet.ops.masks import masks_to_rle


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, pasting: str) -> list[bytes]:
    """Paste the masks of boxes into the image.

    Args:
        masks: (N, m, m) probabilities on the CPU.
        boxes: (N, 4) half-open xyxy in pixels of the image.
        height: height of the image in pixels.
        width: width of the image in pixels.
        pasting: values between the centers of the outer cells and the edges of the box. "clamped": those of the outer
            cells. "padded": interpolated to 0, as in detectron2. "torchvision": as "padded", with boxes rounded to
            whole pixels, as in torchvision.

    Returns:
        N COCO compressed RLE ``counts``.
    """
    if pasting != "clamped":
        cells = masks.shape[-1]
        masks = F.pad(masks, (1, 1, 1, 1))
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        half = (boxes[:, 2:] - boxes[:, :2]) / 2 * ((cells + 2) / cells)
        boxes = torch.cat((center - half, center + half), dim=1)
        if pasting == "torchvision":
            boxes = boxes.trunc() + torch.tensor([0.0, 0.0, 1.0, 1.0])
    return masks_to_rle(masks, boxes, height, width)
