"""Compute unusable images again, after their files have been repaired or added. No torch.

For a complete store ``F.h5`` (`repair`), only batches with such images are computed, into shards in the folder
``F.h5.repair``; all other images are copied from the store. The new store replaces the old one atomically, so there is
a complete store at any time. In an unfinished extraction, the finished shards with such images are computed again
(`refdet.extraction.retries`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, UnusableImageError
from refdet.extraction.merge_reading import ImageToMerge
from refdet.extraction.plan import Plan, Shard, split_into_shards
from refdet.extraction.retries import find_readable
from refdet.extraction.selection_record import merge_provenances
from refdet.extraction.shard_folder import LOCK
from refdet.extraction.shards import ShardSet
from refdet.files.atomic import find_temporary_files, fsync, report_disk_full, write_json
from refdet.files.json_files import read_small_json
from refdet.files.lock import exclusive_lock
from refdet.files.short_text import format_count
from refdet.store import Header, ImageRow, Store
from refdet.store.schema import check_starts
from refdet.store.shard_images import ImageReader
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)

_REPAIR = "repair.json"  # the plan of the repair, and the inode of the store to repair
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
        self._old, self._old_rows = old, _read_rows(old)
        if old.regions:  # without regions, a store does not know the shapes
            for name in plan.features:
                self._shapes.setdefault(name, old.data[f"features/{name}"].shape[1:])

    def merge(self, records: Sequence[ImageRecord], run: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Write a new store, replace the old one with it, and remove the folder.

        The new store keeps the old regions of an image that was usable but can no longer be read. It keeps the
        information about the original run, and has that about this run as "repaired".

        Args:
            records: all images, in the order of the store.
            run: called after writing; returns the information about this run for the store.

        Raises:
            RuntimeFailure: the disk is full, or a shard is damaged.
        """
        computed = self._images_by_id()
        # images of the affected batches that were usable and no longer are: image id -> reason
        lost = {i: row.error for i, (row, _) in computed.items() if row.error and not self._old_rows[i].error}
        if lost:
            log.warning(
                "note: %s beside repaired ones can no longer be read (first: %s); %s keeps the regions it has of %s",
                format_count(len(lost), "image"),
                next(iter(lost.values())),
                self.out,
                "this image" if len(lost) == 1 else "these images",
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
    """Start or continue the repair of a complete store: the computation of unusable images that can now be read.

    Finished shards are continued from if they are of the same store and the same images, and discarded otherwise. If no
    unusable image can be read now, those of this store are kept for a later repair.

    Args:
        out: the store, complete and with this plan and header.
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
        provenance = merge_provenances(old.provenance, header.provenance) or old.provenance
        header = replace(header, provenance=provenance)
        readable = find_readable(old.errors, records, load)
        remaining_errors = [error for image_id, error in old.errors.items() if image_id not in readable]
        if strict and remaining_errors:
            raise UnusableImageError(
                remaining_errors[0],
                fix=f"{out} has no regions of {format_count(len(old.errors), 'image')}; repair the image files and run "
                "it again with `resume=True`",
            )
        if not readable:
            if (folder / _REPAIR).is_file():
                _clean_up(folder, out)
            if provenance != old.provenance:
                log.warning("note: %s: its detector was validated since on a file that the store does not name", out)
            yield None
            return
        old_batch_size = old.run.get("batch_size") or plan.batch_size
        if old_batch_size != plan.batch_size:
            raise InputError(
                f"{out} is complete but has different settings: `batch_size` was {old_batch_size} and is now "
                f"{plan.batch_size}; use the same to compute its repaired images"
            )
        if not (folder / _REPAIR).is_file() and _has_other_files(folder):
            raise InputError(f"{folder}: needed for repaired images, but contains other files; move it")
        affected = [batch for batch in batches if any(record.id in readable for record in batch)]
        shards = split_into_shards(affected, shard_images)
        with report_disk_full(folder, "free some space and run it again"):
            folder.mkdir(exist_ok=True)
            with exclusive_lock(folder, LOCK, "wait for it to finish"):
                this_repair = {"inode": out.stat().st_ino, "plan": plan.to_json(shards, header)}
                if _read_repair(folder) != json.loads(json.dumps(this_repair)):  # as on disk: lists instead of tuples
                    if any(folder.glob(_SHARDS)):
                        log.warning("note: finished shards in %s are of another repair and are discarded", folder)
                    _remove(folder, out, keep_lock=True)
                    write_json(folder / _REPAIR, this_repair)
                for path in (folder / out.name, *find_temporary_files(folder)):  # left by a process that was killed
                    path.unlink(missing_ok=True)
                yield Repair(old, plan, header, shards)


def _read_repair(folder: Path) -> Any:
    """Read `_REPAIR`; None if it is missing or damaged."""
    try:
        return read_small_json(folder / _REPAIR)
    except InputError:
        return None


def _has_other_files(folder: Path) -> bool:
    """Whether a folder has files that are not left by a repair killed before it wrote `_REPAIR`."""
    if not folder.exists():
        return False
    temporary_files = set(find_temporary_files(folder))
    return any(path.name != LOCK and path not in temporary_files for path in folder.iterdir())


def _clean_up(folder: Path, out: Path) -> None:
    """Remove the folder of a repair, unless it has finished shards that a later repair of this store can use."""
    with exclusive_lock(folder, LOCK, "wait for it to finish"):
        content = _read_repair(folder)
        # a finished repair replaces the store by a file with another inode
        unfinished = isinstance(content, dict) and content.get("inode") == out.stat().st_ino
        if unfinished and any(folder.glob(_SHARDS)):
            log.warning(
                "note: %s is kept: it has finished shards of repaired images, which cannot be read now; run it again "
                "with `resume=True` when they can be read",
                folder,
            )
        else:
            _remove(folder, out)


def _remove(folder: Path, out: Path, keep_lock: bool = False) -> None:
    """Remove the files of a repair, and the folder if it is then empty.

    `_REPAIR` is removed last: a folder without it is refused if it has other files.
    """
    names = ["sessions.jsonl", "workers.json", out.name, *([] if keep_lock else [LOCK]), _REPAIR]
    for path in (*folder.glob(_SHARDS), *find_temporary_files(folder), *(folder / name for name in names)):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _read_rows(old: Store) -> dict[int, ImageRow]:
    """Read the row of each image of a store, to write another store with the same rows.

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
    # integers: height, width, regions, mask bytes, and channels, height and width of the feature map
    columns = np.column_stack([old.heights, old.widths, np.diff(region_start), mask_bytes, shapes]).tolist()
    return {
        image_id: ImageRow(image_id, str(name), height, width, str(error), regions, num_bytes, (c, h, w))
        for image_id, name, error, (height, width, regions, num_bytes, c, h, w) in zip(
            old, old.file_names, old.image_errors, columns, strict=True
        )
    }
