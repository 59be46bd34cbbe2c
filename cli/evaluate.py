"""``refdet evaluate``: COCO box and mask AP of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from .arguments import check_device, check_images, check_ray, check_run_directory, check_text_file
from .common import (
    echo_json,
    echo_table,
    exif_option,
    json_option,
    keep_result,
    precision_option,
    ray_option,
    workers_option,
)


@click.command("evaluate", short_help="Compute box and mask AP on an instances file.")
@click.option("--checkpoint", type=Path, required=True, help="Run directory of the detector.")
@click.option("--instances", type=Path, required=True, help="COCO instances JSON to evaluate on.")
@click.option("--images", type=Path, required=True, help="Folder or zip of its images.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Images per batch.  [default: 4; on a GPU as many as fit]",
)
@workers_option
@click.option("--crowd-as-object", is_flag=True, help="Treat iscrowd annotations as objects.")
@click.option("--device", help="cpu, cuda or cuda:1; by default a GPU if available.")
@precision_option
@exif_option()
@ray_option
@json_option
def command(
    checkpoint: Path,
    instances: Path,
    images: Path,
    batch_size: int | None,
    workers: int | None,
    crowd_as_object: bool,
    device: str | None,
    precision: str,
    exif: str,
    ray: str | None,
    as_json: bool,
) -> None:
    """Compute box and mask AP on an instances file, for the regions that extract-features writes by default."""
    check_device("--device", device)
    check_ray(ray)
    check_run_directory("--checkpoint", checkpoint)
    check_images("--images", images)
    check_text_file("--instances", instances, "an instances JSON")

    from refdet.evaluation.average_precision import METRICS
    from refdet.evaluation.detection import evaluate

    metrics = evaluate(
        checkpoint,
        instances,
        images,
        batch_size=batch_size,
        device=device,
        precision=precision,
        workers=workers,
        exif=exif,
        crowd_as_object=crowd_as_object,
        ray=ray,
    )
    with keep_result(metrics):
        if as_json:
            echo_json(metrics)
            return
        rows = [
            (kind, *(_format_metric(values[name]) for name in METRICS)) for kind, values in metrics.items() if values
        ]
        echo_table(rows, header=("", *METRICS))


def _format_metric(value: float | None) -> str:
    """An AP or AR with three decimals; a dash if it is undefined, such as that of small objects if there are none."""
    return "-" if value is None else f"{value:.3f}"
