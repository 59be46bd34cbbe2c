"""Benchmarks a training step against torchvision's Mask R-CNN of the same size, on the same images.

    python benchmarks/train.py [--device cpu] [--networks fpn-res50] [--short-side 192] [--batch-size 2]
                               [--steps 3] [--bf16] [--json]

Both sides have a ResNet with frozen norms and first layers (or batch norm, with --norm batch), a feature pyramid, the
same numbers of anchors, proposals, RoIs and channels, 28x28 masks and SGD with momentum. Images are synthetic, with
eight elliptic objects each. They are in memory, so that neither side reads or decodes them: uint8 with RLE masks for
refdet, floats in 0..1 with bitmaps for torchvision. A step starts with these images and ends with the new weights. The
sides take turns. On a busy machine, CPU time (of all threads) is more reliable than wall time; with OMP_NUM_THREADS=1
it does not include threads that wait for each other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision_fpn import torchvision_fpn

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.data.packed_images import PackedImages
from refdet.data.training_batches import Batch, padded_shape
from refdet.data.transforms import input_size
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.device import exact_float32, resolve_device
from refdet.structures.ground_truth import GroundTruth
from refdet.training.optim import build_optimizer
from refdet.training.step import start_step

CLASSES, OBJECTS = 80, 8


@dataclass(frozen=True)
class Drawn:
    """An image and its objects.

    Attributes:
        pixels: (H, W, 3) uint8.
        boxes: (G, 4) half-open xyxy.
        labels: (G,) 1..CLASSES.
        masks: (G, H, W) uint8.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


def draw(random: np.random.Generator, height: int, width: int) -> Drawn:
    y, x = np.mgrid[:height, :width] + 0.5
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    boxes, masks = [], []
    for _ in range(OBJECTS):
        w, h = random.uniform(0.1, 0.5, 2) * (width, height)
        left, top = random.uniform(0, 1, 2) * (width - w, height - h)
        mask = ((x - left - w / 2) / (w / 2)) ** 2 + ((y - top - h / 2) / (h / 2)) ** 2 < 1
        pixels[mask] = random.integers(0, 256, 3)
        boxes.append([left, top, left + w, top + h])
        masks.append(mask)
    labels = random.integers(1, CLASSES + 1, OBJECTS)
    return Drawn(pixels, np.array(boxes, np.float32), labels, np.array(masks, np.uint8))


def draw_batches(count: int, batch_size: int) -> list[list[Drawn]]:
    """Batches of images in COCO's most frequent sizes, all of them landscape."""
    random, sizes = np.random.default_rng(0), ((480, 640), (427, 640), (480, 640), (426, 640))
    return [[draw(random, *sizes[i % 4]) for i in range(batch_size)] for _ in range(count)]


def refdet_step(recipe: Recipe, batches: list[list[Drawn]], device: torch.device) -> Callable[[int], object]:
    """Make a function that runs one training step of refdet, given the step's number."""
    model = MaskRCNN(recipe, CLASSES).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    sgd, generator = build_optimizer(model, recipe.train), torch.Generator()
    prepared = []
    for batch in batches:
        sizes = [input_size(*image.pixels.shape[:2], recipe.input) for image in batch]
        truths = []
        for image, size in zip(batch, sizes, strict=True):
            rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in image.masks]
            boxes = model.convention.scale(torch.from_numpy(image.boxes), size.scale)
            labels, no_crowds = torch.from_numpy(image.labels), torch.zeros(0, 4)
            truths.append(GroundTruth(boxes, labels, rles, no_crowds, size.scale))
        packed = PackedImages.from_images([image.pixels for image in batch])
        shape = padded_shape(sizes, recipe.input.size_divisibility)
        flips, image_ids = [False] * len(batch), [*range(len(batch))]
        inputs = Batch(packed, sizes, flips, shape, truths, image_ids)
        prepared.append(inputs.pin_memory() if device.type == "cuda" else inputs)

    def step(number: int) -> object:
        generator.manual_seed(number)
        batch = prepared[number % len(prepared)]
        no_clipping = 0.0  # like torchvision's scripts
        return start_step(model, sgd, batch, recipe.train.lr, no_clipping, generator)

    return step


