"""Read images in the order of a store, in groups: a thread reads the next group while one is written. No torch."""

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

# Limits of a group, unless a single image is larger. Reading many images before copying their features is faster, as
# copying evicts the interpreter's data and code from the CPU's caches.
_GROUP_BYTES, _GROUP_IMAGES = 2**23, 32
_GROUPS_AHEAD = 1  # groups that are read while one is written

ReadImage = Regions | EncodedImage | RawImage  # what `ImageToMerge.read` returns


class ImageToMerge(NamedTuple):
    """An image of a finished shard or of the old store.

    Attributes:
        row: row of the image in the new store.
        read: reads the image; uses the given reader, which reuses memory, if the image is in a shard.
    """

    row: ImageRow
    read: Callable[[ImageReader], ReadImage]


def read_ahead(images: Sequence[ImageToMerge], columns: Columns) -> Generator[list[ReadImage], None, None]:
    """Read images in order, in groups.

    Args:
        images: the images, in the order of the store.
        columns: columns of the store.

    Yields:
        The images of the next group. Requesting another group may overwrite their arrays.
    """
    reader = ImageReader(columns, _GROUP_BYTES, _GROUPS_AHEAD + 1)

    def read(group: Sequence[ImageToMerge]) -> list[ReadImage]:
        reader.next_group()
        return [image.read(reader) for image in group]

    pool = ThreadPoolExecutor(1, "read shards")
    waiting: deque[Future[list[ReadImage]]] = deque()
    try:
        for group in _split_into_groups(images, columns):
            waiting.append(pool.submit(read, group))
            if len(waiting) > _GROUPS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


def _split_into_groups(images: Sequence[ImageToMerge], columns: Columns) -> Iterator[list[ImageToMerge]]:
    """Split images into consecutive groups within the limits above."""
    bytes_per_region, itemsize = sum(region_bytes(columns).values()), np.dtype(columns.dtype).itemsize
    group: list[ImageToMerge] = []
    group_bytes = 0
    for image in images:
        row = image.row
        image_bytes = row.regions * bytes_per_region + row.mask_bytes + math.prod(row.map_shape) * itemsize
        if group and (group_bytes + image_bytes > _GROUP_BYTES or len(group) == _GROUP_IMAGES):
            yield group
            group, group_bytes = [], 0
        group.append(image)
        group_bytes += image_bytes
    if group:
        yield group
