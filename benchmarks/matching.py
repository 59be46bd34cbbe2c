"""Times refdet's matching of boxes beside the plain matrix of overlaps and torchvision's.

Candidates are the anchors of a map of 90x93 cells with 12 anchors each, in the detector's order, or boxes about
the objects as the proposals of an RPN are. Times are medians of rounds in which all take turns; memory is the
peak of one call above what was held before it.
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
CASES = {"anchors": (ROWS * COLUMNS * 12, 100), "RoIs": (2000, 20)}  # candidates, objects


def objects_of(count: int, random: torch.Generator) -> Tensor:
    """Boxes (count, 4) of 20 to 420 pixels."""
    corner = torch.rand(count, 2, generator=random) * torch.tensor([COLUMNS, ROWS]) * STRIDE
    return torch.cat((corner, corner + 20 + 400 * torch.rand(count, 2, generator=random) ** 2), dim=1)


def problem(name: str) -> tuple[Tensor, Tensor]:
    """Candidates (N, 4) and objects (M, 4)."""
    random = torch.Generator().manual_seed(0)
    count, known = CASES[name]
    objects = objects_of(known, random)
    if name == "anchors":
        y, x = torch.meshgrid(torch.arange(ROWS) * STRIDE, torch.arange(COLUMNS) * STRIDE, indexing="ij")
        cell = cell_anchors((64, 128, 256, 512), (0.5, 1, 2))
        return (torch.stack((x, y, x, y), dim=2)[:, :, None] + cell).reshape(-1, 4).float(), objects
    chosen = objects[torch.randint(known, (count,), generator=random)]
    sides = (chosen[:, 2:] - chosen[:, :2]).repeat(1, 2)
    return chosen + 0.2 * sides * torch.randn(count, 4, generator=random), objects


def with_torchvision(candidates: Tensor, objects: Tensor) -> tuple[Tensor, ...]:
    overlaps = box_iou(candidates, objects)
    best, matched = overlaps.max(dim=1)
    most = overlaps.amax(dim=0)
    return best, matched, most, ((overlaps == most) & (most > 0)).any(dim=1)


WAYS = {"refdet": match_boxes, "plain": match_boxes_plain, "torchvision": with_torchvision}


def peak_of(way: str, name: str, device: str) -> float:
    """MB that one call takes at most above what was held before it."""
    candidates, objects = (tensor.to(device) for tensor in problem(name))
    WAYS[way](candidates[:10], objects[:2])
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WAYS[way](candidates, objects)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew from what is held now
    before = _high_mark()
    WAYS[way](candidates, objects)
    return (_high_mark() - before) * 1024 / 1e6


def _high_mark() -> int:
    """The most memory, in KiB, that this process has held."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def memory(name: str, device: str) -> dict[str, float]:
    """`peak_of` all ways; on the CPU each in a process of its own: the highest mark of one never goes down again."""
    if device.startswith("cuda"):
        return {f"{way}_mb": round(peak_of(way, name, device), 1) for way in WAYS}
    found = {}
    for way in WAYS:
        command = [sys.executable, "-c", f"import matching; print(matching.peak_of({way!r}, {name!r}, {device!r}))"]
        here = Path(__file__).parent
        text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here).stdout
        found[f"{way}_mb"] = round(float(text), 1)
    return found


def rows(settings: Settings) -> list[Row]:
    """The table."""
    results = []
    for name, (count, known) in CASES.items():
        candidates, objects = (tensor.to(settings.device) for tensor in problem(name))
        runs = {way: partial(run, candidates, objects) for way, run in WAYS.items()}
        same = all(a.equal(b) for a, b in zip(runs["refdet"](), runs["plain"](), strict=True))
        found = settings.measure(runs)
        results.append(
            {"what": name, "candidates": count, "objects": known, "same_as_plain": same}
            | {f"{way}_ms": round(value, 3) for way, value in found.items()}
            | {"ratio": round(min(found["plain"], found["torchvision"]) / found["refdet"], 1)}
            | memory(name, settings.device)
            | settings.roof(candidates.nbytes + objects.nbytes + count * 13, found["refdet"])
        )
    return results
