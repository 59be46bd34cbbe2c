"""RoI pooling from feature maps, by compiled kernels or plain PyTorch.

Shape shorthand in this module:

    B: images in the batch
    C, H, W: channels, height and width of a feature map
    K: RoIs of the batch
    m: bins on a side of a RoI (csrc/ calls them cells)

Feature maps (B, C, H, W) may have any floating dtype and memory format; channels_last is fastest, as others are copied
into it. Sums and means are float32 (float64 for float64 maps). Results with and without the compiled kernels differ
only by the rounding of these sums, by less than 1e-5 for values of magnitude 1. Feature maps must be finite: NaN and
inf may spread to other RoIs.

RoIs (K, 5) are rows of image index and half-open xyxy box in pixels of the network's input; they get no gradient.
Samples outside the map, or of a RoI with a NaN or infinite coordinate, are 0. An empty box is sampled at its point or
line, and a reversed box gives flipped bins; with adaptive sampling both give 0.

All functions raise:
    TypeError: the map or the RoIs are not floating point.
    ValueError: shapes or devices do not match, or the size, stride or sampling ratio is out of range.
    IndexError: the image index of a RoI is out of range. The CUDA kernels do not synchronize and return NaN instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refdet.ops._library import DEVICES
from refdet.ops.pooling_plain import MAX_SIDE, pool_plain

SAMPLING_RATIO = 2  # default number of samples on a side of a bin


def roi_align(
    x: Tensor, rois: Tensor, size: int, stride: float, sampling_ratio: int = SAMPLING_RATIO, aligned: bool = True
) -> Tensor:
    """RoIAlign (He et al., "Mask R-CNN", 2017), by default with half-pixel alignment.

    Args:
        x: (B, C, H, W) feature map; fastest in channels_last.
        rois: (K, 5) rows of image index and half-open xyxy in pixels of the network's input.
        size: bins on a side of a RoI, m.
        stride: of the feature map, in pixels of the network's input.
        sampling_ratio: samples on a side of a bin, as in torchvision. 0 for adaptive sampling: ceil(RoI side / m) in
            positions of the map, at most 1024.
        aligned: as in torchvision. If False, coordinate 0 is the center of the map's first position instead of its
            edge, and RoIs are at least one position wide and high.

    Returns:
        (K, C, m, m) in the dtype of the map, channels_last.
    """
    rois = rois if aligned else _convert_unaligned(rois, stride)
    return _pool(x, rois, size, stride, sampling_ratio, crop=False, mean=False)


def roi_align_mean(
    x: Tensor, rois: Tensor, size: int, stride: float, sampling_ratio: int = SAMPLING_RATIO, aligned: bool = True
) -> Tensor:
    """Mean (K, C) of `roi_align` over its bins, without storing them; float32, or float64 for float64 maps."""
    rois = rois if aligned else _convert_unaligned(rois, stride)
    return _pool(x, rois, size, stride, sampling_ratio, crop=False, mean=True).flatten(1)


def roi_crop(x: Tensor, rois: Tensor, size: int, stride: float) -> Tensor:
    """Crop and resize as in the reference (lichengunc/mask-faster-rcnn).

    Takes one bilinear sample per bin, the outermost ones on the edges of the RoI. Coordinate 0 is the center of the
    map's first position; the map is padded with zeros.

    Args:
        x: (B, C, H, W) feature map; fastest in channels_last.
        rois: (K, 5) rows of image index and half-open xyxy in pixels of the network's input.
        size: bins on a side of a RoI, m; at least 2.
        stride: of the feature map, in pixels of the network's input.

    Returns:
        (K, C, m, m) in the dtype of the map, channels_last.
    """
    return _pool(x, rois, size, stride, sampling_ratio=1, crop=True, mean=False)


def roi_crop_mean(x: Tensor, rois: Tensor, size: int, stride: float) -> Tensor:
    """Mean (K, C) of `roi_crop` over its bins, without storing them; float32, or float64 for float64 maps."""
    return _pool(x, rois, size, stride, sampling_ratio=1, crop=True, mean=True).flatten(1)


class PyramidLevels(NamedTuple):
    """RoIs grouped by pyramid level.

    Attributes:
        rows: for each level, finest first, the ascending indices of its RoIs.
        inverse: (K,) int64, position of each RoI in the concatenation of `rows`.
    """

    rows: tuple[Tensor, ...]
    inverse: Tensor

    def pad(self, count: int) -> PyramidLevels:
        """Assign added RoIs, with indices K to `count` - 1, to the coarsest level."""
        added = torch.arange(len(self.inverse), count, device=self.inverse.device)
        return PyramidLevels((*self.rows[:-1], torch.cat((self.rows[-1], added))), torch.cat((self.inverse, added)))


def pyramid_levels(rois: Tensor, strides: Sequence[int]) -> PyramidLevels:
    """Assign rois (K, 5) to levels as in `pyramid_roi_align`; synchronizes with a GPU once if there are several."""
    if len(strides) == 1:
        indices = torch.arange(len(rois), device=rois.device)
        return PyramidLevels((indices,), indices)
    sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=1e-6).sqrt()
    # 1e-6 keeps a side of exactly 224 pixels, or half or twice as many, on its level despite rounding
    level = torch.floor(torch.log2(sides / 224 + 1e-6) + math.log2(16 / strides[0]))
    level = level.nan_to_num(0).clamp(0, len(strides) - 1)
    order = level.argsort(stable=True)
    indices = torch.arange(len(strides), device=rois.device)
    counts = (level == indices[:, None]).sum(dim=1).tolist()
    return PyramidLevels(order.split(counts), order.argsort())


def pyramid_roi_align(
    maps: Sequence[Tensor],
    rois: Tensor,
    size: int,
    strides: Sequence[int],
    sampling_ratio: int = SAMPLING_RATIO,
    aligned: bool = True,
    levels: PyramidLevels | None = None,
) -> Tensor:
    """RoIAlign from the pyramid level that fits the size of each RoI.

    A RoI of 224 pixels is assigned to the level of stride 16, one of half the size to the next finer level, and so on
    (equation 1 of Lin et al., "Feature Pyramid Networks").

    Args:
        maps: (B, C, Hi, Wi) feature maps, finest first.
        rois: (K, 5) rows of image index and half-open xyxy in pixels of the network's input.
        size: bins on a side of a RoI, m.
        strides: strides of the maps, each twice the one before, in pixels of the network's input.
        sampling_ratio: as in `roi_align`.
        aligned: as in `roi_align`.
        levels: result of `pyramid_levels` for these RoIs; computed if None.

    Returns:
        (K, C, m, m), channels_last.
    """
    pool = partial(roi_align, sampling_ratio=sampling_ratio, aligned=aligned)
    return _pool_by_level(maps, rois, size, strides, levels, pool)


def pyramid_roi_align_mean(
    maps: Sequence[Tensor],
    rois: Tensor,
    size: int,
    strides: Sequence[int],
    sampling_ratio: int = SAMPLING_RATIO,
    aligned: bool = True,
    levels: PyramidLevels | None = None,
) -> Tensor:
    """Mean (K, C) of `pyramid_roi_align` over its bins, without storing them; float32, or float64 for float64 maps."""
    pool = partial(roi_align_mean, sampling_ratio=sampling_ratio, aligned=aligned)
    return _pool_by_level(maps, rois, size, strides, levels, pool)


def _convert_unaligned(rois: Tensor, stride: float) -> Tensor:
    """Convert rois (K, 5) for ``aligned=False`` to RoIs that give the same result with ``aligned=True``."""
    corner = rois[:, 1:3] + stride / 2
    sides = (rois[:, 3:] - rois[:, 1:3]).clamp(min=stride)
    return torch.cat((rois[:, :1], corner, corner + sides), dim=1)


def _pool_by_level(
    maps: Sequence[Tensor],
    rois: Tensor,
    size: int,
    strides: Sequence[int],
    levels: PyramidLevels | None,
    pool: Callable[[Tensor, Tensor, int, float], Tensor],
) -> Tensor:
    """Pool the RoIs of each level from its map, and concatenate the results in the order of `rois`."""
    _check_rois(maps[0], rois)
    rows, inverse = levels or pyramid_levels(rois, strides)
    pooled = [
        pool(x, rois[indices], size, stride).movedim(1, -1)
        for x, indices, stride in zip(maps, rows, strides, strict=True)
    ]
    reordered: Tensor = _Reorder.apply(torch.cat(pooled), inverse, torch.cat(list(rows)))
    return reordered.movedim(-1, 1)


class _Reorder(torch.autograd.Function):
    """``x[inverse]`` for a permutation of rows; its gradient is a gather, faster than the scatter-add of indexing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return x.index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return gradient.index_select(0, rows), None, None


