"""``refdet build-split``: remove REFER's val and test images from training data."""

from __future__ import annotations

from pathlib import Path

import click

from refdet.files.short_text import format_share

from .arguments import check_new_file, check_refer_root, check_text_file
from .common import echo_json, echo_line, echo_table, json_option, note


@click.command("build-split", short_help="Remove REFER's val and test images from COCO.")
@click.option("--instances", required=True, metavar="FILE", help="COCO instances file or image list to filter.")
@click.option("--refer-root", required=True, metavar="DIR", help="Folder with DATASET/refs(SPLIT_BY).p.")
@click.option("--out", required=True, metavar="OUT", help="File to write, in the format of FILE.")
@click.option(
    "--exclude",
    multiple=True,
    metavar="DATASET:SPLIT_BY[:SPLIT,...]",
    help="Exclude only these splits (without SPLIT: all but train); may be repeated. Default: val and test of all "
    "datasets under --refer-root.",
)
@click.option(
    "--keep-only",
    multiple=True,
    metavar="DATASET:SPLIT_BY[:SPLIT,...]",
    help="The reverse: keep only the images of these splits (without SPLIT: all, train too); may be repeated.",
)
@click.option(
    "--benchmark",
    multiple=True,
    metavar="LIST",
    help="Another benchmark to hold out: Ref-L4's Parquet, or any list of images; may be repeated.",
)
@json_option
def command(
    instances: str,
    refer_root: str,
    out: str,
    exclude: tuple[str, ...],
    keep_only: tuple[str, ...],
    benchmark: tuple[str, ...],
    as_json: bool,
) -> None:
    """Remove REFER's val and test images and their annotations from a list of training images.

    FILE is an instances file (COCO, LVIS, ...), a JSON list (Visual Genome's image_data.json, ids, names) or text
    with one id or file name per line. Images are identified by the COCO number in their names, or else by their ids.
    """
    check_text_file("--instances", Path(instances), "an instances JSON or a list of images")
    check_new_file("--out", Path(out), example="split.json")
    check_refer_root(Path(refer_root))

    from refdet.splits.build import build_split

    result = build_split(instances, refer_root, out, exclude=exclude, keep_only=keep_only, benchmark=benchmark)
    for text in result.notes:
        note(f"note: {text}")
    report = result.report
    if as_json:
        echo_json(report)
        return
    counts = report["kept" if keep_only else "excluded"]
    rows: list[tuple[str, ...]] = [
        (name, str(n["images"]), str(n["found"]), str(n["images"] - n["found"])) for name, n in counts.items()
    ]
    echo_table(rows, ("kept" if keep_only else "held out", "images", "found", "not found"))
    echo_line()
    rows = [(noun, str(report[f"{noun}_before"]), str(report[f"{noun}_after"])) for noun in ("images", "annotations")]
    echo_table(rows, ("", "before", "after"))
    echo_line()
    found = format_share(
        report["refer_images_found"], report["refer_images"], "image" if keep_only else "held-out image"
    )
    to_keep = " to keep" if keep_only else ""
    echo_line(f"found {found}{to_keep} in {instances}, {report['refer_images_missing']} missing")
    echo_line(f"wrote {result.out} and {result.report_path}")
