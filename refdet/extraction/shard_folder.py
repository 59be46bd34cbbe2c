"""Folder of an unfinished extraction: its files, its plan, and whether the extraction can be resumed.

No torch, so that an extraction that cannot be resumed is refused before the detector is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from refdet import store
from refdet.errors import InputError
from refdet.extraction.plan import Plan, header_differences
from refdet.files.atomic import TEMPORARY_MARK, find_temporary_files, fsync
from refdet.files.json_files import read_small_json
from refdet.store import Header

LOCK, PLAN = "lock", "plan.json"
MERGED = "merged.json"  # inodes of files merged from the shards, one of which is or becomes the store
_MAX_BATCH_SIZE = 4096  # a larger batch size in a file is taken for damage
_JSON_NAMES = r"(plan|merged|merging|parts|part-\d+|workers|stamps)"
# File names of an extraction; older temporary files have eight hex digits without TEMPORARY_MARK.
OWNED_FILES = re.compile(
    rf"{LOCK}|sessions(-\d+)?\.jsonl|\d{{6,}}\.shard|part-\d+\.lock|{_JSON_NAMES}\.json"
    rf"|\.(\d{{6,}}|{_JSON_NAMES})\.[0-9a-f]{{8}}(\.{TEMPORARY_MARK})?\.(shard|json)"
)


def shards_folder(out: Path) -> Path:
    """Folder of the finished shards of ``out`` until it is complete."""
    return out.with_name(out.name + ".parts")


def read_progress(folder: Path) -> dict[str, Any] | None:
    """Read the plan and progress of an unfinished extraction.

    Args:
        folder: folder of the shards.

    Returns:
        Contents of ``plan.json``, and "finished": the number of finished shards. None if there is no plan.

    Raises:
        InputError: the plan is damaged.
    """
    plan = read_plan(folder)
    return None if plan is None else {**plan, "finished": len(list(folder.glob("[0-9]*.shard")))}


def read_batch_size(out: Path) -> int | None:
    """Batch size of an unfinished or finished extraction into ``out``, None if unknown."""
    settings = read_plan(shards_folder(out))
    if settings is None and out.exists():
        with store.open(out) as finished:
            settings = finished.run
    return None if settings is None else batch_size_of(settings)


def read_classes(out: Path) -> Any:
    """Classes of an unfinished or finished extraction into ``out``; may be damaged, None if unknown or unreadable."""
    with suppress(InputError):
        plan = read_plan(shards_folder(out))
        if plan is not None:
            header = plan.get("header")
            return header.get("classes") if isinstance(header, dict) else None
        if out.exists():
            with store.open(out) as finished:
                return finished.classes
    return None


def batch_size_of(settings: Mapping[str, Any]) -> int | None:
    """Batch size in ``plan.json`` or in a store's information about its run, None if it is missing or invalid."""
    size = settings.get("batch_size")
    return size if type(size) is int and 0 < size <= _MAX_BATCH_SIZE else None


def read_plan(folder: Path) -> dict[str, Any] | None:
    """Read the plan in a folder.

    Args:
        folder: folder of the shards.

    Returns:
        Contents of ``plan.json``. None if it does not exist, or is damaged and the folder has no shards.

    Raises:
        InputError: it is damaged, and the folder has shards.
    """
    path = folder / PLAN
    try:
        value = read_small_json(path)
        if not isinstance(value, dict):
            raise InputError(f"{path}: not a JSON object")
    except InputError as error:
        # Missing: not started, or removed by another process since it was read. Damaged without shards: nothing is lost
        # by starting again.
        if not os.path.lexists(path) or not any(folder.glob("[0-9]*.shard")):
            return None
        raise InputError(
            f"{path}: damaged ({str(error).removeprefix(f'{path}: ')}); remove {folder} and start again"
        ) from None
    return value


def check_new(out: Path) -> None:
    """Check that neither the store ``out`` nor an unfinished extraction into it exists.

    Raises:
        InputError: one of them exists.
    """
    folder = shards_folder(out)
    if out.exists():
        raise InputError(f"{out} exists; choose another `out` or remove it")
    if read_plan(folder) is not None:
        raise InputError(f"{folder} holds an unfinished extraction; add `resume=True` to continue, or remove it")


