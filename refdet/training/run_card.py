"""The model card of a run directory, ``README.md``: training data, leaks and usage."""

from __future__ import annotations

import shlex
from pathlib import Path

from refdet.detector.backbones import network_name
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.files.atomic import atomic_write
from refdet.files.printable_text import printable

CARD = "README.md"
_FIRST = "<!-- Written by refdet train at each save; remove this line to keep your own text. -->"


def write_card(out: Path, meta: CheckpointMetadata) -> None:
    """Write the card, unless the user has edited it."""
    path = out / CARD
    try:
        if path.exists() and not _is_ours(path):
            return
    except OSError:
        return
    with atomic_write(path) as temporary:
        temporary.write_text(_text(meta), encoding="utf-8", errors="backslashreplace")


def _is_ours(path: Path) -> bool:
    """Whether a file is a card that the user has not edited; reads only its first line."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_FIRST)) == _FIRST.encode()


def _text(meta: CheckpointMetadata) -> str:
    provenance, recipe = meta.provenance, meta.recipe
    layout = f", {recipe.model.neck.upper()}" if recipe.model.backbone == "resnet" else ""
    model = f"{network_name(recipe.model)}{layout}, {'with' if recipe.model.masks else 'without'} masks"
    rows = [
        ("recipe", f"{recipe.name} ({model})"),
        ("steps", f"{meta.step} of {recipe.train.steps}, batch size {recipe.train.batch_size}"),
        ("classes", str(len(meta.categories))),
        ("images", f"{provenance.images} of {provenance.source}, ids {provenance.image_ids_sha256[:12]}"),
        ("initial weights", provenance.weights or "random"),
        ("excluded", ", ".join(sorted(provenance.excluded)) or "nothing known"),
        ("leaks", _leaks(meta)),
    ]
    table = "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows)
    return f"""{_FIRST}
# refdet detector

| | |
|---|---|
{table}

Extract features of REFER images:

    refdet extract-features --checkpoint RUN --images DIR --out F.h5 --refer-root DIR --dataset refcoco --split-by unc

`refdet inspect RUN` shows its full provenance; `refdet audit` checks it against REFER.
"""


def _leaks(meta: CheckpointMetadata) -> str:
    provenance, source = meta.provenance, shlex.quote(meta.provenance.source)
    if not provenance.excluded:
        why = provenance.note or "no known exclusions"
        return f"not checked ({why}); check with `refdet audit --instances {source} --refer-root DIR`"
    if provenance.weights and meta.warnings():
        return "unknown for the initial weights"
    return f"none according to its split; prove it with `refdet audit --instances {source} --refer-root DIR`"


def _cell(text: str) -> str:
    """Escape untrusted text for a Markdown table."""
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
