"""Find the files of a source and read each in its format."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refdet.data.parquet import is_parquet
from refdet.data.refer_formats.hugging_face import read_parquet
from refdet.data.refer_formats.json_lists import read_list
from refdet.data.refer_formats.mdetr import is_mdetr, read_mdetr
from refdet.data.refer_formats.records import Source
from refdet.data.refer_formats.split_names import dataset_in, split_by_in, split_in
from refdet.data.refer_formats.tensorflow_datasets import (
    is_examples,
    is_manual_download,
    read_examples,
    read_manual_download,
)
from refdet.errors import InputError
from refdet.files.json_files import json_errors, read_bytes
from refdet.files.short_text import format_count
from refer import plain_files

log = logging.getLogger(__name__)

_SUFFIXES = (".parquet", ".json", ".jsonl")
_LEVELS = 4  # the dataset may be in the name of the file or of one of the three folders above it


def source_files(sources: Sequence[str | Path]) -> list[Path]:
    """List the files of sources, searching folders recursively.

    In a folder with Parquet files only those are read; a note says so if it also has JSON files.

    Args:
        sources: files and folders.

    Returns:
        The files, sorted within each folder, each of them once.

    Raises:
        InputError: a source does not exist, or a folder has no Parquet or JSON file.
    """
    files: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            files_in_folder = sorted(
                path for path in source.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file()
            )
            parquet = [path for path in files_in_folder if path.suffix.lower() == ".parquet"]
            if 0 < len(parquet) < len(files_in_folder):  # the JSON next to them is Hugging Face's metadata
                others = len(files_in_folder) - len(parquet)
                log.warning(
                    "note: %s: its %s not read, as it has Parquet", source, format_count(others, "JSON file", "is")
                )
                files_in_folder = parquet
            if not files_in_folder:
                raise InputError(f"{source}: no {', '.join(_SUFFIXES)} file in it")
            files += files_in_folder
        elif source.is_file():
            files.append(source)
        else:
            raise InputError(f"{source}: no such file or folder; give the downloaded files")
    unique: dict[Path, Path] = {}  # several of the paths can lead to the same file, also through links
    for path in files:
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def read_source(path: Path) -> Source:
    """Read a file in the format recognized by its contents.

    Args:
        path: a Parquet, JSON or JSON-lines file.

    Returns:
        Its refs. If the contents lack the dataset, split_by or split, they come from the file's name; dataset and split
        also from the names of folders.

    Raises:
        InputError: the format or the split is unknown, or the file is damaged or has a wrong value.
        refer.ReferError: malformed JSON.
    """
    split = split_in(path)
    with plain_files.no_garbage_collection():
        source = read_parquet(path, split) if is_parquet(path) else _read_json(path, split)
    inferred = next(filter(None, map(dataset_in, reversed(path.absolute().parts[-_LEVELS:]))), "")
    for ref in source.refs:
        ref.dataset = dataset_in(ref.dataset) or ref.dataset or inferred
        ref.split_by = ref.split_by or split_by_in(path.name)
        if not ref.split:
            raise InputError(
                f"{path}: neither its contents nor its name has the split; rename it, for example to"
                f" {path.stem}_val{path.suffix}"
            )
    return source


def _read_json(path: Path, split: str) -> Source:
    if path.suffix.lower() == ".jsonl":
        return read_list(path, _read_lines(path), split)
    value = plain_files.read_json(path)
    if is_manual_download(value):
        return read_manual_download(path, value)
    if is_mdetr(value):
        return read_mdetr(path, value, split)
    if is_examples(value):
        return read_examples(path, value, split)
    if isinstance(value, list):
        return read_list(path, value, split)
    raise InputError(
        f"{path}: not in a known format of REFER; give Parquet of Hugging Face, MDETR's finetune_*.json, or a list of "
        "boxes and expressions"
    )


def _read_lines(path: Path) -> list[Any]:
    """The values of a JSON-lines file; empty lines are skipped."""
    entries = []
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if line.strip():
            with json_errors(Path(f"{path}: line {number}")):
                entries.append(json.loads(line))
    return entries
