"""Read single images of shards in any order, for merging. No torch."""

from __future__ import annotations

from collections import deque
from io import FileIO
from itertools import accumulate, pairwise
from pathlib import Path

from refdet.store.codec import EncodedImage, RawImage, region_bytes
from refdet.store.schema import Columns, ImageRow
from refdet.store.shard_file import BlockLocation, ShardError, as_shard_error, check_block, parse_image

_MAX_OPEN = 64  # shards that are kept open
_HEADER_BYTES = 2**16  # memory for the headers of the images in a group, in addition to ``group_bytes``


class ImageReader:
    """Reads single images of shards, in groups that reuse the memory of earlier groups.

    Allocating memory for each image would take longer than reading it.

    Args:
        columns: columns of the regions.
        group_bytes: expected size of the images of a group in bytes; more is allocated if necessary.
        num_groups: number of groups whose images are valid at the same time, including the current one.
    """

    def __init__(self, columns: Columns, group_bytes: int = 0, num_groups: int = 1) -> None:
        self._columns = columns
        self._region_bytes = list(region_bytes(columns).values())
        self._buffer_bytes = group_bytes + _HEADER_BYTES
        self._buffers = deque(memoryview(bytearray()) for _ in range(num_groups))  # the current group's first
        self._used = 0  # bytes of the current group's buffer
        self._files: dict[Path, FileIO] = {}  # open shards, least recently used first

    def next_group(self) -> None:
        """Start a group of images, which reuses the memory of the group that was read ``num_groups`` groups ago."""
        self._buffers.rotate()
        self._used = 0

    def close(self) -> None:
        """Close the shards."""
        while self._files:
            self._files.popitem()[1].close()

    def read(self, path: Path, row: ImageRow, location: BlockLocation) -> EncodedImage | RawImage:
        """Read one image.

        Args:
            path: the shard.
            row: the image's row in a store.
            location: location of the image's block.

        Returns:
            The image, whose arrays are in the memory of the current group.

        Raises:
            ShardError: the shard is damaged or missing.
        """
        if self._used + location.length > len(self._buffers[0]):  # earlier images of the group keep the old buffer
            self._buffers[0] = memoryview(bytearray(max(self._buffer_bytes, location.length)))
            self._used = 0
        data = self._buffers[0][self._used : self._used + location.length]
        self._used += location.length
        file = self._open(path)
        file.seek(location.start)
        filled = 0
        while filled < len(data) and (count := file.readinto(data[filled:])):
            filled += count
        check_block(data[:filled], location.length, location.crc)
        if self._columns.maps:
            with as_shard_error():
                return parse_image(data, self._columns)[0]
        # need not be parsed: the checksum shows that these are the data that were checked when written, or on resuming
        sizes = [size * row.regions for size in self._region_bytes]
        if self._columns.masks:  # the first array
            sizes[0] = row.mask_bytes
        ends = list(accumulate(sizes, initial=location.header_bytes))
        if ends[-1] != location.length:
            raise ShardError("damaged: its images differ from the plan")
        parts = [data[first:last] for first, last in pairwise(ends)]
        return RawImage(row, location.mask_sizes, location.checksums, parts)

    def _open(self, path: Path) -> FileIO:
        """The open file of a shard; the least recently used one is closed if too many are open."""
        file = self._files.pop(path, None)
        if file is None:
            try:
                file = path.open("rb", 0)
            except FileNotFoundError:
                raise ShardError("missing") from None
            if len(self._files) == _MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
        self._files[path] = file
        return file
