"""``refdet train``: train a detector on a split, as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from refdet.errors import InputError
from refdet.training.joining import in_all_processes

from .arguments import check_device, check_images, check_run_directory, check_text_file, check_writable_folder
from .common import echo_json, echo_table, exif_option, json_option
from .estimate_table import print_estimate


@click.command("train")
@click.option("--recipe", "recipe_name", required=True, metavar="NAME|YAML", help="Built-in recipe or YAML file.")
@click.option("--instances", type=Path, required=True, help="COCO instances JSON, e.g. from build-split.")
@click.option("--images", type=Path, required=True, help="Folder or zip of its images.")
@click.option("--out", type=Path, help="Run directory to write.  [required unless --dry-run is given]")
@click.option("--weights", type=Path, help="Run directory of the initial weights.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Set a recipe key, e.g. train.steps=500.")
@exif_option(default=None)
@click.option("--crowd-as-object", is_flag=True, help="Treat iscrowd annotations as objects.")
@click.option(
    "--val-instances", type=Path, metavar="FILE", help="COCO instances JSON to measure AP on during training."
)
@click.option("--val-images", type=Path, metavar="DIR", help="Folder or zip of its images.  [default: --images]")
@click.option("--resume", is_flag=True, help="Resume the run in --out.")
@click.option("--dry-run", is_flag=True, help="Check everything and estimate time and memory; write nothing.")
@click.option("--device", help="cpu, cuda or cuda:1; by default a GPU if available.")
@json_option
@in_all_processes
def command(
    recipe_name: str,
    instances: Path,
    images: Path,
    out: Path | None,
    weights: Path | None,
    changes: tuple[str, ...],
    crowd_as_object: bool,
    exif: str | None,
    val_instances: Path | None,
    val_images: Path | None,
    resume: bool,
    dry_run: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Train a Mask R-CNN on a split."""
    check_device("--device", device)
    if weights is not None:
        check_run_directory("--weights", weights)

    if exif is not None and any(change.partition("=")[0].strip() == "input.exif" for change in changes):
        raise InputError(f"--exif {exif}: replaces --set input.exif; give only one of them")
    if out is None and not dry_run:
        raise click.UsageError("--out: give the run directory to write")

    import dataclasses

    from refdet.config import recipe
    from refdet.training import train as training

    chosen = recipe.load(recipe_name).with_changes((*changes, f"input.exif={exif}") if exif else changes)
    if out is not None:
        check_writable_folder("--out", out, must_be_empty=False)
    check_text_file("--instances", instances, "an instances JSON")
    check_images("--images", images)
    if val_instances is not None:
        check_text_file("--val-instances", val_instances, "an instances JSON")
    if val_images is not None:
        check_images("--val-images", val_images)
    options: dict[str, Any] = {
        "weights": weights,
        "resume": resume,
        "device": device,
        "crowd_as_object": crowd_as_object,
        "val_instances": val_instances,
        "val_images": val_images,
    }
    if dry_run:
        print_estimate(training.dry_run(chosen, instances, images, out, **options), recipe_name, as_json)
        return
    assert out is not None
    summary = training.train(chosen, instances, images, out, **options)
    if as_json:
        echo_json(dataclasses.asdict(summary))
    else:
        rows = [
            ("steps", str(summary.steps)),
            ("seconds", f"{summary.seconds:.0f}"),
            ("images/s", f"{summary.images_per_second:.1f}"),
        ]
        if summary.loss is not None:
            rows.append(("final loss", f"{summary.loss:.3f}"))
        echo_table(rows, header=("trained", str(out)))
