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
    """Parse a row, which must have an int step; None if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The undamaged rows of a run directory, in order; [] without a log."""
    path = folder / METRICS
    if not path.is_file():
        return []
    lines = read_bytes(path, MAX_LOG_BYTES).decode("utf-8", "replace").splitlines()
    return [row for line in lines if (row := parse_row(line)) is not None]


def finite_number(row: Mapping[str, Any], name: str) -> float | None:
    """A number in a row; None if it is missing or not finite."""
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e300:  # a huge int has no float
        return None
    return float(value) if math.isfinite(value) else None


def is_validation(row: Mapping[str, Any]) -> bool:
    """Whether a row has the metrics of a validation."""
    return finite_number(row, f"{VALIDATION_PREFIX}bbox_AP") is not None
