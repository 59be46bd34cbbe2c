"""Step: the tables of ops.py on the GPU: refdet's kernels, torchvision's, and the share of the memory bandwidth."""

from __future__ import annotations

import matching
import nms
import pooling
from results import Step, read_group, run
from timing import Settings

TABLES = {"pooling": pooling.rows, "nms": nms.rows, "matching": matching.rows}


def work(step: Step) -> None:
    measured = read_group(step.out, "env").get("env", {}).get("copy_tb_per_s")
    rounds = 2 if step.small else 11
    settings = Settings(repeat=rounds, device=step.device, bandwidth=measured or Settings.bandwidth)
    step.put("bandwidth_tb_per_s", settings.bandwidth)
    if step.small:  # only some of the smallest cases
        nms.CASES, pooling.CASES = nms.CASES[2:3], pooling.CASES[-4:-2]  # type: ignore[misc]
        matching.CASES.pop("anchors")
    for name, rows in TABLES.items():
        table = step.attempt(name, rows, settings)
        if not table:
            continue
        step.put(name, table)
        for row in table:
            step.say(", ".join(f"{key} {value}" for key, value in row.items()))
        ratios = [row["ratio"] for row in table]
        step.goal(f"{name}, slowest row against torchvision", min(ratios), 1.0)


if __name__ == "__main__":
    run(work, "ops")
