"""``refdet recipes``: the shipped recipes, or all keys of one."""

from __future__ import annotations

import click

from .common import echo_json, echo_line, echo_table, json_option


@click.command("recipes", short_help="List the built-in recipes, or print one.")
@click.argument("name", required=False, metavar="[NAME|YAML]")
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the built-in recipes, or print one with every key and its meaning, as YAML for train --recipe."""
    import dataclasses

    from refdet.config import recipe
    from refdet.config.recipe_text import complete_yaml, recipe_summaries

    if name is not None:
        chosen = recipe.load(name)
        if as_json:
            echo_json(dataclasses.asdict(chosen))
            return
        for line in complete_yaml(chosen, name).splitlines():
            echo_line(line)
    elif as_json:
        echo_json([dataclasses.asdict(summary) for summary in recipe_summaries()])
    else:
        rows = [
            (
                summary.name,
                summary.network,
                f"{summary.steps:,}",
                str(summary.batch_size),
                summary.published or summary.about,
            )
            for summary in recipe_summaries()
        ]
        echo_table(rows, header=("recipe", "network", "steps", "batch", "published AP, or description"))
