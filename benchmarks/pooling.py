"""Times refdet's RoI pooling, plain PyTorch's and torchvision's side by side, forward and backward.

On channels_last maps, as the detector has them. Times are medians of rounds in which all take turns, so that a busy
machine slows all of them. The crop is not in torchvision: it stands beside RoIAlign of one sample a cell, which is
the same work on another box. On a GPU also the bytes that must be moved (the map and the cells once, and with backward
the gradients of both), and which part of the time the memory would need for that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import Row, Settings
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from refdet.ops.pooling import SAMPLING_RATIO, roi_align, roi_align_mean, roi_crop, roi_crop_mean
from refdet.ops.pooling_plain import pool_plain

CONV4 = ((1, 1024, 38, 50), 16, 300)  # map (B, C, H, W) of an image, its stride, RoIs
PYRAMID = ((8, 64, 36, 48), 4, 384)  # a level of eight small images
# what, where, cells on a side, samples on a side of a cell, type, with backward
CASES = (
    ("align", CONV4, 7, SAMPLING_RATIO, torch.float32, False),
    ("align", CONV4, 7, SAMPLING_RATIO, torch.float32, True),
    ("align", CONV4, 7, SAMPLING_RATIO, torch.bfloat16, False),
    ("align", CONV4, 7, SAMPLING_RATIO, torch.bfloat16, True),
    ("align", CONV4, 7, 0, torch.float32, False),
    ("mean", CONV4, 7, SAMPLING_RATIO, torch.float32, False),
    ("mean", CONV4, 7, SAMPLING_RATIO, torch.bfloat16, False),
    ("mean", CONV4, 7, 0, torch.float32, False),
    ("crop", CONV4, 7, 1, torch.float32, False),
    ("crop", CONV4, 7, 1, torch.float32, True),
    ("crop mean", CONV4, 7, 1, torch.float32, False),
    ("align", PYRAMID, 7, SAMPLING_RATIO, torch.float32, False),
    ("align", PYRAMID, 7, SAMPLING_RATIO, torch.float32, True),
    ("align", PYRAMID, 14, SAMPLING_RATIO, torch.float32, False),
    ("align", PYRAMID, 14, SAMPLING_RATIO, torch.float32, True),
)


def some_rois(shape: tuple[int, ...], stride: int, count: int, random: torch.Generator) -> Tensor:
    """RoIs (count, 5) inside the map, up to 3 tenths of it on a side."""
    extent = torch.tensor([shape[3], shape[2]]) * stride
    corner = torch.rand(count, 2, generator=random) * extent * 0.7
    sides = torch.rand(count, 2, generator=random) * extent * 0.3
    return torch.cat((torch.randint(0, shape[0], (count, 1), generator=random), corner, corner + sides), dim=1)


def peers(what: str, x: Tensor, rois: Tensor, size: int, stride: int, samples: int) -> dict[str, Callable[[], Tensor]]:
    """The three, each from the map to cells (K, C, m, m), or their means (K, C)."""
    crop, mean = what.startswith("crop"), what.endswith("mean")

    def ours() -> Tensor:
        if crop:
            return (roi_crop_mean if mean else roi_crop)(x, rois, size, stride)
        return (roi_align_mean if mean else roi_align)(x, rois, size, stride, samples)

    def plain() -> Tensor:  # the mean of the cells where that is the sooner way
        pooled = pool_plain(x, rois, size, stride, samples, crop, mean and samples == 0)
        return pooled.mean((2, 3)) if mean else pooled

    def theirs() -> Tensor:
        values = x.float()  # torchvision has no bfloat16 kernel for the CPU, and rounds in between on a GPU
        pooled = torchvision_roi_align(values, rois, size, 1 / stride, sampling_ratio=samples, aligned=True).to(x.dtype)
        return pooled.mean((2, 3)) if mean else pooled

    return {"refdet": ours, "plain": plain, "torchvision": theirs}


def with_backward(run: Callable[[], Tensor], x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.autograd.grad(run(), x, weight)[0]


def rows(settings: Settings) -> list[Row]:
    """The table."""
    random, results = torch.Generator().manual_seed(0), []
    for what, (shape, stride, count), size, samples, dtype, backward in CASES:
        x = torch.randn(shape, generator=random).to(settings.device, dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(backward)
        rois = some_rois(shape, stride, count, random).to(settings.device)
        runs = peers(what, x, rois, size, stride, samples)
        pooled = runs["refdet"]()
        error = (pooled - runs["torchvision" if what in ("align", "mean") else "plain"]()).abs().max().item()
        if backward:
            weight = torch.randn_like(pooled)
            runs = {name: with_backward(run, x, weight) for name, run in runs.items()}
        found = settings.measure(runs)
        row: Row = {
            "what": f"{what} {size}x{size}" + ("" if samples else ", adaptive") + (", backward" if backward else ""),
            "map": "x".join(map(str, shape)),
            "rois": count,
            "type": str(dtype).removeprefix("torch."),
            "max_difference": f"{error:.0e}",
        }
        row |= {f"{name}_ms": round(value, 3) for name, value in found.items()}
        row["to_plain"] = round(found["plain"] / found["refdet"], 1)
        row["ratio"] = round(found["torchvision"] / found["refdet"], 1)
        results.append(row | settings.roof((x.nbytes + pooled.nbytes) * (2 if backward else 1), found["refdet"]))
    return results
