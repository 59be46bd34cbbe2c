"""Validation during training, with the same results as ``refdet evaluate`` on the saved weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from refdet.detector import loading
from refdet.detector.checkpoint import CheckpointMetadata, HasStateDict
from refdet.evaluation.detection import detection_ap
from refdet.files.short_text import format_count
from refdet.interrupt import Stop, StopRequested
from refdet.structures.provenance import Selection
from refdet.training.best import ValidationRecord, read_best, write_best
from refdet.training.metrics_rows import DATA_HASH_KEY, VALIDATION_PREFIX, is_validation, read_rows
from refdet.training.validation import BEST_METRIC, ValidationData, is_due

log = logging.getLogger(__name__)


class Validator:
    """Validates weights and keeps the best; used in the first training process only.

    Args:
        validation: the validation data.
        out: the run directory, locked by the caller.
        workers: number of threads that read images ahead.

    Raises:
        InputError: the record of the best weights so far is damaged.
    """

    def __init__(self, validation: ValidationData, out: Path, workers: int = 2) -> None:
        self._validation, self._out, self._workers = validation, out, max(workers, 1)
        self._best = read_best(out)
        if self._best is not None and (self._best.metric, self._best.data_sha256) != (BEST_METRIC, validation.sha256):
            log.warning(
                "note: `val_instances`: %s/best was chosen on other data (%s); the next validation replaces it",
                out,
                self._best.instances,
            )
            self._best = None

    @property
    def validated_on(self) -> str:
        """The validation data, for the model card."""
        index = self._validation.data.index
        return f"{format_count(len(index.images), 'image')} of {index.path.name}"

    def is_pending(self, meta: CheckpointMetadata) -> bool:
        """Whether the step from which a run resumes is to be validated, but has no row in the log for these data yet.

        Args:
            meta: metadata of the saved weights; its step is 0 in a new run.
        """
        if meta.step == 0 or not is_due(meta.step, meta.recipe.train):
            return False
        if self._best is None:  # nothing was validated on these data yet
            return True
        return not any(
            row["step"] == meta.step and is_validation(row) and row.get(DATA_HASH_KEY) == self._validation.sha256
            for row in read_rows(self._out)
        )

    def validate(
        self, weights: HasStateDict, meta: CheckpointMetadata, device: torch.device, stop: Stop
    ) -> dict[str, float | str]:
        """Measure AP, and replace ``best/`` if it is the highest so far.

        If the run is killed before the returned row is logged, resuming it repeats this, with the same result.

        Args:
            weights: the weights, already saved.
            meta: their metadata.
            device: device to compute on.
            stop: checked after each image; a signal ends the validation.

        Returns:
            The row for metrics.jsonl: "val_bbox_AP" and the other metrics, 0..1, without undefined ones; the hash of
            the data; and "weights" if they are averaged.

        Raises:
            InputError: an image cannot be read.
            RuntimeFailure: the device has too little memory.
            StopRequested: a signal was received.
        """

        def check_stop() -> None:
            if stop.requested:
                raise StopRequested

        check_stop()
        detector = loading.from_tensors(meta, weights.state_dict(), self._out, device, for_inference=True)
        results = detection_ap(
            detector, self._validation.data, workers=self._workers, desc="validate", leave=False, on_image=check_stop
        )
        metrics = {
            f"{VALIDATION_PREFIX}{kind}_{name}": value
            for kind, values in results.items()
            for name, value in (values or {}).items()
            if value is not None
        }
        value, index = metrics[BEST_METRIC], self._validation.data.index
        is_best = self._best is None or value > self._best.value
        if is_best:
            images, sha256 = len(index.images), self._validation.sha256
            self._best = ValidationRecord(BEST_METRIC, value, meta.step, index.path.name, images, sha256, metrics)
            selection = Selection(by_validation=True, validated_on=(self._validation.provenance,))
            provenance = dataclasses.replace(meta.provenance, selection=selection)
            best_meta = dataclasses.replace(meta, provenance=provenance)
            write_best(self._out, weights, best_meta, self._best, self.validated_on)
        assert self._best is not None
        best = "the best so far" if is_best else f"the best is {self._best.value:.3f} at step {self._best.step}"
        log.warning("validation after step %d: %s; %s", meta.step, format_ap(metrics), best)
        row: dict[str, float | str] = {**metrics, DATA_HASH_KEY: self._validation.sha256}
        return row | {"weights": "ema"} if meta.recipe.train.ema else row


def format_ap(row: Mapping[str, Any]) -> str:
    """Format the box and mask AP of a row of metrics.jsonl: "box AP 0.412, mask AP 0.371"."""
    nouns: Sequence[tuple[str, str]] = (("bbox", "box"), ("segm", "mask"))
    return ", ".join(
        f"{noun} AP {row[key]:.3f}" for kind, noun in nouns if (key := f"{VALIDATION_PREFIX}{kind}_AP") in row
    )
