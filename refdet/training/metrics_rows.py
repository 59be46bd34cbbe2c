"""Rows of ``metrics.jsonl``: those of steps, and those of validations."""

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
"""Prefix of the rates of a validation, such as val_bbox_AP50."""
DATA_HASH_KEY = "data_sha256"
"""Hash of the data of a validation; older rows do not have it."""


def row_of(line: str) -> dict[str, Any] | None:
    """A row, with its step as an int; None if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The undamaged rows of a run directory, in order; none without a log."""
    path = folder / METRICS
    if not path.is_file():
        return []
    lines = read_bytes(path, MAX_LOG_BYTES).decode("utf-8", "replace").splitlines()
    return [row for line in lines if (row := row_of(line)) is not None]


def number_of(row: Mapping[str, Any], name: str) -> float | None:
    """A number of a row; None if there is none, or it is not finite."""
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def is_validation(row: Mapping[str, Any]) -> bool:
    """Whether a row has the rates of a validation."""
    return number_of(row, f"{VALIDATION_PREFIX}bbox_AP") is not None
