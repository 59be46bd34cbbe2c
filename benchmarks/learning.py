"""Trains refdet's and torchvision's Mask R-CNN on the synthetic dataset with the same batches, and compares their AP.

    python benchmarks/learning.py [--seeds 0,1,2] [--sides torchvision,refdet] [--steps 300] [--batch-size 4]
                                  [--lr 0.02] [--small] [--set KEY=VALUE ...] [--jobs N] [--results FILE.jsonl] [--json]

Both sides train a full-width ResNet-18 with batch norm from random weights, a 256-channel feature pyramid, 1024-wide
linear layers and 28x28 masks. Anchors, proposals, sampling and input size are those of the `demo` recipe. Both see the
same batches and flips in the same order, at the same learning rate in each step. A seed determines the initial weights,
batches, flips and samples. Both are evaluated by pycocotools on the same images with the same thresholds.

--jobs training runs take place at a time, by default one per core with a single thread each, which is faster in total
than one run on all threads. For each seed, runs of the two sides alternate in the queue, so that both train under the
same load.

A timed step starts with a batch in memory and ends with the new weights. Batches are uint8 images with RLE masks for
refdet, and float images in 0..1 with bitmaps for torchvision. --results appends a row per finished training run to a
file, including the load of the machine; with the same file, later calls skip these runs.

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
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
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
METRICS = ("AP", "AP75")
TOTALS = ("steps_wall_seconds", "steps_cpu_seconds")  # over all steps of a training run
OLD_NAMES = {"step_seconds": "steps_wall_seconds", "step_processor_seconds": "steps_cpu_seconds"}  # in older --results
DETECTION = DetectionOptions(score_threshold=0.05, nms_threshold=0.5, max_regions=100)  # torchvision's own
FULL_WIDTH_CHANGES = [f"model.{key}={value}" for key, value in FULL_WIDTH.items()]  # of the demo recipe

Row = dict[str, Any]  # the results of a training run
PrepareStep = Callable[[Batch, int], Callable[[], object]]
"""Converts a batch for a training step, given the step's number. The returned function runs the step; it returns the
loss or losses for the log."""


@dataclass(frozen=True)
class Dataset:
    """One split of the synthetic dataset."""

    index: CocoIndex
    source: ImageSource

    @classmethod
    def load(cls, folder: Path, split: str) -> Dataset:
        index = CocoIndex.load(folder / "annotations" / f"instances_{split}.json")
        return cls(index, ImageSource.open(folder / split))


@dataclass(frozen=True)
class TrainingRun:
    """One training run: a side, and a recipe that includes the seed.

    Attributes:
        side: "torchvision" or "refdet".
        changes: recipe changes given with --set, of refdet's side only.
        recipe: recipe with all changes and the seed.
    """

    side: str
    changes: tuple[str, ...]
    recipe: Recipe

    @property
    def name(self) -> str:
        return " ".join((self.side, *self.changes))

    def key(self) -> str:
        """Identify the run in a --results file: a hash of its name and recipe."""
        text = json.dumps([self.name, self.recipe.to_dict()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def refdet_side(recipe: Recipe, classes: int) -> tuple[torch.nn.Module, PrepareStep]:
    """Build refdet's model, and its training step."""
    model = MaskRCNN(recipe, classes).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    sgd, generator, schedule = build_optimizer(model, recipe.train), torch.Generator(), recipe.train

    def prepare_step(batch: Batch, step: int) -> Callable[[], object]:
        def run() -> object:
            generator.manual_seed(step_seed(schedule.seed, step))
            lr = learning_rate(step, schedule)
            return start_step(model, sgd, batch, lr, schedule.max_grad_norm, generator).losses()

        return run

    return model, prepare_step


def torchvision_side(recipe: Recipe, classes: int) -> tuple[torch.nn.Module, PrepareStep]:
    """Build torchvision's model, and its training step as in its reference scripts: SGD that decays all parameters."""
    model, schedule = torchvision_fpn(recipe, classes, DETECTION).train(), recipe.train
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sgd = torch.optim.SGD(parameters, lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay)

    def prepare_step(batch: Batch, step: int) -> Callable[[], object]:
        images, targets = torchvision_batch(batch)

        def run() -> object:
            for group in sgd.param_groups:
                group["lr"] = learning_rate(step, schedule)
            total = sum(model(images, targets).values())
            sgd.zero_grad(set_to_none=True)
            total.backward()
            sgd.step()
            return total.item()

        return run

    return model, prepare_step


def train_network(run: TrainingRun, data: Dataset) -> tuple[torch.nn.Module, list[float], list[float]]:
    """Train a network; returns it with the wall time and CPU time (of all threads) of each step in seconds."""
    recipe, seconds, cpu_seconds = run.recipe, [], []
    torch.manual_seed(recipe.train.seed)
    make_side = refdet_side if run.side == "refdet" else torchvision_side
    model, prepare_step = make_side(recipe, len(data.index.categories))
    batches = TrainingBatches(data.index, data.source, recipe)
    for step in range(recipe.train.steps):
        batch = batches[step]
        if not isinstance(batch, Batch):
            raise batch  # TrainingBatches returns the error of an unreadable image in place of its batch
        run_step = prepare_step(batch, step)
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = run_step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        if (step + 1) % 50 == 0:
            print(f"  {run.name}, seed {recipe.train.seed}: step {step + 1}, {sum(seconds):.0f} s, {loss}", flush=True)
    return model.eval(), seconds, cpu_seconds


