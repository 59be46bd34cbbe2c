"""Settings, timing and tables of the benchmarks in ops.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Attributes:
        repeat: number of rounds, of which the median is taken.
        device: "cpu" or "cuda".
        bandwidth: memory bandwidth of the GPU in TB/s.
    """

    repeat: int = 20
    device: str = "cpu"
    bandwidth: float = 4.8

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def roof(self, bytes_moved: int, milliseconds: float) -> Row:
        """Megabytes to move, and the share of the measured time that the GPU's memory needs for it; empty on a CPU."""
        if not self.on_gpu:
            return {}
        return {
            "MB": round(bytes_moved / 1e6, 2),
            "of_roof": round(bytes_moved / (self.bandwidth * 1e9) / milliseconds, 4),
        }

    def measure(self, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median milliseconds of each run; they take turns, so that other load on the machine slows all of them."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(self.repeat + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if self.on_gpu:
                    torch.cuda.synchronize()
                if turn:  # the first round is a warm-up
                    times[name].append((time.perf_counter() - start) * 1000)
        return {name: statistics.median(values) for name, values in times.items()}


def in_columns(rows: Sequence[Row]) -> str:
    """Format rows with the same keys as a table."""
    if not rows:
        return "nothing to measure"
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]}
    lines = ["  ".join(f"{name:>{width}}" for name, width in widths.items())]
    lines += ["  ".join(f"{row[name]!s:>{width}}" for name, width in widths.items()) for row in rows]
    return "\n".join(lines)
