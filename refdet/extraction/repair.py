"""Compute unusable images of a finished store after their files have been repaired. No torch.

Only the batches with such images are computed, to shards in a folder ``F.h5.repair``; the other images are copied from
the store. The result replaces the store atomically, so a store is always complete.
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
from refdet.errors import InputError, RuntimeFailure
from refdet.extraction.plan import Plan, Shard, split_into_shards
from refdet.extraction.shards import ShardSet
from refdet.files.atomic import MARK, fsync, report_disk_full, write_json
from refdet.files.json_files import read_small_json
from refdet.files.lock import exclusive_lock
from refdet.files.progress import progress
from refdet.store import Header, ImageRow, Store
from refdet.store.schema import check_starts
from refdet.store.shard_images import ImageReader
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)

_REPAIR = "repair.json"  # the store and the plan of its repair


def repair_folder(out: Path) -> Path:
    """Folder of the shards of repaired images until they are merged."""
    return out.with_name(out.name + ".repair")


class Repair(ShardSet):
    """Shards of repaired images; created by `repair`.

    Args:
        old: the store.
        plan: what is computed.
        header: metadata of the store.
        shards: batches of each shard.
    """

    def __init__(self, old: Store, plan: Plan, header: Header, shards: Sequence[Shard]) -> None:
        super().__init__(old.path, plan, header, shards, repair_folder(old.path))
        self._old, self._old_rows = old, _rows(old)
        if old.regions:
            for name in plan.features:
                self._shapes.setdefault(name, old.data[f"features/{name}"].shape[1:])

    def merge(self, records: Sequence[ImageRecord], run: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Write a new store, replace the old one with it, and remove the folder.

        The store keeps the information about its run, and that of this run is added as "repaired".

        Args:
            records: images in the order of the store.
            run: called after writing; returns the information about this run.

        Raises:
            RuntimeFailure: the disk is full, or a shard is damaged.
        """
        computed = self._by_id()
        images = [computed.get(r.id) or (self._old_rows[r.id], partial(self._read_old, r.id)) for r in records]
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
    """Start or continue computing unusable images of a finished store that can now be read.

    Finished shards of another repair, for an earlier store or other images, are discarded.

    Args:
        out: the store, complete and with this plan, header and batches.
        plan: what to compute.
        header: metadata of the store.
        batches: all batches of the extraction.
        records: all images in the order of the store.
        load: loads an image, raising InputError if it is unusable.
        strict: fail if an image is still unusable.
        shard_images: number of images at which a shard is complete.

    Yields:
        The shards of the repair, None if there is nothing to do.

    Raises:
        InputError: the store has another batch size, the folder has other files, or another process is using it.
        RuntimeFailure: the disk is full, or an image is still unusable and ``strict`` is True.
    """
    folder = repair_folder(out)
    with store.open(out) as old:
        usable = find_readable(old.errors, records, load)
        unusable = [error for image_id, error in old.errors.items() if image_id not in usable]
        if strict and unusable:
            raise RuntimeFailure(
                f"`strict`: {unusable[0]}; {out} has no regions of {len(old.errors)} images, repair "
                "their files and run it again with `resume=True`"
            )
        if not usable:
            if (folder / _REPAIR).is_file():  # interrupted after replacing the store
                _remove(folder, out)
            yield None
            return
        size = old.run.get("batch_size", plan.batch_size)
        if size != plan.batch_size:
            raise InputError(
                f"{out} is complete but has different settings: `batch_size` was {size} and is now "
                f"{plan.batch_size}; use the same to compute its repaired images"
            )
        if folder.exists() and any(folder.iterdir()) and not (folder / _REPAIR).is_file():
            raise InputError(f"{folder}: needed for repaired images, but contains other files; move it")
        affected = [batch for batch in batches if any(record.id in usable for record in batch)]
        shards = split_into_shards(affected, shard_images)
        with report_disk_full(folder, "free some space and run it again"):
            folder.mkdir(exist_ok=True)
            with exclusive_lock(folder, "lock", "let it end"):
                work = {"inode": out.stat().st_ino, "plan": plan.work(shards, header)}
                if _read_repair(folder) != json.loads(json.dumps(work)):
                    _remove(folder, out, keep=("lock",))
                    write_json(folder / _REPAIR, work)
                for path in (folder / out.name, *_partial_files(folder)):  # by a process that was killed
                    path.unlink(missing_ok=True)
                yield Repair(old, plan, header, shards)


def find_readable(
    errors: Container[int], records: Sequence[ImageRecord], load: Callable[[ImageRecord], object]
) -> set[int]:
    """Find unusable images that can now be read, as their files were repaired or added.

    Args:
        errors: ids of the unusable images.
        records: all images.
        load: loads an image, raising InputError if it is unusable.

    Returns:
        Ids of the images that can be read.
    """
    ids = set()
    for record in progress([r for r in records if r.id in errors], "look for repaired images", "image", leave=False):
        with suppress(InputError):
            load(record)
            ids.add(record.id)
    if ids:
        log.warning("note: %d previously unusable images can now be read", len(ids))
    return ids


def none_usable_message(errors: Mapping[int, str], kept: str) -> str:
    """Error message of an extraction without usable images, with the first reason and what is kept."""
    return (
        f"none of the {len(errors)} images could be used (first: {next(iter(errors.values()))}); {kept}, check the "
        "files or `images` and run it again with `resume=True`"
    )


def _read_repair(folder: Path) -> Any:
    try:
        return read_small_json(folder / _REPAIR)
    except InputError:
        return None


def _remove(folder: Path, out: Path, keep: Sequence[str] = ()) -> None:
    """Remove the files of a repair, `_REPAIR` last, and the folder if it is then empty."""
    owned = [*folder.glob("[0-9]*.shard"), *_partial_files(folder), folder / "sessions.jsonl", folder / out.name]
    owned.append(folder / "workers.json")
    for path in (*owned, folder / "lock", folder / _REPAIR):
        if path.name not in keep:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _partial_files(folder: Path) -> list[Path]:
    """Temporary files of a process that was killed."""
    return list(folder.glob(f".*.{MARK}.*"))


def _rows(old: Store) -> dict[int, ImageRow]:
    """Rows of a store by image id, as a writer needs them.

    Args:
        old: the store.

    Returns:
        Image id -> row.

    Raises:
        InputError: the store is damaged.
    """
    try:
        ends = old.region_start
        mask_bytes = np.zeros(len(old), np.int64)
        if old.has_masks:
            starts = old.data["regions/mask_start"][:]
            check_starts("regions/mask_start", starts, len(old.data["regions/mask_counts"]))
            mask_bytes = np.diff(starts[ends])
        shapes = old.data["maps/head_shape"][:] if old.map_names else np.zeros((len(old), 3), np.int32)
    except store.CORRUPTION_ERRORS as error:
        raise InputError(f"{old.path}: damaged: {error}; extract it again") from None
    columns = np.column_stack([old.heights, old.widths, np.diff(ends), mask_bytes, shapes]).tolist()
    return {
        image_id: ImageRow(image_id, str(name), height, width, str(error), regions, length, (c, h, w))
        for image_id, name, error, (height, width, regions, length, c, h, w) in zip(
            old, old.file_names, old.image_errors, columns, strict=True
        )
    }
