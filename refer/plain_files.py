"""Reading whole files, JSON among them, with errors that name the file."""

from __future__ import annotations

import gc
import importlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ReferDataError, ReferNotFoundError

LARGEST = 2**32
"""Bytes of a file that is read whole; ten times as much memory is needed to parse it."""

_HALF_CHARACTER = re.compile(rb"\\\x00*u\x00*[dD]\x00*[89a-fA-F]")


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """The bytes of a regular file.

    Args:
        most: bytes that it may have.

    Raises:
        ReferNotFoundError: there is no such file.
        ReferDataError: it is something else, is larger, or cannot be read.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise ReferDataError(f"{path}: cannot be read: not a file")
        size = path.stat().st_size
        if size > most:
            raise ReferDataError(f"{path}: has {size / 2**20:.0f} MiB, more than the {most / 2**20:.0f} MiB that such "
                                 "a file may have; is it the right one?")  # fmt: skip
        return path.read_bytes()
    except FileNotFoundError:
        raise ReferNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # a zero in the name is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        raise ReferDataError(f"{path}: cannot be read: {reason}") from None
    except MemoryError:
        raise ReferDataError(f"{path}: too large for the memory") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file, in UTF-8, UTF-16 or UTF-32. msgspec reads it where it is installed, four times as fast.

    Raises:
        ReferNotFoundError: there is no such file.
        ReferDataError: it cannot be read or is malformed; the line is named.
    """
    data = read_bytes(path)
    fast = _msgspec()
    if fast is not None:
        try:
            return fast(data)
        except (ValueError, RecursionError):  # it is malformed, or what only Python's own reads: NaN, UTF-16
            pass
    with json_errors(path):
        value = json.loads(data)
        if _HALF_CHARACTER.search(data):
            json.dumps(value, ensure_ascii=False).encode()
        return value


@contextmanager
def json_errors(path: Path) -> Iterator[None]:
    """Turn what parsing the JSON file ``path`` raises into a ReferDataError that names it and, if it can, the line."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ReferDataError(f"{path}: malformed JSON in line {error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ReferDataError(f"{path}: not a JSON text file ({error.reason} at byte {error.start})") from None
    except UnicodeEncodeError as error:
        raise ReferDataError(f"{path}: half a character in a string ({error.reason})") from None
    except RecursionError:
        raise ReferDataError(f"{path}: malformed JSON: nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise ReferDataError(f"{path}: malformed JSON: {error}") from None
    except MemoryError:
        raise ReferDataError(f"{path}: too large for the memory") from None


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Scanning millions of new lists as they come, though there is no cycle among them, doubles the time of reading."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if gc.get_freeze_count() == 0:  # this makes all objects old, else the next scan were of all the new ones
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _msgspec() -> Callable[[bytes], Any] | None:
    try:
        return importlib.import_module("msgspec.json").decode
    except ImportError:
        return None
