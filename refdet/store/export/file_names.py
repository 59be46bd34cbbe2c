"""The names that the files of an export have, one an image, made of names that anyone may have chosen."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PurePosixPath

from refdet.errors import InputError
from refdet.store import Store

_LONGEST = 255  # bytes of a name, of every common file system
_NOT_IN_NAMES = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control characters, surrogates, line separators


def base_name(file_name: str) -> str:
    r"""The last part of an image's file name; ``\\`` reads as ``/``."""
    return PurePosixPath(file_name.replace("\\", "/")).name


def file_names(store: Store, kind: str, suffix: str) -> dict[int, str]:
    """Image id -> name without ``suffix``, all different and fit to be names of files in one folder.

    Args:
        store: whose images.
        kind: "stem" (the image's file name without its suffix), "file" (with it) or "id" (the id in decimal).
        suffix: what the caller appends, such as ".npz".

    Raises:
        InputError: an image has no such name, an unusable one, or that of another image.
    """
    if kind == "id":
        return {image_id: str(image_id) for image_id in store}
    names: dict[int, str] = {}
    owner: dict[str, int] = {}
    for image_id, file_name in zip(store, store.file_names, strict=True):
        base = base_name(str(file_name))
        name = base if kind == "file" else PurePosixPath(base).stem
        problem = _problem(name, suffix)
        if problem:
            shown = f": {str(file_name)[:100]!a}" if file_name else ""
            raise unusable(store.path, f"image {image_id} {problem}{shown}")
        other = owner.setdefault(name, image_id)
        if other != image_id:
            raise unusable(store.path, f"images {other} and {image_id} are both {name!r}")
        names[image_id] = name
    return names


def unusable(path: Path, why: str) -> InputError:
    """The error for file names that cannot serve."""
    return InputError(f"{path}: no files named by image file: {why}; export with --names id")


def _problem(name: str, suffix: str) -> str:
    """Why this is no name for a file, "" if it is one."""
    if not name.strip(". "):
        return "has none"
    if any(unicodedata.category(character) in _NOT_IN_NAMES for character in name):
        return "has control characters in it"
    if len(os.fsencode(name + suffix)) > _LONGEST:
        return f"has one longer than {_LONGEST} bytes"
    return ""
