"""SVG figure of recall by number of regions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refdet.files.atomic import atomic_write
from refdet.report.charts import line_chart, standalone
from refdet.report.recall import recall_axes, recall_series


def recall_figure(metrics: Mapping[str, Any]) -> str:
    """A standalone SVG of the recall of all splits."""
    title = f"Referent recall of {metrics['dataset']} {metrics['split_by']} by number of regions"
    series, axes = recall_series(metrics), recall_axes(metrics)
    description = "; ".join(f"{s.name} from {s.points[0][1]:.2f} to {s.points[-1][1]:.2f}" for s in series)
    return standalone(line_chart(title, description, series, axes, dots=True), title, series, axes)


def write_recall_figure(out: Path, metrics: Mapping[str, Any]) -> None:
    """Write recall.svg into the folder ``out``."""
    with atomic_write(out / "recall.svg") as temporary:
        temporary.write_text(recall_figure(metrics), encoding="utf-8")
