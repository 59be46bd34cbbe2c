"""Log lines at the start of a training run about the processes and passes that share the images of a step."""

from __future__ import annotations

from refdet.config.recipe import Recipe
from refdet.files.short_text import format_count
from refdet.training.processes import TrainingProcess


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
