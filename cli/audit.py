"""``refdet audit``."""

from __future__ import annotations

import click

from refdet.errors import WorkError

from .common import echo_json, echo_table, json_option, note

SHOWN = 10


@click.command("audit")
@click.option("--instances", required=True, metavar="F.json", help="COCO instances file to look through.")
@click.option("--refer-root", required=True, metavar="DIR", help="Folder of DATASET/refs(SPLIT_BY).p.")
@json_option
def command(instances: str, refer_root: str, as_json: bool) -> None:
    """Look for REFER's val and test images in an instances file: exit 0 if it is clean, 1 if it leaks."""
    from refdet.data.splits import audit

    result = audit(instances, refer_root)
    for text in result.notes:
        note(f"note: {text}")
    if as_json:
        echo_json(result.to_json())
    else:
        rows: list[tuple[str, ...]] = []
        for leak in result.splits:
            ids = " ".join(map(str, leak.image_ids[:SHOWN])) + (" ..." if len(leak.image_ids) > SHOWN else "")
            rows.append((leak.name, str(leak.images), str(len(leak.image_ids)), str(leak.annotations), ids))
        echo_table(rows, ("split", "images", "leaked", "annotations", "image ids"))
    if result.leaked:
        raise WorkError(
            f"{instances}: {len(result.leaked)} held-out images leak into it; make a clean file with refdet build-split"
        )
    if not as_json:
        click.echo(
            f"\nclean: {result.images} images against {result.held_out_images} val/test images of "
            f"{len(result.splits)} splits\nimage_ids_sha256 {result.image_ids_sha256}"
        )
