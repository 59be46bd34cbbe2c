"""Defaults of an extraction that depend on the device."""

from __future__ import annotations

import os

import torch

CPU_BATCH_SIZE = 4
WORKERS = {"cpu": 2, "cuda": 8}  # a GPU is faster than two threads that decode JPEGs


def default_batch_size(device: torch.device) -> int | None:
    """Images per batch: 4 on a CPU; None on a GPU, for as many as fit."""
    return None if device.type == "cuda" else CPU_BATCH_SIZE


def default_workers(device: torch.device) -> int:
    """Threads that load images: 2; on a GPU 8, but not more than there are cores."""
    return max(WORKERS["cpu"], min(WORKERS.get(device.type, WORKERS["cpu"]), _cores()))


def precision_hint(device: torch.device, precision: str) -> str | None:
    """A line for a run in float32 on a GPU that has bfloat16 arithmetic; None for others."""
    if device.type != "cuda" or precision != "float32" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return "note: float32 is exact; `precision='bfloat16'` uses the matrix units of this GPU, with rounded features"


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
