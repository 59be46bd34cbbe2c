"""RoI pooling: the features of boxes, read from maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align as _roi_align

SAMPLES = 2  # on a side of a cell


def roi_align(x: Tensor, rois: Tensor, size: int, stride: float) -> Tensor:
    """RoIAlign (He et al., "Mask R-CNN", 2017) with 2x2 samples a cell and half-pixel alignment.

    Args:
        x: (B, C, H, W) map; fastest in channels_last.
        rois: (K, 5) rows of image index and half-open xyxy in pixels of the network's input.
        size: cells on a side, m.
        stride: pixels of the network's input for one cell of the map.
    Returns:
        (K, C, m, m) in the type of the map, channels_last.
    """
    values = x if x.dtype == torch.float64 else x.float()
    if x.device.type == "cpu":
        pooled = _roi_align_by_rows(values, rois.to(values.dtype), size, stride)
    else:
        pooled = _roi_align(values, rois.to(values.dtype), size, 1.0 / stride, sampling_ratio=SAMPLES, aligned=True)
    return pooled.to(x.dtype).contiguous(memory_format=torch.channels_last)


def roi_crop(x: Tensor, rois: Tensor, size: int, stride: float) -> Tensor:
    """The crop of the seed (lichengunc/mask-faster-rcnn): one bilinear sample a cell, the first and the last of
    each row and column on the corners of the RoI, position 0 of the map being the middle of its first cell.

    Outside the map everything is 0. Arguments and result as for `roi_align`.
    """
    values = x if x.dtype == torch.float64 else x.float()
    pooled = _sum_of_rows(values, rois.to(values.dtype), stride, size, _crop_axis)
    return pooled.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _roi_align_by_rows(x: Tensor, rois: Tensor, size: int, stride: float) -> Tensor:
    """The same as a weighted sum of rows of the map.

    In channels_last a position of the map is a row of C numbers, and a cell of a RoI is the weighted sum of the 16
    rows about its 4 samples: an embedding bag. PyTorch runs that with SIMD along C and in parallel, forward and
    backward, where torchvision walks the map channel by channel; `benchmarks/pooling.py` has both.
    """
    return _sum_of_rows(x, rois, stride, size, _axis)


def _sum_of_rows(
    x: Tensor, rois: Tensor, stride: float, size: int, axis: Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
) -> Tensor:
    """Cells (K, C, size, size) of rois (K, 5), each the sum of the rows of the map that `axis` weighs."""
    count, height, width = len(rois), x.shape[2], x.shape[3]
    x_cells, x_weights = axis(rois[:, 1] / stride, rois[:, 3] / stride, size, width)
    y_cells, y_weights = axis(rois[:, 2] / stride, rois[:, 4] / stride, size, height)
    image = rois[:, 0].long()[:, None, None, None, None] * (height * width)
    rows = image + y_cells[:, :, None, :, None] * width + x_cells[:, None, :, None, :]
    weights = y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]
    bag = x_cells.shape[2] * y_cells.shape[2]
    table = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    pooled = F.embedding_bag(rows.reshape(-1, bag), table, per_sample_weights=weights.reshape(-1, bag), mode="sum")
    return pooled.reshape(count, size, size, x.shape[1]).permute(0, 3, 1, 2)


def _axis(low: Tensor, high: Tensor, size: int, limit: int) -> tuple[Tensor, Tensor]:
    """Along one axis of a map, the positions that each cell reads and their weights, both (K, size, 2 * SAMPLES).

    A sample up to one position outside the map takes the value of the border, one further out is 0, as in the
    original.
    """
    steps = (torch.arange(size * SAMPLES, device=low.device, dtype=low.dtype) + 0.5) / (size * SAMPLES)
    position = low[:, None] - 0.5 + (high - low)[:, None] * steps
    inside = (position >= -1) & (position <= limit)
    position = position.clamp(0, limit - 1)
    floor = position.floor()
    fraction = position - floor
    cell = floor.long()
    cells = torch.stack((cell, (cell + 1).clamp(max=limit - 1)), dim=-1)
    weights = torch.stack((1 - fraction, fraction), dim=-1) * inside[..., None] / SAMPLES
    return cells.reshape(-1, size, 2 * SAMPLES), weights.reshape(-1, size, 2 * SAMPLES)


def _crop_axis(low: Tensor, high: Tensor, size: int, limit: int) -> tuple[Tensor, Tensor]:
    """As `_axis` for `roi_crop`: positions and weights, both (K, size, 2)."""
    steps = torch.arange(size, device=low.device, dtype=low.dtype) / (size - 1)
    # far outside nothing is read; the clamp keeps the conversion to integers defined
    position = (low[:, None] + (high - low)[:, None] * steps).clamp(-2, limit + 1)
    floor = position.floor()
    fraction = position - floor
    cells = torch.stack((floor.long(), floor.long() + 1), dim=-1)
    inside = (cells >= 0) & (cells < limit)
    weights = torch.stack((1 - fraction, fraction), dim=-1) * inside
    return cells.clamp(0, limit - 1), weights


def pyramid_roi_align(maps: Sequence[Tensor], rois: Tensor, size: int, strides: Sequence[int]) -> Tensor:
    """RoIAlign from the level of a pyramid that fits each RoI.

    A RoI of 224 pixels goes to the level of stride 16, one of half the size to the next finer one:
    equation 1 of Lin et al., "Feature Pyramid Networks".

    Args:
        maps: (B, C, Hi, Wi), finest first.
        rois: (K, 5) as for `roi_align`.
        strides: of the maps, each twice the one before.
    Returns:
        (K, C, m, m), channels_last.
    """
    sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=1e-6).sqrt()
    level = torch.floor(torch.log2(sides / 224 + 1e-6) + math.log2(16 / strides[0]))
    level = level.clamp(0, len(maps) - 1)
    pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], size, size)
    for index, (x, stride) in enumerate(zip(maps, strides, strict=True)):
        rows = (level == index).nonzero()[:, 0]
        pooled = pooled.index_put((rows,), roi_align(x, rois[rows], size, stride))
    return pooled.contiguous(memory_format=torch.channels_last)
