"""Metrics that were renamed after refdet 0.1; for one more version, metrics.json has the new and the old name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GROUPS = {"recall@k": "recall_by_regions", "recall@k_with_category": "recall_by_regions_with_category"}
"""Renamed groups of a split: new name -> old name."""

COMPREHENSION = {"random_baseline@0.5": "guessing@0.5"}
"""Renamed rates in the group "comprehension" of a split: new name -> old name."""


def add_old_names(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics with renamed ones under their old names too, as metrics.json has them."""
    return {**metrics, "splits": {name: _add_to_split(values) for name, values in metrics["splits"].items()}}


def rename_old_names(metrics: Any) -> Any:
    """Return the contents of a metrics.json of any version with only new names; anything else is returned as it is."""
    if not isinstance(metrics, Mapping) or not isinstance(metrics.get("splits"), Mapping):
        return metrics
    return {**metrics, "splits": {name: _rename_in_split(values) for name, values in metrics["splits"].items()}}


def _add_to_split(values: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(values) | {old: values[new] for new, old in GROUPS.items() if new in values}
    if "comprehension" in values:
        rates = values["comprehension"]
        both["comprehension"] = rates | {old: rates[new] for new, old in COMPREHENSION.items() if new in rates}
    return both


def _rename_in_split(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    renamed = _rename(values, GROUPS)
    if isinstance(renamed.get("comprehension"), Mapping):
        renamed["comprehension"] = _rename(renamed["comprehension"], COMPREHENSION)
    return renamed


def _rename(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename keys, with ``names`` as new name -> old name; an old key whose new one is also there is dropped."""
    new_names = {old: new for new, old in names.items()}
    # `new_names.get` returns None for a key that is not an old name; None is not in `values`, so the key is kept
    return {new_names.get(key, key): value for key, value in values.items() if new_names.get(key) not in values}
