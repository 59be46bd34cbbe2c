"""Estimate the time, memory and disk space of a training run by running a few of its steps; nothing is written."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from refdet.config.recipe import Recipe
from refdet.data.training_batches import TrainingBatches
from refdet.detector import loading
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.detector.mask_rcnn import MaskRCNN
from refdet.device import (
    as_out_of_memory_error,
    describe_device,
    float32_arithmetic,
    resolve_device,
    supported_precision,
)
from refdet.errors import Interrupted, RefdetError, RuntimeFailure
from refdet.evaluation.detection import detect_regions
from refdet.evaluation.evaluation_data import EvaluationData
from refdet.files.progress import progress_bar
from refdet.interrupt import Stop, StopRequested
from refdet.training import state
from refdet.training.batch_workers import check_shared_memory, prefetch_batches
from refdet.training.inputs import TrainingInputs
from refdet.training.optim import build_optimizer, learning_rate
from refdet.training.pretrained import load_pretrained
from refdet.training.step import start_step, step_seed, uses_bfloat16
from refdet.training.validation import validations_after

# Number of timed steps. Before them, a step on the largest images is not timed, as libraries choose kernels in it.
MEASURED_STEPS = 3
_VALIDATION_IMAGES = 4  # images of which a validation is timed; one batch


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a training run.

    Attributes:
        recipe: the recipe, with its norm resolved to frozen or batch.
        images: number of training images.
        objects: number of objects on them.
        classes: number of classes.
        steps: number of remaining steps, all unless the run is resumed.
        epochs: how often the remaining steps go through all images.
        device: the device, and why it was chosen.
        arithmetic: "float32", "tf32" or "bfloat16".
        step_seconds: median time of the measured steps.
        image_seconds: time per image of a validation; 0 without validation.
        validations: number of remaining validations.
        validation_images: number of images per validation.
        seconds: time for all steps and validations, without saving.
        memory_bytes: peak memory of the measured steps and a step on the largest images: GPU memory, or on a CPU the
            memory of this process.
        disk_bytes: largest size that the run directory will have, which is while it has old and new states.
    """

    recipe: Recipe
    images: int
    objects: int
    classes: int
    steps: int
    epochs: float
    device: str
    arithmetic: str
    step_seconds: float
    image_seconds: float
    validations: int
    validation_images: int
    seconds: float
    memory_bytes: int
    disk_bytes: int


def estimate(inputs: TrainingInputs, device: str | None = None) -> Estimate:
    """Estimate the cost of a training run from a few of its steps, and a batch of its validation if it has one.

    Args:
        inputs: the checked inputs of the run.
        device: device to train on; None to choose one.

    Raises:
        InputError: the device cannot be used, the network is far too large, or an image cannot be used.
        RuntimeFailure: the loss is not finite, or the device has too little memory.
        Interrupted: by a signal.
    """
    target, recipe, index = resolve_device(device), inputs.recipe, inputs.objects.index
    categories = tuple(index.categories.items())
    loading.build_on_meta(recipe, len(categories))  # raises InputError if the network is far too large
    batches = TrainingBatches(index, inputs.source, recipe, inputs.objects)
    check_shared_memory(batches, recipe.train.workers)
    first_step = inputs.saved_run.meta.step if inputs.saved_run else 0
    steps_left = max(recipe.train.steps - first_step, 0)
    precision = supported_precision("tf32" if recipe.train.tf32 else "float32", target)
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)
    try:
        with as_out_of_memory_error(), float32_arithmetic(precision):
            model, seconds = _measure_steps(inputs, batches, target, first_step)
    except torch.cuda.OutOfMemoryError as error:
        raise RuntimeFailure(
            f"{target} has too little memory for a step; lower train.batch_size and train.lr together"
        ) from error
    memory = _peak_memory(target)
    image_seconds, validation_images = 0.0, 0
    if inputs.validation is not None:
        meta = CheckpointMetadata(recipe, categories, inputs.provenance, first_step)
        detector = loading.from_tensors(meta, model.state_dict(), inputs.out, target, for_inference=True)
        image_seconds = _measure_image(detector, inputs.validation.data)
        validation_images = len(inputs.validation.data.records)
    validations = validations_after(first_step, recipe.train) if inputs.validation else 0
    step_seconds = statistics.median(seconds)
    return Estimate(
        recipe=recipe,
        images=len(batches.records),
        objects=sum(len(batches.objects.objects(record.id)) for record in batches.records),
        classes=len(categories),
        steps=steps_left,
        epochs=steps_left / batches.steps_per_epoch,
        device=describe_device(device),
        arithmetic="bfloat16" if uses_bfloat16(model, target) else precision,
        step_seconds=step_seconds,
        image_seconds=image_seconds,
        validations=validations,
        validation_images=validation_images,
        seconds=steps_left * step_seconds + validations * validation_images * image_seconds,
        memory_bytes=memory,
        disk_bytes=state.max_disk_bytes(model, recipe.train, validated=inputs.validation is not None),
    )


def _measure_steps(
    inputs: TrainingInputs, batches: TrainingBatches, device: torch.device, first_step: int
) -> tuple[MaskRCNN, list[float]]:
    """Run a step on the largest images, and a few steps from `first_step`; nothing is saved.

    Returns:
        The network, and the seconds of each of those few steps.
    """
    options = inputs.recipe.train
    torch.manual_seed(options.seed)
    classes = len(batches.labels)
    model = MaskRCNN(inputs.recipe, classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    new_prefixes = None  # of the parameters that are not in `inputs.weights`
    if inputs.weights is not None and inputs.saved_run is None:
        new_prefixes = load_pretrained(model, tuple(inputs.objects.index.categories.items()), inputs.weights)
    sgd = build_optimizer(model, options, new_prefixes)
    if inputs.saved_run is not None:
        state.newest(inputs.out).restore(model, sgd)
    model.train()
    generator, seconds = torch.Generator(), []
    largest, steps = batches.largest_batch(), range(first_step, first_step + MEASURED_STEPS)
    if isinstance(largest, RefdetError):
        raise largest
    try:
        with (
            Stop.watch() as stop,
            progress_bar(1 + len(steps), "measure", "step", leave=False) as bar,
            prefetch_batches(batches, steps, options.workers, device, stop) as prefetched,
        ):
            for position, step in enumerate((first_step, *steps)):
                started = time.perf_counter()
                if stop.requested:
                    raise StopRequested
                batch = next(prefetched) if position else largest
                generator.manual_seed(step_seed(options.seed, step))
                lr = learning_rate(min(step, options.steps - 1), options)  # the measured steps may go beyond the last
                start_step(model, sgd, batch, lr, options.max_grad_norm, generator).losses()  # waits for the device
                seconds.append(time.perf_counter() - started)
                bar.update()
    except StopRequested:
        raise Interrupted(f"stopped by {stop.name}; nothing was written") from None
    return model, seconds[1:]  # without the step on the largest images


def _measure_image(detector: loading.TrainedDetector, data: EvaluationData) -> float:
    """Seconds per image of a validation, from the second of two passes over the same images: the first is slower."""
    records, seconds = data.records[:_VALIDATION_IMAGES], 0.0
    for _ in range(2):
        started = time.perf_counter()
        for _ in detect_regions(detector, data.source, records):
            pass
        seconds = time.perf_counter() - started
    return seconds / len(records)


def _peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: reserved by PyTorch on a GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit
