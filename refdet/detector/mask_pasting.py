"""Paste the masks of boxes into the image, as the recipe says, and encode them as RLE."""

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
        pasting: how masks end at the edge of their box. "clamped": the outer cells extend to the edge. "padded": beyond
            the centers of the outer cells, values fall to 0, as in detectron2. "torchvision": likewise, with boxes
            rounded to whole pixels as in torchvision.

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
