"""Shards of an unfinished extraction in the folder ``F.h5.parts``, and merging them into ``F.h5``. No torch.

``plan.json`` holds what is computed and how it is divided into shards; a folder with another plan is refused. A shard
holds the images that the plan assigns to it, is complete or absent, and has a checksum, so the contents of a store do
not depend on interruptions. A damaged shard is removed and computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, RuntimeFailure
from refdet.extraction.merge_reading import ImageToMerge, read_ahead
from refdet.extraction.part import lock_all_parts
from refdet.extraction.plan import Plan, Shard
from refdet.extraction.shard_folder import (
    LOCK,
    MERGED,
    PLAN,
    check_merged_file,
    check_resumable,
    check_same_settings,
    read_plan,
    remove_merged,
    remove_owned_files,
    remove_partial_files,
    shards_folder,
)
from refdet.files.atomic import atomic_write, fsync, report_disk_full, write_json
from refdet.files.lock import exclusive_lock
from refdet.files.short_text import format_missing_space
from refdet.store import Header, ImageRow
from refdet.store.codec import EncodedImage, RawImage, encode_all
from refdet.store.shard_file import BlockLocation, ShardError, ShardWriter, read
from refdet.store.shard_images import ImageReader
from refdet.store.size import space_needed
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)

_DISK_FULL_FIX = "finished shards are kept; free some space and continue with `resume=True`"


class ShardSet:
    """Shards of an extraction; created by `open_extraction`.

    Args:
        out: the store.
        plan: what is computed.
        header: metadata of the store.
        shards: batches of each shard.
        folder: folder of the shards, by default the `shards_folder` of ``out``.
        saved_plan: contents of the folder's ``plan.json``, if it exists.
        shard_numbers: numbers of the shards to look for in the folder; all if None.

    Attributes:
        out: the store.
        folder: folder of the shards.
        plan: what is computed.
        header: metadata of the store.
        shards: batches of each shard.
        plan_hash: hash of the plan, in each shard.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        header: Header,
        shards: Sequence[Shard],
        folder: Path | None = None,
        saved_plan: Mapping[str, Any] | None = None,
        shard_numbers: Iterable[int] | None = None,
    ) -> None:
        self.out, self.folder = out, folder or shards_folder(out)
        self.plan, self.header, self.shards = plan, header, shards
        self._columns = plan.columns()
        work = plan.to_json(shards, header)
        if saved_plan is not None:  # an older refdet may have written the same recipe differently
            work["header"] = saved_plan["header"]
        self.plan_hash = hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()
        self._rows: dict[int, list[tuple[ImageRow, BlockLocation]]] = {}  # finished shard -> its images
        self._shapes: dict[str, tuple[int, ...]] = {}  # feature -> shape per region, once known
        for number in range(len(shards)) if shard_numbers is None else shard_numbers:
            if self._path(number).exists():
                self._load(number)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.shard"

    def _temporary_file(self, path: Path) -> AbstractContextManager[Path]:
        """Context manager with a temporary file, which becomes the shard ``path`` at the end of the block."""
        return atomic_write(path)

    def _shard_id(self, number: int) -> dict[str, Any]:
        return {"plan": self.plan_hash, "shard": number}

    def _load(self, number: int) -> None:
        path, rows = self._path(number), []
        if not path.is_file():
            raise InputError(f"{path}: not a file; remove it so that the shard can be written")
        try:
            for image, location in read(path, self._shard_id(number), self._columns):
                self._check_shapes(image, path)
                rows.append((image.row, location))
            if not self._matches_plan(number, rows):
                raise ShardError("damaged: its images differ from the plan")
        except ShardError as error:
            log.warning("note: %s: %s; removed, computing its images again", path, error)
            path.unlink()
        else:
            self._rows[number] = rows

    def _matches_plan(self, number: int, rows: Sequence[tuple[ImageRow, BlockLocation]]) -> bool:
        """Whether the rows are of the images of a shard in the plan, in the same order."""
        return [row.id for row, _ in rows] == [record.id for batch in self.shards[number] for record in batch]

    def _check_shapes(self, image: EncodedImage, path: Path) -> None:
        """Check that the features of an image have the same shapes per region as those of other images."""
        for name in self.plan.features:
            values = image.arrays.get(f"features/{name}")
            if values is None:
                continue  # the image has no regions
            shape = values.shape[1:]
            if self._shapes.setdefault(name, shape) != shape:
                raise RuntimeFailure(
                    f"{path}: {name} of image {image.row.id} has shape {shape}, others have {self._shapes[name]}",
                    fix=f"remove {self.folder} and start again",
                )

    @property
    def finished_images(self) -> int:
        """Number of images in finished shards."""
        return sum(map(len, self._rows.values()))

    @property
    def errors(self) -> dict[int, str]:
        """Image id -> reason, of the unusable images in finished shards."""
        return {row.id: row.error for rows in self._rows.values() for row, _ in rows if row.error}

    def missing_shards(self, retry_ids: Container[int] = ()) -> list[int]:
        """List the shards to compute.

        Args:
            retry_ids: ids of images to try again; finished shards in which they were unusable are included.

        Returns:
            Shard numbers.
        """
        return [
            number
            for number in range(len(self.shards))
            if number not in self._rows or any(row.error and row.id in retry_ids for row, _ in self._rows[number])
        ]

    def adopt(
        self,
        number: int,
        file: Path | bytes,
        rows: Sequence[tuple[ImageRow, BlockLocation]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Add a shard that another process has written.

        Args:
            number: number of the shard.
            file: its file in the folder, which is renamed, or its contents.
            rows: row in the store and location in the shard of each of its images.
            shapes: feature -> shape per region.

        Raises:
            RuntimeFailure: the disk is full.
        """
        path = self._path(number)
        with report_disk_full(path, _DISK_FULL_FIX):
            if isinstance(file, Path):
                os.replace(file, path)
                fsync(self.folder)
            else:
                with atomic_write(path) as temporary:
                    temporary.write_bytes(file)
        self._rows[number] = list(rows)
        self._shapes |= shapes

    def encode(self, images: Sequence[Regions]) -> list[EncodedImage]:
        """Encode images for `write`, in any thread; raises RuntimeFailure if a number is not finite."""
        return encode_all(images, self._columns)

    @contextmanager
    def write(self, number: int) -> Iterator[Callable[[Sequence[EncodedImage]], None]]:
        """Write a shard atomically.

        Args:
            number: number of the shard.

        Yields:
            A function to call with images from `encode`, in the order of the plan.

        Raises:
            RuntimeFailure: the disk is full; nothing is left behind.
        """
        path = self._path(number)
        rows: list[tuple[ImageRow, BlockLocation]] = []
        with (
            report_disk_full(path, _DISK_FULL_FIX),
            self._temporary_file(path) as temporary,
            temporary.open("wb", 0) as file,
        ):
            writer = ShardWriter(file, self._shard_id(number))

            def add(images: Sequence[EncodedImage]) -> None:
                locations = writer.add(images)
                for image, location in zip(images, locations, strict=True):
                    self._check_shapes(image, path)
                    rows.append((image.row, location))

            yield add
            if not self._matches_plan(number, rows):
                raise ValueError(f"{path}: images differ from the plan")
            writer.finish()
        self._rows[number] = rows

    def merge(self, records: Sequence[ImageRecord], run: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Write the store from the finished shards, then remove the folder.

        Only a few images at a time are in memory.

        Args:
            records: images in the order of the store.
            run: called after writing; returns the information about the run for the store.

        Raises:
            InputError: another program has created a file at the path of the store.
            RuntimeFailure: the disk is full or a shard is damaged; the other shards are kept.
        """
        check_merged_file(self.out)

        def seal(written: Path) -> None:
            check_merged_file(self.out)
            # A rename keeps the inode; before it the file of an earlier merge may be at the path of the store.
            files = [path for path in (self.out, written) if path.exists()]
            write_json(self.folder / MERGED, {"inodes": [path.stat().st_ino for path in files]})

        by_id = self._by_id()
        self._write_store(self.out, [by_id[record.id] for record in records], run, seal)
        remove_merged(self.folder)

    def _write_store(
        self,
        path: Path,
        images: Sequence[ImageToMerge],
        run: Callable[[], Mapping[str, Any]],
        seal: Callable[[Path], object] = lambda _: None,
    ) -> None:
        """Write images to a store at ``path``; ``seal`` is called with the file before it is renamed to ``path``."""
        columns = self.plan.columns(self._shapes)
        rows = [image.row for image in images]
        space = space_needed(rows, columns, self.header)
        self._check_space(space)
        with report_disk_full(path, _DISK_FULL_FIX), store.create(path, self.header, columns, rows, space) as writer:
            with closing(read_ahead(images, columns)) as groups:
                for group in groups:
                    writer.put(*group)
            writer.finish(run())
            seal(writer.path)

    def _by_id(self) -> dict[int, ImageToMerge]:
        """Images in finished shards by id."""
        return {
            row.id: ImageToMerge(row, partial(self._read, number, row, location))
            for number, rows in self._rows.items()
            for row, location in rows
        }

    def _read(
        self, number: int, row: ImageRow, location: BlockLocation, reader: ImageReader
    ) -> EncodedImage | RawImage:
        path = self._path(number)
        try:
            return reader.read(path, row, location)
        except ShardError as error:
            path.unlink(missing_ok=True)
            raise RuntimeFailure(
                f"{path}: {error}, after it was written, and removed",
                fix="check the disk and compute its images again with `resume=True`",
            ) from None

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise RuntimeFailure(
                f"{self.out}: no space left on the disk (the store needs {format_missing_space(needed, free)})",
                fix=_DISK_FULL_FIX,
            )


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
        InputError: as `check_resumable`; other shards; ``out`` was not made from its shards; or another process is
            writing them.
        RuntimeFailure: the disk is full.
    """
    folder = shards_folder(out)
    saved_plan = check_resumable(out, plan, header, resume)
    if saved_plan is None and out.exists():
        remove_owned_files(folder)  # in case its removal was interrupted
        yield None
        return
    if saved_plan is not None:
        check_same_settings(folder, plan.differing_shards(shards, saved_plan))
    elif resume:
        log.warning("note: `resume`: nothing to resume in %s, starting from the beginning", folder)
    with report_disk_full(folder, "free some space and run it again"):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder, LOCK, "wait for it to finish or choose another `out`"), lock_all_parts(folder):
            current_plan = read_plan(folder)
            if (current_plan is None) != (saved_plan is None) or (current_plan is None and out.exists()):
                raise InputError(f"{folder}: another process has just written to it; try again")
            check_merged_file(out)
            remove_partial_files(out)
            if saved_plan is None:
                write_json(folder / PLAN, plan.to_json(shards, header))
                fsync(out.parent)
            yield ShardSet(out, plan, header, shards, saved_plan=saved_plan)
