"""Log lines at the start of a training run: what is trained, and the processes and passes that share a step."""

from __future__ import annotations

from refdet.config.recipe import Recipe
from refdet.detector.checkpoint import CheckpointMetadata
from refdet.files.short_text import format_count
from refdet.training.inputs import TrainingInputs
from refdet.training.processes import TrainingProcess


def describe_run(inputs: TrainingInputs, meta: CheckpointMetadata, num_images: int, disk_bytes: int) -> str:
    """Describe what is trained on how many images, from where, and for how long.

    Args:
        inputs: the inputs of the run.
        meta: metadata of the run, with the step from which it resumes.
        num_images: number of training images.
        disk_bytes: maximum size of the run directory.
    """
    start = f"starts from {meta.provenance.weights or 'random weights'}"
    if inputs.saved_run is not None:
        start = f"resumes from step {meta.step}"
    recipe = inputs.recipe
    return (
        f"{format_count(num_images, 'image')} of {inputs.objects.index.path.name}; recipe {recipe.name}, {start}; "
        f"{format_count(recipe.train.steps, 'step')}, batch size {recipe.train.batch_size}; "
        f"up to {-(-disk_bytes // 2**20)} MiB on disk"
    )


def start_lines(recipe: Recipe, process: TrainingProcess) -> list[str]:
    """Lines for the log about the processes if torchrun started them, and about the passes if a step has several."""
    options, process_text, lines = recipe.train, process.describe(), []
    share = f"{format_count(options.batch_size, 'image')} per step"
    if process.world_size > 1:
        share += f", {options.batch_size // process.world_size} in each process"
    if options.accumulate > 1:
        pass_size = options.batch_size // process.world_size // options.accumulate
        share += f", in {options.accumulate} passes of {format_count(pass_size, 'image')}"
    if process_text or options.accumulate > 1:
        lines.append(f"train: {process_text}{'; ' if process_text else ''}{share}")
    if options.accumulate > 1 and recipe.model.norm == "batch":
        lines.append(
            "note: train.accumulate: batch norms (model.norm=batch) use the statistics of a pass, not of the whole "
            "step, so the result is not that of a single pass, as it is with model.norm=frozen"
        )
    return lines
