"""Times refdet's RoIAlign and torchvision's side by side, forward and backward.

    python benchmarks/pooling.py [--json] [--repeat 5]

On the CPU and on channels_last maps, as the detector has them; on a GPU refdet calls torchvision's.
"""

from __future__ import annotations

import argparse
import json

import torch
from timing import measure
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from refdet.ops.pooling import SAMPLES, roi_align

# map (B, C, H, W), its stride, RoIs, cells: the conv4 map of an image, a pyramid level of eight small images
CASES = (((1, 1024, 38, 50), 16, 300, 7), ((8, 64, 36, 48), 4, 384, 7), ((8, 64, 36, 48), 4, 128, 14))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    random, results = torch.Generator().manual_seed(0), []
    for shape, stride, count, size in CASES:
        batch, _, height, width = shape
        x = torch.randn(shape, generator=random).contiguous(memory_format=torch.channels_last).requires_grad_()
        corner = torch.rand(count, 2, generator=random) * torch.tensor([width, height]) * stride * 0.7
        sides = torch.rand(count, 2, generator=random) * torch.tensor([width, height]) * stride * 0.3
        image = torch.randint(0, batch, (count, 1), generator=random)
        rois = torch.cat((image, corner, corner + sides), dim=1)

        def ours(x: Tensor = x, rois: Tensor = rois, size: int = size, stride: int = stride) -> Tensor:
            return roi_align(x, rois, size, stride)

        def theirs(x: Tensor = x, rois: Tensor = rois, size: int = size, stride: int = stride) -> Tensor:
            return torchvision_roi_align(x, rois, size, 1 / stride, sampling_ratio=SAMPLES, aligned=True)

        weight = torch.randn(ours().shape, generator=random)
        error = (ours() - theirs()).abs().max().item()
        forward = measure({"refdet": ours, "torchvision": theirs}, options.repeat, "cpu")
        both = measure(
            {
                "refdet": lambda f=ours, x=x, w=weight: torch.autograd.grad(f(), x, w)[0],
                "torchvision": lambda f=theirs, x=x, w=weight: torch.autograd.grad(f(), x, w)[0],
            },
            options.repeat,
            "cpu",
        )
        results.append(
            {"map": "x".join(map(str, shape)), "rois": count, "cells": size, "max_difference": f"{error:.0e}"}
            | {f"{name}_ms": round(value, 2) for name, value in forward.items()}
            | {"ratio": round(forward["torchvision"] / forward["refdet"], 2)}
            | {f"{name}_with_backward_ms": round(value, 2) for name, value in both.items()}
            | {"with_backward_ratio": round(both["torchvision"] / both["refdet"], 2)}
        )
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "cases": results}))
        return
    print(f"RoIAlign on the CPU, {torch.get_num_threads()} threads; milliseconds")
    print("  ".join(f"{name:>14}" for name in results[0]))
    for row in results:
        print("  ".join(f"{value!s:>{max(14, len(name))}}" for name, value in row.items()))


if __name__ == "__main__":
    main()
