"""Time spent on training steps, without the validations between them, and the estimated time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from refdet.files.progress import exclude_pause


class TrainingClock:
    """Clock of a run. It starts when it is created; its *pauses* are the validations.

    Args:
        first: number of steps done before, from which the run resumes; 0 for a new run.
        steps: number of steps of the whole run.
    """

    def __init__(self, first: int, steps: int) -> None:
        self._first, self._steps = first, steps
        self._started = self._lap = time.perf_counter()
        self._paused, self._pauses = 0.0, 0

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    @property
    def step_seconds(self) -> float:
        """Seconds since the start, without pauses."""
        return self.seconds - self._paused

    def lap(self) -> float:
        """Seconds since the last call or the start, without pauses."""
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        return seconds

    @contextmanager
    def pause(self, bar: tqdm[Any]) -> Iterator[None]:
        """Context manager that excludes a validation from the speed of the steps and of their progress bar."""
        started = time.perf_counter()
        try:
            yield
        finally:
            pause_seconds = time.perf_counter() - started
            self._lap += pause_seconds
            self._paused, self._pauses = self._paused + pause_seconds, self._pauses + 1
            exclude_pause(bar, pause_seconds)

    def time_left(self, step: int, pauses: int) -> str:
        """Estimate the time until the end of the run, such as "1:02:03".

        Args:
            step: number of steps done.
            pauses: number of validations still to come.

        Returns:
            The time; "" if this run has done no step yet, or has validations to come but has done none yet.
        """
        if step == self._first or (pauses and not self._pauses):
            return ""
        seconds = self.step_seconds / (step - self._first) * (self._steps - step)
        if pauses:
            seconds += self._paused / self._pauses * pauses
        return tqdm.format_interval(seconds)
