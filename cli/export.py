"""``refdet export``: convert a store to the formats of existing models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refdet.errors import InputError
from refdet.store.export import consumers
from refdet.store.export.folder import resolve_folder

from .arguments import check_images, check_store
from .common import FRACTION, echo_json, echo_table, json_option, note, store_option

if TYPE_CHECKING:
    from refdet.store.export.mattnet_prepro import Prepro
    from refdet.store.export.record import ExportResult

# The parameters of `command` that are for one format or two, by format.
FORMAT_OPTIONS = {
    "mattnet": (
        "annotations",
        "refer_root",
        "dataset",
        "split_by",
        "data_json",
        "word_count_threshold",
        "max_length",
        "attributes",
        "top_attributes",
    ),
    "npz": ("consumer", "feature", "names"),
    "lmdb": ("consumer", "feature"),
    "coco": ("score_threshold",),
    "fiftyone": ("images",),
}


@click.command("export", short_help="Export a store to the formats of other programs.")
@store_option(type=Path, required=True, help="Store written by extract-features.")
@click.option("--format", "format_", type=click.Choice(list(FORMAT_OPTIONS)), required=True, help="Output format.")
@click.option(
    "--for",
    "consumer",
    type=click.Choice([*consumers.NPZ, *consumers.LMDB]),
    help=f"npz, lmdb: the program that will read it.  [default: {consumers.NPZ[0]}, {consumers.LMDB[0]}]",
)
@click.option("--out", type=Path, required=True, help="Folder to write; must be empty or absent.")
@click.option("--feature", help="npz, lmdb: the feature to export.  [default: fc7]")
@click.option(
    "--names",
    type=click.Choice(["stem", "file", "id"]),
    help="npz: name files after the image file without or with its suffix, or the id.  "
    "[default: stem, or file with --for rosita]",
)
@click.option("--annotations", type=Path, help="mattnet: store written with --regions annotations, for ann_feats.h5.")
@click.option("--refer-root", type=Path, help="mattnet: folder of the REFER data, for data.json and data.h5.")
@click.option("--dataset", help="mattnet: refcoco, refcoco+ or refcocog.")
@click.option("--split-by", help="mattnet: unc, umd or google.")
@click.option("--data-json", type=Path, help="mattnet: data.json from its own prepro.py, instead of --refer-root.")
@click.option(
    "--word-count-threshold",
    type=click.IntRange(min=0),
    help="mattnet: words with at most this count become <UNK>.  [default: 5]",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    help="mattnet: maximum words per sentence.  [default: 20 for refcocog, else 10]",
)
@click.option("--attributes", type=Path, help="mattnet: refer-parser2's sents.json, for attribute words.")
@click.option("--top-attributes", type=click.IntRange(min=1), help="mattnet: number of attribute words.  [default: 50]")
@click.option(
    "--score-threshold",
    type=FRACTION,
    help="coco: minimum score of a region in instances.json.  [default: 0.5]",
)
@click.option("--images", type=Path, help="fiftyone: folder of the images.")
@json_option
def command(store: Path, format_: str, out: Path, as_json: bool, **options: Any) -> None:
    """Export a store for MAttNet, readers of bottom-up-attention's npz, ViLBERT, UNITER, COCO's tools or FiftyOne."""
    given = {name: value for name, value in options.items() if value is not None}
    unsupported = [name for name in given if name not in FORMAT_OPTIONS[format_]]
    if unsupported:
        # cli.main translates the parameter in backquotes to its option
        raise InputError(f"`{unsupported[0]}` is not for --format {format_}; omit it")
    check_store("--store", store)
    if "annotations" in given:
        check_store("--annotations", given["annotations"])
    if "top_attributes" in given and "attributes" not in given:
        raise InputError("`top_attributes` is for --attributes; give --attributes or omit it")
    if format_ == "fiftyone" and "images" not in given:
        raise InputError("--format fiftyone needs --images, the folder of the images")
    if "images" in given:
        check_images("--images", given["images"])
    resolve_folder(out)  # raises if the folder is not empty, before slow imports
    result = _export(store, format_, out, given)
    for line in result.notes:
        note(f"note: {line}")
    if as_json:
        echo_json(result.to_json())
        return
    row = (result.format, str(result.images), str(result.regions), " ".join(result.files))
    echo_table([row], header=("format", "images", "regions", "files"))


def _export(store: Path, format_: str, out: Path, given: dict[str, Any]) -> ExportResult:
    """Export a store.

    Args:
        store: the store.
        format_: one of `FORMAT_OPTIONS`.
        out: the folder to write.
        given: the parameters of the format that were given, by name.
    """
    if format_ == "npz":
        from refdet.store.export.npz import export_npz

        return export_npz(store, out, **given)
    if format_ == "lmdb":
        from refdet.store.export.lmdb import export_lmdb

        return export_lmdb(store, out, **given)
    if format_ == "coco":
        from refdet.store.export.coco import export_coco

        return export_coco(store, out, **given)
    if format_ == "fiftyone":
        from refdet.store.export.fiftyone import export_fiftyone

        return export_fiftyone(store, out, **given)
    from refdet.store.export.mattnet import export_mattnet

    # recorded in the export's provenance; files by name only, as paths differ between machines
    recorded = {name: value.name if isinstance(value, Path) else value for name, value in given.items()}
    prepro_options = {name: value for name, value in given.items() if name != "annotations"}
    return export_mattnet(store, out, given.get("annotations"), _prepro(prepro_options), recorded)


def _prepro(given: dict[str, Any]) -> Prepro | None:
    """MAttNet's data.json, read or created as the given options say; None if no options are given."""
    from refdet.store.export.mattnet_prepro import Prepro, PreproOptions, prepare

    if not given:
        return None
    if "data_json" in given:
        if len(given) > 1:
            raise InputError("--data-json: cannot be combined with the options that create another data.json")
        return Prepro.read(given["data_json"])
    refs = ("refer_root", "dataset", "split_by")
    if not all(name in given for name in refs):
        raise InputError("data.json needs --refer-root with --dataset and --split-by")
    options = PreproOptions(**{name: value for name, value in given.items() if name not in refs})
    return prepare(given["refer_root"], given["dataset"], given["split_by"], options)
