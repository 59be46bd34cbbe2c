"""Recall against the number of regions kept: the lines and axes of its charts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refdet.report.charts import Axes, Series


def split_names(metrics: Mapping[str, Any]) -> list[str]:
    """The splits of evaluate-on-refer's metrics in the order people expect: train, val, then the tests."""
    return sorted(metrics["splits"], key=lambda name: (name != "train", name != "val", name))


def recall_series(metrics: Mapping[str, Any]) -> list[Series]:
    """One line a split: recall at IoU 0.5 over the positions of `recall_axes`' ticks."""
    names = split_names(metrics)
    lines = {name: metrics["splits"][name]["recall@k"] for name in names}
    return [Series(name, list(enumerate(lines[name].values())), 1 + i % 5) for i, name in enumerate(names)]


def recall_axes(metrics: Mapping[str, Any], width: int = 580, height: int = 340) -> Axes:
    """Axes of `recall_series`: x has a place for each number of regions, evenly spaced."""
    kept = list(next(iter(metrics["splits"].values()))["recall@k"])
    return Axes(
        "top-scoring regions per image", "referent recall at IoU 0.5",
        x_ticks=range(len(kept)), x_names=kept, y_range=(0.0, 1.0), width=width, height=height,
    )  # fmt: skip
