"""Benchmarks everything after the detector: serialization, shards, merging and closing the store.

    python benchmarks/pipeline.py [--json] [--images 512] [--rounds 5] [--dtype float32,float16] [--folder DIR]

The real extraction runs with a fake detector that returns prepared results at no cost: 100 regions per image with
masks, pool5 and fc7 of ResNet-101. It takes turns, on the same results and disk, with:

- h5py: the same columns, written with one dataset per image and column, without checksums and without resuming;
- disk: only the bytes of the features, written to a file, read back and copied to another file, the least that any
  extraction with shards has to do.

The folder is on a RAM disk by default, the fastest disk possible. Encoding the masks belongs to the detector and is
timed separately.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from refdet import store
from refdet.config import recipe as recipes
from refdet.data.coco import ImageRecord
from refdet.data.training_batches import group_by_input_size
from refdet.extraction.pipeline import extract
from refdet.extraction.plan import Plan
from refdet.extraction.steps import Finish
from refdet.extraction.summary import Summary
from refdet.ops.masks import masks_to_rle
from refdet.structures.regions import Regions

REGIONS, WIDTHS = 100, {"pool5": 1024, "fc7": 2048}
SIZES = ((480, 640), (427, 640), (640, 480), (640, 427), (375, 500), (640, 640), (426, 640), (500, 375))
DISTINCT = 64  # different results, far more than fit into the processor's cache
RAM_DISK = Path("/dev/shm")

Masks = tuple[torch.Tensor, torch.Tensor]  # probabilities (REGIONS, 14, 14) and boxes (REGIONS, 4) of an image


def draw_masks(height: int, width: int, seed: int) -> Masks:
    """Smooth blobs in boxes of any size."""
    random = torch.Generator().manual_seed(seed)
    low = torch.rand(REGIONS, 2, generator=random) * torch.tensor([width, height]) * 0.7
    size = (0.05 + 0.25 * torch.rand(REGIONS, 2, generator=random)) * torch.tensor([width, height])
    noise = torch.randn(REGIONS, 1, 4, 4, generator=random)
    cells = torch.nn.functional.interpolate(noise, (14, 14), mode="bicubic", align_corners=False)
    return torch.sigmoid(cells[:, 0]), torch.cat((low, low + size), 1)


def draw_results(dtype: str) -> list[Regions]:
    """Regions of `DISTINCT` images, with features of the given dtype."""
    random, results = np.random.default_rng(0), []
    for number in range(DISTINCT):
        height, width = SIZES[number % len(SIZES)]
        probabilities, boxes = draw_masks(height, width, number)
        features = {
            name: np.maximum(random.standard_normal((REGIONS, channels), np.float32), 0).astype(dtype)
            for name, channels in WIDTHS.items()
        }
        results.append(
            Regions(
                number,
                "",
                height,
                width,
                boxes.numpy(),
                np.sort(random.random(REGIONS, np.float32))[::-1].copy(),
                random.integers(1, 91, REGIONS),
                masks=tuple(masks_to_rle(probabilities, boxes, height, width)),
                features=features,
            )
        )
    return results


def records_of(images: int) -> list[ImageRecord]:
    """Records of images in random order of sizes, as in a dataset."""
    sizes = np.random.default_rng(1).integers(0, len(SIZES), images).tolist()
    return [ImageRecord(i, f"COCO_train2014_{i:012d}.jpg", *SIZES[size]) for i, size in enumerate(sizes)]


def run(out: Path, records: list[ImageRecord], dtype: str, results: list[Regions], batch_size: int) -> Summary:
    """Run the real extraction, with a detector and images that take no time."""
    by_size: dict[tuple[int, int], list[Regions]] = {}
    for result in results:
        by_size.setdefault((result.height, result.width), []).append(result)
    images = {(height, width): np.zeros((height, width, 3), np.uint8) for height, width in SIZES}

    def result_of(record: ImageRecord) -> Regions:
        drawn = by_size[record.height, record.width]
        return replace(drawn[record.id % len(drawn)], image_id=record.id, file_name=record.file_name)

    def compute(batch: list[ImageRecord], loaded: list[np.ndarray]) -> Finish:
        return lambda: [result_of(record) for record in batch]

    options = {"dtype": dtype}
    plan = Plan(options, tuple(WIDTHS), dtype, masks=True, ann_ids=False, batch_size=batch_size)
    header = store.Header([{"id": 1, "name": "person"}], "{}", {}, options)
    batches = group_by_input_size(records, recipes.load("c4-res101").input, batch_size)
    return extract(out, plan, header, batches, records, lambda r: images[r.height, r.width], compute)


def write_with_h5py(out: Path, records: list[ImageRecord], results: list[Regions]) -> None:
    """Write the results as a simple h5py script would: a group per image, a dataset per column."""
    with h5py.File(out, "w") as file:
        for record in records:
            found, group = results[record.id % DISTINCT], file.create_group(str(record.id))
            group["boxes"], group["scores"] = found.boxes, found.scores
            group["labels"] = found.category_ids
            group["masks"] = np.array(found.masks, dtype=h5py.string_dtype())
            for name, values in found.features.items():
                group[name] = values
    with out.open("rb") as written:
        os.fsync(written.fileno())


def copy_features(folder: Path, images: int, results: list[Regions]) -> None:
    """Write the features to a file, read them back and write them to another file."""
    with (folder / "a").open("w+b", buffering=0) as first, (folder / "b").open("wb", buffering=0) as second:
        for number in range(images):
            for values in results[number % DISTINCT].features.values():
                first.write(values)
        os.fsync(first.fileno())
        memory = bytearray(sum(values.nbytes for values in results[0].features.values()))
        first.seek(0)
        for _ in range(images):
            first.readinto(memory)
            second.write(memory)
        os.fsync(second.fileno())
    (folder / "a").unlink()


def time_masks(rounds: int) -> float:
    """Milliseconds to encode the masks of an image on one thread."""
    drawn, times = [(*draw_masks(*SIZES[k], k), *SIZES[k]) for k in range(len(SIZES))], []
    for turn in range(10 * rounds + 1):
        start = time.perf_counter()
        for one in drawn:
            masks_to_rle(*one)
        if turn:  # the first round is a warm-up
            times.append((time.perf_counter() - start) / len(drawn) * 1000)
    return statistics.median(times)


def time_work(folder: Path, work: Callable[[Path], Any]) -> tuple[float, float, Any]:
    """Wall time and CPU time, in seconds, of work in an empty folder, and its result."""
    folder.mkdir()
    try:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        result = work(folder)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    finally:
        shutil.rmtree(folder)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def measure(folder: Path, dtype: str, images: int, rounds: int, batch_size: int) -> dict[str, Any]:
    """Medians, in milliseconds per image, of rounds in which the three sides take turns."""
    results, records = draw_results(dtype), records_of(images)
    sides: dict[str, Callable[[Path], Any]] = {
        "refdet": lambda at: run(at / "a.h5", records, dtype, results, batch_size),
        "h5py": lambda at: write_with_h5py(at / "a.h5", records, results),
        "disk": lambda at: copy_features(at, images, results),
    }
    found: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for side, work in sides.items():
            wall, cpu, summary = time_work(folder / side, work)
            took = {side: wall, f"{side} processor": cpu}
            if summary is not None:
                took |= {name: summary.stages[name] for name in ("wait", "finish", "write", "merge")}
                took["open, check"] = wall - summary.seconds - summary.stages["merge"]
            if turn:  # the first round is a warm-up
                for name, seconds in took.items():
                    found.setdefault(name, []).append(seconds / images * 1000)
    medians = {name: statistics.median(values) for name, values in found.items()}
    extra_wall = [ours - floor for ours, floor in zip(found["refdet"], found["disk"], strict=True)]
    extra_cpu = [ours - floor for ours, floor in zip(found["refdet processor"], found["disk processor"], strict=True)]
    return {
        "dtype": dtype,
        "images_per_second": {side: round(1000 / medians[side], 1) for side in sides},
        "ms_per_image": {name: round(value, 4) for name, value in medians.items()},
        "besides_the_disk_ms": round(statistics.median(extra_wall), 4),
        "besides_the_disk_processor_ms": round(statistics.median(extra_cpu), 4),
        "ratio_to_h5py": round(medians["h5py"] / medians["refdet"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians are taken")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32,float16")
    parser.add_argument("--folder", type=Path, help="where to write; /dev/shm if there is one")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    where = options.folder or (RAM_DISK if RAM_DISK.is_dir() else None)
    result: dict[str, Any] = {"images": options.images, "rounds": options.rounds, "batch_size": options.batch_size}
    with tempfile.TemporaryDirectory(dir=where) as name:
        os.environ["XDG_CACHE_HOME"] = name
        result["folder"] = "/dev/shm" if where == RAM_DISK else str(where or tempfile.gettempdir())
        result["cores"], result["masks_ms"] = os.cpu_count(), round(time_masks(options.rounds), 4)
        result["runs"] = [
            measure(Path(name), dtype, options.images, options.rounds, options.batch_size)
            for dtype in options.dtype.split(",")
        ]
    if options.json:
        print(json.dumps(result))
        return
    about = ", ".join(f"{key} {value}" for key, value in result.items() if key not in ("runs", "masks_ms"))
    print(f"{about}; medians, ms an image")
    print(f"the masks of an image, before all this: {result['masks_ms']:.2f}")
    for one in result["runs"]:
        print(f"{one['dtype']}:")
        for name, value in one["ms_per_image"].items():
            speed = one["images_per_second"].get(name)
            print(f"  {name:18} {value:7.3f}" + (f"   {speed:.0f} images/s" if speed else ""))
        print(f"  {'besides the disk':18} {one['besides_the_disk_ms']:7.3f}", end="")
        print(f"   ({one['besides_the_disk_processor_ms']:.3f} of CPU time)")
        print(f"  {one['ratio_to_h5py']:.2f} times as fast as h5py with a dataset per image and column")


if __name__ == "__main__":
    main()
