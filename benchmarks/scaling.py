"""Benchmarks extraction with many workers, and extrapolates to 64 GPUs.

    python benchmarks/scaling.py [--json] [--workers 1,2,4,8] [--shards 12] [--seconds 0.25] [--images-per-second 300]

1. Weak scaling: the real extraction by workers of a local Ray cluster, and in parts, with the same number of shards per
   worker and detectors that sleep instead of computing. Efficiency is the speed divided by N times the speed of one
   worker, for N workers. Startup and merging are not included; Ray's startup is shown.
2. Costs per shard: its size, and the time to write and to merge it, with results of real size on a RAM disk.
3. Extrapolation from these: the time for 28,000 images on 1, 8 and 64 GPUs that read images from a shared disk and
   write shards to it, which one process merges. The speed of a GPU is an assumption (--images-per-second).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.extraction.part import Part
from refdet.extraction.parts import extract_part
from refdet.extraction.pipeline import SHARD_IMAGES, extract
from refdet.extraction.plan import Plan
from refdet.extraction.ray_cluster import connect
from refdet.extraction.ray_engine import RayEngine
from refdet.extraction.ray_messages import Tools
from refdet.extraction.ray_pool import worker_pool
from refdet.extraction.shards import ShardSet
from refdet.extraction.steps import Finish
from refdet.structures.regions import Regions

BATCH = 8  # images
REGIONS, WIDTH = 4, 16  # results of the sleeping detectors: regions per image, feature width
HEADER = store.Header([{"id": 1, "name": "person"}], "{}", {}, {"dtype": "float32"})
PLAN = Plan({"dtype": "float32"}, ("fc7",), "float32", masks=False, ann_ids=False, batch_size=BATCH)
IMAGES, JPEG_BYTES = 28_000, 163_000  # images of the REFER datasets; mean size of a JPEG of COCO's train2014
RAM_DISK = Path("/dev/shm")


def records_of(shards: int) -> list[ImageRecord]:
    return [ImageRecord(number, f"{number}.jpg", 48, 64) for number in range(shards * SHARD_IMAGES)]


def batches_of(records: list[ImageRecord]) -> list[list[ImageRecord]]:
    return [records[start : start + BATCH] for start in range(0, len(records), BATCH)]


def load(record: ImageRecord) -> np.ndarray:
    return np.zeros((record.height, record.width, 3), np.uint8)


def result_of(record: ImageRecord) -> Regions:
    return Regions(
        record.id,
        record.file_name,
        record.height,
        record.width,
        np.tile(np.float32([1, 1, 9, 9]), (REGIONS, 1)),
        np.ones(REGIONS, np.float32),
        np.ones(REGIONS, np.int64),
        features={"fc7": np.ones((REGIONS, WIDTH), np.float32)},
    )


@dataclass(frozen=True)
class Sleeping:
    """A fake detector that sleeps a fixed time per batch."""

    seconds: float

    def compute(self, batch: list[ImageRecord], images: list[np.ndarray]) -> Finish:
        time.sleep(self.seconds)
        return lambda: [result_of(record) for record in batch]

    def __call__(self, given: Callable[[ImageRecord], Regions]) -> Tools:
        """The functions of a Ray worker, which real detectors make for its given regions (`ray_messages.MakeTools`)."""
        return Tools(load, self.compute)


@contextmanager
def folder_on_ram() -> Any:
    with tempfile.TemporaryDirectory(dir=RAM_DISK if RAM_DISK.is_dir() else None) as name:
        yield Path(name)


def ray_run(workers: int, shards: int, seconds: float) -> dict[str, float]:
    """One extraction on a Ray cluster with as many CPU slots as workers; the driver's CPU time includes the merge."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    import ray

    records, start = records_of(shards * workers), time.perf_counter()
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init("local", num_cpus=workers, object_store_memory=2**27, **quiet)
    try:
        with (
            folder_on_ram() as folder,
            connect("local", "cpu") as cluster,
            worker_pool(cluster, Sleeping(seconds)) as pool,
        ):
            pool.start()
            while sum(worker.started is not None for worker in pool.workers) < workers:
                for worker, _, answer in pool.answers():
                    pool.handle_start(worker, answer)
            started, before = time.perf_counter() - start, time.process_time()
            done = extract(
                folder / "a.h5",
                PLAN,
                HEADER,
                batches_of(records),
                records,
                load,
                Sleeping(seconds).compute,
                engine=RayEngine(pool),
            )
            cpu_seconds = time.process_time() - before
    finally:
        ray.shutdown()
    return {
        "workers": workers,
        "images_per_second": done.images / done.seconds,
        "start_s": started,
        "driver_ms_per_shard": 1000 * cpu_seconds / (shards * workers),
    }


