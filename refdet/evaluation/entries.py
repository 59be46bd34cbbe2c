"""Reading of model outputs: a JSON list of objects with unique ids."""

from __future__ import annotations

import reprlib
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from refdet.data.coco_validation import json_type
from refdet.errors import InputError
from refdet.files.json_files import read_json

_TYPE_NAMES = {int: "an integer", str: "a string"}


def iter_entries(
    path: Path, fields: Mapping[str, type], noun: str, dataset_ids: Container[int]
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Iterate over the entries of a model's output.

    Args:
        path: the JSON file.
        fields: required fields and their types, int or str; the first is the id.
        noun: what the ids belong to, such as "sentence".
        dataset_ids: the ids in the dataset.

    Yields:
        File and position of an entry for error messages, its id, and the entry.

    Raises:
        InputError: the file is not a list of objects with these fields, or an id is unknown or a duplicate.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        names = " and ".join(fields)
        raise InputError(f"{path}: a JSON {json_type(entries)}; it must be a list of objects with {names}")
    required = " and ".join(f"{_TYPE_NAMES[kind]} {name}" for name, kind in fields.items())
    key = next(iter(fields))
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        where = f"{path}: entry {position}"
        if not isinstance(entry, dict) or any(type(entry.get(name)) is not kind for name, kind in fields.items()):
            raise InputError(f"{where}: it must be an object with {required}{_actual_value(entry, fields)}")
        id_ = entry[key]
        if id_ not in dataset_ids:
            raise InputError(f"{where}: {noun} {id_} is not in this dataset and split_by")
        if id_ in seen:
            raise InputError(f"{where}: duplicate entry for {noun} {id_}; remove one")
        seen.add(id_)
        yield where, id_, entry


def _actual_value(entry: Any, fields: Mapping[str, type]) -> str:
    """The end of an error about an invalid entry: what the entry is, or its first field that is missing or invalid."""
    if not isinstance(entry, dict):
        return f", not {reprlib.repr(entry)[:60]}"
    name = next(name for name, kind in fields.items() if type(entry.get(name)) is not kind)
    return f"; its {name} is {reprlib.repr(entry[name])[:60]}" if name in entry else f"; it has no {name}"
