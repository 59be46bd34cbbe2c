"""Shards of an unfinished extraction in the folder ``F.h5.parts``, and merging them into ``F.h5``. No torch.

``plan.json`` holds what is computed and how the images are divided into shards; a folder with another plan is refused.
A shard holds the images that the plan assigns to it, is complete or absent, and has a checksum, so the contents of a
store do not depend on interruptions. A damaged shard is removed and computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, RuntimeFailure
from refdet.extraction.merge_reading import ImageToMerge, read_ahead
from refdet.extraction.plan import Plan, Shard
from refdet.extraction.shard_folder import MERGED, check_merged_file, remove_merged, shards_folder
from refdet.files.atomic import atomic_write, fsync, report_disk_full, write_json
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
    """All or some shards of an extraction. Removes damaged shards with a warning.

    Args:
        out: the store.
        plan: what is computed.
        header: metadata of the store.
        shards: batches of each shard of the extraction.
        folder: folder of the shards, by default the `shards_folder` of ``out``.
        saved_plan: contents of the folder's ``plan.json``, if it exists.
        shard_numbers: numbers of the shards of this set, which are read from the folder; all if None.

    Attributes:
        out, plan, header, shards, folder, shard_numbers: the arguments, or their defaults.
        plan_hash: hash of the plan, written to each shard.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        header: Header,
        shards: Sequence[Shard],
        folder: Path | None = None,
        saved_plan: Mapping[str, Any] | None = None,
        shard_numbers: Sequence[int] | None = None,
    ) -> None:
        self.out, self.folder = out, folder or shards_folder(out)
        self.plan, self.header, self.shards = plan, header, shards
        self.shard_numbers = range(len(shards)) if shard_numbers is None else shard_numbers
        self._columns = plan.columns()
        plan_json = plan.to_json(shards, header)
        if saved_plan is not None:  # an older refdet may have written the same recipe differently
            plan_json["header"] = saved_plan["header"]
        self.plan_hash = hashlib.sha256(json.dumps(plan_json, sort_keys=True).encode()).hexdigest()
        self._rows: dict[int, list[tuple[ImageRow, BlockLocation]]] = {}  # number of a finished shard -> its images
        self._shapes: dict[str, tuple[int, ...]] = {}  # feature -> shape per region, once known
        for number in self.shard_numbers:
            if self._path(number).exists():
                self._load(number)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.shard"

    def _temporary_file(self, path: Path) -> AbstractContextManager[Path]:
        """Context manager with a temporary file, which becomes the shard ``path`` at the end of the block."""
        return atomic_write(path)

    def _shard_id(self, number: int) -> dict[str, Any]:
        """Identity of a shard, written to its file."""
        return {"plan": self.plan_hash, "shard": number}

    def _load(self, number: int) -> None:
        """Add a shard in the folder to the finished ones, or remove its file if it is damaged."""
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
        """Whether rows are those of the images that the plan assigns to a shard, in the same order."""
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
    def images(self) -> int:
        """Number of images in the shards of this set, finished or not."""
        return sum(len(batch) for number in self.shard_numbers for batch in self.shards[number])

    @property
    def finished_images(self) -> int:
        """Number of images in finished shards."""
        return sum(map(len, self._rows.values()))

    @property
    def errors(self) -> dict[int, str]:
        """Image id -> reason, of the unusable images in finished shards."""
        return {row.id: row.error for rows in self._rows.values() for row, _ in rows if row.error}

    @property
    def stamps(self) -> dict[int, tuple[int, ...]]:
        """Image id -> stamp of its file (`refdet.extraction.stamped_source`), of the images in finished shards."""
        return {row.id: location.stamp for rows in self._rows.values() for row, location in rows}

    def missing_shards(self, retry_ids: Container[int] = ()) -> list[int]:
        """List the numbers of the shards to compute: the unfinished ones, and those with an image of `retry_ids`."""
        return [
            number
            for number in self.shard_numbers
            if number not in self._rows or any(row.id in retry_ids for row, _ in self._rows[number])
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
            file: the shard, as a file in the folder, which is renamed, or as the contents of the file.
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
        """Encode images for `write`; thread-safe. Raises RuntimeFailure if a number is not finite."""
        return encode_all(images, self._columns)

    @contextmanager
    def write(self, number: int) -> Iterator[Callable[[Sequence[EncodedImage]], None]]:
        """Write a shard atomically.

        Args:
            number: number of the shard.

        Yields:
            A function to call with encoded images, in the order of the plan.

        Raises:
            RuntimeFailure: the disk is full; the unfinished file is removed.
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
        """Write the store from the finished shards, with a few images at a time in memory, then remove the folder.

        Args:
            records: images in the order of the store.
            run: called after writing; returns the information about the run for the store.

        Raises:
            InputError: another program has created a file at the path of the store.
            RuntimeFailure: the disk is full or a shard is damaged; all other shards are kept.
        """
        check_merged_file(self.out)

        def seal(written: Path) -> None:
            check_merged_file(self.out)
            # The inode of the written file stays the same when it is renamed to the path of the store. Until then, the
            # file of an earlier merge may be at that path.
            files = [path for path in (self.out, written) if path.exists()]
            write_json(self.folder / MERGED, {"inodes": [path.stat().st_ino for path in files]})

        images = self._images_by_id()
        self._write_store(self.out, [images[record.id] for record in records], run, seal)
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
        free = shutil.disk_usage(self.folder).free
        if free < space:
            raise RuntimeFailure(
                f"{self.out}: no space left on the disk (the store needs {format_missing_space(space, free)})",
                fix=_DISK_FULL_FIX,
            )
        with report_disk_full(path, _DISK_FULL_FIX), store.create(path, self.header, columns, rows, space) as writer:
            with closing(read_ahead(images, columns)) as groups:
                for group in groups:
                    writer.put(*group)
            writer.finish(run())
            seal(writer.path)

    def _images_by_id(self) -> dict[int, ImageToMerge]:
        """Image id -> image, of those in finished shards."""
        return {
            row.id: ImageToMerge(row, partial(self._read, number, row, location))
            for number, rows in self._rows.items()
            for row, location in rows
        }

    def _read(
        self, number: int, row: ImageRow, location: BlockLocation, reader: ImageReader
    ) -> EncodedImage | RawImage:
        """Read an image of a finished shard; if the shard is damaged, remove it and raise RuntimeFailure."""
        path = self._path(number)
        try:
            return reader.read(path, row, location)
        except ShardError as error:
            path.unlink(missing_ok=True)
            fix = "check the disk and compute its images again with `resume=True`"
            raise RuntimeFailure(f"{path}: {error}; removed", fix=fix) from None
