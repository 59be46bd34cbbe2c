"""Time of the steps of a training, without the validations between them, and what is left of both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from refdet.files.progress import exclude_pause


class TrainingClock:
    """Clock of a run, started when it is made.

    Args:
        first: the step that the run starts from.
        steps: number of steps of the whole run.
    """

    def __init__(self, first: int, steps: int) -> None:
        self._first, self._steps = first, steps
        self._started = self._lap = time.perf_counter()
        self._paused, self._pauses = 0.0, 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    @property
    def step_seconds(self) -> float:
        """Since the start, without pauses."""
        return self.seconds - self._paused

    def lap(self) -> float:
        """Seconds of steps since the last call, or the start."""
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        return seconds

    @contextmanager
    def pause(self, bar: tqdm[Any]) -> Iterator[None]:
        """Keep the time of a validation out of the speed of the steps, and out of that of their bar."""
        started = time.perf_counter()
        try:
            yield
        finally:
            pause_seconds = time.perf_counter() - started
            self._lap += pause_seconds
            self._paused, self._pauses = self._paused + pause_seconds, self._pauses + 1
            exclude_pause(bar, pause_seconds)

    def time_left(self, step: int, pauses: int) -> str:
        """Time until the end with the validations still to come, such as "1:02:03"; "" before it can be known."""
        if step == self._first or (pauses and not self._pauses):
            return ""
        seconds = self.step_seconds / (step - self._first) * (self._steps - step)
        if pauses:
            seconds += self._paused / self._pauses * pauses
        return tqdm.format_interval(seconds)
