"""Step: benchmark training of C4 and FPN networks in bfloat16, compared with torchvision under autocast.

Both sides see the same images in batches of 16 and are timed including data loading, after a warm-up.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from statistics import harmonic_mean

import torch
from results import Step, run
from torchvision_training import Examples, TorchvisionC4ForTraining, batches, make_mask_rcnn_fpn, make_train_step
from work import NETWORKS, images_folder, instances_file, recipe_of, run_folder

from refdet.data.coco import CocoIndex
from refdet.training.train import train

LR = 1e-4  # low, so that training from random weights stays finite
WINDOW = 5  # training steps per timing
MAX_SECONDS = 14  # of torchvision's side


def ours(check_step: Step, network: str, batch_size: int) -> dict[str, float]:
    """Train with refdet; returns images per second in the second half of the training steps, and other results."""
    steps = 4 if check_step.small else 40
    window = 1 if check_step.small else WINDOW
    out = check_step.work / f"trained-{network}"
    shutil.rmtree(out, ignore_errors=True)
    changes = [
        "train.bf16=true",
        f"train.batch_size={batch_size}",
        f"train.steps={steps}",
        f"train.log_every={window}",
        f"train.lr={LR}",
        "train.workers=" + ("0" if check_step.small else "8"),
    ]
    reset_peak(check_step)
    started = time.perf_counter()
    recipe = recipe_of(check_step, network)
    train(
        recipe,
        instances_file(check_step),
        images_folder(check_step),
        out,
        changes=changes,
        weights=run_folder(check_step, network),
        device=check_step.device,
    )
    seconds = time.perf_counter() - started
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out)
    speeds = [row["images_per_second"] for row in rows]
    return {
        # all images over all seconds, as for torchvision
        "images_per_second": harmonic_mean(speeds[len(speeds) // 2 :]),
        "first_images_per_second": speeds[0],
        "steps": steps,
        "seconds_in_all": seconds,
        "last_loss": rows[-1]["loss"],
        **peak(check_step),
    }


def theirs(check_step: Step, network: str, batch_size: int) -> dict[str, float]:
    """Train with torchvision; returns images per second in the second half of the training steps, and other results."""
    recipe = recipe_of(check_step, network)
    index = CocoIndex.load(instances_file(check_step))
    examples = Examples(index, Path(images_folder(check_step)))
    torch.manual_seed(0)
    model = (
        TorchvisionC4ForTraining(run_folder(check_step, network))
        if network == "c4"
        else make_mask_rcnn_fpn(recipe, len(index.categories))
    )
    model = model.to(check_step.device)
    reset_peak(check_step)
    train_step = make_train_step(model, check_step.device, LR, autocast=True)
    times, loss, started = [], float("nan"), time.perf_counter()
    workers = 0 if check_step.small else 8
    for number, batch in enumerate(batches(examples, batch_size, workers, on_gpu=not check_step.small)):
        step_start = time.perf_counter()
        if number == (2 if check_step.small else 40) or step_start - started > MAX_SECONDS and number > 5:
            break
        loss = train_step(batch)  # waits for the GPU
        times.append(time.perf_counter())
    between = [b - a for a, b in zip(times, times[1:], strict=False)]
    steady = between[len(between) // 2 :] or [times[0] - started]
    mean = sum(steady) / len(steady)
    return {"images_per_second": batch_size / mean, "steps": len(times), "last_loss": loss, **peak(check_step)}


def reset_peak(check_step: Step) -> None:
    if not check_step.small:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(check_step: Step) -> dict[str, float]:
    return {} if check_step.small else {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def work(check_step: Step) -> None:
    batch_size = 2 if check_step.small else 16
    check_step.put("batch_size", batch_size)
    for network, name in NETWORKS.items():
        speeds = {}
        for side, measure in (("refdet", ours), ("torchvision", theirs)):
            found = check_step.attempt(f"{name}, {side}", measure, check_step, network, batch_size)
            if found is not None:
                check_step.put(f"{name}_{side}", found)
                check_step.say(f"{name}, {side}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
                speeds[side] = found["images_per_second"]
        if len(speeds) == 2:
            ratio = speeds["refdet"] / speeds["torchvision"]
            check_step.goal(f"{name}, training speed relative to torchvision's", ratio, 2.5)


if __name__ == "__main__":
    run(work, "training")
