"""Small text files that may come from strangers: read whole, up to a size, and parsed strictly."""

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
    """The bytes of a regular file of at most `most` bytes.

    Raises:
        InputError: there is no such file, it is larger, or it is a folder, a pipe or a device.
    """
    try:
        # without waiting for a writer, where it is a pipe
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
        raise InputError(f"{path}: larger than {most} bytes, the most that such a file may have")
    return data


def strict_json(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        InputError: it is malformed or nested too deeply, has a key twice in an object, or a number that JSON does not
            have (NaN, Infinity, 1e999).
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
        raise InputError(f"{cut(text)} is too large a number")
    return value


def _integer(text: str) -> int:
    if len(text) > 20:
        raise InputError(f"{cut(text)} is too large an integer")
    return int(text)
