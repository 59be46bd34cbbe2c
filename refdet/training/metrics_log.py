"""Training metrics of a run directory: ``metrics.jsonl`` and TensorBoard event files."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from refdet.config.renamed_keys import LOSSES
from refdet.files.atomic import atomic_write
from refdet.files.json_files import read_bytes
from refdet.files.short_text import format_count
from refdet.training.metrics_rows import METRICS, VALIDATION_PREFIX, parse_row
from refdet.training.run_folder import MAX_LOG_BYTES

log = logging.getLogger(__name__)

_EVENTS = "events.out.tfevents.*"


class MetricsLog:
    """Context manager that logs the metrics of steps and validations.

    Rows of steps after `first`, left by a killed run, are dropped, in TensorBoard too.

    Args:
        folder: the run directory, locked by the caller.
        first: number of steps done before, from which the run resumes; 0 for a new run.

    Raises:
        InputError: ``metrics.jsonl`` is not a regular file or too large.
    """

    def __init__(self, folder: Path, first: int) -> None:
        _truncate_after(folder / METRICS, first)
        if first == 0:
            for events in folder.glob(_EVENTS):
                events.unlink()
        _wait_for_new_timestamp(folder)
        self._board = SummaryWriter(str(folder), purge_step=first + 1 if first else None)
        self._file = (folder / METRICS).open("a", encoding="utf-8")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Log the metrics of a step, counted from 1."""
        old_names = {LOSSES[name]: value for name, value in row.items() if name in LOSSES}  # for older readers
        self._file.write(json.dumps({"step": step, **row, **old_names}) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(f"train/{name}", value, step)

    def write_validation(self, step: int, row: Mapping[str, float | str]) -> None:
        """Log the metrics of a validation after a step; in TensorBoard they are under ``val/``."""
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, float):
                self._board.add_scalar(f"val/{name.removeprefix(VALIDATION_PREFIX)}", value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


def _wait_for_new_timestamp(folder: Path) -> None:
    """Wait until the name of a new event file would sort last, as TensorBoard reads the files in the order of names.

    The name has the time in seconds. Waits for a second at most, even if a file is of the future.
    """
    times = [int(part) for path in folder.glob(_EVENTS) if (part := path.name.split(".")[3]).isdecimal()]
    if times:
        time.sleep(min(max(max(times) + 1 - time.time(), 0), 1))


def _truncate_after(metrics: Path, step: int) -> None:
    """Drop the rows after a step, and damaged rows with a warning."""
    if not os.path.lexists(metrics):  # not `exists`: a dangling link is an error
        return
    kept, damaged = [], 0
    for line in read_bytes(metrics, MAX_LOG_BYTES).decode("utf-8", "replace").splitlines():
        row = parse_row(line)
        if row is None:
            damaged += bool(line.strip())
        elif row["step"] <= step:
            kept.append(line)
    if damaged:
        log.warning("note: %s: %s damaged and left out", metrics, format_count(damaged, "line", "is"))
    with atomic_write(metrics) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
