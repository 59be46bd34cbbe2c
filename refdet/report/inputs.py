"""The inputs of a report, and functions that read the files of a run directory and the list of commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from refdet.config.renamed_keys import LOSSES
from refdet.detector.checkpoint import MAX_META_BYTES
from refdet.errors import InputError
from refdet.files.json_files import read_bytes
from refdet.files.short_text import short_repr
from refdet.files.strict_json import strict_json
from refdet.report.fields import count, field, finite_number, optional_number, text
from refdet.structures.provenance import Provenance
from refdet.training.run_folder import MAX_LOG_BYTES

# Names of the losses in metrics.jsonl, and labels in the chart.
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
    """A step of the pipeline that was run, of one or more commands.

    Attributes:
        name: name of the step, such as "build-split".
        about: the purpose in one sentence.
        commands: the command lines.
        seconds: total time of the commands.
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
        predictions: JSON of a model's answers to the sentences, in which a "region" is a row of the store.
        dataset: dataset and split_by, such as "refcoco/unc"; ignored if there are metrics, which name their own; "" for
            the dataset that the store was extracted for.
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
        instances: instances file with the objects of the stores' images; None for the instances.json of the REFER
            dataset.
        trained_on: instances file that the detector was trained on, to be audited against ``refer_root``.
        original_instances: the instances file that the split ``trained_on`` was built from, audited for comparison.
        steps: the steps of the pipeline that were run.
        pictures: maximum number of example images; at most a third as many of the worst, and of the best, are added.
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


class RunMetadata(NamedTuple):
    """What the report shows of a run's ``model.json``.

    Attributes:
        recipe_name: name of the recipe, "" for a custom recipe.
        step: number of training steps.
        provenance: the training data of the run.
    """

    recipe_name: str
    step: int
    provenance: Provenance


def read_meta(path: Path) -> RunMetadata:
    """Read a ``model.json``.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
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
    return RunMetadata(name, count(tree, "step", str(path)), provenance)


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of training steps in metrics.jsonl, without validations; none without a log, as for imported weights.

    The last line is skipped if it was truncated when the run was killed. Old names of losses are converted.

    Raises:
        InputError: any other line is not JSON, or a step or a loss is not a number.
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
            if number == len(lines):
                break  # truncated
            raise InputError(f"{path}: line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be a JSON object, not {short_repr(row)}")
        if "loss" not in row and any(key.startswith("val_") for key in row):
            continue  # a validation
        row |= {name: row[old] for name, old in LOSSES.items() if old in row and name not in row}
        for name in ("step", "loss", *(key for key, _ in LOSS_LABELS if key in row)):
            finite_number(row, name, where)
        rows.append(row)
    return rows


def read_steps(path: Path) -> list[PipelineStep]:
    """Read the steps in a JSON file, a list of {"name", "about", "commands", "seconds"}; seconds may be null.

    Raises:
        InputError: the file is not such a list.
    """
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
        name, about = text(entry, "name", where), text(entry, "about", where)
        steps.append(PipelineStep(name, about, tuple(commands), max(seconds or 0.0, 0.0)))
    return steps
