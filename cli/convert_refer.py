"""``refdet convert-refer``: convert REFER from other formats."""

from __future__ import annotations

from pathlib import Path

import click

from .arguments import check_text_file, check_writable_folder
from .common import echo_json, echo_line, echo_table, json_option, note
from .option_names import as_options


@click.command("convert-refer", short_help="Convert REFER from other formats.")
@click.option(
    "--from",
    "sources",
    multiple=True,
    required=True,
    metavar="PATH",
    help="File or folder with all splits; may be repeated.",
)
@click.option("--out", required=True, metavar="DIR", help="REFER root: writes DIR/DATASET/refs(SPLIT_BY).p.")
@click.option(
    "--instances",
    metavar="F.json",
    help="COCO's instances_train2014.json, to look up ids by image and box and to write all annotations of the images.",
)
@click.option(
    "--dataset",
    default="",
    metavar="NAME",
    help="refcoco, refcoco+ or refcocog: overrides what the files say; selects one from a file that has several.",
)
@click.option(
    "--split-by",
    default="",
    metavar="NAME",
    help="unc, google or umd: overrides and selects like --dataset.  [default: from the files, else unc or umd]",
)
@click.option(
    "--split-names",
    multiple=True,
    metavar="OLD=NEW",
    help="REFER's name for a split in the files, such as test=testA; may be repeated.",
)
@json_option
def command(
    sources: tuple[str, ...],
    out: str,
    instances: str | None,
    dataset: str,
    split_by: str,
    split_names: tuple[str, ...],
    as_json: bool,
) -> None:
    """Convert REFER from other formats to its original layout.

    Reads Parquet from Hugging Face (jxu124/refcoco, lmms-lab/RefCOCO), MDETR's finetune_*.json, TensorFlow Datasets'
    refcoco.json or lists of its examples, and JSON lists of boxes and expressions, such as LLaVA's. The result is
    compared with the published size.
    """
    check_writable_folder("--out", Path(out), must_be_empty=False)
    if instances is not None:
        check_text_file("--instances", Path(instances), "a COCO instances file")

    from refdet.data.refer_formats.convert import convert_refer

    results = convert_refer(sources, out, dataset, split_by, instances, split_names)
    for result in results:
        for text in result.notes:
            note(f"note: {text}")
    if as_json:
        echo_json(
            [
                {
                    "dataset": result.dataset,
                    "split_by": result.split_by,
                    "refs_file": str(result.refs_file),
                    "complete": result.complete,
                    "splits": {split: counts._asdict() for split, counts in result.counts.items()},
                    "notes": [as_options(text) for text in result.notes],
                }
                for result in results
            ]
        )
        return
    rows: list[tuple[str, ...]] = [
        (f"{result.dataset}/{result.split_by}/{split}", *map(str, counts))
        for result in results
        for split, counts in result.counts.items()
    ]
    echo_table(rows, ("split", "refs", "images", "sentences"))
    for result in results:
        complete = "complete, as published" if result.complete else "not the published size"
        echo_line(f"wrote {result.refs_file} and instances.json ({complete})")
