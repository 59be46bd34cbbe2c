"""Starting or continuing an extraction whose shards one process computes or collects. No torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from refdet.errors import InputError
from refdet.extraction.part import lock_all_parts
from refdet.extraction.plan import Plan, Shard
from refdet.extraction.selection_record import record_selection
from refdet.extraction.shard_folder import (
    LOCK,
    PLAN,
    check_merged_file,
    check_resumable,
    check_same_settings,
    read_plan,
    remove_owned_files,
    remove_partial_files,
    shards_folder,
)
from refdet.extraction.shards import ShardSet
from refdet.files.atomic import fsync, report_disk_full, write_json
from refdet.files.lock import exclusive_lock
from refdet.store import Header

log = logging.getLogger(__name__)


@contextmanager
def open_extraction(
    out: Path, plan: Plan, header: Header, shards: Sequence[Shard], resume: bool
) -> Iterator[ShardSet | None]:
    """Start or continue an extraction, locking its folder.

    Args:
        out: the store.
        plan: what to compute.
        header: metadata of the store.
        shards: batches of each shard.
        resume: continue from finished shards.

    Yields:
        The shards, or None if ``out`` is already complete with this plan and header.

    Raises:
        InputError: as `check_resumable`; the images were divided into other shards; ``out`` exists but was not merged
            from the shards; or another process is using them.
        RuntimeFailure: the disk is full.
    """
    folder = shards_folder(out)
    saved_plan = check_resumable(out, plan, header, resume)
    if saved_plan is None and out.exists():
        remove_owned_files(folder)  # in case their removal after the merge was interrupted
        yield None
        return
    if saved_plan is None and resume:
        log.warning("note: `resume`: nothing to resume in %s, starting from the beginning", folder)
    with report_disk_full(folder, "free some space and run it again"):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder, LOCK, "wait for it to finish or choose another `out`"), lock_all_parts(folder):
            current_plan = read_plan(folder)  # again, now that no other process can write it
            if (current_plan is None) != (saved_plan is None) or (current_plan is None and out.exists()):
                raise InputError(f"{folder}: another process has just written to it; try again")
            check_merged_file(out)
            remove_partial_files(out)
            if current_plan is None:
                write_json(folder / PLAN, plan.to_json(shards, header))
                fsync(out.parent)
            else:
                difference = plan.differing_options(header, current_plan)
                check_same_settings(folder, difference or plan.differing_shards(shards, current_plan))
            header = record_selection(folder / PLAN, header, current_plan)
            yield ShardSet(out, plan, header, shards, saved_plan=current_plan)
