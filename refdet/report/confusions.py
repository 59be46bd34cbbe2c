"""A chart of the categories that the detector confuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from refdet.evaluation.detection_errors import DetectionErrors
from refdet.report.charts import INK, SERIES, Axes, Chart, custom_chart, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Plot

MAX_CATEGORIES = 16  # rows of the matrix
MAX_NAME_LENGTH = 18  # characters of a category's name
_CELL_SIZE = 26  # points
_MARGIN = 150  # points for the names beside and below the cells
_MIN_SHARE = 0.005  # of a cell with a number; smaller shares round to 0%


def confusion_map(errors: DetectionErrors, names: Mapping[int, str]) -> Chart:
    """Confusion matrix of the most confused categories, in percent.

    A row is the category of objects, a column the category of their best-scoring region; the last two columns are for
    a region of a category without a column, and for no region at all. Each row adds up to 100%.

    Args:
        errors: counts of the regions.
        names: category id -> name.

    Returns:
        The chart, without a picture if nothing is confused.
    """
    confused: Counter[int] = Counter()
    for (true, predicted), n in errors.confusions.items():
        if true != predicted:
            confused[true] += n
            confused[predicted] += n
    # without categories that have no objects, of which there are no shares
    shown = [i for i, _ in confused.most_common() if errors.objects_by_category[i]][:MAX_CATEGORIES]
    title = "What objects are taken for, in percent"
    if not shown:
        return Chart(title, "Nothing is confused.", "")
    shares = np.array([_row(errors, category, shown) for category in shown])
    labels = [short_name(names.get(i, str(i)), MAX_NAME_LENGTH) for i in shown]
    columns = [*labels, "another", "no region"]
    description = "; ".join(
        f"{label}: {row[i]:.0%} correct, most often taken for {_most_confused(row, i, columns)}"
        for i, (label, row) in enumerate(zip(labels, shares, strict=True))
    )
    axes = Axes(
        "category of the best-scoring region", "object", range(len(columns)), x_names=columns,
        width=_MARGIN + _CELL_SIZE * len(columns), height=_MARGIN + _CELL_SIZE * len(labels),
    )  # fmt: skip
    return custom_chart(title, description, axes, lambda plot: _draw(plot, shares, labels))


def _row(errors: DetectionErrors, category: int, shown: list[int]) -> list[float]:
    """Shares of a category's objects that are taken for each category in ``shown``, for another, and for none."""
    objects = errors.objects_by_category[category]
    matched = sum(n for (true, _), n in errors.confusions.items() if true == category)
    counts = [errors.confusions[category, predicted] for predicted in shown]
    return [n / objects for n in (*counts, matched - sum(counts), objects - matched)]


def _most_confused(row: np.ndarray, own: int, columns: list[str]) -> str:
    """The most frequent wrong category of a row, with its share; ``own`` is the column of the right category."""
    others = np.where(np.arange(len(row)) == own, -1, row)[:-1]  # without "no region"
    most_frequent = int(others.argmax())
    share = others[most_frequent]
    return f"{columns[most_frequent]} ({share:.0%})" if share > 0 else "nothing else"


def _draw(plot: Plot, shares: np.ndarray, labels: list[str]) -> None:
    """Draw the matrix of shares, (rows, columns); ``labels`` are the names of the rows."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    full, empty = to_rgba(SERIES[1], 0.85), to_rgba(SERIES[1], 0.0)
    colors = LinearSegmentedColormap.from_list("share", [empty, full])
    plot.grid(visible=False)
    plot.pcolormesh(shares, cmap=colors, vmin=0, vmax=1, shading="nearest", edgecolors="none")
    plot.set_yticks(range(len(labels)), labels)
    plot.invert_yaxis()
    plot.set_aspect("equal")
    plot.tick_params(axis="x", rotation=60)
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share >= _MIN_SHARE:
                plot.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=INK)
