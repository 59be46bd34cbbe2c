"""Read single images of shards, in any order, as a merge does. No torch."""

from __future__ import annotations

from collections import deque
from io import FileIO
from itertools import accumulate, pairwise
from pathlib import Path

from refdet.store.codec import EncodedImage, RawImage, region_bytes
from refdet.store.schema import Columns, ImageRow
from refdet.store.shard_file import BlockLocation, ShardError, as_shard_error, check_block, parse_image

_OPEN = 64  # shards that are kept open
_HEADS = 2**16  # bytes for the heads of a group


class ImageReader:
    """Reads single images of shards, groups of them into the same memory in turn.

    Fresh memory for each takes longer than reading it.

    Args:
        columns: columns of the regions.
        size: bytes that a group may need; more are taken if an image needs them.
        valid: how many groups are valid at the same time.
    """

    def __init__(self, columns: Columns, size: int = 0, valid: int = 1) -> None:
        self._columns = columns
        self._bytes = list(region_bytes(columns).values())
        self._size = size + _HEADS
        self._memory = deque(memoryview(bytearray()) for _ in range(valid))
        self._used = 0  # of the memory of this group
        self._files: dict[Path, FileIO] = {}  # the last used one last

    def next_group(self) -> None:
        """Begin a group of images, in the memory of the group that was read ``valid`` groups before."""
        self._memory.rotate()
        self._used = 0

    def close(self) -> None:
        """Close the shards."""
        while self._files:
            self._files.popitem()[1].close()

    def read(self, path: Path, row: ImageRow, place: BlockLocation) -> EncodedImage | RawImage:
        """Read one image.

        Args:
            path: the shard.
            row: the image's row in a store.
            place: location of the image's block.

        Returns:
            The image, with memory of its group.

        Raises:
            ShardError: the shard is damaged or missing.
        """
        if self._used + place.length > len(self._memory[0]):  # images before this one keep what there was
            self._memory[0], self._used = memoryview(bytearray(max(self._size, place.length))), 0
        data, file = self._memory[0][self._used : self._used + place.length], self._open(path)
        self._used += place.length
        file.seek(place.start)
        filled = 0
        while filled < len(data) and (count := file.readinto(data[filled:])):
            filled += count
        check_block(data[:filled], place.length, place.crc)
        if self._columns.maps:
            with as_shard_error():
                return parse_image(data, self._columns)[0]
        # The checksum is that of the data that were parsed when they were written, or found on resuming.
        sizes = [each * row.regions for each in self._bytes]
        if self._columns.masks:
            sizes[0] = row.mask_bytes
        ends = list(accumulate(sizes, initial=place.head))
        if ends[-1] != place.length:
            raise ShardError("damaged: its images differ from the plan")
        parts = [data[first:last] for first, last in pairwise(ends)]
        return RawImage(row, place.mask_sizes, place.checksums, parts)

    def _open(self, path: Path) -> FileIO:
        file = self._files.pop(path, None)
        if file is None:
            try:
                file = path.open("rb", 0)
            except FileNotFoundError:
                raise ShardError("missing") from None
            if len(self._files) == _OPEN:
                self._files.pop(next(iter(self._files))).close()
        self._files[path] = file
        return file
