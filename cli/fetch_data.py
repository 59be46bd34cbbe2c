"""``refdet fetch-data``."""

from __future__ import annotations

from pathlib import Path

import click

from .arguments import check_new_folder
from .common import echo_json, echo_line, echo_table, json_option


@click.command("fetch-data")
@click.option("--out", default="data", show_default=True, metavar="DIR", help="Data folder to write into.")
@click.option(
    "--only",
    multiple=True,
    metavar="NAME,...",
    help="What to fetch, such as refcoco or train2014; may be repeated.  [default: all that REFER needs]",
)
@click.option(
    "--from",
    "mirror",
    metavar="URL",
    help="Mirror of your own, or local folder, with the archives under their names; the only source.",
)
@click.option("--list", "listed", is_flag=True, help="List what there is, its sizes and sources, and stop.")
@json_option
def command(out: str, only: tuple[str, ...], mirror: str | None, listed: bool, as_json: bool) -> None:
    """Download COCO and REFER, check them, and unpack them as refdet reads them.

    Each has several sources, which are tried in turn; a download that was cut short continues. Files that are there
    are not downloaded again.
    """
    if listed:
        _list(Path(out), only, as_json)
        return
    check_new_folder("--out", Path(out), empty=False)

    from refdet.data.fetch.fetch import fetch_data

    results = fetch_data(out, only, mirror)
    if as_json:
        echo_json(
            [
                {
                    "name": one.name,
                    "source": one.source,
                    "sha256": one.sha256,
                    "verified": one.verified,
                    "files": [str(path) for path in one.files],
                }
                for one in results
            ]
        )
        return
    for one in results:
        if not one.source:
            echo_line(f"{one.name}: already in {out}")
            continue
        echo_line(f"{one.name}: {one.source}")
        echo_line(f"  sha256 {one.sha256}, checked by its {one.verified}")
        for path in one.files:
            echo_line(f"  {path}")


def _list(out: Path, only: tuple[str, ...], as_json: bool) -> None:
    from refdet.data.fetch.catalog import ITEMS
    from refdet.data.fetch.fetch import choose_items, is_there
    from refdet.files.download import in_bytes

    items = choose_items(only) if only else list(ITEMS)
    if as_json:
        echo_json(
            [
                {
                    "name": item.name,
                    "archive": item.archive,
                    "size": item.size,
                    "checksum": item.checksum,
                    "default": item.default,
                    "there": is_there(out, item),
                    "files": list(item.outputs),
                    "sources": list(item.urls),
                }
                for item in items
            ]
        )
        return
    rows: list[tuple[str, ...]] = [
        (
            item.name,
            "there" if is_there(out, item) else "default" if item.default else "",
            "unknown" if item.size is None else in_bytes(item.size),
            (item.checksum or "none").partition(":")[0],
            item.contents,
        )
        for item in items
    ]
    echo_table(rows, ("name", "", "size", "checksum", "contents"))
    for item in items:
        echo_line()
        echo_line(f"{item.name}:")
        for url in item.urls:
            echo_line(f"  {url}")
