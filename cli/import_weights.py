"""``refdet import-weights``: convert another program's checkpoint to a run directory."""

from __future__ import annotations

from pathlib import Path

import click

from .arguments import check_text_file, check_weights, check_writable_folder
from .common import echo_json, echo_table, json_option, note, renamed_option


@click.command("import-weights", short_help="Convert other programs' weights to a run directory.")
@click.option("--from", "source", type=Path, required=True, help="Checkpoint of a detector or of an ImageNet network.")
@click.option("--out", type=Path, required=True, help="Run directory to write.")
@click.option("--trained-on", type=Path, help="Instances file that the checkpoint was trained on, if known.")
@renamed_option(
    "--weight-format",
    "--style",
    "weight_format",
    type=click.Choice(["caffe", "torchvision", "tf-faster-rcnn", "pytorch-faster-rcnn"]),
    help="Preprocessing of an ImageNet network (detected by default), or the program that a detector with the "
    "reference's tensor names comes from.",
)
@json_option
def command(source: Path, out: Path, trained_on: Path | None, weight_format: str | None, as_json: bool) -> None:
    """Convert another program's checkpoint to a run directory.

    Reads Mask and Faster R-CNN from lichengunc/mask-faster-rcnn, detectron2 and torchvision, Faster R-CNN from
    pytorch-faster-rcnn and tf-faster-rcnn, and ImageNet networks.
    """
    from dataclasses import asdict

    check_weights("--from", source)
    check_writable_folder("--out", out)
    if trained_on is not None:
        check_text_file("--trained-on", trained_on, "an instances JSON")

    from refdet.detector.weights.import_weights import import_weights

    imported = import_weights(source, out, trained_on, weight_format)
    note(f"{source.name} is {imported.kind}")
    if imported.untrained:
        missing = ", ".join(part.rstrip(".") for part in imported.untrained)
        note(f"it has no {missing}: use it as initial weights (--weights)")
    note(f"trained on: {imported.provenance.one_line()}")
    if as_json:
        echo_json(asdict(imported))
        return
    row = (imported.recipe, str(imported.classes), f"{imported.numbers:,}", str(out))
    echo_table([row], header=("recipe", "classes", "parameters", "run directory"))
