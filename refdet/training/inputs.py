"""The checked inputs of a training run. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from refdet.config.recipe import Recipe
from refdet.data.coco import TrainingObjects
from refdet.data.image_source import ImageSource
from refdet.structures.provenance import Provenance
from refdet.training.saved_run import SavedRun
from refdet.training.validation import ValidationData


@dataclass(frozen=True)
class TrainingInputs:
    """Checked inputs of a training run, made by `refdet.training.train`.

    Attributes:
        recipe: the recipe, with its norm resolved to frozen or batch.
        objects: annotated objects and their instances file.
        source: folder or zip of the images.
        provenance: provenance of the instances file.
        out: the run directory; the current folder in a dry run without one, which writes nothing.
        weights: run directory of a detector to start from, or None.
        saved_run: the state in `out` to resume from, or None.
        data_sha256: `objects.sha256()`, saved to check that a resumed run has the same data.
        validation: images to validate on, or None.
    """

    recipe: Recipe
    objects: TrainingObjects
    source: ImageSource
    provenance: Provenance
    out: Path
    weights: Path | None
    saved_run: SavedRun | None
    data_sha256: str
    validation: ValidationData | None = None