@torch.inference_mode()
def detect_all(model: torch.nn.Module, recipe: Recipe, data: Dataset) -> list[dict[str, Any]]:
    """Detect objects in all images; returns entries of a COCO results JSON."""
    ids, records, found = list(data.index.categories), list(data.index.images.values()), []
    if isinstance(model, MaskRCNN):
        for group in group_by_input_size(records, recipe.input, batch_size=4):
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


def train_and_evaluate(run: TrainingRun, folder: Path, threads: int) -> Row:
    """Train on the dataset in a folder and evaluate, with a number of threads."""
    torch.set_num_threads(threads)
    train, val = Dataset.load(folder, "train2014"), Dataset.load(folder, "val2014")
    load, started = os.getloadavg()[0], time.perf_counter()
    with exact_float32():
        model, seconds, cpu_seconds = train_network(run, train)
        results = detect_all(model, run.recipe, val)
    metrics = {
        kind: {name: round(value, 4) for name, value in coco_ap(val.index, val.index.images, results, kind).items()}
        for kind in ("bbox", "segm")
    }
    return {
        "key": run.key(),
        "side": run.side,
        "changes": list(run.changes),
        "seed": run.recipe.train.seed,
        "steps": run.recipe.train.steps,
        "batch_size": run.recipe.train.batch_size,
        **metrics,
        "steps_wall_seconds": round(sum(seconds), 1),
        "steps_cpu_seconds": round(sum(cpu_seconds), 1),
        "median_step": round(statistics.median(seconds), 4),
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }


def plan_runs(options: argparse.Namespace) -> list[TrainingRun]:
    """The training runs of all seeds; for each seed, those of the two sides alternate."""
    width = [] if options.small else FULL_WIDTH_CHANGES
    schedule = [f"train.steps={options.steps}", f"train.batch_size={options.batch_size}", f"train.lr={options.lr}"]
    base = recipes.load("demo").with_changes([*width, *schedule])
    planned = []
    for seed in map(int, options.seeds.split(",")):
        for side in options.sides.split(","):
            changes = tuple(options.set) if side == "refdet" else ()
            recipe = base.with_changes(changes)
            planned.append(TrainingRun(side, changes, replace(recipe, train=replace(recipe.train, seed=seed))))
    return planned


def run_all(runs: list[TrainingRun], folder: Path, jobs: int) -> Iterator[Row]:
    """Run `jobs` training runs at a time; yields the row of each when it finishes."""
    threads = max((os.cpu_count() or 1) // jobs, 1)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from results_as_completed([pool.submit(train_and_evaluate, run, folder, threads) for run in runs])


def results_as_completed(futures: list[Future[Row]]) -> Iterator[Row]:
    """Yield the result of each future when it completes; raises the first error only after all have completed."""
    errors = []
    for future in as_completed(futures):
        if (error := future.exception()) is None:
            yield future.result()
        else:
            errors.append(error)
    if errors:
        raise errors[0]


def read_rows(path: Path) -> dict[str, Row]:
    """Read the rows of a --results file, by key; empty if there is none yet."""
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["key"]: {OLD_NAMES.get(name, name): value for name, value in row.items()} for row in rows}


def means(rows: list[Row]) -> list[Row]:
    """Mean over the seeds, for each side."""
    found = []
    for side, changes in dict.fromkeys((row["side"], tuple(row["changes"])) for row in rows):
        of_side = [row for row in rows if (row["side"], tuple(row["changes"])) == (side, changes)]
        mean: Row = {"side": side, "changes": list(changes), "seed": f"mean of {len(of_side)}"}
        for kind in ("bbox", "segm"):
            mean[kind] = {name: round(statistics.mean(row[kind][name] for row in of_side), 4) for name in METRICS}
        for name in TOTALS:
            mean[name] = round(statistics.mean(row[name] for row in of_side), 1)
        found.append(mean)
    return found


def table(rows: list[Row]) -> str:
    """Format the rows and their means as a table."""
    lines = ["side                      seed        box AP   AP75  mask AP   AP75   steps, s      CPU, s"]
    for row in [*rows, *means(rows)]:
        name = " ".join((row["side"], *row["changes"]))
        metrics = (row[kind][metric] for kind in ("bbox", "segm") for metric in METRICS)
        lines.append(
            f"{name:25} {row['seed']!s:10}"
            + "  {:.3f}  {:.3f}    {:.3f}  {:.3f}".format(*metrics)
            + f" {row['steps_wall_seconds']:12.0f} {row['steps_cpu_seconds']:14.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--sides", default=",".join(SIDES), help="separated by commas")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of training runs at a time")
    parser.add_argument("--small", action="store_true", help="the demo's narrow network on both sides")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change refdet's recipe")
    parser.add_argument("--results", type=Path, help="file of finished training runs, which are not repeated")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    finished = {} if options.results is None else read_rows(options.results)
    planned = plan_runs(options)
    with tempfile.TemporaryDirectory() as folder:
        data = shapes.write(Path(folder) / "data")
        for row in run_all([run for run in planned if run.key() not in finished], data, options.jobs):
            finished[row["key"]] = row
            if options.results is not None:
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    rows = [finished[run.key()] for run in planned]
    print(json.dumps({"rows": rows, "means": means(rows)}) if options.json else table(rows))


if __name__ == "__main__":
    main()
