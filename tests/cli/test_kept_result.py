"""The result of an evaluation, which is in no file, goes to stderr if stdout cannot be written to."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import click
import pytest
from detector_folder import DetectorFolder

from refdet.cli.main import OUTPUT_LOST
from refdet.evaluation import detection
from refdet.evaluation.average_precision import METRICS


@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_metrics_that_stdout_loses_are_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int
) -> None:
    echo = click.echo

    def fail_on_stdout(*args: Any, err: bool = False, **more: Any) -> None:
        if not err:
            raise OSError(code, "lost")
        echo(*args, err=True, **more)

    metrics = {"bbox": dict.fromkeys(METRICS, 0.5), "segm": None}
    monkeypatch.setattr(detection, "evaluate", lambda *args, **more: metrics)
    monkeypatch.setattr(click, "echo", fail_on_stdout)
    done = DetectorFolder(tmp_path, 1).command("evaluate", *options)
    assert done.exit_code == OUTPUT_LOST and done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if "cannot be written to stdout" in line)
    assert json.loads(line[line.index("{") :]) == metrics
