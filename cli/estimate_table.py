"""What ``refdet train --dry-run`` prints."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from refdet.files.short_text import format_count

from .common import echo_json, echo_line, echo_table

if TYPE_CHECKING:
    from refdet.training.estimate import Estimate


def print_estimate(found: Estimate, source: str, as_json: bool) -> None:
    """Print the recipe in full as YAML, and a table of what the run will take; or both as JSON.

    Args:
        found: the estimate.
        source: the recipe's name or file, as it was given.
        as_json: whether to print JSON.
    """
    if as_json:
        echo_json(dataclasses.asdict(found))
        return
    from refdet.config.recipe_text import complete_yaml

    for line in complete_yaml(found.recipe, source).splitlines():
        echo_line(line)
    echo_line()
    options, objects = found.recipe.train, format_count(found.objects, "object", spec=",")
    rows = [
        ("images", f"{found.images:,} with {objects} of {format_count(found.classes, 'class')}"),
        ("steps", f"{found.steps:,} of {format_count(options.batch_size, 'image')}, {found.epochs:.1f} epochs"),
        ("device", f"{found.device}, {found.arithmetic}"),
        ("a step", f"{found.step_seconds:.3f} s, {options.batch_size / found.step_seconds:.1f} images/s"),
    ]
    if found.validation_images:
        seconds = found.image_seconds * found.validation_images
        images = format_count(found.validation_images, "image", spec=",")
        rows.append(("validations", f"{found.validations} of {images}, {_duration(seconds)} each"))
    rows += [
        ("whole run", _duration(found.seconds)),
        ("memory", f"{found.memory_bytes / 2**30:.1f} GiB, with the largest images"),
        ("disk", f"up to {found.disk_bytes / 2**20:.0f} MiB"),
    ]
    echo_table(rows, header=("dry run", "nothing was written"))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"