def torchvision_step(recipe: Recipe, batches: list[list[Drawn]], device: torch.device) -> Callable[[int], object]:
    """Make a function that runs a step of torchvision's model, like its reference scripts, given the step's number."""
    peer = torchvision_fpn(recipe, CLASSES)
    peer = peer.to(device).train()
    sgd = torch.optim.SGD(
        [p for p in peer.parameters() if p.requires_grad], lr=recipe.train.lr, momentum=0.9, weight_decay=1e-4
    )
    prepared = []
    for batch in batches:
        images = [torch.from_numpy(image.pixels).permute(2, 0, 1).float() / 255 for image in batch]
        targets = [
            {
                "boxes": torch.from_numpy(i.boxes),
                "labels": torch.from_numpy(i.labels),
                "masks": torch.from_numpy(i.masks),
            }
            for i in batch
        ]
        prepared.append((images, targets))

    def step(number: int) -> Tensor:
        images, targets = prepared[number % len(prepared)]
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets]
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.bf16):
            total = sum(peer(images, targets).values())
        sgd.zero_grad(set_to_none=True)
        total.backward()
        sgd.step()
        return total.detach()

    return step


def compare(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time both sides in turns; returns a row of the table."""
    recipe = recipes.load(name).with_changes(
        [f"model.norm={options.norm}", f"input.min_sizes=[{options.short_side}]",
         f"train.batch_size={options.batch_size}", f"train.bf16={str(options.bf16).lower()}", "train.lr=0.0001",
         f"input.max_size={round(options.short_side * 1333 / 800)}"]
    )  # fmt: skip
    batches = draw_batches(options.batches, options.batch_size)
    torch.manual_seed(0)
    sides = {
        "torchvision": torchvision_step(recipe, batches, device),
        "refdet": refdet_step(recipe, batches, device),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    cpu_seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.steps + 1):
        for side, step in sides.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            step(number)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first step is a warm-up
                seconds[side].append(time.perf_counter() - start)
                cpu_seconds[side].append(time.process_time() - cpu_start)
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    return {
        "network": name,
        **{f"{side}_s": round(value, 3) for side, value in medians.items()},
        "ratio": round(medians["torchvision"] / medians["refdet"], 2),
        **{f"{side}_processor_s": round(min(times), 3) for side, times in cpu_seconds.items()},
        "processor_ratio": round(min(cpu_seconds["torchvision"]) / min(cpu_seconds["refdet"]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--networks", default="fpn-res50", help="names of FPN recipes, separated by commas")
    parser.add_argument("--norm", choices=("frozen", "batch"), default="frozen")
    parser.add_argument("--short-side", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--batches", type=int, default=2, help="number of different batches, used in turn")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    device = resolve_device(options.device)
    with exact_float32():
        rows = [compare(name, options, device) for name in options.networks.split(",")]
    about = {
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "norm": options.norm,
        "short_side": options.short_side,
        "batch_size": options.batch_size,
        "precision": "bfloat16" if options.bf16 else "float32",
        "steps": options.steps,
    }
    if options.json:
        print(json.dumps({**about, "rows": rows}))
        return
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for row in rows:
        times = ", ".join(f"{side} {row[f'{side}_s']:.3f} s" for side in ("torchvision", "refdet"))
        print(f"{row['network']}: {times} a step; refdet is {row['ratio']:.2f} times as fast")
        times = ", ".join(f"{side} {row[f'{side}_processor_s']:.3f} s" for side in ("torchvision", "refdet"))
        print(f"  CPU time of the fastest steps: {times}; refdet is {row['processor_ratio']:.2f} times as fast")


if __name__ == "__main__":
    main()
