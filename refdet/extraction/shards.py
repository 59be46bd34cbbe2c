"""Extraction in progress: the folder ``F.h5.parts`` of finished shards, and their merging into ``F.h5``.

``plan.json`` says what is being computed and how it is cut into shards; a folder made under another plan is refused.
Shard k holds the images that the plan gives it, is whole or absent, and has a checksum: so what a store holds does not
depend on who stopped the work, when, and how often. A shard that is damaged is removed and computed again. No torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from refdet import store
from refdet.data.coco import ImageRecord
from refdet.errors import InputError, RuntimeFailure
from refdet.extraction.plan import Plan, Shard
from refdet.extraction.shard_arrays import BlockLocation, ShardError, ShardWriter, read, read_at
from refdet.extraction.shard_folder import LOCK, MERGED, OURS, PLAN, begun_plan, check_begun, parts_folder
from refdet.files.atomic import atomic_write, fsync, left_behind, report_disk_full, write_json
from refdet.files.json_files import read_small_json
from refdet.files.lock import alone
from refdet.store import Columns, Header, ImageRow
from refdet.store.size import space_needed
from refdet.structures.regions import Regions

log = logging.getLogger(__name__)

_Image = tuple[ImageRow, Callable[[], Regions]]  # an image's row in the store, and what reads its regions


class ShardSet:
    """The shards of one extraction, in ``out``'s `parts_folder` by default; made by `open_extraction`.

    Attributes:
        folder: where they are.
        shards: the plan's, by their number.
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
        self._mend = "what is finished is kept: free some space, then continue with --resume"
        work = plan.work(shards, header)
        if begun is not None:  # an older refdet may have written the same recipe in other words
            work["header"] = begun["header"]
        self._of_plan = hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()
        self._rows: dict[int, list[tuple[ImageRow, BlockLocation]]] = {}  # finished shard -> its images
        self._shapes: dict[str, tuple[int, ...]] = {}  # feature -> shape of one region's, once one is known
        for number in range(len(shards)):
            if self._path(number).exists():
                self._look_into(number)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.shard"

    def _shard_id(self, number: int) -> dict[str, Any]:
        return {"plan": self._of_plan, "shard": number}

    def _look_into(self, number: int) -> None:
        path, rows = self._path(number), []
        if not path.is_file():
            raise InputError(f"{path}: not a file, where a finished shard should be; remove it")
        try:
            for regions, place in read(path, self._shard_id(number), self.plan):
                rows.append((self._row(regions, path), place))
            if not self._are_of(number, rows):
                raise ShardError("damaged: its images are not those of the plan")
        except ShardError as error:
            log.warning("note: %s: %s; removed, its images are computed again", path, error)
            path.unlink()
        else:
            self._rows[number] = rows

    def _are_of(self, number: int, rows: Sequence[tuple[ImageRow, BlockLocation]]) -> bool:
        """Whether images are those that the plan has in a shard, in that order."""
        return [row.id for row, _ in rows] == [record.id for batch in self.shards[number] for record in batch]

    def _row(self, regions: Regions, path: Path) -> ImageRow:
        """What the store must know of an image before it is written."""
        for name, values in regions.features.items():
            shape = values.shape[1:]
            if self._shapes.setdefault(name, shape) != shape:
                raise RuntimeFailure(f"{path}: {name} of image {regions.image_id} is {shape}, elsewhere "
                                f"{self._shapes[name]}; remove {self.folder} and start again")  # fmt: skip
        mask_bytes = sum(map(len, regions.masks or ())) if self.plan.masks else 0
        size = regions.height, regions.width
        row = (regions.image_id, regions.file_name, *size, regions.error, len(regions), mask_bytes)
        head = regions.maps.get("head")
        return ImageRow(*row) if head is None else ImageRow(*row, head.shape)

    @property
    def done(self) -> int:
        """How many images finished shards hold."""
        return sum(map(len, self._rows.values()))

    @property
    def errors(self) -> dict[int, str]:
        """The images of finished shards that could not be used -> why."""
        return {row.id: row.error for rows in self._rows.values() for row, _ in rows if row.error}

    def missing(self, again: Container[int] = ()) -> list[int]:
        """Numbers of the shards that are to be computed.

        Args:
            again: ids of images whose shards are computed anew where the images could not be used.
        """
        return [
            number
            for number in range(len(self.shards))
            if number not in self._rows or any(row.error and row.id in again for row, _ in self._rows[number])
        ]

    @contextmanager
    def write(self, number: int) -> Iterator[Callable[[Regions], None]]:
        """Write one shard: gives a function that takes its images' regions, one by one, in the order of the plan.

        The shard is there when the block ends without an error. RuntimeFailure where the disk is full; then nothing of
        it stays behind.
        """
        path, rows = self._path(number), []
        with report_disk_full(path, self._mend), atomic_write(path) as temporary, temporary.open("wb") as file:
            writer = ShardWriter(file, self._shard_id(number), self.plan)

            def add(regions: Regions) -> None:
                place = writer.add(regions)
                rows.append((self._row(regions, path), place))

            yield add
            if not self._are_of(number, rows):
                raise ValueError(f"{path}: not the images that the plan has in this shard")
            writer.finish()
        self._rows[number] = rows

    def merge(self, records: Sequence[ImageRecord], run: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Write the store with its images in the order of ``records``, then remove the folder.

        Memory holds one image at a time. RuntimeFailure where the disk is full or a shard was damaged meanwhile; the
        other shards stay. InputError where somebody else has put a file at the store's place.

        Args:
            run: gives, when all is written, what the store says of its run.
        """
        _refuse_another(self.out)

        def seal(written: Path) -> None:
            _refuse_another(self.out)
            # A file keeps its inode in a rename; until then the one that an earlier merge has put there is ours too.
            files = [path for path in (self.out, written) if path.exists()]
            write_json(self.folder / MERGED, {"inodes": [path.stat().st_ino for path in files]})

        by_id = self._by_id()
        self._write_store(self.out, [by_id[record.id] for record in records], run, seal)
        _remove(self.folder)

    def _write_store(
        self,
        path: Path,
        images: Sequence[_Image],
        run: Callable[[], Mapping[str, Any]],
        seal: Callable[[Path], object] = lambda _: None,
    ) -> None:
        """Write images to a store at ``path``; ``seal`` is called with the file before it gets that name."""
        plan = self.plan
        shapes = {name: self._shapes.get(name, (0,)) for name in plan.features}
        columns = Columns(shapes, plan.dtype, plan.masks, plan.ann_ids, plan.maps, plan.compression)
        rows = [row for row, _ in images]
        space = space_needed(rows, columns, self.header)
        self._see_that_it_fits(space)
        with report_disk_full(path, self._mend), store.create(path, self.header, columns, rows, space) as writer:
            for _, regions in images:
                writer.put(regions())
            writer.finish(run())
            seal(writer.path)

    def _by_id(self) -> dict[int, _Image]:
        """The images of finished shards."""
        return {
            row.id: (row, partial(self._read, number, place))
            for number, rows in self._rows.items()
            for row, place in rows
        }

    def _read(self, number: int, place: BlockLocation) -> Regions:
        path = self._path(number)
        try:
            return read_at(path, place, self.plan)
        except ShardError as error:
            path.unlink(missing_ok=True)
            raise RuntimeFailure(f"{path}: {error}, since it was written; removed: continue with --resume, which "
                            "computes its images again, if the disk can be trusted") from None  # fmt: skip

    def _see_that_it_fits(self, need: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < need:
            told = f"the store needs {need / 2**20:.1f} MiB and {free / 2**20:.1f} are free"
            raise RuntimeFailure(f"{self.out}: no space left on the disk: {told}; {self._mend}")


@contextmanager
def open_extraction(
    out: Path, plan: Plan, header: Header, shards: Sequence[Shard], resume: bool
) -> Iterator[ShardSet | None]:
    """Start or continue an extraction; one process at a time.

    Gives None where ``out`` is there already and complete under this plan and header.

    Raises:
        InputError: see `check_begun`; the shards were cut otherwise; ``out`` is not made of its shards; another process
            is writing them.
        RuntimeFailure: the disk is full.
    """
    folder = parts_folder(out)
    begun = check_begun(out, plan, header, resume)
    if begun is None and out.exists():
        _remove_ours(folder)  # stopped while it was removed
        yield None
        return
    if begun is not None and (told := plan.other_shards(shards, begun)):
        raise InputError(f"{folder} was started differently: {told}; use the same options and checkpoint, or remove it")
    if begun is None and resume:
        log.warning("note: --resume: nothing to resume in %s: starting from the beginning", folder)
    with report_disk_full(folder, "free some space and run it again"):
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder, LOCK, "let it end or choose another --out"):
            now = begun_plan(folder)
            if (now is None) != (begun is None) or (now is None and out.exists()):
                raise InputError(f"{folder}: another process was writing it just now; run it again")
            _refuse_another(out)
            half_written = [
                *(path for path in folder.glob(".*") if OURS.fullmatch(path.name)),
                *left_behind(out.parent, out.name),
            ]
            if not out.exists():  # nor may a later file be taken for what was merged
                half_written += folder.glob(MERGED)
            for path in half_written:  # when a process was killed
                path.unlink()
            if begun is None:
                write_json(folder / PLAN, plan.work(shards, header))
                fsync(out.parent)
            yield ShardSet(out, plan, header, shards, begun=begun)


def _refuse_another(out: Path) -> None:
    """InputError where there is a file at ``out`` that was not made of its shards.

    One that was made of them is there when the folder could not be removed to its end. As the power may have failed
    before all of it was on the disk, it is made again.
    """
    folder = parts_folder(out)
    if not out.exists():
        return
    if out.stat().st_ino not in _merged(folder):
        raise InputError(f"{out} exists, but {folder} is an unfinished extraction; remove one of them")


def _merged(folder: Path) -> list[int]:
    """The inodes of the files that were made of the shards of a folder."""
    try:
        return [int(inode) for inode in read_small_json(folder / MERGED)["inodes"]]
    except (InputError, ValueError, TypeError, KeyError, OverflowError):
        return []


def _remove(folder: Path) -> None:
    # The plan first: without it the rest is nothing that could be continued.
    (folder / PLAN).unlink()
    fsync(folder)
    _remove_ours(folder)


def _remove_ours(folder: Path) -> None:
    """Remove what extractions write there, and the folder if nothing else is in it."""
    # NFS keeps a file that is open, as the lock is, so the folder with it; the store is there all the same.
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if OURS.fullmatch(path.name):
                path.unlink()
        folder.rmdir()
