"""The validations in a run's metrics.jsonl, and the chart of their AP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.files.json_files import read_bytes
from refdet.files.short_text import shorten
from refdet.files.strict_json import strict_json
from refdet.report.charts import Axes, Chart, Series, line_chart
from refdet.report.fields import count, optional_number
from refdet.training.metrics_rows import DATA_HASH_KEY
from refdet.training.run_folder import MAX_LOG_BYTES

AP_KEYS = (
    ("val_bbox_AP", "box AP"),
    ("val_bbox_AP50", "box AP50"),
    ("val_segm_AP", "mask AP"),
    ("val_segm_AP50", "mask AP50"),
)
MARK_POINTS_BELOW = 30  # validations below which each point of the curves is marked


def read_validations(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the validations in metrics.jsonl that are on the same data as the last one.

    If several have the same step and weights, only the last of them counts.

    Lines that are not JSON are skipped here; `read_log` raises an error for them.

    Args:
        path: the file; without it, there are no validations.

    Returns:
        Rows with "step" and AP in 0..1, in ascending order of the step; and the number of validations on other data,
        which are left out as their AP is not comparable.

    Raises:
        InputError: a step or an AP is not a number.
    """
    if not path.exists():
        return [], 0
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}  # (hash of the data, weights, step) -> row
    newest = ""  # hash of the data of the last validation
    for number, line in enumerate(read_bytes(path, MAX_LOG_BYTES).split(b"\n"), 1):
        if b'"val_' not in line:
            continue
        try:
            row = strict_json(line)
        except InputError:
            continue
        where = f"{path}, line {number}"
        if isinstance(row, dict) and any(name in row for name, _ in AP_KEYS):
            for name, _ in AP_KEYS:
                if name in row:
                    optional_number(row, name, where)
            newest = str(row.get(DATA_HASH_KEY))
            rows[newest, _weights_label(row), count(row, "step", where)] = row
    kept = [row for (data_hash, _, _), row in rows.items() if data_hash == newest]
    return sorted(kept, key=lambda row: row["step"]), len(rows) - len(kept)


def validation_chart(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """AP and AP50 of boxes and masks by step, in separate curves for trained and averaged weights."""
    series = []
    for weights in dict.fromkeys(_weights_label(row) for row in rows):
        rows_of_weights = [row for row in rows if _weights_label(row) == weights]
        for style, (key, name) in enumerate(AP_KEYS, 1):
            points = [(row["step"], row[key]) for row in rows_of_weights if row.get(key) is not None]
            if points:
                series.append(Series(f"{name} ({weights})" if weights else name, points, style))
    description = "; ".join(
        f"{curve.name} {curve.points[-1][1]:.3f} at step {curve.points[-1][0]}, highest "
        f"{max(y for _, y in curve.points):.3f}" for curve in series
    )  # fmt: skip
    axes = Axes("training step", "average precision", y_range=(0.0, max(_highest(series), 0.05)))  # not 0 to 0
    return line_chart("Validation AP by step", description, series, axes, dots=len(rows) < MARK_POINTS_BELOW)


def _weights_label(row: Mapping[str, Any]) -> str:
    """Label of the weights that a row is of: "" for the trained weights, "averaged weights" for their EMA."""
    weights = row.get("weights")
    if weights is None:
        return ""
    return "averaged weights" if weights == "ema" else shorten(str(weights), 20)


def _highest(series: Sequence[Series]) -> float:
    """The highest y of all curves, at most 1; 1 without points."""
    return max((min(y, 1.0) for curve in series for _, y in curve.points), default=1.0)
