"""RoIs of a batch of images: rows of an image index and a box, as RoI pooling takes them.

Shape shorthand in this module:

    B: images in the batch
    N: boxes of all images together
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from refdet.device import to_device
from refdet.structures.box_convention import InputSize


def image_indices(counts: Sequence[int], device: torch.device) -> Tensor:
    """Image index of each box, (N,) int64, from the number of boxes of each image."""
    return to_device(torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int64), counts)), device)


def to_rois(image_index: Tensor, boxes: Tensor) -> Tensor:
    """Image indices (N,) and boxes (N, 4) -> RoIs (N, 5)."""
    return torch.cat((image_index.to(boxes.dtype)[:, None], boxes), dim=1)


def image_scales(sizes: Sequence[InputSize], like: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (x, y) and original sizes (width, height), (B, 2) each, in the dtype and on the device of `like`."""
    rows = [(*size.scale, size.image_width, size.image_height) for size in sizes]
    scales, limits = to_device(torch.tensor(rows, dtype=like.dtype), like.device).split(2, dim=1)
    return scales, limits
