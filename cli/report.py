"""``refdet report``: one HTML page about a run, a store and a model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from refdet.errors import InputError

from .arguments import (
    check_images,
    check_new_file,
    check_refer_root,
    check_run_directory,
    check_store,
    check_text_file,
)
from .common import echo_json, echo_line, json_option, note, renamed_option
from .given_options import note_unused

MAX_METRICS_BYTES = 1 << 26  # bytes


@click.command("report", short_help="Write an HTML page about a run and its results.")
@click.option("--run", type=Path, help="Run directory: training data, leak proof and loss.")
@click.option("--store", "stores", type=Path, multiple=True, help="Store of regions; may be repeated.")
@click.option(
    "--metrics",
    type=Path,
    multiple=True,
    help="Folder written by evaluate-on-refer, or output of evaluate --json; may be repeated.",
)
@click.option("--predictions", type=Path, help="JSON of a model's answers, for the first --store.")
@click.option("--images", type=Path, help="Folder or zip of the stores' images, for pictures.")
@click.option(
    "--instances", type=Path, help="Instances JSON of the stores' images.  [default: that of the REFER dataset]"
)
@click.option("--refer-root", type=Path, help="Folder of the REFER data.")
@click.option("--dataset", help="REFER dataset of the stores.  [default: what they were extracted for]")
@click.option("--split-by", help="unc, umd or google, with --dataset.")
@click.option("--trained-on", type=Path, help="Instances JSON that the detector was trained on, to audit it.")
@renamed_option(
    "--original-instances",
    "--made-from",
    "original_instances",
    type=Path,
    help="Instances JSON that build-split made --trained-on from, to audit it too.",
)
@click.option("--steps", type=Path, help="JSON list of the commands that were run: name, about, commands, seconds.")
@click.option("--pictures", type=click.IntRange(min=0), default=12, show_default=True, help="Number of example images.")
@click.option("--title", help="Title of the page.")
@click.option("--out", type=Path, required=True, help="HTML file to write.")
@json_option
def command(
    run: Path | None,
    stores: tuple[Path, ...],
    metrics: tuple[Path, ...],
    out: Path,
    dataset: str | None,
    split_by: str | None,
    title: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Write an HTML page that shows a run, stores and a model's answers, and where they fail."""
    check_new_file("--out", out, example="report.html")
    if run is None and not stores and not metrics:
        raise InputError("nothing to report: give at least one of --run, --store and --metrics")
    if (dataset is None) != (split_by is None):
        raise InputError("--dataset and --split-by: give both, or neither")
    _check_paths(run, stores, dataset, given)
    if run is not None and not run.is_dir():  # the model file of a run directory
        run = run.parent

    from refdet.files.atomic import report_disk_full
    from refdet.report.inputs import ReportInputs, read_steps
    from refdet.report.page import TITLE, write
    from refdet.report.refer_parts import pair_up

    detection, refer_metrics = _read_metrics(metrics)
    parts = pair_up(stores, refer_metrics, given["predictions"], f"{dataset}/{split_by}" if dataset else "")
    inputs = ReportInputs(
        run=run,
        refer_root=given["refer_root"],
        images=given["images"] if given["pictures"] else None,  # not opened for --pictures 0
        parts=parts,
        detection=detection,
        instances=given["instances"],
        trained_on=given["trained_on"],
        original_instances=given["original_instances"],
        steps=read_steps(given["steps"]) if given["steps"] else (),
        pictures=given["pictures"],
    )
    with report_disk_full(out, "free some space and write it again"):
        write(out, inputs, title or TITLE)
    size = out.stat().st_size
    if as_json:
        echo_json({"out": str(out), "bytes": size})
    else:
        echo_line(f"report: {out} ({size / 1e6:.1f} MB; open it in a browser)")


def _check_paths(run: Path | None, stores: Sequence[Path], dataset: str | None, given: dict[str, Any]) -> None:
    """Check the paths, and that no option lacks another that it needs; ``given`` has the other parameters by name."""
    if run is not None:
        check_run_directory("--run", run)
    for store in stores:
        check_store("--store", store)
    for name in ("predictions", "instances", "trained_on", "original_instances", "steps"):
        if given[name] is not None:
            check_text_file("--" + name.replace("_", "-"), given[name])
    if given["images"] is not None:
        check_images("--images", given["images"])
    if given["refer_root"] is not None:
        check_refer_root(given["refer_root"], dataset or "")
    for name, needed in (
        ("predictions", "refer_root"),
        ("trained_on", "refer_root"),
        ("original_instances", "trained_on"),
    ):
        if given[name] is not None and given[needed] is None:
            raise InputError(f"`{name}` needs `{needed}`")  # cli.main translates both to options
    if not stores:
        for name in ("predictions", "images", "instances"):
            if given[name] is not None:
                raise InputError(f"`{name}` needs --store")
        for name in ("pictures", "dataset"):
            note_unused(name, "as there is no --store")
        if given["trained_on"] is None:
            note_unused("refer_root", "as there is neither --store nor --trained-on")
    if given["images"] is not None and not given["pictures"]:
        note("note: --images: not used with --pictures 0")


def _read_metrics(paths: Sequence[Path]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Read the files of --metrics.

    Returns:
        The output of evaluate --json, None without one; and the metrics of evaluate-on-refer.
    """
    from refdet.files.json_files import read_bytes
    from refdet.files.short_text import shorten
    from refdet.files.strict_json import strict_json

    detection, refer_metrics = None, []
    for path in paths:
        file = path / "metrics.json" if path.is_dir() else path
        check_text_file("--metrics", file, "metrics of evaluate-on-refer or evaluate --json")
        try:
            tree = strict_json(read_bytes(file, MAX_METRICS_BYTES))
        except InputError as error:
            raise InputError(f"--metrics {file}: not JSON ({error})") from None
        if isinstance(tree, dict) and "splits" in tree:
            refer_metrics.append(tree)
        elif isinstance(tree, dict) and isinstance(tree.get("bbox"), dict):
            if detection is not None:
                raise InputError(f"--metrics {file}: a second output of evaluate; give only one")
            detection = tree
        else:
            contents = shorten(", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__)
            raise InputError(
                f"--metrics {file}: not metrics of evaluate-on-refer or evaluate --json, but {contents}; give one of "
                "these"
            )
    return detection, refer_metrics