def _pool(x: Tensor, rois: Tensor, size: int, stride: float, sampling_ratio: int, crop: bool, mean: bool) -> Tensor:
    """Check the arguments and pool.

    Returns:
        (K, C, m, m) in the dtype of x; if `mean`, (K, C, 1, 1) float32, or float64 for float64 maps.
    """
    _check_rois(x, rois)
    if not (2 if crop else 1) <= size <= MAX_SIDE:
        raise ValueError(f"RoI pooling needs {2 if crop else 1} to {MAX_SIDE} bins on a side, got {size}")
    if not 0 <= sampling_ratio <= MAX_SIDE:
        raise ValueError(f"RoI pooling needs 1 to {MAX_SIDE} samples on a side of a bin, or 0, got {sampling_ratio}")
    if not 0 < stride < math.inf:
        raise ValueError(f"RoI pooling needs a stride above 0, got {stride}")
    values = x if x.dtype in (torch.float32, torch.float64, torch.bfloat16) else x.float()
    if x.device.type in DEVICES and values.dtype != torch.float64:
        pooled = torch.ops.refdet.roi_pool(values, rois.detach().float(), size, stride, sampling_ratio, crop, mean)
    else:
        pooled = pool_plain(values, rois, size, stride, sampling_ratio, crop, mean)
    return pooled if mean else pooled.to(x.dtype)


