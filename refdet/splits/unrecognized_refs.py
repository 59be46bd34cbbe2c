"""Find files that look like refs but are not read because of their name, their folder or a broken link."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import refer
from refdet.errors import InputError
from refer.statistics import COUNTS

_REFS_FILE = re.compile(r"refs\((.+)\)\.p|grefs\((.+)\)\.(?:p|json)")
_LIKE_REFS = re.compile(r"g?refs([\W_].*)?\.(p|pkl|pickle|json)", re.IGNORECASE)
_DATASETS = {dataset for dataset, _ in COUNTS} | {"grefcoco"}
_DEPTH = 3  # levels to search; refs belong in ROOT/DATASET/file, and ROOT/X/DATASET/file is one folder too deep


def find_unrecognized_refs(refer_root: str | Path) -> list[Path]:
    """Sorted files below a REFER root that look like refs but are not found by `refer.available`.

    Raises:
        InputError: a folder of the root, or a file with the right name and folder, is a broken link or not a file:
            leaving it out would leave its images in the training data.
    """
    root = Path(refer_root)
    for folder in sorted(root.iterdir()):
        may_be_dataset = folder.name in _DATASETS or not folder.suffix
        if may_be_dataset and folder.is_symlink() and not folder.exists():
            raise InputError(f"{folder}: a broken link; repair it, or remove it to leave out the dataset")
    recognized = set(refer.available(root))
    paths = sorted(path for path in _files_like_refs(root, _DEPTH) if _is_unrecognized(root, path, recognized))
    for path in paths:
        if path.parent.parent == root and _REFS_FILE.fullmatch(path.name) and not path.is_file():
            what = "not a file" if path.exists() else "a broken link"
            raise InputError(f"{path}: {what}; repair it, or remove it to leave out its splits")
    return paths


def refer_root_below(refer_root: str | Path, paths: list[Path]) -> Path | None:
    """The folder below ``refer_root`` that has the refs among ``paths`` at the right depth, None if there is no one."""
    roots = {path.parent.parent for path in paths if _REFS_FILE.fullmatch(path.name)}
    below = [root for root in roots if Path(refer_root) in root.parents]
    return below[0] if len(below) == 1 else None


def _is_unrecognized(root: Path, path: Path, recognized: set[tuple[str, str]]) -> bool:
    if not _LIKE_REFS.fullmatch(path.name):
        return False
    match = _REFS_FILE.fullmatch(path.name)
    in_dataset_folder = path.parent.parent == root
    is_recognized = match and in_dataset_folder and (path.parent.name, match[1] or match[2]) in recognized
    return not (is_recognized and path.is_file())


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
