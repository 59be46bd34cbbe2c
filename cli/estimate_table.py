"""The output of ``refdet train --dry-run``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from refdet.files.short_text import format_count

from .common import echo_json, echo_line, echo_table

if TYPE_CHECKING:
    from refdet.training.estimate import Estimate


def print_estimate(estimate: Estimate, source: str, as_json: bool) -> None:
    """Print the recipe as YAML, and a table of the time, memory and disk space of the training run; or both as JSON.

    Args:
        estimate: the estimate.
        source: the recipe's name or file, as it was given.
        as_json: whether to print JSON.
    """
    if as_json:
        echo_json(dataclasses.asdict(estimate))
        return
    from refdet.config.recipe_text import complete_yaml

    for line in complete_yaml(estimate.recipe, source).splitlines():
        echo_line(line)
    echo_line()
    batch_size, objects = estimate.recipe.train.batch_size, format_count(estimate.objects, "object", spec=",")
    rows = [
        ("images", f"{estimate.images:,} with {objects} of {format_count(estimate.classes, 'class')}"),
        ("steps", f"{estimate.steps:,} of {format_count(batch_size, 'image')}, {estimate.epochs:.1f} epochs"),
        ("device", f"{estimate.device}, {estimate.arithmetic}"),
        ("per step", f"{estimate.step_seconds:.3f} s, {batch_size / estimate.step_seconds:.1f} images/s"),
    ]
    if estimate.validation_images:
        seconds = estimate.image_seconds * estimate.validation_images
        images = format_count(estimate.validation_images, "image", spec=",")
        rows.append(("validations", f"{estimate.validations} of {images}, {_format_duration(seconds)} each"))
    rows += [
        ("whole run", _format_duration(estimate.seconds)),
        ("memory", f"{estimate.memory_bytes / 2**30:.1f} GiB, with the largest images"),
        ("disk", f"up to {estimate.disk_bytes / 2**20:.0f} MiB"),
    ]
    echo_table(rows, header=("dry run", "nothing was written"))


def _format_duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"
