"""Series and axes of the charts of recall by number of regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refdet.report.charts import Axes, Series


def split_names(metrics: Mapping[str, Any]) -> list[str]:
    """The splits of evaluate-on-refer's metrics in the usual order: train, val, then the test splits."""
    return sorted(metrics["splits"], key=lambda name: (name != "train", name != "val", name))


def recall_series(metrics: Mapping[str, Any]) -> list[Series]:
    """One line per split: recall at IoU 0.5 at the ticks of `recall_axes`."""
    names = split_names(metrics)
    lines = {name: metrics["splits"][name]["recall@k"] for name in names}
    return [Series(name, list(enumerate(lines[name].values())), 1 + i % 5) for i, name in enumerate(names)]


def recall_axes(metrics: Mapping[str, Any], width: int = 580, height: int = 340) -> Axes:
    """Axes of `recall_series`: evenly spaced ticks of x, one per number of regions."""
    kept = list(next(iter(metrics["splits"].values()))["recall@k"])
    return Axes(
        "top-scoring regions per image",
        "referent recall at IoU 0.5",
        x_ticks=range(len(kept)),
        x_names=kept,
        y_range=(0.0, 1.0),
        width=width,
        height=height,
    )
