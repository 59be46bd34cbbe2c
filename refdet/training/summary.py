"""The result of a training run. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Result of a training run.

    Attributes:
        steps: number of steps done, including those before resuming.
        seconds: wall time since the run was started or resumed, including validations.
        images_per_second: mean throughput of the steps since then.
        loss: mean loss over the last logging interval; None if all steps were already done.
    """

    steps: int
    seconds: float
    images_per_second: float
    loss: float | None
