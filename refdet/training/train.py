"""`train`: from a recipe, an instances file and images to a run directory; `dry_run` estimates its time and memory.

Arguments are checked before torch is imported, so that most mistakes are reported in under a second.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from refdet.config import recipe as recipes
from refdet.config.recipe import Recipe
from refdet.data.coco import CocoIndex, TrainingObjects
from refdet.data.image_source import ImageSource
from refdet.data.instances_provenance import provenance_of_instances
from refdet.detector.checkpoint import BEST, CheckpointMetadata, load_meta
from refdet.errors import InputError
from refdet.files.atomic import report_disk_full
from refdet.files.lock import exclusive_lock
from refdet.files.short_text import format_count
from refdet.structures.provenance import Provenance
from refdet.training.inputs import TrainingInputs
from refdet.training.joining import join_processes
from refdet.training.pretrained import find_new_prefixes
from refdet.training.processes import TrainingProcess
from refdet.training.run_folder import IN_USE_FIX, LOCK, can_resume
from refdet.training.saved_run import SavedRun
from refdet.training.summary import Summary
from refdet.training.validation import ValidationData

if TYPE_CHECKING:
    from refdet.training.estimate import Estimate

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
    val_instances: str | Path | None = None,
    val_images: str | Path | None = None,
) -> Summary:
    """Train a detector.

    Examples:
        >>> summary = refdet.train("demo", "demo/split.json", "demo/data/train2014", "run",
        ...                        changes=["train.steps=2", "model.width=8"], device="cpu")
        >>> summary.steps
        2

    Args:
        recipe: name of a shipped recipe, a YAML file, or a `Recipe`. Its ``model.norm`` "auto" means the norm of
            ``weights`` or of the resumed run, and "batch" without either.
        instances: the split, a COCO instances JSON.
        images: folder or zip of its images.
        out: the run directory, new unless ``resume``.
        changes: overrides of recipe keys, such as "train.steps=500".
        weights: run directory of a detector to start from; random weights if None.
        resume: continue the run in ``out``; if there is nothing to resume, start from the beginning, with a note.
        device: "cpu", "cuda" or "cuda:1"; with None or "auto" a GPU if there is one.
        crowd_as_object: also train on annotations with ``iscrowd`` 1.
        val_instances: COCO instances JSON to measure AP on every ``train.eval_every`` steps and at the end; the best
            weights so far are kept in ``out/best``.
        val_images: folder or zip of the images of ``val_instances``, by default ``images``.

    Returns:
        The number of steps, the time, the throughput and the last loss.

    Raises:
        InputError: an argument is invalid, or another process trains into ``out``.
        RuntimeFailure: the loss is not finite, the disk is full, or a worker process died; saved states are kept.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; the last step is saved.
    """
    with join_processes() as process:
        inputs = _check_inputs(
            process,
            recipe,
            instances,
            images,
            Path(out),
            changes=changes,
            weights=weights,
            resume=resume,
            crowd_as_object=crowd_as_object,
            val_instances=val_instances,
            val_images=val_images,
        )

        from refdet.training.trainer import train_on  # imports torch, which takes seconds

        with report_disk_full(inputs.out, "what was saved is kept: free some space, then continue with `resume=True`"):
            return train_on(inputs, device, process)


def dry_run(
    recipe: Recipe | str | Path,
    instances: str | Path,
    images: str | Path,
    out: str | Path | None = None,
    *,
    changes: Sequence[str] = (),
    weights: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    crowd_as_object: bool = False,
    val_instances: str | Path | None = None,
    val_images: str | Path | None = None,
) -> Estimate:
    """Check the arguments of `train` and estimate the run from three measured steps, without writing anything.

    Args:
        recipe: as in `train`.
        instances: as in `train`.
        images: as in `train`.
        out: as in `train`; may be None without ``resume``.
        changes: as in `train`.
        weights: as in `train`.
        resume: as in `train`.
        device: as in `train`.
        crowd_as_object: as in `train`.
        val_instances: as in `train`.
        val_images: as in `train`.

    Returns:
        The complete recipe, the number of images and steps, and the time and memory that the run will take.

    Raises:
        InputError: an argument is invalid.
        RuntimeFailure: the loss is not finite, or the device has too little memory.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP.
    """
    if resume and out is None:
        raise InputError("`resume`: without `out` there is no run to resume; give its run directory")
    with join_processes() as process:
        if process.world_size > 1:
            raise InputError("torchrun: a dry run measures the steps of one process; start it without torchrun")
        inputs = _check_inputs(
            process,
            recipe,
            instances,
            images,
            None if out is None else Path(out),
            changes=changes,
            weights=weights,
            resume=resume,
            crowd_as_object=crowd_as_object,
            val_instances=val_instances,
            val_images=val_images,
        )

        from refdet.training.estimate import estimate  # imports torch, which takes seconds

        return estimate(inputs, device)


def _check_inputs(
    process: TrainingProcess,
    recipe: Recipe | str | Path,
    instances: str | Path,
    images: str | Path,
    out: Path | None,
    *,
    changes: Sequence[str],
    weights: str | Path | None,
    resume: bool,
    crowd_as_object: bool,
    val_instances: str | Path | None,
    val_images: str | Path | None,
) -> TrainingInputs:
    """Check the arguments of `train` and log notes for the user, without torch; `out` may be None in a dry run."""
    instances, images = Path(instances), Path(images)
    weights = None if weights is None else Path(weights)
    resolved = (recipe if isinstance(recipe, Recipe) else recipes.load(str(recipe))).with_changes(changes)
    check_divisible(resolved, process.world_size)
    saved_run, notes = (None, []) if out is None else _find_saved_run(process, out, resume)
    resolved, default_notes = _resolve_recipe(resolved, weights, saved_run, out)
    source = ImageSource.open(images, resolved.input.exif)
    index = CocoIndex.load(instances, need_segmentation=resolved.model.masks, crowd_as_object=crowd_as_object)
    objects = TrainingObjects(index, resolved.model.masks, resolved.train.empty_images)
    source.check(objects.records, listed_in=index.path, all_records=index.images.values())
    provenance, data_sha256 = provenance_of_instances(index), objects.sha256()
    validation = None
    if val_instances is not None:
        validation = ValidationData.open(
            Path(val_instances), Path(val_images or images), resolved, objects, provenance, crowd_as_object
        )
    elif val_images is not None:
        raise InputError("`val_images`: these images need annotations; give their instances file as `val_instances`")
    notes += [*default_notes, *_validation_notes(validation, resolved, out)]
    categories = tuple(index.categories.items())
    if weights is not None and saved_run is None:
        find_new_prefixes(weights, resolved, categories)  # raises InputError if the weights do not fit
    validation_sha256 = None if validation is None else validation.sha256
    hashes = {"the hash of `instances`": data_sha256, "the hash of `val_instances`": validation_sha256}
    process.check_same({**hashes, **_flatten(resolved)})
    if saved_run is not None and out is not None:
        saved_run.check_data(categories, provenance, data_sha256, out)
        notes += saved_run.resume_notes(resolved, out)
    if weights is None and saved_run is None:
        notes += _random_weights_notes(resolved)
    notes += _provenance_notes(provenance, instances)
    for line in (*notes, *objects.notes):
        log.warning("note: %s", line)
    if crowd_as_object:
        # only now, as the notes are about the instances file
        crowd_note = "its crowds are trained on as objects (`crowd_as_object=True`)"
        provenance = dataclasses.replace(provenance, note="; ".join(filter(None, (provenance.note, crowd_note))))
    return TrainingInputs(
        resolved, objects, source, provenance, out or Path(), weights, saved_run, data_sha256, validation
    )


def _find_saved_run(process: TrainingProcess, out: Path, resume: bool) -> tuple[SavedRun | None, list[str]]:
    """The state in `out` to resume from, if any, and notes for the user; the same in all processes."""
    if not resume and process.is_restart(out):
        resume = True  # its command line is that of a new run, but the failed processes may have saved a state
        log.warning("note: torchrun has started the processes again: they continue with the newest state in %s", out)
    saved_run, note = process.run_on_first(lambda: _read_saved_run(out, resume))
    return saved_run, [note] if note else []


def _read_saved_run(out: Path, resume: bool) -> tuple[SavedRun | None, str]:
    """The state in `out` to resume from, if any, and a note if ``resume`` finds none.

    Raises:
        InputError: `out` cannot be used, or another process trains into it.
    """
    resumes, note = can_resume(out, resume)
    if (out / LOCK).exists():
        with exclusive_lock(out, LOCK, IN_USE_FIX):
            pass  # only checks that no other process trains into the folder
    return (SavedRun.newest(out) if resumes else None), note


def _resolve_recipe(
    recipe: Recipe, weights: Path | None, saved_run: SavedRun | None, out: Path | None
) -> tuple[Recipe, list[str]]:
    """Complete a recipe by what the weights and the saved run determine.

    Returns:
        The recipe, and notes for the user on what the saved run determines.

    Raises:
        InputError: the weights cannot be read, or the saved run was started with another recipe.
    """
    pretrained = None if weights is None else load_meta(weights)
    if weights is not None and pretrained is not None and pretrained.provenance.is_unknown:
        log.warning("starts from %s, %s", weights.name, pretrained.provenance.note)
    recipe = _with_norm(recipe, pretrained, saved_run)
    if saved_run is None or out is None:
        return recipe, []
    recipe, notes = saved_run.with_older_defaults(recipe, out)
    saved_run.check_recipe(recipe, out)
    return recipe, notes


def _validation_notes(validation: ValidationData | None, recipe: Recipe, out: Path | None) -> list[str]:
    """Notes for the user on the validation data, or that the run in `out` is no longer validated."""
    if validation is not None:
        return [*validation.notes, validation.describe(recipe.train)]
    if out is not None and (out / BEST).exists():
        return [f"`resume` {out}: was validated before, but is not now; give `val_instances` to continue validation"]
    return []


def _random_weights_notes(recipe: Recipe) -> list[str]:
    """A note for the user if there are ImageNet weights for the network, which starts from random ones."""
    if recipe.model.width != 64:  # the width of ImageNet weights
        return []
    return [
        f"recipe {recipe.name} starts from random weights, not from ImageNet's; `weights=RUN_DIR` starts from "
        "those that refdet import-weights converts"
    ]


def _provenance_notes(provenance: Provenance, instances: Path) -> list[str]:
    """A note for the user if an instances file was not checked for held-out images."""
    if not provenance.note:
        return []
    return [
        f"{instances}: {provenance.note}; it was not checked for REFER's val and test images; check it with "
        f"refdet audit --instances {instances} --refer-root DIR"
    ]


def _with_norm(recipe: Recipe, pretrained: CheckpointMetadata | None, saved_run: SavedRun | None) -> Recipe:
    """Resolve the norm "auto": that of the pretrained weights or else of the saved run, or batch without either.

    Raises:
        InputError: the norms are frozen, but the weights random.
    """
    source = pretrained or (saved_run and saved_run.meta)
    norm = source.recipe.model.norm if source else "batch"
    if recipe.model.norm == "auto":
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, norm=norm))
    if pretrained is None and saved_run is None and recipe.model.norm == "frozen":
        raise InputError(
            f"recipe {recipe.name}: model.norm=frozen would freeze random norms and first layers; give "
            "`weights=RUN_DIR` (refdet import-weights makes one from an ImageNet ResNet)"
        )
    return recipe


def _flatten(recipe: Recipe) -> dict[str, object]:
    """The options of a recipe by key, such as "train.lr"; its name is left out."""
    sections = {name: options for name, options in dataclasses.asdict(recipe).items() if isinstance(options, dict)}
    return {f"{name}.{key}": value for name, options in sections.items() for key, value in options.items()}


def check_divisible(recipe: Recipe, world_size: int) -> None:
    """Raise InputError if the images of a step cannot be divided equally among all passes of all processes."""
    options = recipe.train
    if options.batch_size % (world_size * options.accumulate):
        passes = f", each in {options.accumulate} passes (train.accumulate)" if options.accumulate > 1 else ""
        raise InputError(
            f"train.batch_size: {format_count(options.batch_size, 'image')} cannot be divided among "
            f"{format_count(world_size, 'process')}{passes}; "
            f"give a multiple of {world_size * options.accumulate}"
        )
