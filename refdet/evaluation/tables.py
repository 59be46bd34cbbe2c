"""The metrics of `refdet evaluate-on-refer` as pandas tables and as files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from refdet.errors import InputError
from refdet.evaluation.renamed_metrics import add_old_names, rename_old_names
from refdet.files.atomic import atomic_create
from refdet.files.spreadsheet_text import spreadsheet_cell

FILES = ("metrics.json", "metrics.csv", "recall.svg")
COLUMNS = ("dataset", "split_by", "split", "group", "metric", "value")
COUNTS = "counts"
"""Name of the group for the numbers that metrics.json has directly in a split, such as "images"."""


def to_dataframe(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """Convert metrics.json to a table with one number per row; text is left out.

    Args:
        metrics: contents of metrics.json, with old or new names of metrics.

    Returns:
        A table with the columns `COLUMNS`: ``group`` is "counts", "detection.bbox", "referent_recall" and so on,
        ``metric`` is "images", "AP50", "0.5" and so on; ``value`` is float64, NaN if undefined.
    """
    metrics = rename_old_names(metrics)
    rows = [
        (metrics["dataset"], metrics["split_by"], split, group, metric, value)
        for split, values in metrics["splits"].items()
        for group, metric, value in _values(COUNTS, values)
    ]
    with pd.option_context("mode.string_storage", "python"):  # PyArrow's strings cannot have surrogates
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"value": "float64"})


def _values(group: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str, float | None]]:
    """Iterate over (group, metric, value) at any depth below a group; names of nested groups are joined with dots."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _values(name if group == COUNTS else f"{group}.{name}", value)
        elif value is None or isinstance(value, int | float):
            yield group, name, value


def tables(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Split the table of all numbers into one table per group.

    Args:
        frame: a table from `to_dataframe`.

    Returns:
        Name of a group -> its table, with a row per split and a column per metric, both in the order of ``frame``.
    """
    by_group = {}
    for group, rows in frame.groupby("group", sort=False):
        wide = rows.pivot(index="split", columns="metric", values="value")
        by_group[str(group)] = wide.reindex(index=rows["split"].unique(), columns=rows["metric"].unique())
    return by_group


def write(out: Path, metrics: Mapping[str, Any], figure: str) -> None:
    """Write metrics.json, with new and old names, metrics.csv, the table of `to_dataframe`, and recall.svg.

    If the disk is full or one of them exists, none is written. In the CSV, a name that a spreadsheet would take for a
    formula has an apostrophe before it.

    Args:
        out: the folder.
        metrics: the metrics, with new names.
        figure: the SVG.

    Raises:
        InputError: one of the files exists.
    """
    with (
        atomic_create(out / FILES[0]) as metrics_file,
        atomic_create(out / FILES[1]) as table_file,
        atomic_create(out / FILES[2]) as figure_file,
    ):
        metrics_file.write_text(json.dumps(add_old_names(metrics), indent=2) + "\n", encoding="utf-8")
        figure_file.write_text(figure, encoding="utf-8")
        frame = to_dataframe(metrics)
        text_columns = [name for name in COLUMNS if name != "value"]
        frame[text_columns] = frame[text_columns].map(spreadsheet_cell)
        frame.to_csv(table_file, index=False)
        for name in FILES:  # before the first one is moved
            if os.path.lexists(out / name):
                raise InputError(f"{out / name} exists; choose another `out` or remove it")
