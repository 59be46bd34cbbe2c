"""Extraction in parts: processes that share nothing but a folder compute the shards of one store. No torch.

Which shards a part computes depends only on its number and the number of parts, a shard is written atomically, and a
shard has the same contents whichever process computes it from the same image files, so the store is correct even on
file systems without locks.
Where there are locks, they keep two processes from computing the same part, and a part from starting during a merge: a
part holds its own lock as long as it runs, and the lock of the folder while it starts, while it removes shards to
compute them again, and while it merges. While one process holds the lock of the folder, the others can only add shards,
so if all shards exist, no other process is computing any.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from refdet.data.coco import ImageRecord
from refdet.errors import InputError, RuntimeFailure
from refdet.extraction.part import Part
from refdet.extraction.part_shards import PartShards, PartTimer
from refdet.extraction.pipeline import SHARD_IMAGES, compute_shards, interruptible, run_information
from refdet.extraction.plan import Plan, Shard, split_into_shards
from refdet.extraction.retries import find_retries
from refdet.extraction.selection_record import record_selection
from refdet.extraction.shard_folder import (
    LOCK,
    MERGED,
    OWNED_FILES,
    PLAN,
    batch_size_of,
    check_merged_file,
    check_resumable,
    check_same_settings,
    read_batch_size,
    read_plan,
    remove_owned_files,
    shards_folder,
)
from refdet.extraction.shards import ShardSet
from refdet.extraction.stamped_source import StampedSource
from refdet.extraction.steps import Compute, Load, no_stamp
from refdet.extraction.summary import Summary, none_usable_error, summarize_store
from refdet.extraction.timing import Timer
from refdet.files.atomic import find_temporary_files, fsync, report_disk_full, write_json_once
from refdet.files.lock import Locked, exclusive_lock
from refdet.files.short_text import format_count, format_share
from refdet.store import Header

log = logging.getLogger(__name__)

MERGING = "merging.json"  # says which part merges; on file systems without locks it keeps the others from merging
_LOCK_TIMEOUT = 60.0  # seconds to wait while another part starts or merges
_SHARD = re.compile(r"\.?(\d{6,})\b.*\.shard")  # file name of a finished shard or, with a dot, a temporary one

MakeBatches = Callable[[int], Sequence[list[ImageRecord]]]  # maximum size of a batch -> batches


def extract_part(
    out: Path,
    plan: Plan,
    header: Header,
    make_batches: MakeBatches,
    records: Sequence[ImageRecord],
    load: Load,
    compute: Compute,
    part: Part,
    *,
    fixed_batch_size: bool = True,
    workers: int = 2,
    shard_images: int = SHARD_IMAGES,
    strict: bool = False,
    compute_seconds: Callable[[], dict[str, float]] = dict,
    source: StampedSource | None = None,
) -> Summary:
    """Compute the shards of one part, and write the store if the shards of all other parts are finished.

    Finished shards are kept and not computed again, whichever process computed them, except those with unusable images
    that can now be read, and those whose images were replaced by others.

    Args:
        out: the store, at a path that all parts see.
        plan: what to compute; must be the same for all parts.
        header: metadata of the store.
        make_batches: divides the images into batches of at most a given size; see `refdet.extraction.pipeline.extract`.
        records: all images in the order of the store.
        load: as in `refdet.extraction.pipeline.extract`.
        compute: as in `refdet.extraction.pipeline.extract`.
        part: the part to compute.
        fixed_batch_size: whether the batch size of the plan was requested, so that another one in the folder is an
            error. Otherwise all parts use the batch size of the part that started first.
        workers: number of threads that prefetch images.
        shard_images: number of images at which a shard is complete.
        strict: fail at an unusable image.
        compute_seconds: called at the end; returns the seconds that each stage of the network took.
        source: as in `refdet.extraction.pipeline.extract`.

    Returns:
        Numbers and timings: of the store if it is written, otherwise of this part.

    Raises:
        InputError: other parts, or ``out``, have other settings or another number of parts; or another process is
            computing the same part or all images.
        RuntimeFailure: as `refdet.extraction.pipeline.extract`; finished shards are kept.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; finished shards are kept.
    """
    timer: PartTimer | None = None  # stays None if the store was complete before
    with open_part(out, plan, header, make_batches, part, fixed_batch_size, shard_images) as shard_set:
        if shard_set is not None:
            timer = PartTimer(shard_set)
            with interruptible(shard_set):
                shard_numbers = _claim_shards(shard_set, find_retries(shard_set, records, load, strict, source))
                with timer.computing():
                    stamp_of = no_stamp if source is None else source.stamp_of
                    compute_shards(shard_set, shard_numbers, timer, load, compute, workers, strict, stamp_of)
                timer.report("finished")
                merged = _merge_if_last(shard_set, records, timer, compute_seconds)
            if not merged:
                return shard_set.summary(timer, compute_seconds())
    return summarize_store(out, timer, compute_seconds, read_batch_size(out) or plan.batch_size)


@contextmanager
def open_part(
    out: Path,
    plan: Plan,
    header: Header,
    make_batches: MakeBatches,
    part: Part,
    fixed_batch_size: bool,
    shard_images: int,
) -> Iterator[PartShards | None]:
    """Start or continue a part of an extraction, locking the part.

    Args:
        out: the store.
        plan: what to compute.
        header: metadata of the store.
        make_batches: divides the images into batches of at most a given size.
        part: the part to compute.
        fixed_batch_size: whether to refuse an extraction that was started with another batch size than the plan's.
        shard_images: number of images at which a shard is complete.

    Yields:
        The shards of the part, or None if ``out`` is already complete.

    Raises:
        InputError: other parts, or ``out``, have other settings or another number of parts; or another process is
            computing the same part or all images.
        RuntimeFailure: the disk is full.
    """
    folder = shards_folder(out)
    with ExitStack() as stack:
        stack.enter_context(report_disk_full(folder, "free some space and run it again"))
        with _lock_folder(folder):
            stack.enter_context(part.lock(folder))
            compared_plan = plan if fixed_batch_size else replace(plan, batch_size=0)  # 0: any batch size
            saved_plan = check_resumable(out, compared_plan, header, resume=True)
            if saved_plan is None and out.exists():
                stack.close()  # unlock the part before the file of its lock is removed
                remove_owned_files(folder)
                yield None
                return
            part.record_count(folder)
            check_merged_file(out)
            # Forget the inodes of merged files: a new file at `out` could get one and be taken for the merged store.
            if not out.exists():
                (folder / MERGED).unlink(missing_ok=True)
            plan, shards, saved_plan = _agree_on_plan(folder, plan, header, make_batches, shard_images)
            _remove_temporary_shards(folder, part, len(shards))
        # The folder is unlocked by now, so that other parts can start while this one reads its finished shards.
        yield _read_finished_shards(out, plan, header, shards, saved_plan, part)


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Create a folder and hold its lock within the block, retrying if another part removes the folder after a merge."""
    with ExitStack() as stack:
        for is_last_attempt in (False, False, True):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(exclusive_lock(folder, LOCK, "wait for it to finish", wait=_LOCK_TIMEOUT))
                break
            except FileNotFoundError:
                if is_last_attempt:
                    raise
        yield


