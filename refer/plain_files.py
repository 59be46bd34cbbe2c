"""Read whole files and JSON, with errors that name the file."""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ReferDataError, ReferNotFoundError

MAX_BYTES = 2**32
"""Maximum size in bytes of a file; parsing it needs ten times as much memory."""

# The escape of a surrogate, such as \ud83d, in UTF-8, UTF-16 or UTF-32.
_SURROGATE = re.compile(rb"\\\x00*u\x00*[dD]\x00*[89a-fA-F]")


def read_file(path: str | Path, max_bytes: int, what: str = "a file") -> bytes:
    """Read a regular file.

    Args:
        path: the file.
        max_bytes: maximum size in bytes.
        what: kind of file, such as "an image", for the message.

    Returns:
        Its contents.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger.
    """
    # nonblocking, as opening a pipe would wait for a writer
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        check_file_size(status.st_size, max_bytes, what)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def check_file_size(size: int, max_bytes: int, what: str = "a file") -> None:
    """Raise an OSError if ``size`` exceeds ``max_bytes``, the limit for ``what``."""
    if size > max_bytes:
        raise OSError(f"larger than {max_bytes} bytes, the limit for {what}")


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file.

    Args:
        path: the file.
        max_bytes: maximum size in bytes.

    Returns:
        Its contents.

    Raises:
        ReferNotFoundError: the file does not exist.
        ReferDataError: it is not a regular file, is larger, or cannot be read.
    """
    try:
        return read_file(path, max_bytes)
    except FileNotFoundError:
        raise ReferNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        reason = getattr(error, "strerror", None)
        raise ReferDataError(f"{path}: {f'cannot be read: {reason}' if reason else error}") from None
    except MemoryError:
        raise ReferDataError(f"{path}: not enough memory") from None


def read_json(path: Path) -> Any:
    """Parse a JSON file in UTF-8, UTF-16 or UTF-32, with msgspec if it is installed, which is four times as fast.

    Args:
        path: the file.

    Returns:
        Its value.

    Raises:
        ReferNotFoundError: the file does not exist.
        ReferDataError: it cannot be read or is malformed; the message has the line.
    """
    data = read_bytes(path)
    decode = _msgspec_decoder()
    if decode is not None:
        try:
            return decode(data)
        except (ValueError, RecursionError):  # malformed, or valid only for json: NaN, UTF-16
            pass
    with json_errors(path):
        value = json.loads(data)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # raises if a surrogate is unpaired
        return value


@contextmanager
def json_errors(path: Path) -> Iterator[None]:
    """Turn errors from parsing the JSON file ``path`` into a ReferDataError with its name and the line, if known."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ReferDataError(f"{path}: malformed JSON in line {error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ReferDataError(f"{path}: not a JSON text file ({error.reason} at byte {error.start})") from None
    except UnicodeEncodeError as error:
        raise ReferDataError(f"{path}: unpaired surrogate in a string ({error.reason})") from None
    except RecursionError:
        raise ReferDataError(f"{path}: malformed JSON: nested too deeply") from None
    except ValueError as error:  # more digits than Python converts
        raise ReferDataError(f"{path}: malformed JSON: {error}") from None
    except MemoryError:
        raise ReferDataError(f"{path}: not enough memory") from None


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection within the block, as scanning millions of new objects doubles the time of reading."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            # Both calls together move all objects to the oldest generation, which is rarely scanned. If somebody else
            # has frozen objects, unfreezing would undo that.
            if gc.get_freeze_count() == 0:
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _msgspec_decoder() -> Callable[[bytes], Any] | None:
    """The JSON decoder of msgspec, None if it is not installed."""
    try:
        return importlib.import_module("msgspec.json").decode
    except ImportError:
        return None
