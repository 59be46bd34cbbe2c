"""File names of an export, one per image, from the untrusted file names of the images."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PurePosixPath

from refdet.errors import InputError
from refdet.store import Store

_MAX_NAME_BYTES = 255  # bytes of a name, on all common file systems
_FORBIDDEN = (
    "Cc",
    "Cs",
    "Zl",
    "Zp",
)  # Unicode categories: control characters, surrogates, separators of lines


def base_name(file_name: str) -> str:
    r"""Last component of an image's file name, with ``\\`` treated as ``/``."""
    return PurePosixPath(file_name.replace("\\", "/")).name


def file_names(store: Store, kind: str, suffix: str) -> dict[int, str]:
    """Choose unique, valid file names for the images of a store.

    Args:
        store: the store.
        kind: "stem" (the image's file name without suffix), "file" (with suffix) or "id" (the decimal id).
        suffix: suffix that the caller appends, such as ".npz".

    Returns:
        Image id -> name without ``suffix``.

    Raises:
        InputError: an image has no name or an invalid one, or two images have the same.
    """
    if kind == "id":
        return {image_id: str(image_id) for image_id in store}
    names: dict[int, str] = {}
    image_of: dict[str, int] = {}
    for image_id, file_name in zip(store, store.file_names, strict=True):
        base = base_name(str(file_name))
        name = base if kind == "file" else PurePosixPath(base).stem
        problem = _problem(name, suffix)
        if problem:
            shown = f": {str(file_name)[:100]!a}" if file_name else ""
            raise unusable_names(store.path, f"image {image_id} {problem}{shown}")
        other = image_of.setdefault(name, image_id)
        if other != image_id:
            raise unusable_names(store.path, f"images {other} and {image_id} are both named {name!r}")
        names[image_id] = name
    return names


def unusable_names(path: Path, why: str) -> InputError:
    """The error for a store whose image names cannot be file names, to be raised."""
    return InputError(f"{path}: image names cannot be used as file names ({why}); export with `names='id'`")


def _problem(name: str, suffix: str) -> str:
    """Why ``name + suffix`` is an invalid file name, to follow "image 9", or "" if it is valid."""
    if not name.strip(". "):
        return "has no name"
    if any(unicodedata.category(character) in _FORBIDDEN for character in name):
        return "has a name with control characters"
    if len(os.fsencode(name + suffix)) > _MAX_NAME_BYTES:
        return f"has a name longer than {_MAX_NAME_BYTES} bytes"
    return ""
