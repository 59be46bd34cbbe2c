"""Validation data of a training run, read and compared with the training images before the first step. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from refdet.config.recipe import Recipe, TrainOptions
from refdet.data.coco import ImageRecord, TrainingObjects
from refdet.data.instances_provenance import provenance_of_instances
from refdet.errors import InputError
from refdet.evaluation.average_precision import why_undefined
from refdet.evaluation.detection import warn_about_annotations
from refdet.evaluation.evaluation_data import EvaluationData
from refdet.files.short_text import format_count, format_share
from refdet.structures.provenance import Provenance
from refdet.training.selection import held_out_notes
from refer.image_lookup import coco_number

BEST_METRIC = "val_bbox_AP"
"""The metric by which the best weights of a run are selected; every network has it."""


@dataclass(frozen=True)
class ValidationData:
    """Images and annotations that a training run is validated on.

    Attributes:
        data: the images and annotations.
        sha256: SHA-256 of what the metrics depend on: names of the images, boxes, masks, categories and crowds.
        provenance: provenance of the instances file, recorded with the weights selected on it.
        notes: notes for the user, one line each.
    """

    data: EvaluationData
    sha256: str
    provenance: Provenance
    notes: tuple[str, ...]

    @classmethod
    def open(
        cls,
        instances: Path,
        images: Path,
        recipe: Recipe,
        training_objects: TrainingObjects,
        trained_on: Provenance,
        crowd_as_object: bool,
    ) -> ValidationData:
        """Read an instances file and find its images.

        Args:
            instances: COCO instances JSON.
            images: folder or zip of the images.
            recipe: the recipe of the run.
            training_objects: images and objects of the training data.
            trained_on: provenance of the training data.
            crowd_as_object: whether annotations with ``iscrowd`` 1 are objects like others.

        Raises:
            InputError: the file is invalid, its categories are not those of the training data, it has no objects, or
                images are missing.
        """
        data = EvaluationData.open(instances, images, recipe.input.exif, crowd_as_object, "val_images")
        data.check_categories(tuple(training_objects.index.categories.items()), str(training_objects.index.path))
        if reason := why_undefined(data.index, data.index.images):
            raise InputError(f"`val_instances` {instances}: {reason}")
        warn_about_annotations(data.index, recipe.model.masks)
        shared = _image_keys(data.records) & _image_keys(training_objects.records)
        notes = []
        if shared:
            notes.append(
                f"`val_instances` {instances}: {format_share(len(shared), len(data.records), 'image', 'is')} trained "
                "on too, by file name: the AP of the validations is not that of unseen images"
            )
        provenance = provenance_of_instances(data.index)
        notes += held_out_notes(instances, provenance, trained_on, training_objects.index.path)
        return cls(data, _sha256(data), provenance, tuple(notes))

    def describe(self, options: TrainOptions) -> str:
        """Describe what is validated and when, for the first lines of a run."""
        every = f"every {format_count(options.eval_every, 'step')} and " if options.eval_every else ""
        weights = "the average of the weights (train.ema)" if options.ema else "the weights"
        return (
            f"validation: {format_count(len(self.data.records), 'image')} of {self.data.index.path.name}, {every}at "
            f"the end, with {weights}; best/ keeps those of the highest box AP ({BEST_METRIC})"
        )


def is_due(step: int, options: TrainOptions) -> bool:
    """Whether the weights after a step, counted from 1, are validated."""
    return step == options.steps or bool(options.eval_every and step % options.eval_every == 0)


def validations_after(step: int, options: TrainOptions) -> int:
    """Number of validations that are due after later steps than this one, counted from 1; 0 is before the first."""
    if step >= options.steps:
        return 0
    every = options.eval_every or options.steps
    return options.steps // every - step // every + bool(options.steps % every)


def _image_keys(records: Iterable[ImageRecord]) -> set[int | str]:
    """Keys by which images of two files can be compared.

    A key is the COCO id in the file name, as the same image has different names in COCO 2014 and 2017, or else the name
    without its folder.
    """
    names = ((record.file_name or str(record.id)) for record in records)
    return {number if (number := coco_number(name)) is not None else PurePosixPath(name).name for name in names}


def _sha256(data: EvaluationData) -> str:
    """Hash of what the metrics depend on; see `ValidationData.sha256`."""
    digest = hashlib.sha256()
    for record in data.records:
        objects = [[a.category_id, a.box, a.iscrowd, a.segmentation] for a in data.index.annotations[record.id]]
        digest.update(json.dumps([record.id, record.file_name, record.height, record.width, objects]).encode())
    return digest.hexdigest()
