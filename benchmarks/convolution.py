"""Times refdet's 3x3 convolution beside PyTorch's, on layers of a ResNet-101-C4 detector in use.

Both work on channels_last maps and weights, without gradients; refdet's weights were packed before. ``error`` is the
root of the mean square of the difference to float64, in standard deviations of the result.
"""

from __future__ import annotations

import torch
from timing import Row, Settings
from torch.nn import functional as F

from refdet.ops.convolution import conv3x3, has_conv3x3, pack_conv3x3

# where, map (N, C, H, W), output channels
CASES = (
    ("conv2", (1, 64, 150, 200), 64),
    ("conv3", (1, 128, 75, 100), 128),
    ("conv4", (1, 256, 38, 50), 256),
    ("conv4, 4 images", (4, 256, 38, 50), 256),
    ("proposals", (1, 1024, 38, 50), 512),
    ("conv5, 38 RoIs", (38, 512, 7, 7), 512),
    ("conv5, 100 RoIs", (100, 512, 7, 7), 512),
    ("masks of a pyramid", (100, 256, 14, 14), 256),
)


@torch.inference_mode()
def rows(settings: Settings) -> list[Row]:
    """The table; empty where there is no kernel."""
    if not has_conv3x3(torch.device(settings.device)):
        return []
    random, results = torch.Generator().manual_seed(0), []
    for where, shape, channels in CASES:
        x = torch.randn(shape, generator=random).relu_().to(memory_format=torch.channels_last)
        weight = torch.randn(channels, shape[1], 3, 3, generator=random) / (9 * shape[1]) ** 0.5
        weight = weight.to(memory_format=torch.channels_last)
        bias, packed = torch.zeros(channels), pack_conv3x3(weight)
        exact = F.conv2d(x[:8].double(), weight.double(), padding=1)
        ours, theirs = conv3x3(x, packed, bias)[:8], F.conv2d(x, weight, bias, padding=1)[:8]
        found = settings.measure(
            {
                "refdet": lambda x=x, w=packed, b=bias: conv3x3(x, w, b),
                "PyTorch": lambda x=x, w=weight, b=bias: F.conv2d(x, w, b, padding=1),
            }
        )
        row: Row = {"what": where, "map": "x".join(map(str, shape)), "channels": channels}
        row |= {f"{name}_ms": round(value, 2) for name, value in found.items()}
        row["ratio"] = round(found["PyTorch"] / found["refdet"], 2)
        for name, values in (("error", ours), ("PyTorch_error", theirs)):
            row[name] = f"{float((values - exact).square().mean().sqrt() / exact.std()):.1e}"
        results.append(row)
    return results
