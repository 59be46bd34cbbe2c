"""``refdet inspect``."""

from __future__ import annotations

import json

import click

from .common import echo_json, echo_table, json_option


@click.command("inspect")
@click.argument("file")
@json_option
def command(file: str, as_json: bool) -> None:
    """Tell what a split, checkpoint (run directory) or store holds, and its provenance."""
    from refdet.inspect import describe

    found = describe(file)
    if as_json:
        echo_json(found)
        return
    provenance = found.pop("provenance")
    rows: list[tuple[str, ...]] = [(key.replace("_", " "), _text(value)) for key, value in found.items()]
    echo_table(rows)
    click.echo("\nprovenance" if provenance else "\nno provenance")
    if provenance:
        excluded = provenance.pop("excluded")
        echo_table([(key.replace("_", " "), _text(value)) for key, value in provenance.items()])
        rows = [(name, str(n.get("images")), str(n.get("found"))) for name, n in excluded.items()]
        if rows:
            click.echo()
            echo_table(rows, ("excluded", "images", "found"))


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
