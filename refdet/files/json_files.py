"""Reading JSON files, with errors that name them: those of `refer.plain_files`, as InputError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refer import ReferError, plain_files

_SMALL = 2**25  # bytes


def read_json(path: Path) -> Any:
    """The value of a JSON file. InputError names the file and, where it is malformed, the line."""
    with json_errors(path):
        return json.loads(read_bytes(path))


def read_small_json(path: Path) -> Any:
    """The value of a JSON file of ours that is never large, as of `read_json`; InputError for one that is."""
    with json_errors(path):
        return json.loads(read_bytes(path, _SMALL))


def read_bytes(path: Path, most: int = plain_files.LARGEST) -> bytes:
    """All of a regular file. InputError for what cannot be read or has more bytes, and for a pipe or a device."""
    with _ours():
        return plain_files.read_bytes(path, most)


@contextmanager
def json_errors(path: Path) -> Iterator[None]:
    """Turn what parsing the JSON file ``path`` raises into an InputError that names it."""
    with _ours(), plain_files.json_errors(path):
        yield


@contextmanager
def _ours() -> Iterator[None]:
    try:
        yield
    except ReferError as error:
        raise InputError(str(error)) from None
