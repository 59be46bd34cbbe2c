"""Overfits detectors to 16 real images, the first thing that any correct training loop must be able to do.

    python benchmarks/overfit.py [--networks fpn-res18,c4-res18] [--images 16] [--steps 800] [--every 50]
                                 [--short-side 256] [--coco-mini DIR] [--json]

Trains from random weights, with batch norm and without flips, until the box AP50 on the training images reaches 0.95,
measured every --every steps; exits 1 if a network does not reach it within --steps. The images are those of
``coco_mini``, a folder with a part of COCO, whose smallest object is largest, so that no object is too small for the
input. Both networks have full
width and the heads of `c4-res18` and `fpn-res50`; inputs and anchors are small enough for a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from learning import Dataset, detect_all, refdet_side

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.data.coco import CocoIndex, ImageRecord
from refdet.data.image_source import ImageSource
from refdet.data.training_batches import Batch, TrainingBatches
from refdet.device import exact_float32
from refdet.evaluation.average_precision import coco_ap

TARGET_AP50 = 0.95  # of the boxes
COCO_MINI = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini"
NETWORKS = {  # name -> recipe, and its changes
    "fpn-res18": ("fpn-res50", ["model.depth=18", "model.anchor_sizes=[16,32,64,128,256]"]),
    "c4-res18": ("c4-res18", ["model.anchor_sizes=[32,64,128,256]"]),
}


def recipe_of(network: str, options: argparse.Namespace) -> Recipe:
    """The recipe of one of `NETWORKS`, for small inputs on a CPU."""
    base, changes = NETWORKS[network]
    shared = [
        f"input.min_sizes=[{options.short_side}]", f"input.max_size={round(options.short_side * 1.7)}",
        "model.norm=batch", "head.batch_size_per_image=32", "proposals.batch_size_per_image=128",
        "proposals.pre_nms_top_n_train=500", "proposals.post_nms_top_n_train=200", "proposals.pre_nms_top_n_test=500",
        "proposals.post_nms_top_n_test=100", f"train.steps={options.steps}", "train.batch_size=4", "train.lr=0.02",
        "train.warmup_steps=100", "train.lr_milestones=[0.7]", "train.flip=false", "train.bf16=false",
    ]  # fmt: skip
    return recipes.load(base).with_changes([*changes, *shared])


def smallest_object(index: CocoIndex, record: ImageRecord) -> float:
    """Shortest side of an object, relative to the shorter side of its image; 0 without objects or with crowds."""
    annotations = index.annotations[record.id]
    if not annotations or any(annotation.iscrowd for annotation in annotations):
        return 0.0
    boxes = [annotation.box for annotation in annotations]
    return min(min(x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes) / min(record.height, record.width)


def select_large_objects(folder: Path, count: int) -> Dataset:
    """The `count` images of a folder whose smallest objects are largest."""
    index = CocoIndex.load(folder / "annotations" / "instances_train2017.json")
    chosen = sorted(index.images.values(), key=lambda record: -smallest_object(index, record))[:count]
    kept = {record.id: record for record in sorted(chosen, key=lambda record: record.id)}
    annotations = {id_: objects for id_, objects in index.annotations.items() if id_ in kept}
    index = dataclasses.replace(index, images=kept, annotations=annotations)
    return Dataset(index, ImageSource.open(folder / "train2017"))


def learn(network: str, data: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """Train until the box AP50 on the training images reaches `TARGET_AP50`; returns a row of the result."""
    recipe = recipe_of(network, options)
    torch.manual_seed(0)
    model, prepare_step = refdet_side(recipe, len(data.index.categories))
    batches, curve = TrainingBatches(data.index, data.source, recipe), {}
    for step in range(options.steps):
        batch = batches[step]
        if not isinstance(batch, Batch):
            raise batch  # TrainingBatches returns the error of an unreadable image in place of its batch
        prepare_step(batch, step)()
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            results = detect_all(model.eval(), recipe, data)
            model.train()
            curve[step + 1] = round(coco_ap(data.index, data.index.images, results, "bbox")["AP50"], 3)
            print(f"  {network}: AP50 {curve[step + 1]:.3f} after {step + 1} steps", file=sys.stderr, flush=True)
            if curve[step + 1] >= TARGET_AP50:
                break
    steps, ap50 = list(curve.items())[-1]
    return {"network": network, "steps": steps, "AP50": ap50, "reached": ap50 >= TARGET_AP50, "curve": curve}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--short-side", type=int, default=256)
    parser.add_argument("--coco-mini", type=Path, default=COCO_MINI)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if not options.coco_mini.is_dir():
        print(f"overfit: skipped, {options.coco_mini} does not exist; give real images with --coco-mini")
        return 0
    data = select_large_objects(options.coco_mini, options.images)
    with exact_float32():
        rows = [learn(network, data, options) for network in options.networks.split(",")]
    if options.json:
        print(json.dumps({"images": options.images, "short_side": options.short_side, "rows": rows}))
        return 0 if all(row["reached"] for row in rows) else 1
    for row in rows:
        verdict = "target reached" if row["reached"] else f"below the target {TARGET_AP50}"
        print(f"{row['network']}: AP50 {row['AP50']:.3f} after {row['steps']} steps of 4 images, {verdict}")
    return 0 if all(row["reached"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
