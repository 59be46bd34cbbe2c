"""What a training is given, read and checked before torch is imported: most mistakes are found in under a second."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from refdet.config.recipe import Recipe
from refdet.data.coco import CocoIndex
from refdet.data.image_source import ImageSource
from refdet.data.instances_provenance import provenance_of_instances
from refdet.data.training_objects import CROWD_OPTION, TrainingObjects
from refdet.detector.checkpoint import load_meta
from refdet.errors import InputError
from refdet.files.lock import alone
from refdet.structures.provenance import Provenance
from refdet.training.pretrained import begins_anew
from refdet.training.run_folder import BUSY, LOCK, goes_on
from refdet.training.saved_run import SavedRun

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
        before: the state in `out` to go on from, or None.
        data_sha256: `TrainingObjects.sha256` of the objects.
    """

    recipe: Recipe
    objects: TrainingObjects
    source: ImageSource
    provenance: Provenance
    out: Path
    weights: Path | None
    before: SavedRun | None
    data_sha256: str


def check(
    recipe: Recipe,
    instances: Path,
    images: Path,
    out: Path,
    weights: Path | None = None,
    resume: bool = False,
    crowd_as_object: bool = False,
) -> TrainingInputs:
    """Read and check what a training is given; what is quick to check comes first. See `refdet.training.trainer.train`.

    Raises:
        InputError: something given does not fit.
    """
    _refuse_many_processes()
    goes, remark = goes_on(out, resume)
    if (out / LOCK).exists():
        with alone(out, LOCK, BUSY):
            pass  # nobody trains into it now
    before = SavedRun.newest(out) if goes else None
    if weights is not None:
        norm = load_meta(weights).recipe.model.norm
    else:  # that of the run, which may be that of the weights it started from
        norm = before.meta.recipe.model.norm if before else "batch"
    if recipe.model.norm == "auto":
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, norm=norm))
    if weights is None and not goes and recipe.model.norm == "frozen":
        raise InputError(
            f"recipe {recipe.name}: model.norm=frozen keeps norms and first layers as they are, which from "
            "nothing is noise; give --weights RUN_DIR (refdet import-weights makes one of an ImageNet ResNet)"
        )
    if before is not None:
        before.check_recipe(recipe, out)
    source = ImageSource.open(images, recipe.input.exif)
    # without masks nothing needs a segmentation
    index = CocoIndex.load(instances, recipe.model.masks, crowd_as_object)
    objects = TrainingObjects(index, recipe.model.masks, recipe.train.empty_images)
    source.check(objects.records, index.path, index.images.values())
    if weights is not None and not goes:
        begins_anew(weights, recipe, tuple(index.categories.items()))
    provenance, data_sha256 = provenance_of_instances(index), objects.sha256()
    notes = [remark] if remark else []
    if before is not None:
        before.check_data(tuple(index.categories.items()), provenance, data_sha256, out)
        notes += before.notes(recipe, out)
    if provenance.note:
        notes.append(f"{instances}: {provenance.note}; whether images of REFER's val and test are in it was not "
                     f"checked: refdet audit --instances {instances} --refer-root DIR does")  # fmt: skip
    if crowd_as_object:
        text = f"its crowds are trained on as objects ({CROWD_OPTION})"
        provenance = dataclasses.replace(provenance, note="; ".join(filter(None, (provenance.note, text))))
    for line in (*notes, *objects.notes):
        log.warning("note: %s", line)
    return TrainingInputs(recipe, objects, source, provenance, out, weights, before, data_sha256)


def _refuse_many_processes() -> None:
    """Torchrun and its like would start one whole training each, all in one run directory."""
    count = os.environ.get("WORLD_SIZE", "")
    if count.isdecimal() and int(count) > 1:
        raise InputError(
            f"WORLD_SIZE is {count}: refdet train is one process on one device; start it without torchrun, once"
        )