def check_resumable(
    out: Path, plan: Plan, header: Header, resume: bool, ignored: Container[str] = ()
) -> dict[str, Any] | None:
    """Check that an extraction into ``out`` can start or, with ``resume``, continue with the same settings.

    The division into shards is not compared; `Plan.differing_shards` does that.

    Args:
        out: the store.
        plan: what to compute.
        header: metadata of the store.
        resume: whether to continue an unfinished extraction.
        ignored: names of options that may differ.

    Returns:
        Contents of ``plan.json`` of the unfinished extraction, None if there is none.

    Raises:
        InputError: ``out`` or an unfinished extraction exists and ``resume`` is False, or has another plan or header;
            or the folder of the shards contains other files.
    """
    if not resume:
        check_new(out)
    folder = shards_folder(out)
    saved_plan = read_plan(folder)
    if saved_plan is not None:
        check_same_settings(folder, plan.differing_options(header, saved_plan, ignored))
    elif out.exists():
        with store.open(out) as finished:
            stored = {"recipe": finished.recipe, "classes": finished.classes, "provenance": finished.provenance}
            difference = plan.differences(finished.options, ignored) or header_differences(header, stored, written=True)
        if difference:
            raise InputError(f"{out} is complete but has different settings: {difference}; choose another `out`")
    elif unexpected := _find_unexpected(folder):
        raise InputError(f"{folder}: contains {unexpected}, not part of an extraction; move it or choose another `out`")
    return saved_plan


def check_same_settings(folder: Path, difference: str) -> None:
    """Raise an InputError if ``difference``, from comparing plans with the one in a folder, is not empty."""
    if difference:
        raise InputError(
            f"{folder} was started with different settings: {difference}; use the same options and checkpoint, or "
            "remove the folder"
        )


def _find_unexpected(folder: Path) -> str:
    """First file name in a folder that is not part of an extraction, "" if there is none."""
    try:
        return min((path.name for path in folder.iterdir() if not OWNED_FILES.fullmatch(path.name)), default="")
    except FileNotFoundError:
        return ""


def check_merged_file(out: Path) -> None:
    """Raise an InputError if there is a file at ``out`` that was not merged from its shards.

    A merged store exists beside its folder of shards if removing the folder was interrupted. The store is then merged
    again, as it may be incomplete on disk after a power failure.
    """
    folder = shards_folder(out)
    if not out.exists():
        return
    if out.stat().st_ino not in _merged_inodes(folder):
        raise InputError(f"{out} exists, but {folder} is an unfinished extraction; remove one of them")


def _merged_inodes(folder: Path) -> list[int]:
    """Inodes of the files that were merged from the shards in a folder, [] if none is recorded."""
    try:
        return [int(inode) for inode in read_small_json(folder / MERGED)["inodes"]]
    except (InputError, ValueError, TypeError, KeyError, OverflowError):
        return []


def remove_partial_files(out: Path) -> None:
    """Remove what killed processes left of an extraction into ``out``; no other process may be using it."""
    folder = shards_folder(out)
    partial = [path for path in folder.glob(".*") if OWNED_FILES.fullmatch(path.name)]
    partial += find_temporary_files(out.parent, out.name)
    if not out.exists():  # a later file at `out` could get a recorded inode and be taken for the merged store
        partial += folder.glob(MERGED)
    for path in partial:
        path.unlink()


def remove_owned_files(folder: Path) -> None:
    """Remove the files of an extraction, and the folder if it is then empty."""
    # On NFS, an open file such as the lock keeps the folder from being removed, but the store is complete anyway.
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if OWNED_FILES.fullmatch(path.name):
                path.unlink()
        folder.rmdir()


def remove_merged(folder: Path) -> None:
    """Remove a folder whose shards are merged into the store."""
    (folder / PLAN).unlink()  # first, so that an interrupted removal is not resumed
    fsync(folder)
    remove_owned_files(folder)
