"""``refdet evaluate-on-refer``: evaluate a store of regions on the splits of REFER."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refdet.errors import InputError
from refdet.files.short_text import format_share

from .arguments import check_not_empty, check_refer_root, check_store, check_text_file, check_writable_folder
from .common import box_format_option, echo_json, echo_line, echo_table, json_option, note, store_option
from .given_options import reject_box_format_without

if TYPE_CHECKING:
    import pandas as pd

TITLES = {  # group of metrics -> title of its table
    "recall@k": "recall@0.5 with the top k regions",
    "recall@k_with_category": "recall@0.5 with the top k regions, correct category",
    "comprehension": "comprehension: boxes",
    "segmentation": "comprehension: masks",
    "generalized": "gRefCOCO",
    "language": "generated expressions",
}


@click.command("evaluate-on-refer", short_help="Compute AP, recall and comprehension on REFER.")
@store_option(type=Path, required=True, help="Store written by extract-features.")
@click.option("--refer-root", type=Path, required=True, help="Folder of the REFER data.")
@click.option("--dataset", required=True, help="refcoco, refcoco+, refcocog or grefcoco.")
@click.option("--split-by", required=True, help="unc, umd or google.")
@click.option("--split", "splits", multiple=True, help="Comma-separated splits.  [default: all but train]")
@click.option("--predictions", type=Path, help="JSON of a model's answers, for comprehension and segmentation.")
@click.option("--expressions", type=Path, help="JSON of generated expressions, for BLEU, ROUGE-L, CIDEr and METEOR.")
@click.option(
    "--protocol",
    type=click.Choice(["standard", "mattnet", "mdetr"]),
    default="standard",
    show_default=True,
    help="Box comparison: mattnet uses MAttNet's IoU; mdetr uses generalized IoU for answers.",
)
@box_format_option("--predictions")
@click.option("--out", type=Path, required=True, help="Folder for metrics.json, metrics.csv and recall.svg.")
@json_option
def command(out: Path, as_json: bool, **options: Any) -> None:
    """Compute detection AP, referent recall and, given a model's answers, comprehension metrics."""
    check_writable_folder("--out", out, must_be_empty=False)
    for name in ("metrics.json", "metrics.csv", "recall.svg"):  # refdet.evaluation.tables.FILES, which imports pandas
        if os.path.lexists(out / name):
            raise InputError(f"{out / name} exists; choose another --out or remove it")
    check_store("--store", options["store"])
    check_refer_root(options["refer_root"], options["dataset"])
    check_not_empty("--split", options["splits"])
    for name in ("predictions", "expressions"):
        if options[name] is not None:
            check_text_file(f"--{name}", options[name])
    reject_box_format_without("--predictions", options["predictions"], options["box_format"])
    if options["predictions"] is None and options["protocol"] == "mdetr":
        raise InputError(
            "--protocol mdetr is for --predictions, and leaves recall as it is; give --predictions or omit --protocol"
        )

    from refdet.evaluation.refer_benchmark import evaluate_on_refer
    from refdet.evaluation.renamed_metrics import add_old_names
    from refdet.evaluation.tables import tables, to_dataframe, write
    from refdet.report.recall_charts import recall_figure
    from refdet.structures.provenance import Provenance

    metrics = evaluate_on_refer(**options)
    write(out, metrics, recall_figure(metrics))
    note(f"detector trained on: {Provenance.from_json(metrics['provenance']).one_line()}")
    for split, values in metrics["splits"].items():
        for group in ("comprehension", "generalized"):
            if missing := values.get(group, {}).get("missing", 0):
                share = format_share(missing, values["sentences"], "sentence", "has")
                note(f"{split}: {share} no answer, counted as wrong")
        if missing := values.get("language", {}).get("missing", 0):
            share = format_share(missing, values["language"]["refs"], "ref", "has")
            note(f"{split}: {share} no generated expression, scored as an empty one")
        if "language" in values and values["language"]["METEOR"] is None:  # only without Java
            note(f"{split}: java is not on the PATH: no METEOR, and words are split at spaces")
    if as_json:
        echo_json(add_old_names(metrics))
        return
    by_group = tables(to_dataframe(metrics))
    echo_table(*_overview(by_group))
    for group, title in TITLES.items():
        if group in by_group:
            echo_line()
            echo_line(title)
            echo_table(*_as_text(by_group[group]))


def _overview(by_group: dict[str, pd.DataFrame]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Rows and header, for `echo_table`, of a table with the main metrics of each split."""
    import pandas as pd

    recall = by_group["referent_recall"]
    columns = {
        **by_group["counts"],  # its columns: images, refs and so on
        "box AP": by_group["detection.bbox"]["AP"],
        "AP50": by_group["detection.bbox"]["AP50"],
        "mask AP": by_group["detection.segm"]["AP"] if "detection.segm" in by_group else float("nan"),
        "recall@0.5": recall["0.5"],
        "@0.9": recall["0.9"],
        "with category": recall["with_category@0.5"],
        "best IoU": recall["mean_best_iou"],
    }
    return _as_text(pd.DataFrame(columns, index=by_group["counts"].index))


def _as_text(table: pd.DataFrame) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Rows and header, for `echo_table`, of a table with a row per split; a dash for NaN, an undefined metric."""
    integer_columns = {"images", "unusable", "refs", "sentences", "missing", "no_target"}

    def format_cell(column: str, value: float) -> str:
        if math.isnan(value):
            return "-"
        return f"{value:.0f}" if column in integer_columns else f"{value:.3f}"

    rows = [
        (str(split), *(format_cell(str(column), value) for column, value in row.items()))
        for split, row in table.iterrows()
    ]
    return rows, ("split", *(str(column).replace("_", " ") for column in table))
