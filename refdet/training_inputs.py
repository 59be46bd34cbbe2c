"""What a training is given, read and checked before torch is imported: most mistakes are found in under a second."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from refdet.data.coco import CocoIndex
from refdet.data.images import ImageSource
from refdet.data.training_objects import CROWD_OPTION, TrainingObjects
from refdet.errors import InputError
from refdet.lock import alone
from refdet.provenance import Provenance
from refdet.recipe import Recipe
from refdet.run_folder import BUSY, LOCK, goes_on, states

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingInputs:
    """All that a training needs to begin; made by `check`.

    Attributes:
        recipe: what to train, with a norm that is frozen or batch.
        objects: what is trained on, and the instances file it is in.
        source: where its images are.
        provenance: of the instances file.
        out: the run directory.
        weights: run directory of a detector to start from, or None.
        goes_on: there is a state in `out` to go on from.
    """

    recipe: Recipe
    objects: TrainingObjects
    source: ImageSource
    provenance: Provenance
    out: Path
    weights: Path | None
    goes_on: bool


def check(
    recipe: Recipe,
    instances: Path,
    images: Path,
    out: Path,
    weights: Path | None = None,
    resume: bool = False,
    crowd_as_object: bool = False,
) -> TrainingInputs:
    """Read and check what a training is given; what is quick to check comes first. See `refdet.train.train`.

    Raises:
        InputError: something given does not fit.
    """
    _refuse_many_processes()
    goes = goes_on(out, resume)
    if (out / LOCK).exists():
        with alone(out, LOCK, BUSY):
            pass  # nobody trains into it now
    if weights is not None:
        from refdet.checkpoint import load_meta

        norm = load_meta(weights).recipe.model.norm
    else:
        norm = _norm_of_run(out) if goes else "batch"
    if recipe.model.norm == "auto":
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, norm=norm))
    if weights is None and not goes and recipe.model.norm == "frozen":
        raise InputError(
            f"recipe {recipe.name}: model.norm=frozen keeps norms and first layers as they are, which from "
            "nothing is noise; give --weights RUN_DIR (refdet import-weights makes one of an ImageNet ResNet)"
        )
    source = ImageSource.open(images, recipe.input.exif)
    # without masks nothing needs a segmentation
    index = CocoIndex.load(instances, recipe.model.masks, crowd_as_object)
    objects = TrainingObjects(index, recipe.model.masks, recipe.train.empty_images)
    source.check(objects.records, index.path, index.images.values())
    if weights is not None and not goes:
        from refdet.pretrained import begins_anew

        begins_anew(weights, recipe, tuple(index.categories.items()))
    provenance = Provenance.of_instances(index)
    if provenance.note:
        log.warning(
            "note: %s: %s; whether images of REFER's val and test are in it was not checked: "
            "refdet audit --instances %s --refer-root DIR does", instances, provenance.note, instances,
        )  # fmt: skip
    if crowd_as_object:
        text = f"its crowds are trained on as objects ({CROWD_OPTION})"
        provenance = dataclasses.replace(provenance, note="; ".join(filter(None, (provenance.note, text))))
    for line in objects.notes:
        log.warning("note: %s", line)
    return TrainingInputs(recipe, objects, source, provenance, out, weights, goes)


def _norm_of_run(out: Path) -> str:
    """The norm that a run was begun with, which may be that of the weights it started from."""
    from safetensors import SafetensorError, safe_open

    from refdet.checkpoint import Meta

    try:
        with safe_open(states(out)[-1], framework="numpy") as file:
            return Meta.parse((file.metadata() or {})["meta"]).recipe.model.norm
    except (OSError, SafetensorError, KeyError, InputError):  # damaged, which is said when it is read whole
        return "batch"


def _refuse_many_processes() -> None:
    """torchrun and its like would start one whole training each, all in one run directory."""
    count = os.environ.get("WORLD_SIZE", "")
    if count.isdecimal() and int(count) > 1:
        raise InputError(
            f"WORLD_SIZE is {count}: refdet train is one process on one device; start it without torchrun, once"
        )
