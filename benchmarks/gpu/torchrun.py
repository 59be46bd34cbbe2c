"""Step: train an FPN network with torchrun: in one process, compared with a plain one, and on all GPUs if several.

A single process under torchrun does everything that several do: it sums counts, losses and gradients, exchanges errors
before each step, and uses DistributedDataParallel. So its speed relative to a plain process shows the overhead.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from results import Step, run
from work import images_folder, instances_file, median, recipe_of, refdet_command, run_folder

NETWORK, ROUNDS = "fpn", 2
MIN_SPEED = 0.97  # relative to a plain process
WINDOW = 5  # steps per timing
# maximum relative differences of losses: of the first window on a GPU, where the order of sums varies, and of three
# steps in float32 on a CPU
LOSS, LOSS_SMALL = 0.05, 1e-4


def train(step: Step, name: str, processes: int | None, batch_size: int, steps: int) -> list[dict[str, float]]:
    """Train, with torchrun unless `processes` is None; returns the rows of metrics.jsonl."""
    out, recipe = step.work / "torchrun" / name, step.work / "torchrun.yaml"
    out.parent.mkdir(exist_ok=True)
    recipe.write_text(json.dumps(recipe_of(step, NETWORK).to_dict()))  # JSON is YAML
    shutil.rmtree(out, ignore_errors=True)
    changes = [f"train.batch_size={batch_size}", f"train.steps={steps}", "train.lr=0.0001"]
    changes += [
        f"train.log_every={1 if step.small else WINDOW}",
        f"train.bf16={str(not step.small).lower()}",
        f"train.workers={0 if step.small else 8 // (processes or 1)}",
    ]
    command = refdet_command(
        "train", "--recipe", recipe, "--instances", instances_file(step), "--images", images_folder(step),
        "--weights", run_folder(step, NETWORK), "--device", step.device, "--out", out,
        *[part for change in changes for part in ("--set", change)],
    )  # fmt: skip
    if processes is not None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *torchrun, *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        step.say(done.stderr[-3000:])
        raise RuntimeError(f"{name} exited with {done.returncode}")
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out)
    return rows


def speed(rows: list[dict[str, float]]) -> float:
    return median([row["images_per_second"] for row in rows[len(rows) // 2 :]])


def compare(step: Step, who: str, found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Check that the first losses are equal within the limit."""
    count, limit = (3, LOSS_SMALL) if step.small else (1, LOSS)
    pairs = [(a["loss"], b["loss"]) for a, b in zip(found[:count], expected[:count], strict=True)]
    worst = float(np.max([abs(a - b) / abs(b) for a, b in pairs]))
    step.at_most(f"losses of {who} and of a plain process, relative difference", worst, limit)


def work(step: Step) -> None:
    batch_size, steps = (4, 4) if step.small else (16, 40)
    plain, alone = [], []
    for number in range(1 if step.small else ROUNDS):  # in turns, as the machine's speed may drift
        for name, processes, found in (("plain", None, plain), ("torchrun", 1, alone)):
            rows = step.attempt(f"{name}, round {number + 1}", train, step, name, processes, batch_size, steps)
            if rows is not None:
                found.append(rows)
                step.put(f"{name}_{number + 1}", {"images_per_second": speed(rows), "steps": steps})
        if plain and alone:
            step.put("torchrun_to_plain_so_far", max(map(speed, alone)) / max(map(speed, plain)))
    if not plain or not alone:
        return
    compare(step, "one process under torchrun", alone[0], plain[0])
    fastest = [max(map(speed, rounds)) for rounds in (alone, plain)]
    step.goal("speed of one process under torchrun to a plain one's", fastest[0] / fastest[1], MIN_SPEED)
    many = 2 if step.small else min(torch.cuda.device_count(), 8)
    if many < 2:
        step.put("more_than_one", "skipped: one GPU")
        return
    per_process = batch_size if not step.small else batch_size // many
    rows = step.attempt(f"{many} processes", train, step, "many", many, per_process * many, steps)
    if rows is not None:
        step.put(f"{many}_processes", {"images_per_second": speed(rows), "steps": steps})
        if step.small:
            compare(step, "two processes", rows, plain[0])
        else:
            step.goal(f"speed of {many} GPUs to that of one", speed(rows) / fastest[1], 0.9 * many)


if __name__ == "__main__":
    run(work, "training")
