"""Benchmarks refdet's box matching against the full IoU matrix, by refdet's fallback and by torchvision.

Candidates are the anchors of a 90x93 map with 12 anchors per cell, or boxes around the objects, as RPN proposals are.
Times are medians of rounds in which all implementations take turns. Memory is the peak during a call, less what was
allocated before it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from timing import Row, Settings
from torch import Tensor
from torchvision.ops import box_iou

from refdet.detector.anchors import cell_anchors
from refdet.ops.matching import match_boxes, match_boxes_plain

ROWS, COLUMNS, STRIDE = 90, 93, 16
CASES = {"anchors": (ROWS * COLUMNS * 12, 100), "RoIs": (2000, 20)}  # numbers of candidates and of objects
RESULT_BYTES = 4 + 8 + 1  # per candidate: its IoU, its object, and whether it is the best one


def objects_of(count: int, random: torch.Generator) -> Tensor:
    """Boxes (count, 4) of 20 to 420 pixels."""
    corner = torch.rand(count, 2, generator=random) * torch.tensor([COLUMNS, ROWS]) * STRIDE
    return torch.cat((corner, corner + 20 + 400 * torch.rand(count, 2, generator=random) ** 2), dim=1)


def problem(name: str) -> tuple[Tensor, Tensor]:
    """Candidates (N, 4) and objects (M, 4)."""
    random = torch.Generator().manual_seed(0)
    count, object_count = CASES[name]
    objects = objects_of(object_count, random)
    if name == "anchors":
        y, x = torch.meshgrid(torch.arange(ROWS) * STRIDE, torch.arange(COLUMNS) * STRIDE, indexing="ij")
        cell = cell_anchors((64, 128, 256, 512), (0.5, 1, 2))
        return (torch.stack((x, y, x, y), dim=2)[:, :, None] + cell).reshape(-1, 4).float(), objects
    chosen = objects[torch.randint(object_count, (count,), generator=random)]
    sides = (chosen[:, 2:] - chosen[:, :2]).repeat(1, 2)
    return chosen + 0.2 * sides * torch.randn(count, 4, generator=random), objects


def with_torchvision(candidates: Tensor, objects: Tensor) -> tuple[Tensor, ...]:
    """The results of `match_boxes` from torchvision's IoU matrix, and the highest IoU of each object."""
    overlaps = box_iou(candidates, objects)
    best, matched = overlaps.max(dim=1)
    most = overlaps.amax(dim=0)
    return best, matched, most, ((overlaps == most) & (most > 0)).any(dim=1)


IMPLEMENTATIONS = {"refdet": match_boxes, "plain": match_boxes_plain, "torchvision": with_torchvision}


def peak_of(peer: str, name: str, device: str) -> float:
    """Peak memory of one call in MB, less what was allocated before it."""
    candidates, objects = (tensor.to(device) for tensor in problem(name))
    IMPLEMENTATIONS[peer](candidates[:10], objects[:2])  # a warm-up, which loads libraries
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        IMPLEMENTATIONS[peer](candidates, objects)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = _peak_kib()
    IMPLEMENTATIONS[peer](candidates, objects)
    return (_peak_kib() - before) * 1024 / 1e6


def _peak_kib() -> int:
    """Peak resident memory of this process in KiB."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def memory(name: str, device: str) -> dict[str, float]:
    """`peak_of` each implementation; on the CPU in a process each, as freed memory may stay resident."""
    if device.startswith("cuda"):
        return {f"{peer}_mb": round(peak_of(peer, name, device), 1) for peer in IMPLEMENTATIONS}
    found = {}
    for peer in IMPLEMENTATIONS:
        command = [sys.executable, "-c", f"import matching; print(matching.peak_of({peer!r}, {name!r}, {device!r}))"]
        here = Path(__file__).parent
        text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here).stdout
        found[f"{peer}_mb"] = round(float(text), 1)
    return found


def rows(settings: Settings) -> list[Row]:
    """Rows of the table."""
    results = []
    for name, (count, object_count) in CASES.items():
        candidates, objects = (tensor.to(settings.device) for tensor in problem(name))
        runs = {peer: partial(run, candidates, objects) for peer, run in IMPLEMENTATIONS.items()}
        same = all(a.equal(b) for a, b in zip(runs["refdet"](), runs["plain"](), strict=True))
        times = settings.measure(runs)
        results.append(
            {"what": name, "candidates": count, "objects": object_count, "same_as_plain": same}
            | {f"{peer}_ms": round(value, 3) for peer, value in times.items()}
            | {"ratio": round(min(times["plain"], times["torchvision"]) / times["refdet"], 1)}
            | memory(name, settings.device)
            | settings.roof(candidates.nbytes + objects.nbytes + count * RESULT_BYTES, times["refdet"])
        )
    return results
