"""RoI pooling in plain PyTorch, the fallback without compiled kernels.

Shape shorthand in this module:

    B: images in the batch
    C, H, W: channels, height and width of the feature map
    K: RoIs of the batch
    m: bins on a side of a RoI
    n: samples on a side of a bin

A bin is a weighted sum of positions of the map; the weights are separable in x and y. With fixed sampling a bin reads
few positions, so the sum is an embedding bag over the positions of a channels_last map, which PyTorch vectorizes along
C. With adaptive sampling, and for the mean over bins, many positions are read, so the sum is two matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_SIDE = 1024  # limit of the bins on a side of a RoI, and of the samples on a side of a bin
CHUNK = 64  # RoIs per matrix product, to bound the memory of intermediate results


def pool_plain(
    x: Tensor, rois: Tensor, size: int, stride: float, sampling_ratio: int, crop: bool, mean: bool
) -> Tensor:
    """`refdet::roi_pool` in plain PyTorch; only image indices are checked.

    Args:
        x: (B, C, H, W); sums are float64 for float64 maps, otherwise float32.
        rois: (K, 5) image index and half-open xyxy in pixels of the network's input.
        size: bins on a side of a RoI, m.
        stride: of the feature map, in pixels of the network's input.
        sampling_ratio: samples on a side of a bin; 0 for adaptive.
        crop: instead of RoIAlign, one sample per bin, the outermost ones on the edges of the RoI.
        mean: return the mean over the bins.

    Returns:
        (K, C, m, m) in the dtype of the map, or with `mean` (K, C, 1, 1) in the dtype of the sums; channels_last.

    Raises:
        IndexError: the image index of a RoI is out of range.
    """
    values = x if x.dtype == torch.float64 else x.float()
    rois = rois.detach().to(values.dtype)
    out_of_range = ~((rois[:, 0] >= 0) & (rois[:, 0] < len(x)))
    if out_of_range.any():
        row = int(out_of_range.nonzero()[0])
        raise IndexError(f"RoI pooling: RoI {row} is on image {rois[row, 0].item():g} of a batch of {len(x)}")
    side = 1 if mean else size
    if len(rois) == 0 or x.numel() == 0:  # the sum keeps the result differentiable
        empty = values.new_zeros((len(rois), x.shape[1], side, side)) + 0 * values.sum()
        return empty if mean else empty.to(x.dtype)
    if x.device.type != "cpu" and sampling_ratio and not crop and not mean:
        from torchvision.ops import roi_align  # imports torch's compiler, which takes a second

        outside = -1e6 * stride  # coordinate far outside the map: RoIs with NaN or inf are to give 0
        finite_rois = torch.where(rois.isfinite().all(dim=1, keepdim=True), rois[:, 1:], outside)
        finite_rois = torch.cat((rois[:, :1], finite_rois), dim=1)
        pooled = roi_align(values, finite_rois, size, 1.0 / stride, sampling_ratio=sampling_ratio, aligned=True)
    else:
        across = _taps(rois[:, 1] / stride, rois[:, 3] / stride, size, x.shape[3], sampling_ratio, crop)
        down = _taps(rois[:, 2] / stride, rois[:, 4] / stride, size, x.shape[2], sampling_ratio, crop)
        image = rois[:, 0].long()
        if sampling_ratio and not mean:
            pooled = _pool_with_embedding_bag(values, image, across, down)
        else:
            columns, rows = _dense_weights(*across, x.shape[3]), _dense_weights(*down, x.shape[2])
            if mean:
                columns, rows = columns.mean(1, keepdim=True), rows.mean(1, keepdim=True)
            pooled = _pool_with_matmul(values, image, columns, rows)
    return (pooled if mean else pooled.to(x.dtype)).contiguous(memory_format=torch.channels_last)


def _taps(low: Tensor, high: Tensor, size: int, limit: int, sampling_ratio: int, crop: bool) -> tuple[Tensor, Tensor]:
    """Positions that each bin reads along one axis of the map, and their weights, both (K, m, 2n).

    As in Caffe2 and torchvision, a RoIAlign sample up to one position outside the map has the value at the border;
    beyond, it is 0.

    Args:
        low: (K,) start of each RoI, in positions of the map.
        high: (K,) end of each RoI.
        size: bins along the axis, m.
        limit: positions of the map along the axis.
        sampling_ratio: as in `pool_plain`.
        crop: as in `pool_plain`.
    """
    side = (high - low)[:, None, None]
    adaptive = (side / size).ceil().nan_to_num(0).clamp(0, MAX_SIDE)
    samples_per_bin = torch.full_like(side, sampling_ratio) if sampling_ratio else adaptive
    sample_in_bin = torch.arange(
        sampling_ratio or max(int(samples_per_bin.max()), 1), device=low.device, dtype=low.dtype
    )
    sample = torch.arange(size, device=low.device, dtype=low.dtype)[:, None] * samples_per_bin + sample_in_bin
    if crop:
        position = low[:, None, None] + side * (sample / (size - 1))
        inside = (position > -1) & (position < limit)
        position = position.where(inside, 0)
    else:
        position = low[:, None, None] - 0.5 + side * ((sample + 0.5) / (size * samples_per_bin))
        inside = (position >= -1) & (position <= limit) & (sample_in_bin < samples_per_bin)
        position = position.where(inside, 0).clamp(0, limit - 1)
    floor = position.floor()
    fraction = position - floor
    positions = torch.stack((floor.long(), floor.long() + 1), dim=-1)
    weights = torch.stack((1 - fraction, fraction), dim=-1) / samples_per_bin.clamp(min=1)[..., None]
    weights = weights * (inside[..., None] & (positions >= 0) & (positions < limit))
    return positions.clamp(0, limit - 1).flatten(2), weights.flatten(2)


def _pool_with_embedding_bag(
    x: Tensor, image: Tensor, across: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]
) -> Tensor:
    """Pool bins (K, C, m, m) with positions and weights of `_taps` for x and y.

    Args:
        x: (B, C, H, W) feature map.
        image: (K,) int64 image index of each RoI.
        across: positions and weights (K, m, 2n) along x.
        down: positions and weights (K, m, 2n) along y.
    """
    (xs, x_weights), (ys, y_weights) = across, down
    channels, height, width = x.shape[1:]
    count, size, bag = len(image), xs.shape[1], xs.shape[2] * ys.shape[2]
    first = image[:, None, None, None, None] * (height * width)
    rows = first + ys[:, :, None, :, None] * width + xs[:, None, :, None, :]
    weights = y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]
    table = x.permute(0, 2, 3, 1).reshape(-1, channels)  # a row per position
    pooled = F.embedding_bag(rows.reshape(-1, bag), table, per_sample_weights=weights.reshape(-1, bag), mode="sum")
    return pooled.reshape(count, size, size, channels).permute(0, 3, 1, 2)


def _dense_weights(positions: Tensor, weights: Tensor, limit: int) -> Tensor:
    """Weights (K, m, limit) of all positions of an axis, from positions and weights (K, m, 2n) of `_taps`."""
    return weights.new_zeros((*weights.shape[:2], limit)).scatter_add(2, positions, weights)


def _pool_with_matmul(x: Tensor, image: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Pool bins (K, C, m, m) with the weights of all columns (K, m, W) and rows (K, m, H)."""
    channels, height, width = x.shape[1:]
    order, pooled = [], []
    for index, table in enumerate(x.permute(0, 2, 3, 1)):
        for indices in (image == index).nonzero()[:, 0].split(CHUNK):
            lines = rows[indices].flatten(0, 1) @ table.reshape(height, width * channels)
            lines = lines.reshape(len(indices), rows.shape[1], width, channels)
            order.append(indices)
            pooled.append(columns[indices][:, None] @ lines)
    return torch.cat(pooled).index_select(0, torch.cat(order).argsort()).permute(0, 3, 1, 2)
