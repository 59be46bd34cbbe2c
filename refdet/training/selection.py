"""The data on which weights are selected: its record in their provenance, and notes on held-out images in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from refdet.detector.checkpoint import was_validated
from refdet.errors import InputError
from refdet.files.json_files import read_small_json
from refdet.files.short_text import format_share
from refdet.splits.build import report_path
from refdet.splits.list_reading import read_image_list
from refdet.structures.provenance import Provenance, Selection


def provenance_of_last_step(provenance: Provenance, out: Path, validated_on: Provenance | None) -> Provenance:
    """Record in a provenance that weights are those of the last step, not selected by validation.

    Args:
        provenance: provenance of the training data or from a saved state.
        out: the run directory.
        validated_on: provenance of the file that the run is validated on from now on, if any.

    Returns:
        The provenance with ``selection``; unchanged if an older refdet validated the run without recording the data.
    """
    selection = provenance.selection
    if selection is None:
        if was_validated(out):
            return provenance
        selection = Selection(by_validation=False)
    return replace(provenance, selection=selection if validated_on is None else selection.with_file(validated_on))


def held_out_notes(val_instances: Path, validated_on: Provenance, training: Provenance, split: Path) -> list[str]:
    """Notes for the user on held-out images in a validation file, by which ``best/`` would be selected.

    Args:
        val_instances: the validation file.
        validated_on: its provenance.
        training: provenance of the training file.
        split: the training file; a report by build-split next to it lists the held-out images that were removed.

    Returns:
        One line, or none if the validation file excludes everything that the training file does.
    """
    audit = f"refdet audit --instances {val_instances} --refer-root DIR"
    removed = _removed_ids(split) if training.excluded else frozenset()
    images = read_image_list(val_instances).images if removed else []
    leaked = sum(not removed.isdisjoint(image.coco_ids) for image in images)
    if leaked:
        return [
            f"`val_instances` {val_instances}: {format_share(leaked, len(images), 'image', 'is')} held out of "
            f"{split.name}, as images of REFER's val and test: best/ is chosen by AP on them, so refdet audit does not "
            f"call it clean ({audit} lists them)"
        ]
    if not validated_on.excluded:
        why = f"{validated_on.note}; " if validated_on.note else ""
        unchecked = f"it was not checked for REFER's val and test images; check it with {audit}"
        return [f"`val_instances` {val_instances}, which chooses best/: {why}{unchecked}"]
    missing = sorted(training.excluded.keys() - validated_on.excluded.keys())
    if missing:
        return [
            f"`val_instances` {val_instances}, which chooses best/: does not exclude {', '.join(missing)}, as "
            f"{split.name} does, and was not checked for their images; check it with {audit}"
        ]
    return []


def _removed_ids(split: Path) -> frozenset[int]:
    """COCO ids of the images that build-split removed from a file; empty if there is no readable report."""
    path = report_path(split)
    try:
        report = read_small_json(path) if path.is_file() else None
    except InputError:
        return frozenset()
    ids = report.get("removed_image_ids") if isinstance(report, dict) else None
    return frozenset(id_ for id_ in ids if type(id_) is int) if isinstance(ids, list) else frozenset()
