"""``refdet export-weights``: write a trained detector's weights for another program."""

from __future__ import annotations

from pathlib import Path

import click

from .arguments import check_new_file, check_run_directory
from .common import echo_json, echo_table, json_option, note


@click.command("export-weights", short_help="Export weights to detectron2 or torchvision.")
@click.option("--checkpoint", type=Path, required=True, metavar="RUN_DIR", help="Run directory of the detector.")
@click.option(
    "--format", "format_", type=click.Choice(["detectron2", "torchvision"]), required=True, help="Output format."
)
@click.option(
    "--out", type=Path, required=True, help=".pth file to write; for detectron2, a .yaml is written next to it."
)
@json_option
def command(checkpoint: Path, format_: str, out: Path, as_json: bool) -> None:
    """Write a detector's weights as a state dict of detectron2 or torchvision."""
    check_run_directory("--checkpoint", checkpoint)
    check_new_file("--out", out, example="model.pth")

    from refdet.detector.weights.export_weights import export_weights

    result = export_weights(checkpoint, out, format_)
    for text in result.notes:
        note(f"note: {text}")
    if as_json:
        echo_json(
            {"files": [str(file) for file in result.files], "tensors": result.tensors, "notes": list(result.notes)}
        )
        return
    echo_table([(str(file), str(result.tensors)) for file in result.files[:1]], header=("file", "tensors"))
