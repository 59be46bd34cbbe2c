"""Step: `extract-features` from JPEGs to the finished file, compared with torchvision's modules in each precision.

ResNet-101-C4, 300 proposals, 100 regions with masks, pool5 and fc7. torchvision's modules process one image at a time,
as is usual, and batches of images of similar size, which is fastest.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
from extract import Work, check_same_work
from flops import flops_of_image
from results import Step, read_group, run
from torchvision_c4 import Stages, TorchvisionC4
from torchvision_c4 import extract as torchvision_extract
from work import (
    NMS,
    arithmetic,
    detector,
    draw_results,
    extract_options,
    image_list,
    images_folder,
    images_of_one_size,
    max_regions,
    run_folder,
)

from refdet.data.image_source import ImageSource
from refdet.detector import loading
from refdet.extraction.extract import extract_features
from refdet.extraction.options import CHOICES
from refdet.extraction.shard_folder import shards_folder

GOALS = {"one image a call": 10.0, "batched": 3.0}  # refdet's speed to torchvision's, both in bfloat16
RAM = Path("/dev/shm")


def ours(
    step: Step, name: str, count: int, batch_size: int | Literal["auto"], folder: Path | None = None, **options: Any
) -> float:
    """Extract features of the first images; returns images per second, including the merge into the final file."""
    out = (folder or step.work) / "refdet-gpu-check.h5"
    remove(out)
    images = image_list(step, count)
    if not step.small:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        done = extract_features(
            run_folder(step, "c4"),
            images_folder(step),
            out,
            images,
            options=extract_options(step, "c4", **options),
            batch_size=batch_size,
            workers=2 if step.small else 8,
            device=step.device,
        )
    finally:
        remove(out)
    seconds = done.seconds + done.stages["merge"]
    found = {
        "images": done.images,
        "images_per_second": done.images / seconds,
        "images_per_second_before_merge": done.images_per_second,
        "regions_per_image": done.regions / done.images,
        "batch_size": done.batch_size,
        "bytes_per_image": done.bytes / done.images,
        "stages": done.stages,
        "computing": done.computing,
    }
    if not step.small:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    step.put(f"refdet, {name}", found)
    step.say(f"refdet, {name}: {found['images_per_second']:.4g} images/s")
    return found["images_per_second"]


def remove(out: Path) -> None:
    """Remove a store and the shards that a failed extraction leaves; they would fill a RAM disk."""
    out.unlink(missing_ok=True)
    shutil.rmtree(shards_folder(out), ignore_errors=True)


def theirs(step: Step, peer: TorchvisionC4, mode: str, batch_size: int, count: int) -> float:
    """Extract features with torchvision's modules; returns images per second."""
    records = image_list(step, count).records
    if batch_size > 1:  # similar sizes next to each other, for little padding
        records = sorted(records, key=lambda record: (record.width, record.height))
    source = ImageSource.open(images_folder(step))
    paths = [images_folder(step) / str(source.find(record)) for record in records]
    out = step.work / "torchvision.h5"
    with arithmetic(mode, step.device):
        for turn in range(2):  # a warm-up with fewer images, then the measurement
            some = paths[: 2 * batch_size] if turn == 0 else paths
            stages = Stages(torch.device("cpu"))  # "cpu", so that stages do not synchronize with the GPU
            start = time.perf_counter()
            regions = torchvision_extract(peer, some, out, stages, batch_size)
            seconds = time.perf_counter() - start
    out.unlink()
    name = f"torchvision, {mode}, " + ("one image a call" if batch_size == 1 else "batched")
    found = {
        "images": len(paths),
        "images_per_second": len(paths) / seconds,
        "batch_size": batch_size,
        "regions_per_image": statistics.mean(regions),
    }
    step.put(name, found)
    step.say(f"{name}: {found['images_per_second']:.4g} images/s")
    return found["images_per_second"]


def work(step: Step) -> None:
    few, many, of_peer, of_slow_peer = (4, 8, 4, 4) if step.small else (128, 512, 64, 16)
    batch = 4 if step.small else 16
    main = f"bfloat16, batch {batch}"
    ours(step, "warm-up", 4 if step.small else 32, batch, precision="bfloat16")
    first = ours(step, f"few images, {main}", few, batch, precision="bfloat16")
    best = ours(step, main, many, batch, precision="bfloat16")
    step.put("images_per_second_few_and_many", [first, best])
    step.goal("images/s of 512 in bfloat16", best, 300)
    step.attempt("share of the peak", peak_share, step, best)
    if not step.small:
        few_peak, many_peak = (step.values[f"refdet, {name}{main}"]["peak_gib"] for name in ("few images, ", ""))
        step.at_most("peak memory of 512 images to that of 128", many_peak / few_peak, 1.1)

    peer = step.attempt("torchvision's detector", make_peer, step)
    ways = {"one image a call": 1, "batched": 2 if step.small else 8}
    for way, size in ways.items() if peer else ():
        speed = step.attempt(f"torchvision, autocast, {way}", theirs, step, peer, "autocast", size, of_peer)
        if speed:
            step.goal(f"times torchvision in bfloat16 {way}", best / speed, GOALS[way])

    def measure(name: str, *arguments: Any, **options: Any) -> None:
        step.attempt(name, ours, step, name, *arguments, **options)

    measure(f"{main}, float16 store", many, batch, precision="bfloat16", dtype="float16")
    for size in [1] if step.small else [8, 32]:
        measure(f"bfloat16, batch {size}", many, size, precision="bfloat16")
    if not step.small and RAM.is_dir() and shutil.disk_usage(RAM).free > 4 << 30:
        measure(f"{main}, RAM disk", many, batch, RAM, precision="bfloat16")
    for precision in ("float32", "tf32"):
        if precision in CHOICES["precision"]:
            measure(f"{precision}, batch {batch // 2}", few * 2, batch // 2, precision=precision)
    measure("bfloat16, batch auto", many, "auto", precision="bfloat16")
    for mode, (way, size) in itertools.product(("tf32", "ieee"), ways.items() if peer else ()):
        step.attempt(f"torchvision, {mode}, {way}", theirs, step, peer, mode, size, of_slow_peer)


def make_peer(step: Step) -> TorchvisionC4:
    """Build torchvision's detector with the same weights, and check that it computes the same features."""
    threshold = draw_results(step)["threshold"]["c4"]
    peer = TorchvisionC4(loading.load(run_folder(step, "c4")).model, threshold, NMS, max_regions(step))
    pixels = images_of_one_size(step, "c4", 1)[1][0]
    given = Work(run_folder(step, "c4"), images_folder(step), image_list(step, 1), threshold)
    step.put("difference_of_features_float32", check_same_work(given, peer, pixels))
    return peer.to(step.device)


def peak_share(step: Step, images_per_second: float) -> None:
    """Report the share of the GPU's measured throughput of matrix products that the extraction reaches."""
    with torch.inference_mode():
        records, pixels = images_of_one_size(step, "c4", 4)
        flops = flops_of_image(step, detector(step, "c4", "bfloat16"), records, pixels)
    step.put("gflop_per_image", flops / 1e9)
    tflops = read_group(step.out, "env").get("env", {}).get("product_tflops_bf16")
    if tflops:
        step.goal("share of the measured peak of matrix products", flops * images_per_second / (tflops * 1e12), 0.4)


if __name__ == "__main__":
    run(work, "extraction")
