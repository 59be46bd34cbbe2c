"""``refdet build-split``."""

from __future__ import annotations

import click

from .common import echo_json, echo_table, json_option, note


@click.command("build-split")
@click.option("--instances", required=True, metavar="F.json", help="COCO instances file to filter.")
@click.option("--refer-root", required=True, metavar="DIR", help="Folder of DATASET/refs(SPLIT_BY).p.")
@click.option("--out", required=True, metavar="OUT.json", help="Instances file to write.")
@click.option(
    "--exclude",
    multiple=True,
    metavar="DATASET:SPLIT_BY[:SPLIT,...]",
    help="Leave out only these; may be repeated. Default: val and test of all under --refer-root.",
)
@json_option
def command(instances: str, refer_root: str, out: str, exclude: tuple[str, ...], as_json: bool) -> None:
    """Write an instances file without REFER's val and test images and their annotations."""
    from refdet.data.splits import build_split

    result = build_split(instances, refer_root, out, exclude)
    for text in result.notes:
        note(f"note: {text}")
    report = result.report
    if as_json:
        echo_json(report)
        return
    rows: list[tuple[str, ...]] = [(name, str(n["images"]), str(n["found"])) for name, n in report["excluded"].items()]
    echo_table(rows, ("held out", "images", "found"))
    click.echo()
    counted = ("images", "annotations")
    rows = [(what, str(report[f"{what}_before"]), str(report[f"{what}_after"])) for what in counted]
    echo_table(rows, ("", "before", "after"))
    click.echo(f"\nwrote {result.out} and {result.report_path}")
