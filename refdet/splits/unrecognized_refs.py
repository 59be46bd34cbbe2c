"""Find files that look like refs but are not read because of their name or folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import refer

_LIKE_REFS = re.compile(r"g?refs([\W_].*)?\.(p|pkl|pickle|json)", re.IGNORECASE)
_DEPTH = 3  # levels to search; refs belong in ROOT/DATASET/file, and ROOT/X/DATASET/file is one folder too deep


def find_unrecognized_refs(refer_root: str | Path) -> list[Path]:
    """Sorted files below a REFER root that look like refs but are not found by `refer.available`."""
    root = Path(refer_root)
    recognized = set(refer.available(root))
    return sorted(path for path in _files_like_refs(root, _DEPTH) if _is_unrecognized(root, path, recognized))


def _is_unrecognized(root: Path, path: Path, recognized: set[tuple[str, str]]) -> bool:
    if not _LIKE_REFS.fullmatch(path.name):
        return False
    match = re.fullmatch(r"refs\((.+)\)\.p|grefs\((.+)\)\.(?:p|json)", path.name)
    in_dataset_folder = path.parent.parent == root
    return not (match and in_dataset_folder and (path.parent.name, match[1] or match[2]) in recognized)


def _files_like_refs(folder: Path, depth: int) -> Iterator[Path]:
    """Files whose names look like refs, at most ``depth`` levels below a folder."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _LIKE_REFS.fullmatch(entry.name):
                    yield folder / entry.name
                elif depth > 1 and entry.is_dir():
                    yield from _files_like_refs(folder / entry.name, depth - 1)
    except OSError:  # skip unreadable folders
        return
