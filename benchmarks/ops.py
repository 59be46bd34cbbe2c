"""Benchmarks the compiled kernels against plain PyTorch, torchvision and pycocotools.

    python benchmarks/ops.py [nms] [pooling] [masks] [matching] [convolution] [--json] [--repeat 20] [--device cpu]

Times are medians, in milliseconds, of rounds in which all implementations take turns. ``ratio`` is the time of the
library that refdet is compared with, divided by refdet's.
"""

from __future__ import annotations

import argparse
import json

import convolution
import masks
import matching
import nms
import pooling
import torch
import torchvision
from timing import Settings, in_columns

from refdet.ops._library import DEVICES

TABLES = {
    "nms": nms.rows,
    "pooling": pooling.rows,
    "masks": masks.rows,
    "matching": matching.rows,
    "convolution": convolution.rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="all by default")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeat", type=int, default=20, help="rounds, of which the medians are printed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--memory-bandwidth", type=float, default=4.8, help="of the GPU's memory, in TB/s (default: an H200's)"
    )
    options = parser.parse_args()
    settings = Settings(repeat=options.repeat, device=options.device, bandwidth=options.memory_bandwidth)
    machine = {
        "device": options.device,
        "threads": torch.get_num_threads(),
        "kernels": sorted(DEVICES),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    found = {}
    for name in options.tables or TABLES:
        found[name] = TABLES[name](settings)
        if not options.json:
            print(f"{name}: {machine}\n{in_columns(found[name])}\n", flush=True)
    if options.json:
        print(json.dumps({**machine, **found}))


if __name__ == "__main__":
    main()
