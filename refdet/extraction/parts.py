"""Extraction in parts: processes that share nothing but a folder compute the shards of one store. No torch.

Which shards a part computes depends on nothing but its number, a shard is written atomically, and the same shard has
the same contents whoever computes it, so that the store is right even where locks do not work. Locks, where there are
any, keep two processes from the same part, and a part from starting during a merge: a part holds its own lock for as
long as it runs, and the folder's while it starts and while it merges. Under the folder's lock, shards are only added by
others, so that nobody computes once all are there.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from refdet.data.coco import ImageRecord
from refdet.errors import InputError, RuntimeFailure
from refdet.extraction.part import Part
from refdet.extraction.pipeline import SHARD_IMAGES, compute_shards, stoppable
from refdet.extraction.plan import Plan, Shard, cut_into_shards
from refdet.extraction.repair import none_usable, readable
from refdet.extraction.shard_folder import (
    LOCK,
    MERGED,
    OURS,
    PLAN,
    begun_batch_size,
    begun_plan,
    check_begun,
    parts_folder,
    refuse_another,
    remove_ours,
)
from refdet.extraction.shards import ShardSet
from refdet.extraction.steps import Compute, Load
from refdet.extraction.summary import Summary, summary_of_store
from refdet.extraction.timing import Session
from refdet.files.atomic import fsync, left_behind, report_disk_full, write_json_once
from refdet.files.lock import Locked, alone
from refdet.store import Header

log = logging.getLogger(__name__)

MERGING = "merging.json"  # who merges, where there are no locks
_PATIENCE = 20.0  # seconds; a part holds the folder's lock for a moment when it starts and when it ends
_SHARD = re.compile(r"\.?(\d{6,})\b.*\.shard")  # finished or temporary

Cut = Callable[[int], Sequence[list[ImageRecord]]]  # maximum size of a batch -> batches


class PartShards(ShardSet):
    """The shards of one part; created by `open_part`."""

    def __init__(self, out: Path, plan: Plan, header: Header, shards: Sequence[Shard], part: Part) -> None:
        self.own = part.shards(len(shards))
        super().__init__(out, plan, header, shards, begun=begun_plan(parts_folder(out)), numbers=self.own)
        self.part = part

    def discard(self, numbers: Sequence[int]) -> None:
        """Remove finished shards, to compute them again."""
        for number in numbers:
            self._path(number).unlink(missing_ok=True)
            self._rows.pop(number, None)

    @property
    def images(self) -> int:
        """Number of images in its shards, finished or not."""
        return sum(len(batch) for number in self.own for batch in self.shards[number])

    def summary(self, session: Session, parts_of_computing: dict[str, float]) -> Summary:
        """The numbers of this part, whose store is not written yet."""
        rows = [row for rows in self._rows.values() for row, _ in rows]
        size = sum(path.stat().st_size for path in map(self._path, self._rows) if path.exists())
        return Summary(
            images=len(rows),
            regions=sum(row.regions for row in rows),
            errors=len(self.errors),
            computed=session.images,
            seconds=session.seconds,
            bytes=size,
            images_per_second=session.images / session.seconds if session.images else 0.0,
            stages=session.stages,
            batch_size=self.plan.batch_size,
            computing=parts_of_computing,
            merged=False,
        )


class _PartSession(Session):
    """Timing of one part, which others can read while it runs."""

    def __init__(self, parts: PartShards) -> None:
        self._parts = parts
        super().__init__(parts.folder, parts.part.number)
        self.tell("computing")

    def finished(self, images: int) -> None:
        super().finished(images)
        self.tell("computing")

    def tell(self, state: str) -> None:
        done, speed = self._parts.done, self.images / self.seconds if self.images else 0.0
        self._parts.part.note(
            self._parts.folder, state=state, finished=done, images=self._parts.images, images_per_second=round(speed, 2)
        )


def extract_part(
    out: Path,
    plan: Plan,
    header: Header,
    cut: Cut,
    records: Sequence[ImageRecord],
    load: Load,
    compute: Compute,
    part: Part,
    *,
    fixed_batch_size: bool = True,
    workers: int = 2,
    shard_images: int = SHARD_IMAGES,
    strict: bool = False,
    parts_of_computing: Callable[[], dict[str, float]] = dict,
) -> Summary:
    """Compute the shards of one part, and write the store if those of all other parts are finished.

    Finished shards are kept and not computed again, whoever computed them, with the exception of images that were
    unusable and can now be read.

    Args:
        out: the store, at a path that all parts see.
        plan: what to compute; must be the same for all parts.
        header: metadata of the store.
        cut: divides the images into batches of at most a given size, as `refdet.extraction.pipeline.extract` takes.
        records: all images in the order of the store.
        load: as in `refdet.extraction.pipeline.extract`.
        compute: as in `refdet.extraction.pipeline.extract`.
        part: which part.
        fixed_batch_size: whether the batch size of the plan was asked for; otherwise that of the part that was
            started first is used.
        workers: number of threads that prefetch images.
        shard_images: number of images at which a shard is complete.
        strict: fail at an unusable image.
        parts_of_computing: called at the end; returns the seconds per part of computing.

    Returns:
        Numbers and timings: of the store if it is written, otherwise of this part.

    Raises:
        InputError: other parts, or ``out``, have other settings or another number of parts; another process computes
            the same part or all images.
        RuntimeFailure: as `refdet.extraction.pipeline.extract`; finished shards are kept.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; finished shards are kept.
    """
    session: Session | None = None
    with open_part(out, plan, header, cut, part, fixed_batch_size, shard_images) as parts:
        if parts is not None:
            session = _PartSession(parts)
            with stoppable(parts, parts.images):
                again = set(parts.errors) if strict else readable(parts.errors, records, load)
                numbers = _to_compute(parts, again)
                with session.computing():
                    compute_shards(parts, numbers, session, load, compute, workers, strict)
                session.tell("finished")
                merged = _merge_if_last(parts, records, session, parts_of_computing)
            if not merged:
                return parts.summary(session, parts_of_computing())
    return summary_of_store(out, session, parts_of_computing, begun_batch_size(out) or plan.batch_size)


@contextmanager
def open_part(
    out: Path, plan: Plan, header: Header, cut: Cut, part: Part, fixed_batch_size: bool, shard_images: int
) -> Iterator[PartShards | None]:
    """Start or continue a part of an extraction, locking the part.

    Args:
        out: the store.
        plan: what to compute.
        header: metadata of the store.
        cut: divides the images into batches of at most a given size.
        part: which part.
        fixed_batch_size: whether to refuse another batch size than the plan's.
        shard_images: number of images at which a shard is complete.

    Yields:
        The shards of the part, or None if ``out`` is already complete.

    Raises:
        InputError: other parts, or ``out``, have other settings or another number of parts; another process computes
            the same part or all images.
        RuntimeFailure: the disk is full.
    """
    folder = parts_folder(out)
    with ExitStack() as stack:
        stack.enter_context(report_disk_full(folder, "free some space and run it again"))
        with _starting(folder):
            stack.enter_context(part.alone(folder))
            begun = check_begun(out, plan if fixed_batch_size else replace(plan, batch_size=0), header, True)
            if begun is None and out.exists():
                stack.close()
                remove_ours(folder)
                yield None
                return
            part.agree(folder)
            refuse_another(out)
            if not out.exists():  # a later file must not be taken for the merged one
                (folder / MERGED).unlink(missing_ok=True)
            plan, shards = _agreed(folder, plan, header, cut, shard_images)
            parts = PartShards(out, plan, header, shards, part)
            for path in folder.glob(".*.shard"):  # by a process that was killed
                match = _SHARD.fullmatch(path.name)
                if match and OURS.fullmatch(path.name) and int(match[1]) in parts.own:
                    path.unlink(missing_ok=True)
        yield parts


@contextmanager
def _starting(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which another part may be removing after a merge."""
    with ExitStack() as stack:
        for last in (False, False, True):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(alone(folder, LOCK, "let it end", wait=_PATIENCE))
                break
            except FileNotFoundError:
                if last:
                    raise
        yield


