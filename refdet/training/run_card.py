"""The model card of a run directory, ``README.md``: recipe, training data, leaks, learning curve, AP and usage."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refdet.detector.backbone_channels import network_name
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.files.atomic import atomic_write
from refdet.files.printable_text import escape_unprintable
from refdet.structures.provenance import Provenance, Selection
from refdet.training.metrics_rows import DATA_HASH_KEY, VALIDATION_PREFIX, finite_number, is_validation

CARD = "README.md"
_MAX_CURVE_LINES = 12  # in the learning curve
_BAR_CHARACTERS = 40  # width of its longest bar
_BOX_AP = f"{VALIDATION_PREFIX}bbox_AP"
_AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_MARKER = "<!-- Written by refdet train at each save; remove this line to keep your own text. -->"


def write_card(
    out: Path, meta: CheckpointMetadata, rows: Sequence[Mapping[str, Any]] = (), validated_on: str = ""
) -> None:
    """Write the card, unless the user has edited it.

    Args:
        out: the run directory.
        meta: metadata of its weights.
        rows: the undamaged rows of its metrics.jsonl.
        validated_on: the validation data, such as "5000 images of minival.json".
    """
    path = out / CARD
    try:
        if path.exists() and not _is_generated(path):
            return
    except OSError:  # not readable: it may be the user's
        return
    with atomic_write(path) as temporary:
        temporary.write_text(_text(meta, rows, validated_on), encoding="utf-8", errors="backslashreplace")


def _is_generated(path: Path) -> bool:
    """Whether a file is a card that the user has not edited; reads only its first line."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MARKER)) == _MARKER.encode()


def _text(meta: CheckpointMetadata, rows: Sequence[Mapping[str, Any]], validated_on: str) -> str:
    """The card, in Markdown."""
    provenance, recipe = meta.provenance, meta.recipe
    layout = f", {recipe.model.neck.upper()}" if recipe.model.backbone == "resnet" else ""
    model = f"{network_name(recipe.model)}{layout}, {'with' if recipe.model.masks else 'without'} masks"
    facts = [
        ("recipe", f"{recipe.name} ({model})"),
        ("steps", f"{meta.step} of {recipe.train.steps}, batch size {recipe.train.batch_size}"),
        ("weights", _weights(meta)),
        ("classes", str(len(meta.categories))),
        ("images", f"{provenance.images} of {provenance.source}, ids {provenance.image_ids_sha256[:12]}"),
        ("initial weights", provenance.weights or "random"),
        ("excluded", ", ".join(sorted(provenance.excluded)) or "nothing known"),
        ("selection", _selection(provenance.selection)),
        ("leaks", _leaks(meta)),
    ]
    table = "\n".join(f"| {name} | {_cell(text)} |" for name, text in facts)
    return f"""{_MARKER}
# refdet detector

| | |
|---|---|
{table}
{_accuracy(rows, validated_on)}{_curve(rows)}
## How to use it

Detect objects, measure AP, train on from these weights:

    refdet draw IMAGE.jpg --checkpoint RUN --out regions.png
    refdet evaluate --checkpoint RUN --instances F.json --images DIR
    refdet train --recipe RECIPE --weights RUN --instances F.json --images DIR --out NEW_RUN

Extract features of REFER images:

    refdet extract-features --checkpoint RUN --images DIR --out F.h5 --refer-root DIR --dataset refcoco --split-by unc

`refdet inspect RUN` shows its recipe and full provenance; `refdet audit` checks it against REFER.
"""


def _weights(meta: CheckpointMetadata) -> str:
    """Describe the weights in model.safetensors."""
    decay = meta.recipe.train.ema
    return f"an exponential average over the steps (train.ema={decay:g})" if decay else f"those after step {meta.step}"


