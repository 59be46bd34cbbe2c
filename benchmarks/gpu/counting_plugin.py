"""A pytest plugin that writes the numbers of passed, failed and skipped tests to a file during the run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

TARGET = "REFDET_GPU_COUNTS"


class Counting:
    """Counts test reports, with pytest-xdist those of all workers."""

    def __init__(self, path: Path) -> None:
        self.path, self.written = path, 0.0
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failed: list[str] = []
        self.reasons: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.counts["failed"] += 1
            self.failed.append(f"{report.nodeid} ({report.when})")
        elif report.skipped:
            self.counts["skipped"] += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        elif report.when == "call":
            self.counts["passed"] += 1
        else:
            return
        if time.monotonic() - self.written > 0.5:
            self.write()

    def write(self) -> None:
        """Replace the file."""
        self.written = time.monotonic()
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps({**self.counts, "failures": self.failed, "skip_reasons": self.reasons}))
        temporary.replace(self.path)

    def pytest_sessionfinish(self) -> None:
        self.write()


def pytest_configure(config: pytest.Config) -> None:
    if TARGET in os.environ and not hasattr(
        config, "workerinput"
    ):  # not in xdist workers, which report to the main process
        config.pluginmanager.register(Counting(Path(os.environ[TARGET])), "counting")
