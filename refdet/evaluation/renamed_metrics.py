"""Renamed metrics of refdet 0.1; metrics.json has both names for one more version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GROUPS = {"recall@k": "recall_by_regions", "recall@k_with_category": "recall_by_regions_with_category"}
"""Groups of a split: new name -> old name."""

COMPREHENSION = {"random_baseline@0.5": "guessing@0.5"}
"""Comprehension rates: new name -> old name."""


def add_old_names(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Add the old names of renamed metrics, as in metrics.json."""
    return {**metrics, "splits": {name: _add_to_split(values) for name, values in metrics["splits"].items()}}


def rename_old_names(metrics: Any) -> Any:
    """Rename the metrics of a metrics.json of any version to the new names; other values are returned as they are."""
    if not isinstance(metrics, Mapping) or not isinstance(metrics.get("splits"), Mapping):
        return metrics
    return {**metrics, "splits": {name: _rename_in_split(values) for name, values in metrics["splits"].items()}}


def _add_to_split(values: Mapping[str, Any]) -> dict[str, Any]:
    renamed = dict(values) | {old: values[new] for new, old in GROUPS.items() if new in values}
    if "comprehension" in values:
        rates = values["comprehension"]
        renamed["comprehension"] = rates | {old: rates[new] for new, old in COMPREHENSION.items() if new in rates}
    return renamed


def _rename_in_split(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    renamed = _rename(values, GROUPS)
    if isinstance(renamed.get("comprehension"), Mapping):
        renamed["comprehension"] = _rename(renamed["comprehension"], COMPREHENSION)
    return renamed


def _rename(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename keys, given as new name -> old name; an old name beside its new one is dropped."""
    new_names = {old: new for new, old in names.items()}
    # for a name that is not an old one, `get` returns None, which is no key
    return {new_names.get(name, name): value for name, value in values.items() if new_names.get(name) not in values}