def _check_rois(x: Tensor, rois: Tensor) -> None:
    """Raise TypeError or ValueError unless x is a feature map and `rois` are RoIs on the same device."""
    if not (x.is_floating_point() and rois.is_floating_point()):
        raise TypeError(f"RoI pooling needs a floating-point feature map and RoIs, got {x.dtype} and {rois.dtype}")
    if x.dim() != 4:
        raise ValueError(f"RoI pooling needs a feature map (B, C, H, W), got {tuple(x.shape)}")
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f"RoI pooling needs RoIs (K, 5), rows of image index and box, got {tuple(rois.shape)}")
    if x.device != rois.device:
        raise ValueError(f"RoI pooling needs the feature map and RoIs on one device, got {x.device} and {rois.device}")


if DEVICES:

    @torch.library.register_fake("refdet::roi_pool")
    def _roi_pool_fake(
        x: Tensor, rois: Tensor, size: int, stride: float, samples: int, crop: bool, mean: bool
    ) -> Tensor:
        side = 1 if mean else size
        shape = (rois.shape[0], x.shape[1], side, side)
        dtype = torch.float32 if mean else x.dtype
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)

    @torch.library.register_fake("refdet::roi_pool_backward")
    def _roi_pool_backward_fake(gradient: Tensor, rois: Tensor, shape: Sequence[int], *options: object) -> Tensor:
        batch, channels, height, width = shape
        return gradient.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)
