"""``refdet extract-features``: regions and features into an HDF5 store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from refdet.errors import InputError
from refdet.files.file_kinds import FileKind, kind_of
from refdet.files.short_text import format_count, format_share

from .arguments import (
    check_device,
    check_images,
    check_new_file,
    check_not_empty,
    check_ray,
    check_refer_root,
    check_run_directory,
    check_text_file,
)
from .common import (
    FRACTION,
    box_format_option,
    echo_json,
    echo_line,
    echo_table,
    exif_option,
    json_option,
    note,
    precision_option,
    ray_option,
    renamed_option,
    workers_option,
)
from .given_options import reject_box_format_without, reject_unused, was_given

if TYPE_CHECKING:
    from refdet.extraction.summary import Summary

_BAR_LENGTH = 40  # characters


@click.command("extract-features", short_help="Extract boxes, masks and features into HDF5.")
@click.option("--checkpoint", type=Path, required=True, help="Run directory of the detector.")
@click.option("--images", type=Path, required=True, help="Folder or zip of the images.")
@click.option("--out", type=Path, required=True, help="HDF5 file to write.")
@click.option("--refer-root", type=Path, help="Folder of the REFER data; with --dataset and --split-by.")
@click.option("--dataset", help="refcoco, refcoco+, refcocog or grefcoco.")
@click.option("--split-by", help="unc, umd or google.")
@click.option("--split", "splits", multiple=True, help="Comma-separated splits.  [default: all]")
@click.option("--instances", type=Path, help="Instead of REFER: use all images of this COCO instances JSON.")
@click.option(
    "--regions",
    type=click.Choice(["detections", "annotations"]),
    default="detections",
    show_default=True,
    help="Regions to extract.",
)
@click.option("--crowd-as-object", is_flag=True, help="Also extract iscrowd annotations.")
@click.option("--boxes", type=Path, help="Instead of --regions: boxes from COCO results JSON or a store (.h5).")
@box_format_option("--boxes")
@click.option(
    "--masks",
    type=click.Choice(["annotated", "predicted"]),
    default="annotated",
    show_default=True,
    help="With annotations or --boxes: use their masks, or predict them.",
)
@click.option(
    "--features",
    default="pool5,fc7",
    show_default=True,
    help="Comma-separated features: pool5, fc7, class_prob; with a C4 detector also spatial_pool5, spatial_fc7, head.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Type of the stored features.",
)
@click.option(
    "--score-threshold",
    type=FRACTION,
    default=0.05,
    show_default=True,
    help="Minimum score of a detection.",
)
@click.option(
    "--nms-threshold",
    type=FRACTION,
    default=0.3,
    show_default=True,
    help="IoU threshold of per-class NMS.",
)
@renamed_option(
    "--lower-threshold-if-empty",
    "--at-least-one",
    "lower_threshold_if_empty",
    is_flag=True,
    help="If an image has no regions, lower its score threshold in steps of 0.1 until it has one.",
)
@click.option(
    "--max-regions",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Maximum number of regions per image.",
)
@click.option("--batch-size", help="Images per batch, or auto for as many as fit.  [default: 4; on a GPU auto]")
@workers_option
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:1; auto uses a GPU if available.")
@precision_option
@click.option(
    "--compression",
    type=click.Choice(["none", "gzip", "lzf"]),
    default="none",
    show_default=True,
    help="Compression of features and maps.",
)
@exif_option()
@click.option("--strict", is_flag=True, help="Stop at an unusable image instead of recording the error.")
@click.option("--profile", is_flag=True, help="Print the time spent in each stage.")
@click.option("--resume", is_flag=True, help="Resume a stopped run.")
@click.option("--part", metavar="K/N", help="Compute part K of N; the last part to finish writes the file.")
@ray_option
@json_option
def command(
    checkpoint: Path,
    images: Path,
    out: Path,
    refer_root: Path | None,
    dataset: str | None,
    split_by: str | None,
    splits: tuple[str, ...],
    instances: Path | None,
    regions: str,
    crowd_as_object: bool,
    boxes: Path | None,
    box_format: str,
    masks: str,
    features: str,
    dtype: str,
    score_threshold: float,
    nms_threshold: float,
    lower_threshold_if_empty: bool,
    max_regions: int,
    batch_size: str | None,
    workers: int | None,
    device: str,
    precision: str,
    compression: str,
    exif: str,
    strict: bool,
    profile: bool,
    resume: bool,
    part: str | None,
    ray: str | None,
    as_json: bool,
) -> None:
    """Extract boxes, masks and features of REFER splits (or of an instances file) into HDF5."""
    check_not_empty("--split", splits)
    check_not_empty("--features", [features])
    parsed_batch_size = _parse_batch_size(batch_size)
    check_device("--device", device)
    if part is not None:
        from refdet.extraction.part import Part

        Part.parse(part)  # raises if it is not K/N
    check_ray(ray, part)
    if crowd_as_object and regions != "annotations":
        raise InputError("--crowd-as-object is for --regions annotations; give both or omit --crowd-as-object")
    _check_image_list(refer_root, dataset, split_by, splits, instances)
    if boxes is not None and regions != "detections":
        raise InputError(f"--boxes {boxes} replaces --regions; omit --regions {regions}")
    reject_box_format_without("--boxes", boxes, box_format)
    if boxes is None and regions == "detections" and masks == "annotated":  # "predicted" is refused by extract_features
        reject_unused("masks", "is for --regions annotations or --boxes; detections have their own masks; omit it")
    check_new_file("--out", out, example="features.h5", may_exist=resume or part is not None)
    _check_input_files(checkpoint, images, boxes, box_format, instances, refer_root, dataset)

    from dataclasses import asdict

    from refdet.extraction.extract import extract_features
    from refdet.extraction.image_list import ImageList
    from refdet.extraction.options import ExtractOptions

    names = tuple(dict.fromkeys(name.strip() for name in features.split(",") if name.strip()))
    options = ExtractOptions(
        regions=regions,
        features=names,
        dtype=dtype,
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        max_regions=max_regions,
        lower_threshold_if_empty=lower_threshold_if_empty,
        precision=precision,
        masks=masks,
        compression=compression,
        exif=exif,
        crowd_as_object=crowd_as_object,
    )
    if boxes is not None or regions == "annotations":
        what = "`boxes`" if boxes is not None else "`regions='annotations'`"
        _note_unused(what)
    if instances is not None:
        image_list = ImageList.of_instances(instances, crowd_as_object=crowd_as_object)
    else:
        assert refer_root is not None and dataset and split_by
        image_list = ImageList.of_refer(refer_root, dataset, split_by, splits=splits, crowd_as_object=crowd_as_object)
    summary = extract_features(
        checkpoint,
        images,
        out,
        image_list,
        options=options,
        boxes=boxes,
        box_format=box_format,
        batch_size=parsed_batch_size,
        workers=workers,
        device=device,
        resume=resume,
        part=part,
        ray=ray,
        strict=strict,
        say=note,
        announce=note,
    )
    _print_notes(summary, out, part)
    if as_json:
        echo_json({**asdict(summary), "shares": summary.shares})
    elif summary.computed == 0 and part is not None:
        complete = f"{out} is complete" if summary.merged else f"part {part} was complete"
        echo_line(f"{complete}: {format_count(summary.images, 'image')}, {format_count(summary.regions, 'region')}")
    else:
        _print_summary(summary)
        if profile:
            _print_stages(summary)


def _check_image_list(
    refer_root: Path | None, dataset: str | None, split_by: str | None, splits: tuple[str, ...], instances: Path | None
) -> None:
    """Raise InputError unless the images are given either by the options for REFER or by --instances."""
    has_all_refer_options = refer_root is not None and bool(dataset) and bool(split_by)
    has_any_refer_option = refer_root is not None or bool(dataset) or bool(split_by) or bool(splits)
    images_are_listed_once = has_all_refer_options if instances is None else not has_any_refer_option
    if not images_are_listed_once:
        raise InputError("give --refer-root with --dataset and --split-by, or --instances alone")


def _check_input_files(
    checkpoint: Path,
    images: Path,
    boxes: Path | None,
    box_format: str,
    instances: Path | None,
    refer_root: Path | None,
    dataset: str | None,
) -> None:
    """Raise InputError if a file or folder does not exist or is of another kind."""
    check_run_directory("--checkpoint", checkpoint)
    check_images("--images", images)
    if boxes is not None and kind_of(boxes) is not FileKind.STORE:
        check_text_file("--boxes", boxes, "COCO results JSON or a store")
    elif boxes is not None and box_format != "xywh":
        raise InputError(f"--boxes {boxes}: a store has its own box format; omit --box-format {box_format}")
    if instances is not None:
        check_text_file("--instances", instances, "an instances JSON")
    if refer_root is not None:
        check_refer_root(refer_root, dataset or "")


def _note_unused(source: str) -> None:
    """Print a note about options for detections that were given although nothing is detected.

    Args:
        source: what the regions are from instead, as an argument in backquotes.
    """
    names = ("score_threshold", "nms_threshold", "max_regions", "lower_threshold_if_empty")
    unused = [name for name in names if was_given(name)]
    if unused:
        note(f"note: {', '.join(f'`{name}`' for name in unused)}: for detections only, not used with {source}")


def _print_notes(summary: Summary, out: Path, part: str | None) -> None:
    """Print notes about a store that was complete before, and about images that could not be used."""
    if summary.computed == 0 and part is None:
        note(f"{out} is complete")
    if summary.errors and summary.merged:
        note(
            f"note: {format_share(summary.errors, summary.images, 'image')} could not be used; see /images/error in "
            f"{out}; once the files are repaired, repeat the command with --resume"
            f"{'' if part is None else ', without --part,'} to recompute their batches"
        )


def _print_summary(summary: Summary) -> None:
    """Print the table of an extraction, and the shares of its time."""
    row = (
        str(summary.images),
        str(summary.regions),
        str(summary.errors),
        f"{summary.images_per_second:.2f}" if summary.computed else "-",
        str(summary.batch_size) if summary.computed else "-",
        f"{summary.bytes / 2**20:.1f} MiB",
    )
    echo_table([row], header=("images", "regions", "errors", "images/s", "batch", "file"))
    if summary.computed:
        echo_line("time: " + ", ".join(f"{name} {share:.1%}" for name, share in summary.shares.items()))


def _print_stages(summary: Summary) -> None:
    """Print the time of each stage, and of the parts of the compute stage, with bars.

    The stages finish and write overlap the others, so the times may add up to more than the run took.
    """
    stages: dict[str, float] = {}
    for name, seconds in summary.stages.items():
        stages[name] = seconds
        if name == "compute":
            stages |= {f"- {part}": part_seconds for part, part_seconds in summary.computing.items()}
    longest = max(stages.values(), default=0.0) or 1.0  # no division by 0 if nothing took time
    rows = [(name, f"{seconds:.2f}", "#" * round(_BAR_LENGTH * seconds / longest)) for name, seconds in stages.items()]
    echo_table(rows, header=("stage", "seconds", ""))


def _parse_batch_size(text: str | None) -> int | Literal["auto"] | None:
    """The value of --batch-size; None if the option was not given."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise InputError(f"--batch-size {text}: not a number of images; give an integer of 1 or more, or auto")
