"""``refdet fetch-data``: download COCO and REFER."""

from __future__ import annotations

from pathlib import Path

import click

from .arguments import check_not_empty, check_writable_folder
from .common import echo_json, echo_line, echo_table, json_option
from .given_options import reject_unused


@click.command("fetch-data", short_help="Download COCO and REFER.")
@click.option("--out", default="data", show_default=True, metavar="DIR", help="Data folder to write into.")
@click.option(
    "--only",
    multiple=True,
    metavar="NAME,...",
    help="Items to fetch, such as refcoco or train2014; may be repeated.  [default: everything needed for REFER]",
)
@click.option(
    "--from",
    "mirror",
    metavar="URL",
    help="Mirror, or local folder, with the archives under their original names; replaces all other sources.",
)
@click.option("--list", "list_items", is_flag=True, help="List the items, their sizes and sources, and exit.")
@json_option
def command(out: str, only: tuple[str, ...], mirror: str | None, list_items: bool, as_json: bool) -> None:
    """Download COCO and REFER, verify them, and unpack them into the layout that refdet reads.

    Each item has several sources, which are tried in turn; interrupted downloads resume. Existing files are not
    downloaded again.
    """
    check_not_empty("--only", only)
    if list_items:
        reject_unused("mirror", "--list shows the usual sources and downloads nothing; omit one of them")
        _list_items(Path(out), only, as_json)
        return
    check_writable_folder("--out", Path(out), must_be_empty=False)

    from refdet.data.fetch.fetch import fetch_data

    results = fetch_data(out, only, mirror)
    if as_json:
        echo_json(
            [
                {
                    "name": item.name,
                    "source": item.source,
                    "sha256": item.sha256,
                    "verified": item.verified,
                    "files": [str(path) for path in item.files],
                }
                for item in results
            ]
        )
        return
    for item in results:
        if not item.source:
            echo_line(f"{item.name}: already in {out}")
            continue
        echo_line(f"{item.name}: {item.source}")
        echo_line(f"  sha256 {item.sha256}, verified by {item.verified}")
        for path in item.files:
            echo_line(f"  {path}")


def _list_items(out: Path, only: tuple[str, ...], as_json: bool) -> None:
    """Print the chosen items, by default all, and whether each is in the data folder ``out``."""
    from refdet.data.fetch.catalog import ITEMS
    from refdet.data.fetch.fetch import choose_items, is_fetched
    from refdet.files.short_text import format_bytes

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
                    "present": is_fetched(out, item),
                    "there": is_fetched(out, item),  # the older name of "present"
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
            "present" if is_fetched(out, item) else "fetched by default" if item.default else "",
            "unknown" if item.size is None else format_bytes(item.size),
            (item.checksum or "none").partition(":")[0],
            item.contents,
        )
        for item in items
    ]
    echo_table(rows, ("name", "status", "size", "verified by", "contents"))
    for item in items:
        echo_line()
        echo_line(f"{item.name}:")
        for url in item.urls:
            echo_line(f"  {url}")
