"""The inputs of a report, and readers for the files of a run directory and for the list of commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refdet.config.renamed_keys import LOSSES
from refdet.detector.checkpoint import MAX_META_BYTES
from refdet.errors import InputError
from refdet.files.json_files import read_bytes
from refdet.files.strict_json import strict_json
from refdet.report.fields import count, field, optional_number, text
from refdet.structures.provenance import Provenance
from refdet.training.run_folder import MAX_LOG_BYTES

# Names of the losses in metrics.jsonl, and their labels in the chart.
LOSS_LABELS = (
    ("loss", "total"),
    ("loss_classifier", "class: which category is it?"),
    ("loss_box_reg", "box: where exactly?"),
    ("loss_mask", "mask: which pixels?"),
    ("loss_objectness", "proposals: is anything here?"),
    ("loss_rpn_box_reg", "proposals: roughly where?"),
)


@dataclass(frozen=True)
class PipelineStep:
    """One command that was run.

    Attributes:
        name: "build-split".
        about: its purpose in one sentence.
        commands: the command lines.
        seconds: their total time.
    """

    name: str
    about: str
    commands: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class ReferPart:
    """A store, and the results of evaluating its regions on a REFER dataset.

    Attributes:
        store: the store; None for metrics alone.
        metrics: the metrics.json of evaluate-on-refer; None if the store was not evaluated.
        predictions: predictions JSON: a model's answers to the sentences; their regions are rows of the store.
        dataset: dataset and split_by, such as "refcoco/unc", if there are no metrics; "" to use those in the store.
    """

    store: Path | None
    metrics: Mapping[str, Any] | None = None
    predictions: Path | None = None
    dataset: str = ""


@dataclass(frozen=True)
class ReportInputs:
    """The inputs of a report, any of which may be missing.

    Attributes:
        run: run directory of the detector.
        refer_root: folder of the REFER data.
        images: folder or zip of the images of the stores.
        parts: the stores and their metrics.
        detection: output of ``refdet evaluate --json``.
        instances: instances file with the objects of the stores' images; None for that of a REFER dataset.
        trained_on: instances file that the detector was trained on, to be audited again against ``refer_root``.
        original_instances: the instances file that the split ``trained_on`` was built from, audited for comparison.
        steps: the commands that were run.
        pictures: approximate number of example images; a third as many of the worst and of the best are added.
    """

    run: Path | None = None
    refer_root: Path | None = None
    images: Path | None = None
    parts: Sequence[ReferPart] = ()
    detection: Mapping[str, Any] | None = None
    instances: Path | None = None
    trained_on: Path | None = None
    original_instances: Path | None = None
    steps: Sequence[PipelineStep] = ()
    pictures: int = 12


def read_meta(path: Path) -> tuple[str, int, Provenance]:
    """Name of the recipe, number of training steps and provenance in a ``model.json``."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give a run directory that refdet train wrote")
    data = read_bytes(path, MAX_META_BYTES)
    try:
        tree = strict_json(data)
    except InputError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    recipe = field(tree, "recipe", str(path))
    name = text(recipe, "name", f"{path}, recipe")
    try:
        provenance = Provenance.from_json(field(tree, "provenance", str(path)))
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return name, count(tree, "step", str(path)), provenance


def read_log(path: Path) -> list[dict[str, float]]:
    """The training steps in metrics.jsonl, without validations; empty without a log, as for imported weights.

    The last line is skipped if it was truncated when the run was killed. Old names of losses are converted.
    """
    if not path.exists():
        return []
    lines = read_bytes(path, MAX_LOG_BYTES).split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = strict_json(line)
        except InputError as error:
            if number == len(lines):  # truncated when the run was killed
                break
            raise InputError(f"{path}: line {number} is not JSON ({error})") from None
        if isinstance(row, dict):
            if "loss" not in row and any(key.startswith("val_") for key in row):
                continue  # a validation
            row |= {name: row[old] for name, old in LOSSES.items() if old in row and name not in row}
        for name in ("step", "loss", *(key for key, _ in LOSS_LABELS if isinstance(row, dict) and key in row)):
            if optional_number(row, name, where) is None:
                raise InputError(f"{where}: {name!r} is not a number")
        rows.append(row)
    return rows


def read_steps(path: Path) -> list[PipelineStep]:
    """The steps in a JSON file, a list of {"name", "about", "commands", "seconds"}."""
    try:
        tree = strict_json(read_bytes(path, MAX_META_BYTES))
    except InputError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(tree, list):
        raise InputError(f"{path}: not a list of steps")
    steps = []
    for number, entry in enumerate(tree, 1):
        where = f"{path}, step {number}"
        commands, seconds = field(entry, "commands", where), optional_number(entry, "seconds", where)
        if not isinstance(commands, list) or not all(isinstance(line, str) for line in commands):
            raise InputError(f"{where}: 'commands' is not a list of strings")
        steps.append(
            PipelineStep(
                text(entry, "name", where), text(entry, "about", where), tuple(commands), max(seconds or 0.0, 0)
            )
        )
    return steps
