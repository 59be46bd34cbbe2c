"""``refdet draw``: one image with its regions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from refdet.errors import ArgumentError, InputError
from refdet.files.short_text import format_count

from .arguments import check_device, check_new_file, check_run_directory, check_store
from .common import FRACTION, echo_json, echo_line, json_option
from .given_options import reject_unused

if TYPE_CHECKING:
    import numpy as np

    from refdet.structures.regions import Regions


@click.command("draw", short_help="Draw an image's regions into a picture.")
@click.argument("image", type=Path)
@click.option("--checkpoint", type=Path, help="Run directory of a detector to run on the image.")
@click.option("--store", type=Path, help="Store with the regions of the image, written by extract-features.")
@click.option("--out", type=Path, required=True, help="Picture to write, such as regions.png or regions.jpg.")
@click.option("--image-id", type=int, help="The image's id in --store, if its file name does not identify it.")
@click.option(
    "--score-threshold",
    type=FRACTION,
    default=0.5,
    show_default=True,
    help="Minimum score of a region to draw.",
)
@click.option(
    "--max-regions",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Maximum number of regions to draw.",
)
@click.option("--no-masks", is_flag=True, help="Draw boxes only.")
@click.option("--device", help="cpu, cuda or cuda:1, for --checkpoint; by default a GPU if available.")
@json_option
def command(
    image: Path,
    checkpoint: Path | None,
    store: Path | None,
    out: Path,
    image_id: int | None,
    score_threshold: float,
    max_regions: int,
    no_masks: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Draw the regions of an IMAGE, found by a detector or read from a store, and save the picture."""
    if (checkpoint is None) == (store is None):
        raise InputError("give either --checkpoint, to detect regions, or --store, to read them")
    if checkpoint is not None:
        reject_unused("image_id", "is for --store; omit it with --checkpoint")
    else:
        reject_unused("device", "is for --checkpoint; omit it with --store, whose regions are only read")
    check_new_file("--out", out, example="regions.png")
    check_device("--device", device)

    from dataclasses import replace

    from refdet.files.atomic import atomic_create, report_disk_full

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--out {out}: not the name of a picture; end it in .png, .jpg or .webp")
    if checkpoint is not None:
        check_run_directory("--checkpoint", checkpoint)
        regions, pixels = _detect(image, checkpoint, score_threshold, max_regions, device)
    else:
        assert store is not None
        check_store("--store", store)
        regions, pixels = _read_stored(image, store, image_id)
    if no_masks:
        regions = replace(regions, masks=None)
    try:
        picture = regions.draw(pixels, min_score=score_threshold, max_regions=max_regions)
    except ArgumentError as error:
        raise InputError(f"{image}: {error.problem}") from error
    drawn = min(int(regions.score_at_least(score_threshold).sum()), max_regions)
    with report_disk_full(out, "free some space and draw it again"), atomic_create(out) as temporary:
        picture.save(temporary, quality=92)  # of JPEG and WebP; ignored for PNG
    if as_json:
        echo_json({"out": str(out), "regions": len(regions), "drawn": drawn})
    else:
        echo_line(f"{out}: {drawn} of {format_count(len(regions), 'region')} drawn")


def _detect(
    image: Path, checkpoint: Path, score_threshold: float, max_regions: int, device: str | None
) -> tuple[Regions, np.ndarray]:
    """Detect the regions of an image; returns the regions and the pixels of the image, (H, W, 3) uint8 RGB."""
    from refdet.data.image_pixels import read_pixels
    from refdet.detector.detector import load_detector

    pixels = read_pixels(image)
    detector = load_detector(checkpoint, device=device or "auto")
    regions = detector.detect(pixels, score_threshold=score_threshold, max_regions=max_regions, features=())
    return regions, pixels


def _read_stored(image: Path, path: Path, image_id: int | None) -> tuple[Regions, np.ndarray]:
    """Read the regions of an image from a store; returns them and the pixels, (H, W, 3) uint8 RGB.

    The pixels are oriented as they were for the extraction.
    """
    from refdet import store as stores
    from refdet.data.image_pixels import read_pixels
    from refdet.report.image_lookup import find_image_id

    with stores.open(path) as store:
        if image_id is None:
            image_id = find_image_id(store, image)
        if image_id not in store:
            raise InputError(f"{path}: has no image {image_id}; give an --image-id that it has")
        regions = store.read(image_id, features=())
        exif = store.options.get("exif", "ignore")
    if regions.error:
        raise InputError(f"{path}: image {image_id} has no regions: {regions.error}")
    return regions, read_pixels(image, exif)
