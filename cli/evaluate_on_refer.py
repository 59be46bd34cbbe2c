"""``refdet evaluate-on-refer``: what a store of regions is worth on the splits of REFER."""

from __future__ import annotations

from pathlib import Path

import click

from refdet.errors import InputError

from .common import echo_json, echo_table, json_option, note


@click.command("evaluate-on-refer")
@click.option("--features", type=Path, required=True, help="Store that extract-features wrote.")
@click.option("--refer-root", type=Path, required=True, help="Folder of the REFER data.")
@click.option("--dataset", required=True, help="refcoco, refcoco+ or refcocog.")
@click.option("--split-by", required=True, help="unc, umd or google.")
@click.option("--split", "splits", multiple=True, help="Splits, with commas between; all but train by default.")
@click.option("--predictions", type=Path, help="JSON of a model's answers, for comprehension and segmentation.")
@click.option("--out", type=Path, required=True, help="Folder for metrics.json.")
@json_option
def command(
    features: Path,
    refer_root: Path,
    dataset: str,
    split_by: str,
    splits: tuple[str, ...],
    predictions: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Detection AP, referent recall and, given predictions, comprehension and segmentation metrics."""
    from refdet.atomic import write_json
    from refdet.evaluate.refer import evaluate_on_refer
    from refdet.provenance import Provenance

    path = out / "metrics.json"
    if path.exists():
        raise InputError(f"{path} exists; choose another --out or remove it")
    metrics = evaluate_on_refer(features, refer_root, dataset, split_by, splits, predictions)
    write_json(path, metrics)
    note(f"detector trained on: {Provenance.from_json(metrics['provenance']).one_line()}")
    for split, values in metrics["splits"].items():
        missing = values.get("comprehension", {}).get("missing", 0)
        if missing:
            note(f"{split}: {missing} of {values['sentences']} sentences have no prediction and count as wrong")
    if as_json:
        echo_json(metrics)
        return
    header = ["split", "images", "refs", "sentences", "box AP", "AP50", "mask AP", "recall@0.5", "@0.9", "best IoU"]
    if predictions is not None:
        header += ["accuracy@0.5", "overall IoU"]
    rows = []
    for split, values in metrics["splits"].items():
        box, mask, recall = values["detection"]["bbox"], values["detection"]["segm"], values["referent_recall"]
        numbers = [box["AP"], box["AP50"], mask and mask["AP"], recall["0.5"], recall["0.9"], recall["mean_best_iou"]]
        if predictions is not None:
            segmentation = values["segmentation"]
            numbers += [values["comprehension"]["accuracy@0.5"], segmentation and segmentation["overall_iou"]]
        counts = (str(values[name]) for name in ("images", "refs", "sentences"))
        rows.append((split, *counts, *("-" if n is None else f"{n:.3f}" for n in numbers)))
    echo_table(rows, header=tuple(header))
