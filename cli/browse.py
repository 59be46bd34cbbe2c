"""``refdet browse``: a local page that shows the regions of stores on their images."""

from __future__ import annotations

import importlib.util
import ipaddress
from pathlib import Path
from typing import Any

import click

from refdet.errors import InputError

from .arguments import check_images, check_refer_root, check_store, check_text_file
from .common import box_format_option, echo_line, note
from .given_options import reject_box_format_without


@click.command("browse", short_help="Show the regions of a store in the browser.")
@click.argument("stores", metavar="STORE...", nargs=-1, required=True, type=Path)
@click.option("--images", type=Path, help="Folder or zip of the images.  [default: boxes on gray]")
@click.option("--refer-root", type=Path, help="Folder of the REFER data, for sentences and their referents.")
@click.option("--dataset", help="refcoco, refcoco+, refcocog or grefcoco.")
@click.option("--split-by", help="unc, umd or google.")
@click.option("--predictions", type=Path, help="JSON of a model's answers on the first store.")
@box_format_option("--predictions")
@click.option("--instances", type=Path, help="Instances JSON whose boxes are shown too.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; unless it is a loopback address, anyone on the network who has the token can connect.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port to listen on, 0 for any free one.  [default: 8765, or the next free one]",
)
def command(stores: tuple[Path, ...], host: str, port: int | None, **given: Any) -> None:
    """Show the regions of one store, or of two side by side, in the browser; Ctrl-C stops it."""
    if len(stores) > 2:
        raise InputError(f"{len(stores)} stores; give one, or two to show side by side")
    for store in stores:
        check_store("STORE", store)
    if given["images"] is not None:
        check_images("--images", given["images"])
    if given["refer_root"] is not None and given["dataset"] is not None:
        check_refer_root(given["refer_root"], given["dataset"])
    for name in ("predictions", "instances"):
        if given[name] is not None:
            check_text_file(f"--{name}", given[name])
    reject_box_format_without("--predictions", given["predictions"], given["box_format"])
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"browse needs {' and '.join(missing)}: pip install 'refdet[browse]'")

    from refdet.report.browse.collection import BrowseInputs, Collection
    from refdet.report.browse.guard import new_token
    from refdet.report.browse.server import listen, serve

    listener = listen(host, port)
    with listener:
        collection = Collection(BrowseInputs(stores, **given))
        if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            note(
                f"note: --host {host}: the network can reach this page, unencrypted, with only the token to protect it"
            )
        serve(collection, listener, host, new_token(), echo_line)
