"""Masks of boxes as RLE of the image, pasted as the recipe says."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from refdet.ops.masks import masks_to_rle


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, pasting: str) -> list[bytes]:
    """RLE counts of the masks of boxes.

    Args:
        masks: (N, m, m) probabilities.
        boxes: (N, 4) half-open xyxy in pixels of the image.
        height: of the image in pixels.
        width: of the image in pixels.
        pasting: "clamped": the outer cells reach to the edge of the box. "padded": beyond them is 0, as in detectron2,
            so masks end within half a cell of the edge. "torchvision": the same, of boxes cut to whole pixels.
    """
    if pasting != "clamped":
        cells = masks.shape[-1]
        masks = F.pad(masks, (1, 1, 1, 1))
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        half = (boxes[:, 2:] - boxes[:, :2]) / 2 * ((cells + 2) / cells)
        boxes = torch.cat((centre - half, centre + half), dim=1)
        if pasting == "torchvision":
            boxes = boxes.trunc() + torch.tensor([0.0, 0.0, 1.0, 1.0])
    return masks_to_rle(masks, boxes, height, width)
