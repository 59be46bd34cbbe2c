"""How long each part of the network takes, on its device and without keeping it waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PENDING = 512  # measurements of a GPU that are not read yet; by then the first are long done


class Stages:
    """Seconds of each part of the network's work.

    On the CPU by the clock. On a GPU by events in its stream, so that they are the times of the device, which may
    lie after those in which the work was given to it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure what is done within it as a part of this name."""
        if not self._on_gpu:
            started = time.perf_counter()
            try:
                yield
            finally:
                self._add(name, time.perf_counter() - started)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        try:
            yield
        finally:
            end.record()
            self._pending.append((name, begin, end))
            if len(self._pending) > _PENDING:
                self._read(_PENDING // 2)

    def seconds(self) -> dict[str, float]:
        """Part -> seconds until now, in the order of the work; waits for a GPU to finish."""
        self._read(len(self._pending))
        return dict(self._seconds)

    def _read(self, count: int) -> None:
        for name, begin, end in self._pending[:count]:
            end.synchronize()
            self._add(name, begin.elapsed_time(end) / 1000)
        del self._pending[:count]

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
