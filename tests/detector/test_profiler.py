"""`Profiler` records events on the current stream of its device."""

from __future__ import annotations

import pytest
import torch

from refdet.detector.profiler import Profiler


@pytest.mark.parametrize("count", [3, 1200])
def test_events_are_recorded_on_the_device_that_computes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Which need not be the current device. Events are blocking, so that waiting does not occupy a core."""
    clock = iter(range(10**6))

    class Event:
        def __init__(self, *, enable_timing: bool, blocking: bool) -> None:
            assert enable_timing and blocking

        def record(self, stream: object) -> None:
            assert stream == "stream of cuda:1"
            self.at = next(clock)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    profiler = Profiler(torch.device("cuda:1"))
    for _ in range(count):
        with profiler("backbone"):
            pass
    assert profiler.seconds() == {"backbone": pytest.approx(count / 1000)}
