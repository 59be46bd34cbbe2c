"""``refdet demo``: the whole pipeline on the synthetic dataset."""

from __future__ import annotations

from pathlib import Path

import click

from .common import echo_json, echo_line, echo_table, json_option


@click.command("demo", short_help="Run the whole pipeline on a synthetic dataset.")
@click.option("--out", type=Path, default=Path("demo"), show_default=True, help="Folder to create.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the dataset and of training."
)
@click.option("--images", type=int, help="Number of train images to generate.  [default: 800]")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Set a recipe key, e.g. train.steps=20.")
@json_option
def command(out: Path, seed: int, images: int | None, changes: tuple[str, ...], as_json: bool) -> None:
    """Run the whole pipeline on a synthetic dataset, from building a split to a report; takes minutes."""
    import sys
    from contextlib import redirect_stdout

    from refdet.files.atomic import report_disk_full

    from .demo_pipeline import demo
    from .main import main

    main_options = click.get_current_context().find_root().params
    verbosity = [f"--{name}" for name in ("verbose", "quiet") if main_options.get(name)]

    def run(args: list[str], output: Path | None = None) -> None:
        if output is None:
            main([*verbosity, *args], standalone_mode=False)
            return
        with output.open("w", encoding="utf-8") as file, redirect_stdout(file):
            main([*verbosity, *args], standalone_mode=False)

    fix = f"free some space, remove {out} and run the demo again"
    with report_disk_full(out, fix), redirect_stdout(sys.stderr if as_json else sys.stdout):
        metrics = demo(out, run, _echo, seed, images, changes)
    if as_json:
        echo_json(metrics)
        return
    echo_line()
    echo_line("--- results")
    detection = [
        (f"{name} AP50 on val2014", metrics["detection"][kind]) for kind, name in (("bbox", "box"), ("segm", "mask"))
    ]
    rows = [(name, f"{values['AP50']:.3f}") for name, values in detection if values]
    rows += [
        (f"recall@0.5 on {dataset} {split}", f"{values['referent_recall']['0.5']:.3f}")
        for dataset, splits in metrics["refer"].items()
        for split, values in splits.items()
    ]
    rows += [
        (f"{model}, accuracy@0.5 on {dataset} {split}", f"{values['comprehension'][name]:.3f}")
        for model, name in (("listener", "accuracy@0.5"), ("random baseline", "random_baseline@0.5"))
        for dataset, splits in metrics["refer"].items()
        for split, values in splits.items()
        if "comprehension" in values
    ]
    echo_table(rows)
    echo_line()
    echo_table([(name, f"{seconds:.1f}") for name, seconds in metrics["seconds"].items()], header=("step", "seconds"))
    echo_line()
    echo_line(f"metrics: {out / 'metrics.json'}")
    echo_line(f"report:  {out / 'report.html'}  (open it in a browser)")


def _echo(text: str) -> None:
    """Print text of one or more lines."""
    for line in text.split("\n"):
        echo_line(line)