def _validations(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of the validations on the same data as the last one, as AP on different data is not comparable."""
    validations = [row for row in rows if is_validation(row)]
    return [row for row in validations if row.get(DATA_HASH_KEY) == validations[-1].get(DATA_HASH_KEY)]


def _accuracy(rows: Sequence[Mapping[str, Any]], validated_on: str) -> str:
    """A table of the last and the best validation; "" without validations."""
    validations = _validations(rows)
    if not validations:
        return ""
    last, best = validations[-1], max(validations, key=lambda row: finite_number(row, _BOX_AP) or 0.0)
    heading = f"## AP on {_cell(validated_on)}" if validated_on else "## AP on the validation images"
    lines = ["", heading, "", f"| | {' | '.join(_AP_NAMES)} |", "|---" * (1 + len(_AP_NAMES)) + "|"]
    shown = [("", last)] if best is last else [("last, ", last), ("best, ", best)]
    for name, row in shown:
        for kind, noun in (("bbox", "boxes"), ("segm", "masks")):
            values = [finite_number(row, f"{VALIDATION_PREFIX}{kind}_{ap}") for ap in _AP_NAMES]
            if any(value is not None for value in values):
                cells = ["-" if value is None else f"{value:.3f}" for value in values]
                lines.append(f"| {noun}, {name}step {row['step']} | {' | '.join(cells)} |")
    if best is not last:
        lines += ["", "The weights of the best are in `best/`."]
    return "\n".join(lines) + "\n"


def _curve(rows: Sequence[Mapping[str, Any]]) -> str:
    """The loss at up to `_MAX_CURVE_LINES` steps as bars of text; "" with fewer than two losses.

    Each line also has the box AP of the last validation since the line before.
    """
    losses = [(row["step"], loss) for row in rows if (loss := finite_number(row, "loss")) is not None]
    box_aps = [(row["step"], finite_number(row, _BOX_AP)) for row in _validations(rows)]
    if len(losses) < 2:
        return ""
    max_loss = max(max(loss for _, loss in losses), 1e-9)  # not 0, by which the bars could not be divided
    heading, lines, previous_step = f"    {'step':>9}  {'loss':>8}  {'':<{_BAR_CHARACTERS}}", [], 0
    last = len(losses) - 1
    for index in sorted({round(i * last / (_MAX_CURVE_LINES - 1)) for i in range(_MAX_CURVE_LINES)}):
        step, loss = losses[index]
        measured = [f"{ap:.3f}" for ap_step, ap in box_aps if previous_step < ap_step <= step]
        bar = "#" * min(max(round(_BAR_CHARACTERS * loss / max_loss), 1), _BAR_CHARACTERS)
        lines.append(f"    {step:>9}  {loss:8.3f}  {bar:<{_BAR_CHARACTERS}}  {''.join(measured[-1:])}".rstrip())
        previous_step = step
    heading = f"{heading}  box AP" if box_aps else heading.rstrip()
    return "\n".join(["", "## Learning curve", "", heading, *lines]) + "\n"


def _leaks(meta: CheckpointMetadata) -> str:
    """What is known about REFER's val and test images in the training data, and how to check."""
    provenance = meta.provenance
    instances = _instances_argument(provenance, "SPLIT.json")
    if not provenance.excluded:
        why = provenance.note or "no known exclusions"
        return f"not checked ({why}); check with `refdet audit --instances {instances} --refer-root DIR`"
    if provenance.weights and meta.warnings():
        return "unknown for the initial weights"
    selection = provenance.selection
    if selection is None or not selection.by_validation:
        command = f"refdet audit --checkpoint RUN --instances {instances} --refer-root DIR"
        return f"none according to its split; prove it with `{command}`"
    (chosen_on,) = selection.validated_on
    validation = _instances_argument(chosen_on, "VAL.json")
    known = provenance.excluded.keys() <= chosen_on.excluded.keys()
    which = "its split and its validation file" if known else "its split; its validation file was not checked"
    return (
        f"none according to {which}; prove it with "
        f"`refdet audit --checkpoint RUN --instances {instances} --val-instances {validation} --refer-root DIR`"
    )


def _instances_argument(file: Provenance, placeholder: str) -> str:
    """The file to audit; the placeholder if build-split made it, as its record names the original, with the images."""
    return placeholder if file.excluded else shlex.quote(file.source)


def _selection(selection: Selection | None) -> str:
    return "not recorded" if selection is None else selection.one_line()


def _cell(text: str) -> str:
    """Escape untrusted text for a Markdown table."""
    return escape_unprintable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