def _agreed(folder: Path, plan: Plan, header: Header, cut: Cut, shard_images: int) -> tuple[Plan, list[Shard]]:
    """The plan and shards that all parts have: those of the part that wrote ``plan.json`` first."""
    shards = cut_into_shards(cut(plan.batch_size), shard_images)
    if begun_plan(folder) is None:
        write_json_once(folder / PLAN, plan.work(shards, header))
        fsync(folder.parent)
    begun = begun_plan(folder) or {}
    size = begun.get("batch_size")
    if isinstance(size, int) and size != plan.batch_size:
        plan = replace(plan, batch_size=size)
        shards = cut_into_shards(cut(size), shard_images)
    if difference := plan.other_options(header, begun) or plan.other_shards(shards, begun):
        raise InputError(
            f"{folder} was started with different settings: {difference}; use the same options and "
            "checkpoint, or remove it"
        )
    return plan, shards


def _to_compute(parts: PartShards, again: set[int]) -> list[int]:
    """The shards of a part that are missing, and those to compute again, which are removed so that nobody merges."""
    numbers = [number for number in parts.missing(again) if number in parts.own]
    if again:
        with alone(parts.folder, LOCK, "let it end", wait=_PATIENCE):
            parts.discard(numbers)
    return numbers


def _merge_if_last(
    parts: PartShards,
    records: Sequence[ImageRecord],
    session: Session,
    parts_of_computing: Callable[[], dict[str, float]],
) -> bool:
    """Write the store if all shards are finished; returns whether it is written."""
    folder, out = parts.folder, parts.out
    missing = len(parts.shards) - _finished(folder)
    if missing > 0 and begun_plan(folder) is not None:
        are = "is" if missing == 1 else "are"
        log.warning(
            "note: part %s is finished; %d of %d shards %s missing: the part that ends last writes %s",
            *(parts.part, missing, len(parts.shards), are, out),
        )
        return False
    try:
        with alone(folder, LOCK, "let it end", wait=_PATIENCE) as locked:
            begun = begun_plan(folder)
            if begun is None:  # another part has merged them meanwhile
                remove_ours(folder)
                return True
            who = {"part": str(parts.part), "host": socket.gethostname(), "pid": os.getpid()}
            if not write_json_once(folder / MERGING, who) and not locked:
                log.warning("note: part %s is finished; another part writes %s", parts.part, out)
                return False
            for path in left_behind(out.parent, out.name) if locked else ():  # by a process that was killed
                path.unlink()
            whole = ShardSet(out, parts.plan, parts.header, parts.shards, begun=begun)
            if left := len(whole.missing()):
                log.warning(
                    "note: part %s is finished; %s damaged and removed: compute them with `resume=True`",
                    *(parts.part, "1 shard was" if left == 1 else f"{left} shards were"),
                )
                return False
            if len(whole.errors) == len(records):
                raise RuntimeFailure(none_usable(whole.errors, f"finished shards are kept in {folder}"))
            with session.timed("merge"):
                whole.merge(
                    records,
                    lambda: {
                        **session.summary(),
                        "batch_size": parts.plan.batch_size,
                        "parts": parts.part.of,
                        "computing": {part: round(took, 3) for part, took in parts_of_computing().items()},
                    },
                )
            return True
    except Locked:
        log.warning("note: part %s is finished; another part writes %s", parts.part, out)
        return False
    except FileNotFoundError:
        if begun_plan(folder) is None and out.exists():  # another part has just removed the folder
            return True
        raise


def _finished(folder: Path) -> int:
    """Number of finished shards, of all parts."""
    try:
        return sum(1 for name in os.listdir(folder) if name[0] != "." and _SHARD.fullmatch(name))
    except FileNotFoundError:  # merged by another part
        return 0
