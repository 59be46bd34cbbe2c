"""Read JSON files as `refer.plain_files` does, but with errors as InputError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refdet.errors import InputError
from refdet.files.strict_json import finite_json
from refer import ReferError, plain_files

_MAX_SMALL_BYTES = 2**25  # 32 MiB


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Args:
        path: the file.

    Returns:
        Its value.

    Raises:
        InputError: it cannot be read or is malformed; the message names the file and the line.
    """
    with json_errors(path):
        return json.loads(read_bytes(path))


def read_small_json(path: Path, finite: bool = True) -> Any:
    """Parse one of refdet's own JSON files, which are at most 32 MiB and have no NaN.

    Args:
        path: the file.
        finite: whether a number that is not finite is an error; otherwise the caller checks the numbers that it uses.

    Returns:
        Its value.

    Raises:
        InputError: it cannot be read, is malformed, has a number that is not finite, or is larger than 32 MiB.
    """
    with json_errors(path):
        data = read_bytes(path, _MAX_SMALL_BYTES)
        return finite_json(data) if finite else json.loads(data)


def read_bytes(path: Path, max_bytes: int = plain_files.MAX_BYTES) -> bytes:
    """Read a regular file.

    Args:
        path: the file.
        max_bytes: maximum size in bytes.

    Returns:
        Its contents.

    Raises:
        InputError: it cannot be read, is larger than ``max_bytes``, or is a pipe or device.
    """
    with _as_input_error():
        return plain_files.read_bytes(path, max_bytes)


@contextmanager
def json_errors(path: Path) -> Iterator[None]:
    """Turn errors from parsing the JSON file ``path`` into an InputError that names the file."""
    with _as_input_error(), plain_files.json_errors(path):
        yield


@contextmanager
def _as_input_error() -> Iterator[None]:
    """Turn errors of the package refer into an InputError with the same message."""
    try:
        yield
    except ReferError as error:
        raise InputError(str(error)) from None
