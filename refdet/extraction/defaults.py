"""Defaults of an extraction that depend on the device."""

from __future__ import annotations

import os

import torch

CPU_BATCH_SIZE = 4
_BFLOAT16_CAPABILITY = (8, 0)  # Ampere, the first GPUs with bfloat16 arithmetic
WORKERS = {"cpu": 2, "cuda": 8}  # a GPU computes faster than two threads decode JPEGs


def default_batch_size(device: torch.device) -> int | None:
    """Images per batch: 4 on a CPU; None on a GPU, for as many as fit into memory."""
    return None if device.type == "cuda" else CPU_BATCH_SIZE


def default_workers(device: torch.device) -> int:
    """Threads that load images: 2, or on a GPU as many as there are cores, 2 to 8."""
    return max(WORKERS["cpu"], min(WORKERS.get(device.type, WORKERS["cpu"]), _count_cores()))


def precision_hint(device: torch.device, precision: str) -> str | None:
    """A hint about bfloat16 for an extraction in float32 on a GPU that supports it; None otherwise."""
    if (
        device.type != "cuda"
        or precision != "float32"
        or torch.cuda.get_device_capability(device) < _BFLOAT16_CAPABILITY
    ):
        return None
    return "note: float32 is exact; `precision='bfloat16'` uses the matrix units of this GPU, with rounded features"


def _count_cores() -> int:
    """Number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
