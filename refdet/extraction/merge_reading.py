"""Read images in the order of a store, in groups, one group ahead of the one being written. No torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from refdet.store import ImageRow
from refdet.store.codec import EncodedImage, RawImage, region_bytes
from refdet.store.schema import Columns
from refdet.store.shard_images import ImageReader
from refdet.structures.regions import Regions

# Limits of a group. Copying features evicts the interpreter's own data and code from the processor's caches, so Python
# code runs for several images in a row.
_GROUP_BYTES, _GROUP_IMAGES = 2**23, 32
_GROUPS_AHEAD = 1  # groups that are read while one is written

ReadImage = Regions | EncodedImage | RawImage


class ImageToMerge(NamedTuple):
    """An image of a finished shard or of an older store.

    Attributes:
        row: its row in the store.
        read: reads it with a reader.
    """

    row: ImageRow
    read: Callable[[ImageReader], ReadImage]


def read_ahead(images: Sequence[ImageToMerge], columns: Columns) -> Generator[list[ReadImage], None, None]:
    """Read images in order, in groups.

    Args:
        images: the images, in the order of the store.
        columns: columns of the store.

    Yields:
        The images of the next group; they are valid until the next one is requested.
    """
    reader = ImageReader(columns, _GROUP_BYTES, _GROUPS_AHEAD + 1)

    def read(group: Sequence[ImageToMerge]) -> list[ReadImage]:
        reader.next_group()
        return [image.read(reader) for image in group]

    pool = ThreadPoolExecutor(1, "read shards")
    waiting: deque[Future[list[ReadImage]]] = deque()
    try:
        for group in _groups(images, columns):
            waiting.append(pool.submit(read, group))
            if len(waiting) > _GROUPS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


def _groups(images: Sequence[ImageToMerge], columns: Columns) -> Iterator[list[ImageToMerge]]:
    region_size, itemsize = sum(region_bytes(columns).values()), np.dtype(columns.dtype).itemsize
    group: list[ImageToMerge] = []
    size = 0
    for image in images:
        row = image.row
        image_size = row.regions * region_size + row.mask_bytes + math.prod(row.map_shape) * itemsize
        if group and (size + image_size > _GROUP_BYTES or len(group) == _GROUP_IMAGES):
            yield group
            group, size = [], 0
        group.append(image)
        size += image_size
    if group:
        yield group
