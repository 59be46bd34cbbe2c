"""Read and strictly parse small, untrusted text files."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from refdet.errors import InputError
from refdet.files.short_text import cut, shown

_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def read_small(path: Path, most: int) -> bytes:
    """Read a small regular file.

    Args:
        path: the file.
        most: maximum size in bytes.

    Returns:
        Its contents.

    Raises:
        InputError: the file does not exist, is larger, or is a folder, pipe or device.
    """
    try:
        # nonblocking, as opening a pipe would wait for a writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(f"{path}: not a regular file")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(most + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > most:
        raise InputError(f"{path}: larger than {most} bytes, the limit for such a file")
    return data


def strict_json(data: bytes | str) -> Any:
    """Parse JSON strictly.

    Args:
        data: the text, in UTF-8 if it is bytes.

    Returns:
        Its value.

    Raises:
        InputError: malformed or too deeply nested JSON, a duplicate key, or a number that is not JSON (NaN, Infinity,
            1e999).
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite_float, parse_int=_integer
        )
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        raise InputError(f"malformed JSON in line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise InputError("malformed JSON: nested too deeply") from None
    except UnicodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason if hasattr(error, 'reason') else error})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InputError(f"duplicate key {shown(twice)}")
    return tree


def _no_constant(name: str) -> NoReturn:
    raise InputError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise InputError(f"number {cut(text)} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 20:
        raise InputError(f"integer {cut(text)} is too large")
    return int(text)
