"""How the weights of an extraction's detector were selected, if the record in its run directory changed meanwhile.

A run can be validated after an extraction with its weights has started. Then its provenance has another record of their
selection (`refdet.structures.provenance.Selection`), though the weights are the same. The store has the record that
claims less: the audit must not find weights clean of which any process of the extraction knew otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.files.atomic import write_json
from refdet.store import Header
from refdet.structures.provenance import Selection

log = logging.getLogger(__name__)

SELECTION = "selection"
"""Key of the record in a provenance, and in ``plan.json`` if it changed since the extraction started."""


def merge_provenances(first: Any, second: Any) -> dict[str, Any] | None:
    """A provenance that claims no more than either of two of the same weights.

    Weights chosen by validation may leak its images, so that record outweighs all others. Without a record it is not
    known how they were selected, which outweighs that they are of the last step.

    Args:
        first: the earlier provenance, as JSON.
        second: the later one.

    Returns:
        The first one, with the record of the selection that claims less. None if they differ in anything else, are
        damaged, or have records that exclude each other.
    """
    if (
        not isinstance(first, dict)
        or not isinstance(second, dict)
        or _without_selection(first) != _without_selection(second)
    ):
        return None
    records = [tree.get(SELECTION) for tree in (first, second)]
    if records[0] == records[1]:
        return first
    try:
        selections = [None if record is None else Selection.from_json(record) for record in records]
    except InputError:
        return None
    chosen = [selection for selection in selections if selection is not None and selection.by_validation]
    if len(chosen) == 2:  # on two files, of which a record can name only one
        return None
    if chosen:
        return first | {SELECTION: chosen[0].to_json()}
    known = [selection for selection in selections if selection is not None]
    if len(known) < 2:
        return _without_selection(first)
    return first | {SELECTION: reduce(Selection.with_file, known[1].validated_on, known[0]).to_json()}


def claims_no_more(stored: Any, current: Any) -> bool:
    """Whether a complete store may keep its record, given provenances that can be merged.

    A file that weights of the last step were validated on is only named for information.
    """
    merged = merge_provenances(stored, current)
    if merged == stored:
        return True
    records = [tree.get(SELECTION) if isinstance(tree, dict) else None for tree in (stored, merged)]
    return all(record is not None and not Selection.from_json(record).by_validation for record in records)


def recorded_provenance(plan: Mapping[str, Any]) -> Any:
    """The provenance of an unfinished extraction's store, from the contents of its ``plan.json``; may be damaged."""
    header = plan.get("header")
    provenance = header.get("provenance") if isinstance(header, dict) else None
    if SELECTION not in plan or not isinstance(provenance, dict):
        return provenance
    return _without_selection(provenance) | ({SELECTION: plan[SELECTION]} if plan[SELECTION] is not None else {})


def record_selection(path: Path, header: Header, saved_plan: Mapping[str, Any] | None) -> Header:
    """Record a changed selection of the weights in ``plan.json``, with a note; the folder of the shards is locked.

    Args:
        path: ``plan.json``.
        header: metadata of the store, which `refdet.extraction.shard_folder.check_resumable` found to fit the plan.
        saved_plan: contents of ``plan.json``; None if the extraction has just started.

    Returns:
        The header with the record for the store.
    """
    if saved_plan is None:
        return header
    recorded = recorded_provenance(saved_plan)
    provenance = merge_provenances(recorded, header.provenance)
    if provenance is None:
        return header
    if provenance != header.provenance or provenance != recorded:
        log.warning(
            "note: the record of how the weights of `checkpoint` were selected differs from that with which the "
            "extraction was started; the store has %s",
            _describe(provenance.get(SELECTION)),
        )
    if provenance != recorded:
        write_json(path, {**saved_plan, SELECTION: provenance.get(SELECTION)})
    return replace(header, provenance=provenance)


def _without_selection(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in provenance.items() if name != SELECTION}


def _describe(record: Any) -> str:
    """A record in words, for messages."""
    return "none" if record is None else f"that which claims less: {Selection.from_json(record).one_line()}"
