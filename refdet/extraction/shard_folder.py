"""The folder of an unfinished extraction: whether it is one, under which plan it was begun, and whether work may go on.

No torch: what does not fit is found before the detector is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from refdet import store
from refdet.errors import InputError
from refdet.extraction.plan import Plan, header_differences
from refdet.files.atomic import MARK
from refdet.files.json_files import read_small_json
from refdet.store import Header

LOCK, PLAN = "lock", "plan.json"
MERGED = "merged.json"  # which file the shards became
_MOST_AT_ONCE = 4096  # images of a batch that a plan is believed
# The names that an extraction gives in its folder; before they had MARK, temporary files had eight hex digits alone.
OURS = re.compile(rf"{LOCK}|sessions\.jsonl|\d{{6,}}\.shard|plan\.json|merged\.json"
                  rf"|\.(\d{{6,}}|plan|merged)\.[0-9a-f]{{8}}(\.{MARK})?\.(shard|json)")  # fmt: skip


def parts_folder(out: Path) -> Path:
    """Where the finished shards of ``out`` are until it is complete."""
    return out.with_name(out.name + ".parts")


def progress(folder: Path) -> dict[str, Any] | None:
    """What ``plan.json`` says of an unfinished extraction, and as "finished" how many shards there are.

    None where the folder is of none. InputError where its plan is damaged.
    """
    begun = begun_plan(folder)
    return None if begun is None else {**begun, "finished": len(list(folder.glob("[0-9]*.shard")))}


def begun_batch_size(out: Path) -> int | None:
    """The batch size of an unfinished extraction, or of a finished one that says it; None where nothing was begun."""
    begun = begun_plan(parts_folder(out))
    if begun is None and out.exists():
        with store.open(out) as finished:
            begun = finished.run
    size = (begun or {}).get("batch_size")
    return size if type(size) is int and 0 < size <= _MOST_AT_ONCE else None


def begun_plan(folder: Path) -> dict[str, Any] | None:
    """The plan under which a folder was begun; None where there is none, or nothing that was done under it.

    Raises:
        InputError: it is damaged, and there are shards.
    """
    path = folder / PLAN
    if not os.path.lexists(path):
        return None
    try:
        value = read_small_json(path)
        if not isinstance(value, dict):
            raise InputError(f"{path}: not an object")
    except InputError as error:
        if not any(folder.glob("[0-9]*.shard")):
            return None
        raise InputError(f"{path}: damaged ({str(error).removeprefix(f'{path}: ')}); remove {folder} and start again"
                         ) from None  # fmt: skip
    return value


def check_begun(
    out: Path, plan: Plan, header: Header, resume: bool, undecided: Container[str] = ()
) -> dict[str, Any] | None:
    """See that an extraction into ``out`` may begin or, with ``resume``, go on; what was begun goes on only as it was.

    How the images are cut into shards is not looked at; see `Plan.other_shards`.

    Args:
        undecided: options of the plan that are not compared.

    Returns:
        the plan under which it was begun; None where nothing was.

    Raises:
        InputError: ``out`` or its shards exist and ``resume`` is False; they were made under another plan or header;
            files of somebody else are in the folder.
    """
    folder = parts_folder(out)
    begun = begun_plan(folder)
    if out.exists() and not resume:
        raise InputError(f"{out} exists; choose another --out or remove it")
    if begun is not None:
        if not resume:
            raise InputError(f"{folder} holds an unfinished extraction; add --resume to continue, or remove it")
        if told := plan.other_options(header, begun, undecided):
            raise InputError(f"{folder} was started differently: {told}; use the same options and checkpoint, or "
                             "remove it")  # fmt: skip
    elif out.exists():
        with store.open(out) as finished:
            said = {"recipe": finished.recipe, "classes": finished.classes, "provenance": finished.provenance}
            told = plan.differences(finished.options, undecided) or header_differences(header, said)
        if told:
            raise InputError(f"{out} is complete but was made differently: {told}; choose another --out")
    elif strange := _strange(folder):
        raise InputError(f"{folder}: holds {strange}, which no extraction wrote; move it or choose another --out")
    return begun


def _strange(folder: Path) -> str:
    """The first name in a folder that no extraction gives, "" where there is none."""
    try:
        return min((path.name for path in folder.iterdir() if not OURS.fullmatch(path.name)), default="")
    except FileNotFoundError:
        return ""