def _agree_on_plan(
    folder: Path, plan: Plan, header: Header, make_batches: MakeBatches, shard_images: int
) -> tuple[Plan, list[Shard], dict[str, Any]]:
    """Write ``plan.json``, unless another part has written it, and adopt its batch size.

    Returns:
        The plan with that batch size, its shards, and the contents of ``plan.json``.
    """
    shards = split_into_shards(make_batches(plan.batch_size), shard_images)
    if read_plan(folder) is None:
        write_json_once(folder / PLAN, plan.to_json(shards, header))
        fsync(folder.parent)
    saved_plan = read_plan(folder) or {}
    size = batch_size_of(saved_plan)
    if size is not None and size != plan.batch_size:
        plan = replace(plan, batch_size=size)
        shards = split_into_shards(make_batches(size), shard_images)
    check_same_settings(folder, plan.differing_options(header, saved_plan) or plan.differing_shards(shards, saved_plan))
    record_selection(folder / PLAN, header, saved_plan)
    return plan, shards, saved_plan


def _remove_temporary_shards(folder: Path, part: Part, count: int) -> None:
    """Remove the unfinished shards of a part, left by a process that was killed; ``count`` is that of all shards."""
    for path in folder.glob(".*.shard"):
        match = _SHARD.fullmatch(path.name)
        if match and OWNED_FILES.fullmatch(path.name) and int(match[1]) in part.shards(count):
            path.unlink(missing_ok=True)


def _read_finished_shards(
    out: Path, plan: Plan, header: Header, shards: Sequence[Shard], saved_plan: Mapping[str, Any], part: Part
) -> PartShards | None:
    """Read the finished shards of a part; None if another part has merged all shards meanwhile."""
    folder, shard_set = shards_folder(out), None
    try:
        shard_set = PartShards(out, plan, header, shards, saved_plan, part)
    except (OSError, InputError):  # expected only if another part merges and removes the shards meanwhile
        if read_plan(folder) is not None:
            raise
    return None if read_plan(folder) is None else shard_set


