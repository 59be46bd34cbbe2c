"""Trains refdet's and torchvision's Mask R-CNN on the embedded dataset with the same batches, and compares their AP.

    python benchmarks/learning.py [--seeds 0,1,2] [--sides torchvision,refdet] [--steps 300] [--batch-size 4]
                                  [--jobs N] [--results FILE.jsonl] [--set KEY=VALUE ...] [--json]

Both sides train a full-width ResNet-18 with batch norm from random weights, a 256-channel feature pyramid, 1024-wide
linear layers and 28x28 masks. Anchors, proposals, sampling and input size are those of the `demo` recipe. Both see the
same batches and flips in the same order, at the same learning rate in each step. A seed determines the initial weights,
batches, flips and samples. Both are evaluated by pycocotools on the same images with the same thresholds.

--jobs trainings run at a time, by default one per core with a single thread, which is faster in total than one training
on all threads. For each seed the sides take turns, so that both run under the same load.

A timed step starts with a batch in memory and ends with the new weights. Batches are uint8 images with RLE masks for
refdet, and float images in 0..1 with bitmaps for torchvision. --results appends a row per finished training to a file,
including the load of the machine; later runs with the same file skip these trainings.

--small trains the `demo` recipe's narrow network on both sides, a seventh of the work. --set changes refdet's recipe
for experiments; the change becomes part of the row's name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision_fpn import FULL_WIDTH, torchvision_batch, torchvision_fpn

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.data import shapes
from refdet.data.coco import CocoIndex
from refdet.data.image_source import ImageSource
from refdet.data.training_batches import Batch, TrainingBatches, group_by_input_size
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.detector.predictor import detect_batch
from refdet.device import exact_float32
from refdet.evaluation.average_precision import coco_ap
from refdet.structures.detection_options import DetectionOptions
from refdet.training.optim import build_optimizer, learning_rate
from refdet.training.step import start_step, step_seed

SIDES = ("torchvision", "refdet")
RATES = ("AP", "AP75")
TIMES = ("step_seconds", "step_processor_seconds")
DETECTION = DetectionOptions(score_threshold=0.05, nms_threshold=0.5, max_regions=100)  # torchvision's own
RECIPE = [f"model.{key}={value}" for key, value in FULL_WIDTH.items()]


@dataclass(frozen=True)
class Dataset:
    """A part of the embedded dataset."""

    index: CocoIndex
    source: ImageSource

    @classmethod
    def of(cls, folder: Path, split: str) -> Dataset:
        index = CocoIndex.load(folder / "annotations" / f"instances_{split}.json")
        return cls(index, ImageSource.open(folder / split))


@dataclass(frozen=True)
class Training:
    """One training: a side, a seed and a recipe.

    Attributes:
        side: "torchvision" or "refdet".
        changes: changes by --set, of refdet's recipe only.
        recipe: recipe with all changes and the seed.
    """

    side: str
    changes: tuple[str, ...]
    recipe: Recipe

    @property
    def name(self) -> str:
        return " ".join((self.side, *self.changes))

    def key(self) -> str:
        """Identify the training in a --results file: a hash of the side and the recipe."""
        text = json.dumps([self.side, self.recipe.to_dict()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def refdet_side(recipe: Recipe, classes: int) -> tuple[torch.nn.Module, Callable[[Batch, int], Callable[[], object]]]:
    model = MaskRCNN(recipe, classes).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    sgd, generator, options = build_optimizer(model, recipe.train), torch.Generator(), recipe.train

    def prepare_step(batch: Batch, step: int) -> Callable[[], object]:
        def run() -> object:
            generator.manual_seed(step_seed(options.seed, step))
            return start_step(
                model, sgd, batch, learning_rate(step, options), options.max_grad_norm, generator
            ).losses()

        return run

    return model, prepare_step


def torchvision_side(
    recipe: Recipe, classes: int
) -> tuple[torch.nn.Module, Callable[[Batch, int], Callable[[], object]]]:
    """The model of torchvision, trained as by its reference scripts: SGD with weight decay on all parameters."""
    model, options = torchvision_fpn(recipe, classes, DETECTION).train(), recipe.train
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sgd = torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)

    def prepare_step(batch: Batch, step: int) -> Callable[[], object]:
        images, targets = torchvision_batch(batch)

        def run() -> object:
            for group in sgd.param_groups:
                group["lr"] = learning_rate(step, options)
            total = sum(model(images, targets).values())
            sgd.zero_grad(set_to_none=True)
            total.backward()
            sgd.step()
            return total.item()

        return run

    return model, prepare_step


def trained(training: Training, data: Dataset) -> tuple[torch.nn.Module, list[float], list[float]]:
    """Train a network; returns it with the wall time and CPU time (of all threads) of each step in seconds."""
    recipe, seconds, processor = training.recipe, [], []
    torch.manual_seed(recipe.train.seed)
    make = refdet_side if training.side == "refdet" else torchvision_side
    model, prepare_step = make(recipe, len(data.index.categories))
    batches = TrainingBatches(data.index, data.source, recipe)
    for step in range(recipe.train.steps):
        batch = batches[step]
        if not isinstance(batch, Batch):
            raise batch
        run = prepare_step(batch, step)
        start, processor_start = time.perf_counter(), time.process_time()
        loss = run()
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - processor_start)
        if (step + 1) % 50 == 0:
            print(
                f"  {training.name}, seed {recipe.train.seed}: step {step + 1}, {sum(seconds):.0f} s, {loss}",
                flush=True,
            )
    return model.eval(), seconds, processor


@torch.inference_mode()
def detections(model: torch.nn.Module, recipe: Recipe, data: Dataset) -> list[dict[str, Any]]:
    """Detections in all images, as entries of a COCO results JSON."""
    ids, records, found = list(data.index.categories), list(data.index.images.values()), []
    if isinstance(model, MaskRCNN):
        for group in group_by_input_size(records, recipe.input, 4):
            images = [data.source.read(record) for record in group]
            for regions in detect_batch(model, images, group, ids, DETECTION, features=()):
                found += regions.to_coco()
        return found
    for record in records:
        (output,) = model([torch.from_numpy(data.source.read(record)).permute(2, 0, 1).float() / 255])
        masks = (output["masks"][:, 0] > 0.5).numpy().astype(np.uint8)
        for box, score, label, mask in zip(
            output["boxes"].tolist(), output["scores"].tolist(), output["labels"].tolist(), masks, strict=True
        ):
            rle = coco_mask.encode(np.asfortranarray(mask))
            found.append(
                {
                    "image_id": record.id,
                    "category_id": ids[label - 1],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "score": score,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                }
            )
    return found


def row_of(training: Training, train: Dataset, val: Dataset) -> dict[str, Any]:
    """Train and evaluate; returns a row of the table."""
    load, started = os.getloadavg()[0], time.perf_counter()
    with exact_float32():
        model, seconds, processor = trained(training, train)
        results = detections(model, training.recipe, val)
    rates = {
        kind: {name: round(rate, 4) for name, rate in coco_ap(val.index, val.index.images, results, kind).items()}
        for kind in ("bbox", "segm")
    }
    return {
        "key": training.key(),
        "side": training.side,
        "changes": list(training.changes),
        "seed": training.recipe.train.seed,
        "steps": training.recipe.train.steps,
        "batch_size": training.recipe.train.batch_size,
        **rates,
        "step_seconds": round(sum(seconds), 1),
        "step_processor_seconds": round(sum(processor), 1),
        "median_step": round(statistics.median(seconds), 4),
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }


def trainings(options: argparse.Namespace) -> list[Training]:
    """The trainings of all seeds; for each seed the sides take turns."""
    both = [f"train.steps={options.steps}", f"train.batch_size={options.batch_size}", f"train.lr={options.lr}"]
    base = recipes.load("demo").with_changes([*(() if options.small else RECIPE), *both])
    listed = []
    for seed in map(int, options.seeds.split(",")):
        for side in options.sides.split(","):
            changes = tuple(options.set) if side == "refdet" else ()
            recipe = base.with_changes(changes)
            listed.append(Training(side, changes, replace(recipe, train=replace(recipe.train, seed=seed))))
    return listed


def row_from(training: Training, folder: Path, threads: int) -> dict[str, Any]:
    """`row_of` for the dataset in a folder, computed with a number of threads."""
    torch.set_num_threads(threads)
    return row_of(training, Dataset.of(folder, "train2014"), Dataset.of(folder, "val2014"))


def finished_rows(trainings: list[Training], folder: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Run `jobs` trainings at a time; yields their rows as they finish."""
    threads = max((os.cpu_count() or 1) // jobs, 1)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from (
            future.result()
            for future in as_completed([pool.submit(row_from, training, folder, threads) for training in trainings])
        )


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over the seeds, for each side."""
    found = []
    for side, changes in dict.fromkeys((row["side"], tuple(row["changes"])) for row in rows):
        of_side = [row for row in rows if (row["side"], tuple(row["changes"])) == (side, changes)]
        mean: dict[str, Any] = {"side": side, "changes": list(changes), "seed": f"mean of {len(of_side)}"}
        for kind in ("bbox", "segm"):
            mean[kind] = {name: round(statistics.mean(row[kind][name] for row in of_side), 4) for name in RATES}
        for name in TIMES:
            mean[name] = round(statistics.mean(row[name] for row in of_side), 1)
        found.append(mean)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["side                      seed        box AP   AP75  mask AP   AP75   steps, s      CPU, s"]
    for row in [*rows, *means(rows)]:
        name = " ".join((row["side"], *row["changes"]))
        rates = (row[kind][rate] for kind in ("bbox", "segm") for rate in RATES)
        lines.append(
            f"{name:25} {row['seed']!s:10}"
            + "  {:.3f}  {:.3f}    {:.3f}  {:.3f}".format(*rates)
            + f" {row['step_seconds']:12.0f} {row['step_processor_seconds']:14.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of trainings at a time")
    parser.add_argument("--small", action="store_true", help="the demo's narrow network on both sides")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change refdet's recipe")
    parser.add_argument("--results", type=Path, help="file of finished trainings, which are not repeated")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    finished = {}
    if options.results is not None and options.results.exists():
        finished = {
            row["key"]: row for row in map(json.loads, options.results.read_text(encoding="utf-8").splitlines())
        }
    planned = trainings(options)
    with tempfile.TemporaryDirectory() as folder:
        data = shapes.write(Path(folder) / "data")
        for row in finished_rows(
            [training for training in planned if training.key() not in finished], data, options.jobs
        ):
            finished[row["key"]] = row
            if options.results is not None:
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    rows = [finished[training.key()] for training in planned]
    print(json.dumps({"rows": rows, "means": means(rows)}) if options.json else table(rows))


if __name__ == "__main__":
    main()
