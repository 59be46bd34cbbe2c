"""Extract the images of a finished store that were unusable, after their files have been repaired. No torch.

Only batches with such images are computed, into shards in a folder ``F.h5.repair`` next to the store ``F.h5``; the
other images are copied from the store. The result replaces the store atomically, so a store is always complete.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, UnusableImageError
from refdet.extraction.merge_reading import ImageToMerge
from refdet.extraction.plan import Plan, Shard, split_into_shards
from refdet.extraction.shard_folder import LOCK
from refdet.extraction.shards import ShardSet
from refdet.files.atomic import find_temporary_files, fsync, report_disk_full, write_json
from refdet.files.json_files import read_small_json
from refdet.files.lock import exclusive_lock
from refdet.files.progress import progress
from refdet.files.short_text import format_count
from refdet.store import Header, ImageRow, Store
from refdet.store.schema import check_starts
from refdet.store.shard_images import ImageReader
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)

_REPAIR = "repair.json"  # identifies the store and the plan of its repair
_SHARDS = "[0-9]*.shard"


def repair_folder(out: Path) -> Path:
    """Folder for the shards of repaired images until they are merged into the store."""
    return out.with_name(out.name + ".repair")


class Repair(ShardSet):
    """The shards of repaired images; created by `repair`.

    Args:
        old: the store before the repair.
        plan: what to compute.
        header: metadata of the store.
        shards: the shards to compute, each with its batches.
    """

    def __init__(self, old: Store, plan: Plan, header: Header, shards: Sequence[Shard]) -> None:
        super().__init__(old.path, plan, header, shards, repair_folder(old.path))
        self._old, self._old_rows = old, _rows(old)
        if old.regions:
            for name in plan.features:
                self._shapes.setdefault(name, old.data[f"features/{name}"].shape[1:])

    def merge(self, records: Sequence[ImageRecord], run: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Write a new store, replace the old one with it, and remove the folder.

        The new store keeps the regions of images that were usable and can no longer be read, and the information about
        the original run; that about this run is added as "repaired".

        Args:
            records: all images, in the order of the store.
            run: called after writing; returns the information about this run.

        Raises:
            RuntimeFailure: the disk is full, or a shard is damaged.
        """
        computed = self._by_id()
        lost = {i: row.error for i, (row, _) in computed.items() if row.error and not self._old_rows[i].error}
        if lost:
            log.warning(
                "note: %s beside repaired ones can no longer be read (first: %s); %s keeps the regions it has of %s",
                format_count(len(lost), "image"),
                next(iter(lost.values())),
                self.out,
                "it" if len(lost) == 1 else "them",
            )
        for image_id in lost:
            del computed[image_id]
        images = [
            computed.get(r.id) or ImageToMerge(self._old_rows[r.id], partial(self._read_old, r.id)) for r in records
        ]
        new = self.folder / self.out.name
        self._write_store(new, images, lambda: {**self._old.run, "repaired": dict(run())})
        os.replace(new, self.out)
        fsync(self.out.parent)
        _remove(self.folder, self.out)

    def _read_old(self, image_id: int, reader: ImageReader) -> Regions:
        return self._old.read(image_id)


@contextmanager
def repair(
    out: Path,
    plan: Plan,
    header: Header,
    batches: Sequence[list[ImageRecord]],
    records: Sequence[ImageRecord],
    load: Callable[[ImageRecord], object],
    strict: bool,
    shard_images: int,
) -> Iterator[Repair | None]:
    """Start or continue the repair of a finished store: computing its unusable images that can now be read.

    Finished shards of another repair, of an earlier store or with other images, are discarded. They are kept if no
    unusable image can be read now.

    Args:
        out: the store, complete and with this plan, header and batches.
        plan: what to compute.
        header: metadata of the store.
        batches: all batches of the extraction.
        records: all images, in the order of the store.
        load: loads an image, raising InputError if it is unusable.
        strict: fail if an image is still unusable.
        shard_images: number of images at which a shard is complete.

    Yields:
        The shards of the repair; None if no unusable image can be read now.

    Raises:
        InputError: the store has another batch size, the folder has other files, or another process is using it.
        UnusableImageError: an image is still unusable and ``strict`` is True.
        RuntimeFailure: the disk is full.
    """
    folder = repair_folder(out)
    with store.open(out) as old:
        readable = find_readable(old.errors, records, load)
        remaining_errors = [error for image_id, error in old.errors.items() if image_id not in readable]
        if strict and remaining_errors:
            raise UnusableImageError(
                remaining_errors[0],
                fix=f"{out} has no regions of {format_count(len(old.errors), 'image')}; repair the files and run it "
                "again with `resume=True`",
            )
        if not readable:
            if (folder / _REPAIR).is_file():
                _clean_up(folder, out)
            yield None
            return
        batch_size = old.run.get("batch_size", plan.batch_size)
        if batch_size != plan.batch_size:
            raise InputError(
                f"{out} is complete but has different settings: `batch_size` was {batch_size} and is now "
                f"{plan.batch_size}; use the same to compute its repaired images"
            )
        if folder.exists() and any(folder.iterdir()) and not (folder / _REPAIR).is_file():
            raise InputError(f"{folder}: needed for repaired images, but contains other files; move it")
        affected = [batch for batch in batches if any(record.id in readable for record in batch)]
        shards = split_into_shards(affected, shard_images)
        with report_disk_full(folder, "free some space and run it again"):
            folder.mkdir(exist_ok=True)
            with exclusive_lock(folder, LOCK, "wait for it to finish"):
                work = {"inode": out.stat().st_ino, "plan": plan.to_json(shards, header)}
                if _read_repair(folder) != json.loads(json.dumps(work)):
                    if any(folder.glob(_SHARDS)):
                        log.warning("note: finished shards in %s are of another repair and are discarded", folder)
                    _remove(folder, out, keep_lock=True)
                    write_json(folder / _REPAIR, work)
                for path in (folder / out.name, *find_temporary_files(folder)):  # left by a process that was killed
                    path.unlink(missing_ok=True)
                yield Repair(old, plan, header, shards)