def part_main(out: str, part: str, shards: str, seconds: str) -> None:
    """One part of `parts_run`, in a process of its own."""
    records = records_of(int(shards))
    done = extract_part(
        Path(out), PLAN, HEADER, lambda _: batches_of(records), records, load, Sleeping(float(seconds)).compute,
        Part.parse(part),
    )  # fmt: skip
    print(json.dumps({"computed": done.computed, "seconds": done.seconds}))


def parts_run(workers: int, shards: int, seconds: float) -> dict[str, float]:
    """One extraction in `workers` parts; the time is that of the slowest."""
    with folder_on_ram() as folder:
        command = [sys.executable, __file__, "--part-of", str(folder / "a.h5")]
        running = [
            subprocess.Popen(
                [*command, f"{number + 1}/{workers}", str(shards * workers), str(seconds)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for number in range(workers)
        ]
        done = [json.loads(process.communicate()[0]) for process in running]
    slowest = max(one["seconds"] for one in done)
    return {"workers": workers, "images_per_second": sum(one["computed"] for one in done) / slowest}


def efficiencies(runs: list[dict[str, float]], images_per_second: float) -> list[dict[str, float]]:
    """Add two ratios to each run of N workers: its speed to N detectors alone, and to N times one worker.

    Args:
        runs: the first has the fewest workers, one by default.
        images_per_second: speed of one detector alone.
    """
    one = runs[0]["images_per_second"] / runs[0]["workers"]
    return [
        {
            **run,
            "of_detectors": run["images_per_second"] / (run["workers"] * images_per_second),
            "of_one_worker": run["images_per_second"] / (run["workers"] * one),
        }
        for run in runs
    ]


def shard_figures(dtype: str) -> dict[str, float]:
    """Size of a shard with results of real size, and the CPU time to write and to merge it."""
    from pipeline import draw_results, run  # benchmarks/pipeline.py
    from pipeline import records_of as real_records

    shards, results, merging = 4, draw_results(dtype), 0.0
    original = ShardSet.merge

    # in place of ShardSet.merge, to time it within the extraction
    def merge(*arguments: Any) -> None:
        nonlocal merging
        before = time.process_time()
        original(*arguments)
        merging = time.process_time() - before

    found = []
    ShardSet.merge = merge  # type: ignore[method-assign]
    for _ in range(5):
        with folder_on_ram() as folder:
            before = time.process_time()
            done = run(folder / "a.h5", real_records(shards * SHARD_IMAGES), dtype, results, BATCH)
            found.append((merging / shards, (time.process_time() - before - merging) / shards, done.bytes))
    ShardSet.merge = original  # type: ignore[method-assign]
    merges, writes, sizes = zip(*found, strict=True)
    return {
        "shard_mb": sizes[0] / shards / 1e6,
        "write_s_per_shard": statistics.median(writes),
        "merge_s_per_shard": statistics.median(merges),
    }


def extrapolate(
    gpus: int, disk: float, figures: dict[str, float], images_per_second: float, driver_s: float, local_images: bool
) -> dict[str, Any]:
    """Extrapolated time for all images, and its bottleneck.

    Args:
        gpus: number of GPUs.
        disk: bandwidth of the shared disk, bytes per second.
        figures: costs per shard, from `shard_figures`.
        images_per_second: speed of one GPU.
        driver_s: CPU time of the driver per shard, in seconds.
        local_images: whether each machine reads the images from its own disk.
    """
    shards, size = math.ceil(IMAGES / SHARD_IMAGES), figures["shard_mb"] * 1e6
    moved = size + (0 if local_images else SHARD_IMAGES * JPEG_BYTES)
    # mean time between two finished shards of any workers, by what could limit it
    shard_interval = {
        "GPUs": SHARD_IMAGES / images_per_second / gpus,
        "shared disk": moved / disk,
        "driver": driver_s,
        "writing": figures["write_s_per_shard"] / gpus,
    }
    limit = max(shard_interval, key=lambda name: shard_interval[name])
    compute = shard_interval[limit] * shards
    if limit in ("GPUs", "writing"):  # in the last round, some GPUs may have no shard left
        compute = shard_interval[limit] * gpus * math.ceil(shards / gpus)
    # merging reads and writes each shard
    merges = {"shared disk": 2 * size * shards / disk, "merging process": figures["merge_s_per_shard"] * shards}
    merge_limit = max(merges, key=lambda name: merges[name])
    total = compute + merges[merge_limit]
    return {
        "gpus": gpus,
        "disk_gb_s": disk / 1e9,
        "compute_s": compute,
        "compute_limit": limit,
        "merge_s": merges[merge_limit],
        "merge_limit": merge_limit,
        "total_s": total,
        "images_per_second": IMAGES / total,
    }


def extrapolation_table(
    figures: dict[str, dict[str, float]], images_per_second: float, driver_s: float
) -> list[dict[str, Any]]:
    rows = []
    for dtype, of_dtype in figures.items():
        for disk in (1e9, 1e10):
            for gpus in (1, 8, 64):
                row, local = (
                    extrapolate(gpus, disk, of_dtype, images_per_second, driver_s, local_images)
                    for local_images in (False, True)
                )
                rows.append({"dtype": dtype, **row, "compute_with_local_images_s": local["compute_s"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--workers", default="1,2,4,8")
    parser.add_argument("--shards", type=int, default=12, help="shards per worker")
    parser.add_argument("--seconds", type=float, default=0.25, help="time per batch of 8 images")
    parser.add_argument("--images-per-second", type=float, default=300.0, help="assumed speed of a GPU")
    parser.add_argument("--dtype", default="float32,float16")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    counts = [int(count) for count in options.workers.split(",")]
    result: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "shards": options.shards}
    for kind, run_one in (("ray", ray_run), ("parts", parts_run)):
        runs = [run_one(count, options.shards, options.seconds) for count in counts]
        result[kind] = efficiencies(runs, images_per_second=BATCH / options.seconds)
    result["figures"] = {dtype: shard_figures(dtype) for dtype in options.dtype.split(",")}
    driver_s = result["ray"][-1]["driver_ms_per_shard"] / 1000
    result["extrapolation"] = extrapolation_table(result["figures"], options.images_per_second, driver_s)
    if options.json:
        print(json.dumps(result))
        return
    shard_s = options.seconds * SHARD_IMAGES / BATCH
    print(
        f"{result['cores']} cores, load {result['load']:.1f}; {options.shards} shards of {shard_s:g} s for each worker"
    )
    for kind in ("ray", "parts"):
        for run in result[kind]:
            more = ""
            if "start_s" in run:
                more = f", started in {run['start_s']:.0f} s, driver {run['driver_ms_per_shard']:.0f} ms per shard"
            print(
                f"{kind:6} {run['workers']:3} workers {run['images_per_second']:8.1f} images/s, "
                f"{run['of_detectors']:.3f} of the detectors alone, "
                f"{run['of_one_worker']:.3f} of N times one worker{more}"
            )
    for dtype, figures in result["figures"].items():
        print(f"{dtype}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    print(f"\n{IMAGES} images, {options.images_per_second:g} images/s per GPU, without startup:\n")
    print(
        "| dtype | disk, GB/s | GPUs | computing, s | limited by | computing, images local, s | merging, s "
        "| limited by | total, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in result["extrapolation"]:
        print(
            f"| {row['dtype']} | {row['disk_gb_s']:g} | {row['gpus']} | "
            f"{row['compute_s']:.0f} | {row['compute_limit']} | "
            f"{row['compute_with_local_images_s']:.0f} | {row['merge_s']:.0f} | {row['merge_limit']} | "
            f"{row['total_s']:.0f} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part-of"]:
        part_main(*sys.argv[2:])
    else:
        main()