def _claim_shards(shard_set: PartShards, retry_ids: set[int]) -> list[int]:
    """List the shards that a part must compute: missing ones, and finished ones with images to try again.

    Removes the finished ones from the folder, so that no other part merges them meanwhile.

    Raises:
        RuntimeFailure: another part has merged them already.
    """
    numbers = shard_set.missing_shards(retry_ids)
    if retry_ids:
        try:
            with _lock_folder(shard_set.folder):
                if read_plan(shard_set.folder) is None:
                    remove_owned_files(shard_set.folder)  # created again by the lock
                    raise _merged_too_early(shard_set, retry_ids, "wrote it meanwhile")
                shard_set.discard(numbers)
        except Locked:  # during the whole merge
            raise _merged_too_early(shard_set, retry_ids, "is writing it") from None
    return numbers


def _merged_too_early(shard_set: PartShards, retry_ids: set[int], action: str) -> RuntimeFailure:
    """The error for a part whose shards another part merges before this one has computed images again."""
    were_unusable = retry_ids <= shard_set.errors.keys()
    return RuntimeFailure(
        f"{shard_set.out}: another part {action} {'without' if were_unusable else 'with the old'} regions of "
        f"{format_count(len(retry_ids), 'image')}",
        fix="when it is complete, compute them with `resume=True`, without `part`"
        if were_unusable
        else "when it is complete, remove it and extract again",
    )


def _merge_if_last(
    shard_set: PartShards,
    records: Sequence[ImageRecord],
    timer: Timer,
    compute_seconds: Callable[[], dict[str, float]],
) -> bool:
    """Write the store if all shards are finished.

    Returns:
        Whether the store is written, by this or another part.
    """
    folder, out, count = shard_set.folder, shard_set.out, len(shard_set.shards)
    try:
        with exclusive_lock(folder, LOCK, "wait for it to finish", wait=_LOCK_TIMEOUT) as locked:
            saved_plan = read_plan(folder)
            if saved_plan is None:  # another part has merged all shards meanwhile
                remove_owned_files(folder)
                return True
            finished = sum(1 for name in os.listdir(folder) if name[0] != "." and _SHARD.fullmatch(name))
            if finished < count:
                missing = format_share(count - finished, count, "shard", "is")
                log.warning(
                    "note: part %s is finished; %s missing: the last part to finish writes %s",
                    shard_set.part,
                    missing,
                    out,
                )
                return False
            merging_process = {"part": str(shard_set.part), "host": socket.gethostname(), "pid": os.getpid()}
            # With the lock, a file that exists already is left from a process that was killed, and means nothing.
            if not write_json_once(folder / MERGING, merging_process) and not locked:
                log.warning("note: part %s is finished; another part writes %s", shard_set.part, out)
                return False
            # temporary files of processes that were killed while they merged
            for path in find_temporary_files(out.parent, out.name) if locked else ():
                path.unlink()
            header = record_selection(folder / PLAN, shard_set.header, saved_plan)  # another part may have recorded one
            all_shards = ShardSet(out, shard_set.plan, header, shard_set.shards, saved_plan=saved_plan)
            if damaged := all_shards.missing_shards():
                raise _damaged_shards_error(folder, damaged, shard_set.part.count)
            if len(all_shards.errors) == len(records):
                raise none_usable_error(all_shards.errors, kept=f"finished shards are kept in {folder}")
            with timer.timed("merge"):
                all_shards.merge(
                    records,
                    lambda: run_information(shard_set, timer, compute_seconds) | {"parts": shard_set.part.count},
                )
            return True
    except Locked:  # for longer than a part takes to start, so another part is merging
        log.warning("note: part %s is finished; another part writes %s", shard_set.part, out)
        return False
    except FileNotFoundError:
        if read_plan(folder) is None and out.exists():  # another part has just removed the folder
            return True
        raise


def _damaged_shards_error(folder: Path, damaged: Sequence[int], part_count: int) -> RuntimeFailure:
    """The error of a merge that found damaged shards, which are removed by now; names the parts to run again."""
    parts = [Part(number, part_count) for number in sorted({1 + shard % part_count for shard in damaged})]
    return RuntimeFailure(
        f"{folder}: {format_count(len(damaged), 'damaged shard')} removed; check the disk, and run part "
        f"{', '.join(map(str, parts))} again or compute what is missing with `resume=True`"
    )