def find_readable(
    errors: Container[int], records: Sequence[ImageRecord], load: Callable[[ImageRecord], object]
) -> set[int]:
    """Find unusable images that can now be read, because their files were repaired or added.

    Args:
        errors: ids of the unusable images.
        records: all images.
        load: loads an image, raising InputError if it is unusable.

    Returns:
        Ids of the unusable images that can now be read.
    """
    readable = set()
    for record in progress([r for r in records if r.id in errors], "look for repaired images", "image", leave=False):
        with suppress(InputError):
            load(record)
            readable.add(record.id)
    if readable:
        log.warning("note: %s can now be read", format_count(len(readable), "previously unusable image"))
    return readable


def find_retries(
    shard_set: ShardSet, records: Sequence[ImageRecord], load: Callable[[ImageRecord], object], strict: bool
) -> set[int]:
    """Find the unusable images in finished shards to try again.

    These are the images that can now be read, or all if ``strict``, so that one that is still unusable is reported. As
    a shard is always computed as a whole, a shard in which another image can no longer be read is left out, or the
    regions of that image would be lost.

    Args:
        shard_set: the shards.
        records: all images.
        load: loads an image, raising InputError if it is unusable.
        strict: whether an unusable image is an error.

    Returns:
        Ids of the images.
    """
    if strict:
        return set(shard_set.errors)
    errors = shard_set.errors
    readable = find_readable(errors, records, load)
    unreadable = []  # of each shard left out, why another image cannot be read
    for number in sorted({*shard_set.missing_shards(readable)} - {*shard_set.missing_shards()}):
        images = [record for batch in shard_set.shards[number] for record in batch]
        try:
            for record in images:
                if record.id not in errors:
                    load(record)
        except InputError as error:
            readable -= {record.id for record in images}
            unreadable.append(str(error))
    if unreadable:
        log.warning(
            "note: %s not computed again for repaired images, as others in it can no longer be read (first: %s)",
            format_count(len(unreadable), "finished shard", "is"),
            unreadable[0],
        )
    return readable


def _read_repair(folder: Path) -> Any:
    """Contents of `_REPAIR`, None if it is missing or damaged."""
    try:
        return read_small_json(folder / _REPAIR)
    except InputError:
        return None


def _clean_up(folder: Path, out: Path) -> None:
    """Remove the folder of a repair that had already replaced the store; keep the shards of an unfinished one."""
    with exclusive_lock(folder, LOCK, "wait for it to finish"):
        work = _read_repair(folder)
        unfinished = isinstance(work, dict) and work.get("inode") == out.stat().st_ino
        if unfinished and any(folder.glob(_SHARDS)):
            log.warning(
                "note: %s is kept: it has finished shards of repaired images, which cannot be read now; run it again "
                "with `resume=True` when they can",
                folder,
            )
        else:
            _remove(folder, out)


def _remove(folder: Path, out: Path, keep_lock: bool = False) -> None:
    """Remove the files of a repair, `_REPAIR` last, and the folder if it is then empty."""
    names = ["sessions.jsonl", "workers.json", out.name, *([] if keep_lock else [LOCK]), _REPAIR]
    for path in (*folder.glob(_SHARDS), *find_temporary_files(folder), *(folder / name for name in names)):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _rows(old: Store) -> dict[int, ImageRow]:
    """Read the rows of the images of a store, to write another one.

    Args:
        old: the store.

    Returns:
        Image id -> row, in the order of the store.

    Raises:
        InputError: the store is damaged.
    """
    try:
        region_start = old.region_start
        mask_bytes = np.zeros(len(old), np.int64)
        if old.has_masks:
            mask_start = old.data["regions/mask_start"][:]
            check_starts("regions/mask_start", mask_start, len(old.data["regions/mask_counts"]))
            mask_bytes = np.diff(mask_start[region_start])
        shapes = old.data["maps/head_shape"][:] if old.map_names else np.zeros((len(old), 3), np.int32)
    except store.CORRUPTION_ERRORS as error:
        raise InputError(f"{old.path}: damaged: {error}; extract it again") from None
    columns = np.column_stack([old.heights, old.widths, np.diff(region_start), mask_bytes, shapes]).tolist()
    return {
        image_id: ImageRow(image_id, str(name), height, width, str(error), num_regions, num_bytes, (c, h, w))
        for image_id, name, error, (height, width, num_regions, num_bytes, c, h, w) in zip(
            old, old.file_names, old.image_errors, columns, strict=True
        )
    }
