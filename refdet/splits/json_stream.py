"""Stream a large JSON file: one value at a time, with its position in the text.

Parsing a COCO file of 330 MB at once takes 2 GB of memory. Parsed entry by entry it takes little more than its text,
and the entries that are kept can be written back byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from refdet.data.fetch.hints import check_fetched
from refdet.errors import InputError
from refdet.files.json_files import json_errors, read_bytes

_SPACE = re.compile(r"[ \t\n\r]*")
_SCAN_STRING = json.decoder.scanstring  # type: ignore[attr-defined]  # missing in typeshed
_SCAN_VALUE = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # missing in typeshed


class JsonValue(NamedTuple):
    """A value in a JSON text.

    Attributes:
        key: its key if it is a member of the object, or the key of the list that it is an entry of; "" if there is no
            object but only a list.
        position: its index in its list, None for a member of the object.
        value: the parsed value; [] for a list whose entries have been read one by one.
        start: offset of the value in the text.
        end: offset of the end of the value.
        key_start: offset of the key of a member, 0 for other values.
    """

    key: str
    position: int | None
    value: Any
    start: int
    end: int
    key_start: int = 0


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, UTF-16 or UTF-32.

    Args:
        path: the file.

    Returns:
        Its contents.

    Raises:
        InputError: the file does not exist, cannot be read or is not text.
    """
    check_fetched(path)
    data = read_bytes(path)
    with json_errors(path):
        return data.decode(json.detect_encoding(data), "surrogatepass")


def iter_values(path: Path, text: str, lists: Collection[str]) -> Iterator[JsonValue]:
    """Iterate over the values of a JSON text in order.

    Args:
        path: the file, for error messages.
        text: its contents, an object or a list at the top level.
        lists: keys whose lists are read entry by entry.

    Yields:
        The members of an object, or the entries of a list. The entries of each list are followed by a value for the
        list itself, with position None.

    Raises:
        InputError: malformed text, a duplicate key, or a top level that is neither an object nor a list.
    """
    with json_errors(path):
        start = _skip_space(text, 0)
        if text[start : start + 1] == "[":
            end = yield from _entries(text, start, "")
        elif text[start : start + 1] == "{":
            end = yield from _members(path, text, start, lists)
        else:
            json.JSONDecoder().decode(text)  # raises if malformed
            raise InputError(f"{path}: neither an object nor a list at the top level; give an instances JSON or a list")
        end = _skip_space(text, end)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)


def iter_values_at(path: Path, text: str, start: int) -> Iterator[JsonValue]:
    """Iterate over the object or list that opens at ``text[start]``; raises the errors of `iter_values`."""
    with json_errors(path):
        if text[start] == "[":
            for item in _entries(text, start, ""):
                if item.position is not None:
                    yield item
        else:
            yield from _members(path, text, start, ())


def _members(path: Path, text: str, start: int, lists: Collection[str]) -> Generator[JsonValue, None, int]:
    """Iterate over the object that opens at ``text[start]``, and return the offset of its end."""
    seen: set[str] = set()
    offset = _skip_space(text, start + 1)
    if text[offset : offset + 1] == "}":
        return offset + 1
    while True:
        if text[offset : offset + 1] != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, offset)
        key_start = offset
        key, offset = _SCAN_STRING(text, key_start + 1, True)
        if key in seen:  # JSON readers differ in which one they use, so one could hide the other
            raise InputError(f"{path}: duplicate key {key!r:.60}")
        seen.add(key)
        offset = _skip_space(text, offset)
        if text[offset : offset + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text, offset)
        offset = _skip_space(text, offset + 1)
        if key in lists and text[offset : offset + 1] == "[":
            offset = yield from _entries(text, offset, key)
        else:
            value, end = _parse_value(text, offset)
            yield JsonValue(key, None, value, offset, end, key_start)
            offset = end
        offset, more = _find_next(text, offset, "}")
        if not more:
            return offset


def _entries(text: str, start: int, key: str) -> Generator[JsonValue, None, int]:
    """Iterate over the list that opens at ``text[start]``, under ``key``, and return the offset of its end."""
    offset = _skip_space(text, start + 1)
    position = 0
    more = text[offset : offset + 1] != "]"
    if not more:
        offset += 1
    while more:
        value, end = _parse_value(text, offset)
        yield JsonValue(key, position, value, offset, end)
        position += 1
        offset, more = _find_next(text, end, "]")
    yield JsonValue(key, None, [], start, offset)
    return offset


def _find_next(text: str, offset: int, close: str) -> tuple[int, bool]:
    """Return the start of the next value, or the offset after ``close``, and whether there is a next value."""
    character = text[offset : offset + 1]
    if character != ",":
        offset = _skip_space(text, offset)
        character = text[offset : offset + 1]
    if character == close:
        return offset + 1, False
    if character != ",":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, offset)
    return _skip_space(text, offset + 1), True


def _skip_space(text: str, offset: int) -> int:
    return _SPACE.match(text, offset).end()  # type: ignore[union-attr]  # always matches


def _parse_value(text: str, offset: int) -> tuple[Any, int]:
    """Return the value that starts at an offset, and the offset of its end."""
    try:
        return _SCAN_VALUE(text, offset)
    except StopIteration as stop:  # would end the calling generator
        raise json.JSONDecodeError("Expecting value", text, stop.value) from None
