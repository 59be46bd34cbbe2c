"""Shards of an unfinished extraction in the folder ``F.h5.parts``, and merging them into ``F.h5``. No torch.

``plan.json`` holds what is computed and how it is divided into shards; a folder with another plan is refused. A shard
holds the images that the plan assigns to it, is complete or absent, and has a checksum, so the contents of a store do
not depend on interruptions. A damaged shard is removed and computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, RuntimeFailure
from refdet.extraction.merge_reading import ImageToMerge, read_ahead
from refdet.extraction.plan import Plan, Shard
from refdet.extraction.shard_folder import (
    LOCK,
    MERGED,
    OURS,
    PLAN,
    begun_plan,
    check_begun,
    parts_folder,
    refuse_another,
    remove_ours,
)
from refdet.files.atomic import atomic_write, fsync, left_behind, report_disk_full, write_json
from refdet.files.lock import alone
from refdet.store import Header, ImageRow
from refdet.store.codec import EncodedImage, RawImage, encode_all
from refdet.store.shard_file import BlockLocation, ShardError, ShardWriter, read
from refdet.store.shard_images import ImageReader
from refdet.store.size import space_needed
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)


class ShardSet:
    """Shards of an extraction; created by `open_extraction`.

    Args:
        out: the store.
        plan: what is computed.
        header: metadata of the store.
        shards: batches of each shard.
        folder: folder of the shards, by default the `parts_folder` of ``out``.
        begun: contents of the folder's ``plan.json``, if it exists.

    Attributes:
        out: the store.
        folder: folder of the shards.
        plan: what is computed.
        header: metadata of the store.
        shards: batches of each shard.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        header: Header,
        shards: Sequence[Shard],
        folder: Path | None = None,
        begun: Mapping[str, Any] | None = None,
    ) -> None:
        self.out = out
        self.folder = folder or parts_folder(out)
        self.plan, self.header = plan, header
        self.shards = shards
        self._columns = plan.columns()
        self._fix = "finished shards are kept; free some space and continue with `resume=True`"
        work = plan.work(shards, header)
        if begun is not None:  # an older refdet may have written the same recipe differently
            work["header"] = begun["header"]
        self._of_plan = hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()
        self._rows: dict[int, list[tuple[ImageRow, BlockLocation]]] = {}  # finished shard -> its images
        self._shapes: dict[str, tuple[int, ...]] = {}  # feature -> shape per region, once known
        for number in range(len(shards)):
            if self._path(number).exists():
                self._load(number)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.shard"

    def _shard_id(self, number: int) -> dict[str, Any]:
        return {"plan": self._of_plan, "shard": number}

    def _load(self, number: int) -> None:
        path, rows = self._path(number), []
        if not path.is_file():
            raise InputError(f"{path}: not a file; remove it so that the shard can be written")
        try:
            for image, place in read(path, self._shard_id(number), self._columns):
                rows.append((self._row(image, path), place))
            if not self._matches(number, rows):
                raise ShardError("damaged: its images differ from the plan")
        except ShardError as error:
            log.warning("note: %s: %s; removed, computing its images again", path, error)
            path.unlink()
        else:
            self._rows[number] = rows

    def _matches(self, number: int, rows: Sequence[tuple[ImageRow, BlockLocation]]) -> bool:
        """Whether images are those of a shard in the plan, in the same order."""
        return [row.id for row, _ in rows] == [record.id for batch in self.shards[number] for record in batch]

    def _row(self, image: EncodedImage, path: Path) -> ImageRow:
        """Row of an image, which the store needs before it is written."""
        for name in self.plan.features:
            values = image.arrays.get(f"features/{name}")
            if values is None:
                continue  # without regions
            shape = values.shape[1:]
            if self._shapes.setdefault(name, shape) != shape:
                raise RuntimeFailure(
                    f"{path}: {name} of image {image.row.id} has shape {shape}, others have "
                    f"{self._shapes[name]}; remove {self.folder} and start again"
                )
        return image.row

    @property
    def done(self) -> int:
        """Number of images in finished shards."""
        return sum(map(len, self._rows.values()))

    @property
    def errors(self) -> dict[int, str]:
        """Image id -> reason, of the unusable images in finished shards."""
        return {row.id: row.error for rows in self._rows.values() for row, _ in rows if row.error}

    def missing(self, again: Container[int] = ()) -> list[int]:
        """List the shards to compute.

        Args:
            again: ids of images to try again; finished shards in which they were unusable are included.

        Returns:
            Shard numbers.
        """
        return [
            number
            for number in range(len(self.shards))
            if number not in self._rows or any(row.error and row.id in again for row, _ in self._rows[number])
        ]

    def encode(self, images: Sequence[Regions]) -> list[EncodedImage]:
        """Encode images for `write`, in any thread; raises RuntimeFailure if a number is not finite."""
        return encode_all(images, self._columns)

    @contextmanager
    def write(self, number: int) -> Iterator[Callable[[Sequence[EncodedImage]], None]]:
        """Write a shard atomically.

        Args:
            number: number of the shard.

        Yields:
            A function to call with the images from `encode`, some at a time, in the order of the plan.

        Raises:
            RuntimeFailure: the disk is full; nothing is left behind.
        """
        path = self._path(number)
        rows: list[tuple[ImageRow, BlockLocation]] = []
        with report_disk_full(path, self._fix), atomic_write(path) as temporary, temporary.open("wb", 0) as file:
            writer = ShardWriter(file, self._shard_id(number))

            def add(images: Sequence[EncodedImage]) -> None:
                places = writer.add(images)
                rows.extend((self._row(image, path), place) for image, place in zip(images, places, strict=True))

            yield add
            if not self._matches(number, rows):
                raise ValueError(f"{path}: images differ from the plan")
            writer.finish()
        self._rows[number] = rows

    def merge(self, records: Sequence[ImageRecord], run: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Write the store from the finished shards, then remove the folder.

        Only a few images at a time are in memory.

        Args:
            records: images in the order of the store.
            run: called after writing; returns the store's information about its run.

        Raises:
            InputError: another program has created a file at the path of the store.
            RuntimeFailure: the disk is full or a shard is damaged; the other shards are kept.
        """
        refuse_another(self.out)

        def seal(written: Path) -> None:
            refuse_another(self.out)
            # A rename keeps the inode; before it the file of an earlier merge may be at the path of the store.
            files = [path for path in (self.out, written) if path.exists()]
            write_json(self.folder / MERGED, {"inodes": [path.stat().st_ino for path in files]})

        by_id = self._by_id()
        self._write_store(self.out, [by_id[record.id] for record in records], run, seal)
        _remove(self.folder)

    def _write_store(
        self,
        path: Path,
        images: Sequence[ImageToMerge],
        run: Callable[[], Mapping[str, Any]],
        seal: Callable[[Path], object] = lambda _: None,
    ) -> None:
        """Write images to a store at ``path``; ``seal`` is called with the file before it is renamed to ``path``."""
        columns = self.plan.columns(self._shapes)
        rows = [row for row, _ in images]
        space = space_needed(rows, columns, self.header)
        self._check_space(space)
        with report_disk_full(path, self._fix), store.create(path, self.header, columns, rows, space) as writer:
            with closing(read_ahead(images, columns)) as found:
                for some in found:
                    writer.put(*some)
            writer.finish(run())
            seal(writer.path)

    def _by_id(self) -> dict[int, ImageToMerge]:
        """Images in finished shards by id."""
        return {
            row.id: (row, partial(self._read, number, row, place))
            for number, rows in self._rows.items()
            for row, place in rows
        }

    def _read(self, number: int, row: ImageRow, place: BlockLocation, reader: ImageReader) -> EncodedImage | RawImage:
        path = self._path(number)
        try:
            return reader.read(path, row, place)
        except ShardError as error:
            path.unlink(missing_ok=True)
            raise RuntimeFailure(
                f"{path}: {error}, after it was written, and removed; check the disk and compute its "
                "images again with `resume=True`"
            ) from None

    def _check_space(self, need: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < need:
            why = f"the store needs {need / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free"
            raise RuntimeFailure(f"{self.out}: no space left on the disk ({why}); {self._fix}")


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
        InputError: as `check_begun`; other shards; ``out`` was not made from its shards; or another process is
            writing them.
        RuntimeFailure: the disk is full.
    """
    folder = parts_folder(out)
    begun = check_begun(out, plan, header, resume)
    if begun is None and out.exists():
        remove_ours(folder)  # in case its removal was interrupted
        yield None
        return
    if begun is not None and (difference := plan.other_shards(shards, begun)):
        raise InputError(
            f"{folder} was started with different settings: {difference}; use the same options and "
            "checkpoint, or remove it"
        )
    if begun is None and resume:
        log.warning("note: `resume`: nothing to resume in %s, starting from the beginning", folder)
    with report_disk_full(folder, "free some space and run it again"):
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder, LOCK, "let it end or choose another `out`"):
            now = begun_plan(folder)
            if (now is None) != (begun is None) or (now is None and out.exists()):
                raise InputError(f"{folder}: another process has just written to it; try again")
            refuse_another(out)
            half_written = [
                *(path for path in folder.glob(".*") if OURS.fullmatch(path.name)),
                *left_behind(out.parent, out.name),
            ]
            if not out.exists():  # a later file must not be taken for the merged one
                half_written += folder.glob(MERGED)
            for path in half_written:  # by a process that was killed
                path.unlink()
            if begun is None:
                write_json(folder / PLAN, plan.work(shards, header))
                fsync(out.parent)
            yield ShardSet(out, plan, header, shards, begun=begun)


def _remove(folder: Path) -> None:
    # The plan first, as without it nothing can be resumed.
    (folder / PLAN).unlink()
    fsync(folder)
    remove_ours(folder)
