"""`train`: from a recipe, an instances file and images to a run directory.

Arguments are checked before torch is imported, so that most mistakes are reported in under a second.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.data.coco import CocoIndex, TrainingObjects
from refdet.data.image_source import ImageSource
from refdet.data.instances_provenance import provenance_of_instances
from refdet.detector.checkpoint import CheckpointMetadata, load_meta
from refdet.errors import InputError
from refdet.files.atomic import report_disk_full
from refdet.files.lock import alone
from refdet.training.pretrained import begins_anew
from refdet.training.run_folder import BUSY, LOCK, goes_on
from refdet.training.saved_run import SavedRun

if TYPE_CHECKING:
    from refdet.training.trainer import Summary

log = logging.getLogger(__name__)


def train(
    recipe: Recipe | str | Path,
    instances: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    changes: Sequence[str] = (),
    weights: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    crowd_as_object: bool = False,
) -> Summary:
    """Train a detector.

    Examples:
        >>> summary = refdet.train("demo", "demo/split.json", "demo/data/train2014", "run",
        ...                        changes=["train.steps=2", "model.width=8"], device="cpu")
        >>> summary.steps
        2

    Args:
        recipe: name of a shipped recipe, a YAML file, or a `Recipe`. Its ``model.norm`` "auto" means frozen with
            ``weights`` and batch without.
        instances: the split, a COCO instances JSON.
        images: folder or zip of its images.
        out: the run directory, new unless ``resume``.
        changes: overrides of recipe keys, such as "train.steps=500".
        weights: run directory of a detector to start from.
        resume: continue the run in ``out``; starts from the beginning, with a note, if there is nothing to resume.
        device: "cpu", "cuda" or "cuda:1"; with None or "auto" a GPU if there is one.
        crowd_as_object: train on annotations of ``iscrowd`` 1 as on others.

    Returns:
        The number of steps, the time and the last loss.

    Raises:
        InputError: an argument is invalid, or another process trains into ``out``.
        RuntimeFailure: the loss is not finite, the disk is full, or a worker process died; saved states are kept.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; the last step is saved.
    """
    _refuse_many_processes()
    instances, images, out = Path(instances), Path(images), Path(out)
    weights = None if weights is None else Path(weights)
    chosen = (recipe if isinstance(recipe, Recipe) else recipes.load(str(recipe))).with_changes(changes)
    continues, remark = goes_on(out, resume)
    if (out / LOCK).exists():
        with alone(out, LOCK, BUSY):
            pass  # no other process trains into it
    before = SavedRun.newest(out) if continues else None
    notes = [remark] if remark else []
    theirs = None if weights is None else load_meta(weights)
    if weights is not None and theirs is not None and theirs.provenance.is_unknown:
        log.warning("starts from %s, %s", weights.name, theirs.provenance.note)
    chosen = _with_norm(chosen, theirs, before, continues)
    if before is not None:
        chosen, kept = before.with_older_defaults(chosen, out)
        notes += kept
        before.check_recipe(chosen, out)
    source = ImageSource.open(images, chosen.input.exif)
    # segmentations are needed only with masks
    index = CocoIndex.load(instances, chosen.model.masks, crowd_as_object)
    objects = TrainingObjects(index, chosen.model.masks, chosen.train.empty_images)
    source.check(objects.records, index.path, index.images.values())
    categories = tuple(index.categories.items())
    if weights is not None and not continues:
        begins_anew(weights, chosen, categories)
    provenance, data_sha256 = provenance_of_instances(index), objects.sha256()
    if before is not None:
        before.check_data(categories, provenance, data_sha256, out)
        notes += before.notes(chosen, out)
    if provenance.note:
        notes.append(
            f"{instances}: {provenance.note}; whether images of REFER's val and test are in it was not "
            f"checked: refdet audit --instances {instances} --refer-root DIR does"
        )
    if crowd_as_object:
        text = "its crowds are trained on as objects (`crowd_as_object=True`)"
        provenance = dataclasses.replace(provenance, note="; ".join(filter(None, (provenance.note, text))))
    for line in (*notes, *objects.notes):
        log.warning("note: %s", line)

    from refdet.training.trainer import TrainingInputs, train_on  # imports torch, which takes seconds

    given = TrainingInputs(chosen, objects, source, provenance, out, weights, before, data_sha256)
    with report_disk_full(out, "what was saved is kept: free some space, then continue with `resume=True`"):
        return train_on(given, device)


def _with_norm(recipe: Recipe, weights: CheckpointMetadata | None, before: SavedRun | None, continues: bool) -> Recipe:
    """Resolve the norm to frozen or batch; InputError for frozen norms with random weights."""
    source = weights or (before and before.meta)  # the run's own norm may come from the weights it started from
    norm = source.recipe.model.norm if source else "batch"
    if recipe.model.norm == "auto":
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, norm=norm))
    if weights is None and not continues and recipe.model.norm == "frozen":
        raise InputError(
            f"recipe {recipe.name}: model.norm=frozen would freeze random norms and first layers; give "
            "`weights=RUN_DIR` (refdet import-weights makes one from an ImageNet ResNet)"
        )
    return recipe


def _refuse_many_processes() -> None:
    """Raise InputError under torchrun, which would start several trainings in one run directory."""
    count = os.environ.get("WORLD_SIZE", "")
    if count.isdecimal() and int(count) > 1:
        raise InputError(
            f"WORLD_SIZE is {count}: refdet train runs as one process on one device; start it once, without torchrun"
        )
