"""Benchmarks refdet's convolutions against PyTorch's, on the layers of a ResNet-101-C4 detector at inference.

Maps and weights are channels_last; refdet's weights are packed before the measurement. Both sides add the shortcut of
layers that have one, and end with ReLU. ``error`` is the root mean square difference of refdet's result from float64,
in standard deviations of the result; ``PyTorch_error`` is that of PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import Row, Settings
from torch import Tensor
from torch.nn import functional as F

from refdet.ops.convolution import conv1x1, conv3x3, has_kernels, pack_conv1x1, pack_conv3x3

# layer, map (N, C, H, W), output channels, kernel size, whether a shortcut is added
CASES = (
    ("conv2", (1, 64, 150, 200), 64, 3, False),
    ("conv3", (1, 128, 75, 100), 128, 3, False),
    ("conv4", (1, 256, 38, 50), 256, 3, False),
    ("proposals", (1, 1024, 38, 50), 512, 3, False),
    ("conv5, 40 RoIs", (40, 512, 7, 7), 512, 3, False),
    ("masks of a pyramid", (100, 256, 14, 14), 256, 3, False),
    ("conv2, end", (1, 64, 150, 200), 256, 1, True),
    ("conv3, end", (1, 128, 75, 100), 512, 1, True),
    ("conv4, begin", (1, 1024, 38, 50), 256, 1, False),
    ("conv4, end", (1, 256, 38, 50), 1024, 1, True),
    ("conv5, entry", (1, 1024, 38, 50), 2560, 1, False),
    ("conv5, 40 RoIs, begin", (40, 2048, 7, 7), 512, 1, False),
    ("conv5, 40 RoIs, end", (40, 512, 7, 7), 2048, 1, True),
)


@torch.inference_mode()
def rows(settings: Settings) -> list[Row]:
    """Rows in float32 and bfloat16, each if this processor has kernels for it."""
    device = torch.device(settings.device)
    supported = [half for half in (False, True) if has_kernels(device, half)]
    return [_row(settings, half, *case) for half in supported for case in CASES]


def _row(
    settings: Settings, half: bool, layer: str, shape: tuple[int, ...], channels: int, size: int, has_shortcut: bool
) -> Row:
    random = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if half else torch.float32
    x = torch.randn(shape, generator=random).relu_().to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, shape[1], size, size, generator=random) / (size**2 * shape[1]) ** 0.5
    weight = weight.to(dtype).to(memory_format=torch.channels_last)
    shortcut, bias = None, torch.zeros(channels)
    if has_shortcut:
        shortcut = torch.randn(shape[0], channels, *shape[2:], generator=random).to(dtype)
        shortcut = shortcut.to(memory_format=torch.channels_last)
    ours = _ours(x, weight.float(), bias, shortcut, half)
    low_precision_bias = bias.to(dtype)  # PyTorch needs that of the weight

    def theirs() -> Tensor:
        y = F.conv2d(x, weight, low_precision_bias, padding=size // 2)
        return (y if shortcut is None else y.add_(shortcut)).relu_()

    exact = F.conv2d(x[:8].double(), weight.double(), padding=size // 2)
    exact = (exact if shortcut is None else exact + shortcut[:8]).relu()
    times = settings.measure({"refdet": ours, "PyTorch": theirs})
    row: Row = {"what": f"{size}x{size}, {layer}", "map": "x".join(map(str, shape)), "channels": channels}
    row["type"] = str(dtype).removeprefix("torch.")
    row |= {f"{name}_ms": round(value, 2) for name, value in times.items()}
    row["ratio"] = round(times["PyTorch"] / times["refdet"], 2)
    for name, values in (("error", ours()[:8]), ("PyTorch_error", theirs()[:8])):
        row[name] = f"{float((values - exact).square().mean().sqrt() / exact.std()):.1e}"
    return row


def _ours(x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, half: bool) -> Callable[[], Tensor]:
    if weight.shape[-1] == 1:
        pointwise = pack_conv1x1(weight.flatten(1), half)
        return lambda: conv1x1(x, pointwise, bias, shortcut, relu=True)
    packed = pack_conv3x3(weight, half)
    return lambda: conv3x3(x, packed, bias, relu=True)
