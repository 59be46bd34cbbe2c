"""Images of a finished store that could not be used, computed once their files are repaired. No torch.

Only the batches that hold such images are computed, into the shards of a folder ``F.h5.repair``; all other images are
read from the store itself. What comes of both takes the store's place when it is whole, so a store is always complete.
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
from refdet.extraction.plan import Plan, Shard, cut_into_shards
from refdet.extraction.shards import ShardSet
from refdet.files.atomic import MARK, fsync, report_disk_full, write_json
from refdet.files.json_files import read_small_json
from refdet.files.lock import alone
from refdet.files.progress import progress
from refdet.store import Header, ImageRow, Store
from refdet.store.schema import check_starts

log = logging.getLogger(__name__)

_OF = "repair.json"  # which store is repaired, and how


def repair_folder(out: Path) -> Path:
    """Where the shards of repaired images are until they are in the store."""
    return out.with_name(out.name + ".repair")


class Repair(ShardSet):
    """The shards of repaired images; made by `repair`."""

    def __init__(self, old: Store, plan: Plan, header: Header, shards: Sequence[Shard]) -> None:
        super().__init__(old.path, plan, header, shards, repair_folder(old.path))
        self._old, self._old_rows = old, _rows(old)
        if old.regions:
            for name in plan.features:
                self._shapes.setdefault(name, old.data[f"features/{name}"].shape[1:])

    def merge(self, records: Sequence[ImageRecord], run: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Write the store anew, put it in the place of the old one, and remove the folder.

        What the store says of its run stays; that of this one is added as "repaired".

        Raises:
            RuntimeFailure: the disk is full, or a shard was damaged meanwhile.
        """
        made = self._by_id()
        images = [made.get(r.id) or (self._old_rows[r.id], partial(self._old.read, r.id)) for r in records]
        new = self.folder / self.out.name
        self._write_store(new, images, lambda: {**self._old.run, "repaired": dict(run())})
        os.replace(new, self.out)
        fsync(self.out.parent)
        _remove(self.folder, self.out)


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
    """Start or continue to compute images of a finished store that could not be used and now can.

    What was finished of another repair, of an earlier store or other images, is computed anew. Gives None where there
    is nothing to do.

    Args:
        out: the store, complete and made under this plan and header of these batches.
        strict: begin only where all of its images can be used.

    Raises:
        InputError: another batch size was used for the store, the folder is somebody else's, or another process is
            at it.
        RuntimeFailure: the disk is full; or an image is still broken, and it is strict.
    """
    folder = repair_folder(out)
    with store.open(out) as old:
        usable = readable(old.errors, records, load)
        broken = [error for image_id, error in old.errors.items() if image_id not in usable]
        if strict and broken:
            raise RuntimeFailure(f"--strict: {broken[0]}; {out} has no regions of {len(old.errors)} images; when their "
                            "files are repaired, run it again with --resume")  # fmt: skip
        if not usable:
            if (folder / _OF).is_file():  # stopped when the store had been replaced already
                _remove(folder, out)
            yield None
            return
        size = old.run.get("batch_size", plan.batch_size)
        if size != plan.batch_size:
            raise InputError(f"{out} is complete but was made differently: --batch-size was {size} and is now "
                             f"{plan.batch_size}; use the same to compute its repaired images")  # fmt: skip
        if folder.exists() and any(folder.iterdir()) and not (folder / _OF).is_file():
            raise InputError(f"{folder}: is needed for repaired images, but holds other files; move it")
        affected = [batch for batch in batches if any(record.id in usable for record in batch)]
        shards = cut_into_shards(affected, shard_images)
        with report_disk_full(folder, "free some space and run it again"):
            folder.mkdir(exist_ok=True)
            with alone(folder, "lock", "let it end"):
                work = {"inode": out.stat().st_ino, "plan": plan.work(shards, header)}
                if _begun(folder) != json.loads(json.dumps(work)):
                    _remove(folder, out, but=("lock",))
                    write_json(folder / _OF, work)
                for path in (folder / out.name, *_half_written(folder)):  # when a process was killed
                    path.unlink(missing_ok=True)
                yield Repair(old, plan, header, shards)


def readable(errors: Container[int], records: Sequence[ImageRecord], load: Callable[[ImageRecord], object]) -> set[int]:
    """Which of the images that could not be used can be read now: their files were repaired or put there."""
    found = set()
    for record in progress([r for r in records if r.id in errors], "look for repaired images", "image", leave=False):
        with suppress(InputError):
            load(record)
            found.add(record.id)
    if found:
        log.warning("note: %d images that could not be used can be read now", len(found))
    return found


def none_usable(errors: Mapping[int, str], kept: str) -> str:
    """The error of an extraction of which every image failed, with the first reason and what is kept."""
    return (
        f"none of the {len(errors)} images could be used; the first: {next(iter(errors.values()))}; {kept}: see to the "
        "files (or to --images), then run it again with --resume"
    )


def _begun(folder: Path) -> Any:
    try:
        return read_small_json(folder / _OF)
    except InputError:
        return None


def _remove(folder: Path, out: Path, but: Sequence[str] = ()) -> None:
    """Remove what a repair writes, the file last that says so, then the folder if nothing else is in it."""
    ours = [*folder.glob("[0-9]*.shard"), *_half_written(folder), folder / "sessions.jsonl", folder / out.name]
    for path in (*ours, folder / "lock", folder / _OF):
        if path.name not in but:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _half_written(folder: Path) -> list[Path]:
    """The temporary files of a process that was killed."""
    return list(folder.glob(f".*.{MARK}.*"))


def _rows(old: Store) -> dict[int, ImageRow]:
    """Image id -> its row in a store, as it is announced to a writer.

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
    numbers = np.column_stack([old.heights, old.widths, np.diff(ends), mask_bytes, shapes]).tolist()
    return {
        image_id: ImageRow(image_id, str(name), height, width, str(error), regions, length, (c, h, w))
        for image_id, name, error, (height, width, regions, length, c, h, w) in zip(
            old, old.file_names, old.image_errors, numbers, strict=True
        )
    }
