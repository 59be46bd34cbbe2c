"""What a run records about the images that its weights are selected on, and notes on held-out images among them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from refdet.detector.checkpoint import was_validated
from refdet.errors import InputError
from refdet.files.json_files import read_small_json
from refdet.files.short_text import format_share
from refdet.splits.build import report_path
from refdet.splits.held_out import TRAIN
from refdet.splits.list_reading import read_image_list
from refdet.structures.provenance import Provenance, Selection


def with_last_step_selection(provenance: Provenance, out: Path, validated_on: Provenance | None) -> Provenance:
    """Record in a provenance that the weights are those of the last step, not selected by validation.

    Args:
        provenance: provenance of the training data, or of a run that is resumed.
        out: the run directory.
        validated_on: provenance of the file that the run is validated on from now on, None without validation.

    Returns:
        The provenance with its ``selection`` set; unchanged if an older refdet validated the run without recording the
        validation file.
    """
    selection = provenance.selection
    if selection is None:
        if was_validated(out):
            return provenance
        selection = Selection(by_validation=False)
    return replace(provenance, selection=selection if validated_on is None else selection.with_file(validated_on))


def held_out_notes(
    val_instances: Path, validated_on: Provenance, training: Provenance, training_file: Path
) -> list[str]:
    """Notes for the user on held-out images in a validation file, on which the weights in ``best/`` are selected.

    Args:
        val_instances: the validation file.
        validated_on: its provenance.
        training: provenance of the training file.
        training_file: the training file; build-split's report next to it lists the images that were held out.

    Returns:
        A line if the validation file has images that were held out of the training file, and a line if its provenance
        excludes no split at all, or lacks one that the training file excludes.

    Raises:
        InputError: an id in the validation file is invalid; ``refdet audit`` would fail too.
    """
    notes = []
    audit = f"refdet audit --instances {val_instances} --refer-root DIR"
    held_out = _read_held_out(training_file, training)
    images = read_image_list(val_instances).images if held_out.ids else []
    leaked = sum(not held_out.ids.isdisjoint(image.coco_ids) for image in images)
    if leaked:
        # which of the images is in which split is not recorded
        # audit looks for images of REFER's val and test splits: it certainly finds some if there are no other splits
        others = sorted(name for name in held_out.splits if not _is_val_or_test(name))
        splits = others if len(others) == len(held_out.splits) else [*others, "REFER's val or test splits"]
        verdict = "" if others else f", so refdet audit does not call best/ clean ({audit} lists them)"
        notes.append(
            f"`val_instances` {val_instances}: {format_share(leaked, len(images), 'image', 'is')} held out of "
            f"{training_file.name}, as images of {' or '.join(splits)}: best/ is chosen by AP on them{verdict}"
        )
    missing = sorted(training.excluded.keys() - validated_on.excluded.keys())
    if not validated_on.excluded:
        why = f"{validated_on.note}; " if validated_on.note else ""
        notes.append(
            f"`val_instances` {val_instances}, which chooses best/: {why}it was not checked for REFER's val and test "
            f"images; check it with {audit}"
        )
    elif missing:
        notes.append(
            f"`val_instances` {val_instances}, which chooses best/: does not exclude {', '.join(missing)}, as "
            f"{training_file.name} does, and was not checked for their images; check it with {audit}"
        )
    return notes


class _HeldOutImages(NamedTuple):
    """Images that build-split held out of a training file.

    Attributes:
        ids: their ids in the file from which they were removed.
        splits: the splits and benchmarks that they are from, such as "refcoco/unc/val" and "benchmark/ref-l4.parquet".
    """

    ids: frozenset[int] = frozenset()
    splits: frozenset[str] = frozenset()


def _read_held_out(training_file: Path, training: Provenance) -> _HeldOutImages:
    """Read which images were held out of a training file from build-split's report next to it.

    The ids are COCO's: build-split records no excluded splits for a file whose ids contradict its file names, so the
    check below rejects its report.

    Args:
        training_file: the training file.
        training: its provenance.

    Returns:
        The images; none if there is no readable report of this file, or if build-split was told which images to keep
        (``keep_only``), as most of those that it removed then are in no held-out split.
    """
    path = report_path(training_file)
    try:
        report = read_small_json(path) if path.is_file() else None
    except InputError:
        return _HeldOutImages()
    if not isinstance(report, dict) or "kept" in report:
        return _HeldOutImages()
    splits, ids = report.get("excluded"), report.get("removed_image_ids")
    if not isinstance(splits, dict) or not isinstance(ids, list):
        return _HeldOutImages()
    if not splits or any(training.excluded.get(name) != counts for name, counts in splits.items()):
        return _HeldOutImages()  # the report of another file
    return _HeldOutImages(frozenset(id_ for id_ in ids if type(id_) is int), frozenset(splits))


def _is_val_or_test(name: str) -> bool:
    """Whether the name of a split is DATASET/SPLIT_BY/SPLIT, and not that of a train split or a benchmark."""
    parts = name.split("/")
    return len(parts) == 3 and parts[2] != TRAIN
