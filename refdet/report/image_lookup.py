"""Find the image of a store by the name of an image file."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path, PurePosixPath

from refdet.errors import InputError
from refdet.files.short_text import shorten
from refdet.store import Store


def image_of_file(store: Store, file: Path) -> int:
    """The id of the image whose name in the store has the most folders in common with a path, from the file name up.

    Args:
        store: the store.
        file: the image file.

    Raises:
        InputError: the store has no image of that file name, or several that fit equally well.
    """
    parts = file.absolute().parts
    shared: dict[int, int] = {}  # image id -> number of trailing path components in common
    for image_id, name in zip(store.image_ids.tolist(), store.file_names, strict=True):
        pairs = zip(reversed(PurePosixPath(str(name).replace("\\", "/")).parts), reversed(parts), strict=False)
        if count := sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)):
            shared[image_id] = count
    best = [image_id for image_id, count in shared.items() if count == max(shared.values())]
    if not best:
        raise InputError(f"{store.path}: has no image named {shorten(file.name)}; give its `image_id` in the store")
    if len(best) > 1:
        raise InputError(
            f"{store.path}: images {best[0]} and {best[1]} both fit the name {shorten(file.name)}; give `image_id`"
        )
    return best[0]
