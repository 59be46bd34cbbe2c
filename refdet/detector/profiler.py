"""Measure the time spent in each part of the network without synchronizing with a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MAX_PENDING = 512  # GPU measurements kept before the older half is read


class Profiler:
    """Measures the seconds spent in each part of the network: wall time, or on a GPU the time between CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the ``with`` block to the part `name`."""
        if not self._on_gpu:
            started = time.perf_counter()
            try:
                yield
            finally:
                self._add(name, time.perf_counter() - started)
            return
        begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(self._device))
        try:
            yield
        finally:
            end.record(torch.cuda.current_stream(self._device))
            self._pending.append((name, begin, end))
            if len(self._pending) > _MAX_PENDING:
                self._read(_MAX_PENDING // 2)

    def seconds(self) -> dict[str, float]:
        """Part -> seconds so far, in order of first use; waits for the GPU."""
        self._read(len(self._pending))
        return dict(self._seconds)

    def _read(self, count: int) -> None:
        """Wait for the oldest `count` GPU measurements and add their times."""
        for name, begin, end in self._pending[:count]:
            end.synchronize()
            self._add(name, begin.elapsed_time(end) / 1000)
        del self._pending[:count]

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
