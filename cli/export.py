"""``refdet export``: a store in the forms of existing models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refdet.errors import InputError

from .common import echo_json, echo_table, json_option, note

if TYPE_CHECKING:
    from refdet.export.mattnet_prepro import Prepro
    from refdet.export.record import Exported

# Options that only some formats take.
TAKEN = {
    "mattnet": ("annotations", "refer_root", "dataset", "split_by", "data_json", "word_count_threshold", "max_length",
                "attributes", "top_attributes"),
    "npz": ("feature", "names"),
    "lmdb": ("feature",),
}  # fmt: skip


@click.command("export")
@click.option("--features", type=Path, required=True, help="Store that extract-features wrote.")
@click.option("--format", "format_", type=click.Choice(list(TAKEN)), required=True)
@click.option("--out", type=Path, required=True, help="Folder to write; must be empty or not there.")
@click.option("--feature", help="npz, lmdb: the feature of a region.  [default: fc7]")
@click.option(
    "--names", type=click.Choice(["stem", "id"]), help="npz: files named by image file or id.  [default: stem]"
)
@click.option("--annotations", type=Path, help="mattnet: store of --regions annotations, for ann_feats.h5.")
@click.option("--refer-root", type=Path, help="mattnet: folder of the REFER data, for data.json and data.h5.")
@click.option("--dataset", help="mattnet: refcoco, refcoco+ or refcocog.")
@click.option("--split-by", help="mattnet: unc, umd or google.")
@click.option("--data-json", type=Path, help="mattnet: data.json of its own prepro.py, instead of --refer-root.")
@click.option("--word-count-threshold", type=click.IntRange(min=0),
              help="mattnet: words no more frequent are <UNK>.  [default: 5]")  # fmt: skip
@click.option("--max-length", type=click.IntRange(min=1),
              help="mattnet: words of a sentence.  [default: 20 of refcocog, else 10]")  # fmt: skip
@click.option("--attributes", type=Path, help="mattnet: sents.json of refer-parser2, for attribute words.")
@click.option("--top-attributes", type=click.IntRange(min=1), help="mattnet: how many of these words.  [default: 50]")
@json_option
def command(features: Path, format_: str, out: Path, as_json: bool, **given: Any) -> None:
    """A store in the form of MAttNet's files, of bottom-up-attention's npz or of ViLBERT's LMDB."""
    chosen = {name: value for name, value in given.items() if value is not None}
    wrong = [name for name in chosen if name not in TAKEN[format_]]
    if wrong:
        raise InputError(f"--{wrong[0].replace('_', '-')} is not for --format {format_}")
    done = _export(features, format_, out, chosen)
    for line in done.notes:
        note(line)
    if as_json:
        echo_json(done.to_json())
        return
    row = (done.format, str(done.images), str(done.regions), " ".join(done.files))
    echo_table([row], header=("format", "images", "regions", "files"))


def _export(features: Path, format_: str, out: Path, chosen: dict[str, Any]) -> Exported:
    if format_ == "npz":
        from refdet.export.npz import export_npz

        return export_npz(features, out, **chosen)
    if format_ == "lmdb":
        from refdet.export.lmdb import export_lmdb

        return export_lmdb(features, out, **chosen)
    from refdet.export.mattnet import export_mattnet

    options = {name: value.name if isinstance(value, Path) else value for name, value in chosen.items()}
    return export_mattnet(features, out, chosen.pop("annotations", None), _prepro(chosen), options)


def _prepro(chosen: dict[str, Any]) -> Prepro | None:
    """MAttNet's data.json as the options want it, None for none."""
    from refdet.export.mattnet_prepro import Prepro, PreproOptions, prepare

    if not chosen:
        return None
    if "data_json" in chosen:
        if len(chosen) > 1:
            raise InputError("--data-json: give it without the options that make another data.json")
        return Prepro.read(chosen["data_json"])
    root, dataset, split_by = (chosen.pop(name, None) for name in ("refer_root", "dataset", "split_by"))
    if root is None or dataset is None or split_by is None:
        raise InputError("data.json needs --refer-root with --dataset and --split-by")
    return prepare(root, dataset, split_by, PreproOptions(**chosen))
