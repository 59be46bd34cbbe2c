"""Side by side timing, for the benchmarks of this folder."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def measure(runs: dict[str, Callable[[], Tensor]], repeat: int, device: str) -> dict[str, float]:
    """Median milliseconds of each, taking turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn:  # the first is a warm-up
                times[name].append((time.perf_counter() - start) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}
