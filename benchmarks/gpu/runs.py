"""Step: run whole commands: an extraction killed and resumed, batch size auto, a training run stopped and resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from results import Step, run
from safetensors.numpy import load_file
from work import (
    detector,
    draw_results,
    extract_options,
    image_list,
    images_folder,
    instances_file,
    largest,
    max_regions,
    refdet_command,
    run_folder,
)

from refdet import store
from refdet.detector.predictor import detect_batch
from refdet.extraction.batch_size import auto_batch_size, measure_batch_size
from refdet.extraction.shard_folder import shards_folder
from refdet.structures.regions import Regions

MEMORY_TOLERANCE = 0.1  # maximum relative error of the memory that batch size auto predicts
WEIGHT_TOLERANCE = 0.05  # maximum relative difference between the weights of a resumed and an uninterrupted run
INTERRUPTED_EXIT_CODE = 130  # of refdet after Ctrl-C


def command(step: Step, *arguments: object) -> str:
    """Run refdet; returns what it printed to stdout, and raises RuntimeError if it fails."""
    done = subprocess.run(refdet_command(*arguments), capture_output=True, text=True)
    if done.returncode:
        step.say(done.stderr[-2000:])
        raise RuntimeError(f"refdet {arguments[0]} exited with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def extraction(step: Step) -> None:
    """Kill an extraction, resume it, and compare the store with that of an uninterrupted one."""
    folder = empty_folder(step.work / "extraction")
    count = 40 if step.small else 160
    tree = json.loads(instances_file(step).read_text())
    # the images repeated up to the count, under new ids
    chosen = [tree["images"][i % len(tree["images"])] for i in range(count)]
    images = [{**image, "id": number} for number, image in enumerate(chosen, start=1)]
    instances = folder / "instances.json"
    instances.write_text(json.dumps(tree | {"images": images, "annotations": []}))
    common = ["extract-features", "--checkpoint", run_folder(step, "c4"), "--images", images_folder(step)]
    common += ["--instances", instances, "--device", step.device, "--batch-size", 4 if step.small else 8]
    common += ["--score-threshold", draw_results(step)["threshold"]["c4"], "--precision", "bfloat16"]
    common += ["--max-regions", max_regions(step)]
    killed, whole = folder / "killed.h5", folder / "whole.h5"
    process = subprocess.Popen(refdet_command(*common, "--out", killed), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and not count_shards(killed):
            time.sleep(0.002)
        finished = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        status = process.wait()
    finally:
        process.kill()
    step.check(
        "an extraction was killed before its end",
        not finished and status == -signal.SIGKILL,
        shards=count_shards(killed),
    )
    command(step, *common, "--out", killed, "--resume")
    command(step, *common, "--out", whole)
    step.check("the resumed store verifies", bool(command(step, "inspect", killed, "--verify")))
    differing, regions = differences(killed, whole)
    step.put("extraction_regions", regions)
    step.check("it is bit-identical to that of an uninterrupted extraction", not differing, images=len(differing))
    shutil.rmtree(folder)


def count_shards(out: Path) -> int:
    """Number of finished shards of the unfinished store `out`."""
    return len(list(shards_folder(out).glob("[0-9]*.shard")))


def empty_folder(folder: Path) -> Path:
    """Create a folder, without the contents of an earlier run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def differences(a: Path, b: Path) -> tuple[list[int], int]:
    """Ids of images whose regions differ between two stores, and the number of regions in the second store."""
    with store.open(a) as first, store.open(b) as second:
        return [i for i in second if not same(first.read(i), second.read(i))], second.regions


def same(a: Regions, b: Regions) -> bool:
    arrays = [(a.boxes, b.boxes), (a.scores, b.scores), (a.category_ids, b.category_ids)]
    arrays += [(a.features[name], b.features[name]) for name in b.features]
    return a.masks == b.masks and all(np.array_equal(x, y) for x, y in arrays)


@torch.inference_mode()
def automatic_batches(step: Step) -> None:
    """Determine the automatic batch size, and compare its predicted memory with that of a batch of large images."""
    loaded, options = detector(step, "c4", "bfloat16"), extract_options(step, "c4")
    records = image_list(step, 512).records
    if step.small:  # on a CPU, memory is not measured
        size = auto_batch_size(loaded, records, options, options.features)
        step.put("auto_batch_size", size)
        step.check("the automatic batch size is one or more", size >= 1)
        return
    found = measure_batch_size(loaded, records, options, options.features)
    step.put("auto_batch_size", found.size)
    step.check("the automatic batch size is one or more", found.size >= 1)
    batch, pixels = largest(step, "c4", found.size)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    detect_batch(loaded.model, pixels, batch, loaded.meta.category_ids, options, features=options.features)
    peak = torch.cuda.max_memory_allocated() - before
    step.put("memory_of_batch_gib", peak / 2**30)
    step.put("memory_expected_of_batch_gib", found.peak_bytes / 2**30)
    step.at_most(
        "memory of an automatic batch, difference to what was expected",
        abs(found.peak_bytes / peak - 1),
        MEMORY_TOLERANCE,
    )


def training(step: Step) -> None:
    """Compare the weights of a training run with those of one that is stopped and resumed.

    On a GPU they differ a little, as the order of sums varies between runs.
    """
    folder = empty_folder(step.work / "training")
    workers = 0 if step.small else 2
    common = ["train", "--recipe", "demo", "--instances", instances_file(step), "--images", images_folder(step)]
    common += ["--device", step.device, "--set", f"train.workers={workers}", "--set", "train.batch_size=4"]
    for change in ("train.log_every=1", "train.lr=0.005", "train.bf16=true", "train.checkpoint_interval=4"):
        common += ["--set", change]
    common += ["--set", "model.width=8", "--set", "input.min_sizes=[96]"] if step.small else []
    steps = 6 if step.small else 12
    command(step, *common, "--set", f"train.steps={steps}", "--out", folder / "whole")
    resumed = folder / "resumed"

    def saved_states() -> list[Path]:
        return list(resumed.glob("state/step-*.safetensors"))

    process = subprocess.Popen(
        refdet_command(*common, "--set", f"train.steps={steps}", "--out", resumed), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not saved_states():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    messages = process.communicate(timeout=60)[1]
    step.put("training_stopped_with", process.returncode)
    stopped = re.search(r"after step (\d+)", messages)
    step.put("training_stopped_after_step", int(stopped[1]) if stopped else None)
    stopped_early = process.returncode == INTERRUPTED_EXIT_CODE and stopped is not None
    step.check("a training run was stopped before its end", stopped_early)
    command(step, *common, "--set", f"train.steps={steps}", "--out", resumed, "--resume")
    expected, actual = (load_file(folder / name / "model.safetensors") for name in ("whole", "resumed"))
    worst = max(
        float(np.linalg.norm(actual[name].astype(np.float64) - w) / max(np.linalg.norm(w.astype(np.float64)), 1e-6))
        for name, w in expected.items()
        if w.ndim > 1  # not biases: they start at zero, so their relative differences are large
    )
    step.check("trained weights are finite", all(np.isfinite(w).all() for w in actual.values()))
    step.at_most("weights of a training run that was stopped and resumed, relative difference", worst, WEIGHT_TOLERANCE)
    losses = [json.loads(line)["loss"] for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    step.put("training_losses", losses)
    shutil.rmtree(folder)


def work(step: Step) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "4")  # of the commands
    for part in (extraction, automatic_batches, training):
        step.attempt(part.__name__.replace("_", " "), part, step)


if __name__ == "__main__":
    run(work, "parity")
