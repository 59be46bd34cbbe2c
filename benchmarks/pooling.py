"""Benchmarks refdet's RoI pooling against plain PyTorch and torchvision, forward and backward.

Maps are channels_last, as in the detector. Times are medians of rounds in which all implementations take turns, so that
other load on the machine slows all of them. torchvision has no crop pooling; it is compared with RoIAlign of one sample
per bin, which does the same work at other positions. torchvision's time for bfloat16 includes converting the map to
float32. The columns to_plain and ratio are refdet's speedup over plain PyTorch and over torchvision. On a GPU, the
table also has the bytes that must be moved (map and bins once, and their gradients for backward), and the fraction of
refdet's time that moving them takes at full memory bandwidth (of_roof).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import Row, Settings
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from refdet.ops.pooling import SAMPLING_RATIO, roi_align, roi_align_mean, roi_crop, roi_crop_mean
from refdet.ops.pooling_plain import pool_plain

CONV4 = ((1, 1024, 38, 50), 16, 300)  # map (B, C, H, W), its stride, number of RoIs
PYRAMID = ((8, 64, 36, 48), 4, 384)  # an FPN level of a batch of eight small images
# pooling, (map, stride, RoIs), bins per side, samples per side of a bin, dtype, with backward
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
    """RoIs (count, 5) inside the map, with sides of up to 30% of it."""
    extent = torch.tensor([shape[3], shape[2]]) * stride
    corner = torch.rand(count, 2, generator=random) * extent * 0.7
    sides = torch.rand(count, 2, generator=random) * extent * 0.3
    return torch.cat((torch.randint(0, shape[0], (count, 1), generator=random), corner, corner + sides), dim=1)


def peers(what: str, x: Tensor, rois: Tensor, size: int, stride: int, samples: int) -> dict[str, Callable[[], Tensor]]:
    """The three implementations, from the map to bins (K, C, m, m) or their means (K, C)."""
    crop, mean = what.startswith("crop"), what.endswith("mean")

    def ours() -> Tensor:
        if crop:
            return (roi_crop_mean if mean else roi_crop)(x, rois, size, stride)
        return (roi_align_mean if mean else roi_align)(x, rois, size, stride, samples)

    def plain() -> Tensor:  # computes all bins, then their mean, which is faster except with adaptive sampling
        pooled = pool_plain(x, rois, size, stride, samples, crop, mean and samples == 0)
        return pooled.mean((2, 3)) if mean else pooled

    def theirs() -> Tensor:
        values = (
            x.float()
        )  # torchvision has no bfloat16 kernel for the CPU, and on a GPU rounds intermediate results to bfloat16
        pooled = torchvision_roi_align(values, rois, size, 1 / stride, sampling_ratio=samples, aligned=True).to(x.dtype)
        return pooled.mean((2, 3)) if mean else pooled

    return {"refdet": ours, "plain": plain, "torchvision": theirs}


def with_backward(run: Callable[[], Tensor], x: Tensor, grad_output: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.autograd.grad(run(), x, grad_output)[0]


def rows(settings: Settings) -> list[Row]:
    """Rows of the table."""
    random, results = torch.Generator().manual_seed(0), []
    for what, (shape, stride, count), size, samples, dtype, backward in CASES:
        x = torch.randn(shape, generator=random).to(settings.device, dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(backward)
        rois = some_rois(shape, stride, count, random).to(settings.device)
        runs = peers(what, x, rois, size, stride, samples)
        pooled = runs["refdet"]()
        error = (pooled - runs["torchvision" if what in ("align", "mean") else "plain"]()).abs().max().item()
        if backward:
            grad_output = torch.randn_like(pooled)
            runs = {name: with_backward(run, x, grad_output) for name, run in runs.items()}
        times = settings.measure(runs)
        row: Row = {
            "what": f"{what} {size}x{size}" + ("" if samples else ", adaptive") + (", backward" if backward else ""),
            "map": "x".join(map(str, shape)),
            "rois": count,
            "type": str(dtype).removeprefix("torch."),
            "max_difference": f"{error:.0e}",
        }
        row |= {f"{name}_ms": round(value, 3) for name, value in times.items()}
        row["to_plain"] = round(times["plain"] / times["refdet"], 1)
        row["ratio"] = round(times["torchvision"] / times["refdet"], 1)
        results.append(row | settings.roof((x.nbytes + pooled.nbytes) * (2 if backward else 1), times["refdet"]))
    return results
