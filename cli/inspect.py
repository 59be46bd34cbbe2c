"""``refdet inspect``: show the contents and provenance of a split, checkpoint or store."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from refdet.errors import RuntimeFailure
from refdet.files.short_text import format_count

from .common import echo_json, echo_line, echo_table, json_option

if TYPE_CHECKING:
    from refdet.store.verify import Verification

MAX_SHOWN = 20  # problems of a damaged store


@click.command("inspect", short_help="Show what a split, checkpoint or store contains.")
@click.argument("file")
@click.option("--verify", is_flag=True, help="Check a whole store against its checksums; exit 1 if damaged.")
@json_option
def command(file: str, verify: bool, as_json: bool) -> None:
    """Show the contents and provenance of a split, checkpoint (run directory), store or unfinished store."""
    from refdet.splits.inspect import check, describe

    if verify:
        _print_verification(check(file), as_json)
        return
    description = describe(file)
    if as_json:
        echo_json(description)
        return
    provenance, workers = description.pop("provenance"), description.pop("workers", [])
    rows: list[tuple[str, ...]] = [(key.replace("_", " "), _text(value)) for key, value in description.items()]
    echo_table(rows)
    _print_workers(workers)
    echo_line()
    echo_line("provenance" if provenance else "no provenance")
    if provenance:
        excluded = provenance.pop("excluded")
        if "selection" in provenance:
            from refdet.structures.provenance import Selection

            provenance["selection"] = Selection.from_json(provenance["selection"]).one_line()
        echo_table([(key.replace("_", " "), _text(value)) for key, value in provenance.items()])
        rows = [(name, str(n.get("images")), str(n.get("found"))) for name, n in excluded.items()]
        if rows:
            echo_line()
            echo_table(rows, ("excluded", "images", "found"))


def _print_verification(result: Verification, as_json: bool) -> None:
    """Print the problems of a store; RuntimeFailure if there are any."""
    if as_json:
        echo_json(result.to_json())
    else:
        for problem in result.problems[:MAX_SHOWN]:
            echo_line(str(problem))
        if len(result.problems) > MAX_SHOWN:
            echo_line(f"... and {len(result.problems) - MAX_SHOWN} more (--json lists all)")
        for name in result.unchecked:
            echo_line(f"not checked: {name}")
    if result.problems:
        images = f" in {format_count(len(result.damaged_images), 'image')}" if result.damaged_images else ""
        raise RuntimeFailure(
            f"{result.path}: damaged: {format_count(len(result.problems), 'problem')}{images}; extract it again"
        )
    if not as_json:
        echo_line(f"OK: {format_count(result.images, 'image')}, {format_count(result.regions, 'region')}")


def _print_workers(workers: list[dict[str, Any]]) -> None:
    """Print a table of the processes that compute an unfinished store."""
    if not workers:
        return
    rows = []
    for worker in workers:
        finished = "?" if worker["finished"] is None else str(worker["finished"])
        shards = ", ".join(str(number) for number in worker["shards"] or [])
        total = "" if worker["images"] is None else f" of {worker['images']}"
        where = f"{worker['host'] or '?'} ({worker['pid'] or '?'})"
        speed, age = (
            "-" if worker[key] is None else _text(worker[key]) for key in ("images_per_second", "seconds_ago")
        )
        rows.append(
            (worker["worker"] or "?", where, worker["state"] or "?", f"{finished}{total}", speed, age, shards or "-")
        )
    echo_line()
    echo_table(rows, ("worker", "host (process)", "state", "images", "images/s", "seconds ago", "shards"))


def _text(value: object) -> str:
    """A string as it is, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
