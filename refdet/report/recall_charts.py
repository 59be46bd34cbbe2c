"""Charts of recall by number of regions and by IoU threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refdet.report.charts import Axes, Chart, Series, line_chart, standalone_svg

THRESHOLDS = ("0.5", "0.6", "0.7", "0.8", "0.9")
PANEL_SIZE: Any = {"width": 320, "height": 220}  # in points, of a chart that shares a row with others


def split_names(metrics: Mapping[str, Any]) -> list[str]:
    """The splits of evaluate-on-refer's metrics in the usual order: train, val, then the test splits."""
    return sorted(metrics["splits"], key=lambda name: (name != "train", name != "val", name))


def recall_figure(metrics: Mapping[str, Any]) -> str:
    """SVG of the recall of all splits by number of regions."""
    title = f"Referent recall of {metrics['dataset']} {metrics['split_by']} by number of regions"
    return standalone_svg(title, _by_regions(metrics), _axes(metrics))


def charts_by_regions(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Recall by number of regions, a chart per dataset."""
    return [_chart(entry, "number of regions", _by_regions(entry), _axes(entry, **PANEL_SIZE)) for entry in metrics]


def charts_by_iou(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Recall by IoU threshold, a chart per dataset."""
    axes = Axes("IoU threshold", "referent recall", [float(t) for t in THRESHOLDS], (0.0, 1.0), **PANEL_SIZE)
    charts = []
    for entry in metrics:
        recall = {name: entry["splits"][name]["referent_recall"] for name in split_names(entry)}
        lines = {name: [(float(t), rates[t]) for t in THRESHOLDS] for name, rates in recall.items()}
        charts.append(_chart(entry, "IoU", _series(lines), axes))
    return charts


def _chart(metrics: Mapping[str, Any], by: str, series: Sequence[Series], axes: Axes) -> Chart:
    """A chart of recall, with the dataset of the metrics as its title; ``by`` names the quantity of x."""
    description = "; ".join(f"{s.name} from {s.points[0][1]:.2f} to {s.points[-1][1]:.2f}" for s in series)
    title = f"{metrics['dataset']} {metrics['split_by']}"
    return line_chart(title, f"Referent recall of {title} by {by}: {description}", series, axes, dots=True)


def _by_regions(metrics: Mapping[str, Any]) -> list[Series]:
    """One line per split: recall at IoU 0.5, at the x ticks of `_axes`."""
    recall = {name: metrics["splits"][name]["recall@k"] for name in split_names(metrics)}
    return _series({name: list(enumerate(rates.values())) for name, rates in recall.items()})


def _axes(metrics: Mapping[str, Any], **size: Any) -> Axes:
    """Axes whose x ticks are evenly spaced, one per number of regions."""
    counts = list(next(iter(metrics["splits"].values()))["recall@k"])
    label = "top-scoring regions per image"
    return Axes(label, "referent recall at IoU 0.5", range(len(counts)), (0.0, 1.0), x_names=counts, **size)


def _series(lines: Mapping[str, list[tuple[float, float]]]) -> list[Series]:
    """Lines in different colors; ``lines`` is name -> (x, y) points."""
    # style 0 is the color of text
    return [Series(name, points, 1 + i % 5) for i, (name, points) in enumerate(lines.items())]
