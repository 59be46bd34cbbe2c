"""Find an image in a store by the path of its file."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path, PurePath, PurePosixPath

from refdet.errors import InputError
from refdet.files.short_text import shorten
from refdet.store import Store


def find_image_id(store: Store, file: Path) -> int:
    """The id of the image whose name in the store shares the longest suffix of whole components with a path.

    Args:
        store: the store.
        file: the image file.

    Raises:
        InputError: the store has no image of that file name, or several with the longest suffix.
    """
    path = file.absolute()
    suffix_lengths = {
        image_id: _common_suffix_length(PurePosixPath(str(name).replace("\\", "/")), path)
        for image_id, name in zip(store.image_ids.tolist(), store.file_names, strict=True)
    }
    longest = max(suffix_lengths.values(), default=0)
    best = [image_id for image_id, length in suffix_lengths.items() if length == longest > 0]
    if not best:
        raise InputError(f"{store.path}: has no image named {shorten(file.name)}; give its `image_id` in the store")
    if len(best) > 1:
        raise InputError(
            f"{store.path}: images {best[0]} and {best[1]} both fit the name {shorten(file.name)}; give `image_id`"
        )
    return best[0]


def _common_suffix_length(a: PurePath, b: PurePath) -> int:
    """Number of trailing components that two paths have in common."""
    pairs = zip(reversed(a.parts), reversed(b.parts), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
