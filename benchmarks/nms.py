"""Times refdet's nms, its plain PyTorch fallback and torchvision's side by side.

    python benchmarks/nms.py [--json] [--repeat 20] [--device cpu]

The boxes are clustered as the proposals of an RPN are: many shifted copies around each of some objects. Times
are medians of rounds in which all three take turns, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import json

import torch
import torchvision
from timing import measure
from torch import Tensor

from refdet.ops._library import DEVICES
from refdet.ops.nms import nms, nms_plain

# boxes, to keep, IoU threshold: RPN when testing, RPN when training, one class of the head
CASES = ((6000, 300, 0.7), (12000, 2000, 0.7), (300, 100, 0.3))


def proposals(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes (count, 4) in an image of 1000x600 pixels and scores (count,)."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.rand(count // 6 + 1, 2, generator=random) * torch.tensor([1000.0, 600.0])
    sizes = torch.rand(count // 6 + 1, 2, generator=random) * 200 + 16
    chosen = torch.randint(len(centres), (count,), generator=random)
    centre = centres[chosen] + torch.randn(count, 2, generator=random) * 6
    size = sizes[chosen] * torch.exp(torch.randn(count, 2, generator=random) * 0.1)
    return torch.cat((centre - size / 2, centre + size / 2), dim=1), torch.rand(count, generator=random)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    results = []
    for count, keep, threshold in CASES:
        boxes, scores = (tensor.to(options.device) for tensor in proposals(count))
        runs = {
            "refdet": lambda b=boxes, s=scores, t=threshold, k=keep: nms(b, s, t, k),
            "plain": lambda b=boxes, s=scores, t=threshold, k=keep: nms_plain(b, s, t, k),
            "torchvision": lambda b=boxes, s=scores, t=threshold, k=keep: torchvision.ops.nms(b, s, t)[:k],
        }
        same = all(torch.equal(runs["refdet"](), other()) for other in runs.values())
        found = measure(runs, options.repeat, options.device)
        results.append(
            {"boxes": count, "max_keep": keep, "iou_threshold": threshold, "same": same}
            | {f"{name}_ms": round(value, 4) for name, value in found.items()}
            | {"ratio": round(found["torchvision"] / found["refdet"], 2)}
        )
    if options.json:
        machine = {"device": options.device, "torch": torch.__version__, "threads": torch.get_num_threads()}
        print(json.dumps({**machine, "kernels": sorted(DEVICES), "cases": results}))
        return
    print(f"nms on {options.device}, kernels for {', '.join(sorted(DEVICES)) or 'no device'}; milliseconds")
    for position, row in enumerate(results):
        if position == 0:
            print("  ".join(f"{name:>14}" for name in row))
        print("  ".join(f"{value!s:>14}" for value in row.values()))


if __name__ == "__main__":
    main()
