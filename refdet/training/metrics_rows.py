"""Rows of ``metrics.jsonl``, of training steps and of validations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refdet.files.json_files import read_bytes
from refdet.training.run_folder import MAX_LOG_BYTES

METRICS = "metrics.jsonl"
VALIDATION_PREFIX = "val_"
"""Prefix of the metrics of a validation, such as val_bbox_AP50."""
DATA_HASH_KEY = "data_sha256"
"""Key of the hash of the validation data; older rows do not have it."""


def parse_row(line: str) -> dict[str, Any] | None:
    """Parse a line of metrics.jsonl, an object with an integer "step"; None if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the undamaged rows of a run directory's metrics.jsonl, in order; [] without such a file."""
    path = folder / METRICS
    if not path.is_file():
        return []
    lines = read_bytes(path, MAX_LOG_BYTES).decode("utf-8", "replace").splitlines()
    return [row for line in lines if (row := parse_row(line)) is not None]


def finite_number(row: Mapping[str, Any], name: str) -> float | None:
    """The value of a row's key; None if it is missing, not a number, not finite or huge."""
    value = row.get(name)
    # the limit is for an int that float() cannot convert
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def is_validation(row: Mapping[str, Any]) -> bool:
    """Whether a row has the metrics of a validation."""
    return finite_number(row, f"{VALIDATION_PREFIX}bbox_AP") is not None
