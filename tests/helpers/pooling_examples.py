"""Every kind of RoI pooling, random feature maps and RoIs, and a reference implementation of pooling."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refdet.ops._library import DEVICES
from refdet.ops.pooling import (
    roi_align,
    roi_align_mean,
    roi_crop,
    roi_crop_mean,
)
from refdet.ops.pooling_plain import pool_plain

compiled = pytest.mark.skipif("cpu" not in DEVICES, reason="the kernels are not built here")
devices = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
CLOSE = {"rtol": 0.0, "atol": 1e-5}  # for float32 values around 1
KINDS: dict[str, tuple[Callable[..., Tensor], int, bool, bool]] = {  # function, samples, crop, mean
    "fixed": (roi_align, 2, False, False),
    "three": (lambda *a: roi_align(*a, 3), 3, False, False),
    "adaptive": (lambda *a: roi_align(*a, 0), 0, False, False),
    "crop": (roi_crop, 1, True, False),
    "fixed mean": (roi_align_mean, 2, False, True),
    "adaptive mean": (lambda *a: roi_align_mean(*a, 0), 0, False, True),
    "crop mean": (roi_crop_mean, 1, True, True),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def plain(kind: str, x: Tensor, rois: Tensor, size: int, stride: float) -> Tensor:
    _, samples, crop, mean = KINDS[kind]
    pooled = pool_plain(x, rois, size, stride, samples, crop, mean)
    return pooled.flatten(1) if mean else pooled


def some_map(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)


def some_rois(generator: torch.Generator, count: int, batch: int, odd: bool = False, turned: bool = True) -> Tensor:
    """RoIs (count, 5) in, across and outside a 12x15 map of stride 8: small, large, empty or with swapped corners."""
    corner = torch.rand(count, 2, generator=generator) * 160 - 40
    sides = torch.rand(count, 2, generator=generator) ** 3 * 200
    if turned:
        sides *= torch.rand(count, 2, generator=generator).sub(0.1).sign()
    sides *= torch.rand(count, 2, generator=generator) > 0.1
    boxes = torch.cat((corner, corner + sides), 1)
    boxes = torch.where(torch.rand(count, 1, generator=generator) < 0.3, boxes.round(), boxes)
    if odd:
        values = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -3e38, 1e-40, 1e7, 0.0])
        chosen = values[torch.randint(len(values), boxes.shape, generator=generator)]
        boxes = torch.where(torch.rand(boxes.shape, generator=generator) < 0.1, chosen, boxes)
    return torch.cat((torch.randint(batch, (count, 1), generator=generator), boxes), 1)


def sample_by_sample(kind: str, x: Tensor, rois: Tensor, size: int, stride: float) -> Tensor:
    """Pool by the definition, one bilinear sample at a time, in float64."""
    _, samples, crop, mean = KINDS[kind]
    height, width = x.shape[2:]

    def axis(low: float, high: float, limit: int) -> list[list[tuple[int, float]]]:
        each = samples or min(max(math.ceil((high - low) / size), 0), 1024)
        cells: list[list[tuple[int, float]]] = []
        for cell in range(size):
            taps = []
            for sample in range(each):
                if crop:
                    at = low + (high - low) * cell / (size - 1)
                    keep = -1 < at < limit
                else:
                    at = low + (high - low) * (cell + (sample + 0.5) / each) / size - 0.5
                    keep, at = -1 <= at <= limit, min(max(at, 0), limit - 1)
                if keep:
                    floor = math.floor(at)
                    taps += [(floor, (1 - at + floor) / each), (floor + 1, (at - floor) / each)]
            cells.append([(p, w) for p, w in taps if 0 <= p < limit])
        return cells

    out = torch.zeros(len(rois), x.shape[1], size, size, dtype=torch.float64)
    for roi, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            continue
        columns, rows = axis(x1 / stride, x2 / stride, width), axis(y1 / stride, y2 / stride, height)
        for i, down in enumerate(rows):
            for j, across in enumerate(columns):
                for y, wy in down:
                    for column, wx in across:
                        out[roi, :, i, j] += wy * wx * x[int(image), :, y, column].double()
    return out.mean((2, 3)) if mean else out
