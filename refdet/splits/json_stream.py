"""A large JSON file read piece by piece: its values one at a time, and where in the text each stands.

A COCO file of 330 MB takes 2 GB when it is parsed whole. One entry at a time it takes little more than its text,
and what is kept of it can be written as it stood, digit for digit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from refdet.errors import InputError
from refdet.files.json_files import json_errors, read_bytes

_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = json.decoder.scanstring  # type: ignore[attr-defined]  # the decoder's own, which typeshed leaves out


class Piece(NamedTuple):
    """One value of a JSON text.

    Attributes:
        key: the key of the object at the top that it belongs to; "" if a list is at the top.
        position: which entry of its list it is; None for the whole value of the key.
        value: what it says. Of a list read entry by entry the last piece has its position None and an empty value.
        start, end: it is ``text[start:end]``.
        key_start: where the key of an object's member starts; ``start`` for other values.
    """

    key: str
    position: int | None
    value: Any
    start: int
    end: int
    key_start: int = 0


def read_text(path: Path) -> str:
    """A text file, in UTF-8, UTF-16 or UTF-32.

    Raises:
        InputError: it is not there, cannot be read or is no text.
    """
    data = read_bytes(path)
    with json_errors(path):
        return data.decode(json.detect_encoding(data), "surrogatepass")


def pieces(path: Path, text: str, lists: Collection[str]) -> Iterator[Piece]:
    """The values of a JSON text in their order.

    Args:
        path: names the file in errors.
        text: an object or a list at the top.
        lists: keys whose lists are read entry by entry, with a last piece for the list itself.

    Raises:
        InputError: the text is malformed, a key is there twice, or neither an object nor a list is at the top.
    """
    with json_errors(path):
        start = _skip(text, 0)
        if text[start : start + 1] == "[":
            end = yield from _entries(text, start, "")
        elif text[start : start + 1] == "{":
            end = yield from _members(path, text, start, lists)
        else:
            json.JSONDecoder().decode(text)  # malformed: it says where
            raise InputError(f"{path}: neither an object nor a list is at the top of this JSON")
        end = _skip(text, end)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)


def pieces_at(path: Path, text: str, start: int) -> Iterator[Piece]:
    """The members of the object, or the items of the list, whose bracket is ``text[start]``; errors as of `pieces`."""
    with json_errors(path):
        if text[start] == "[":
            for piece in _entries(text, start, ""):
                if piece.position is not None:
                    yield piece
        else:
            yield from _members(path, text, start, ())


def _members(path: Path, text: str, start: int, lists: Collection[str]) -> Generator[Piece, None, int]:
    seen: set[str] = set()
    at = _skip(text, start + 1)
    if text[at : at + 1] == "}":
        return at + 1
    while True:
        if text[at : at + 1] != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
        key_start = at
        key, at = _STRING(text, at + 1, True)
        if key in seen:  # which of the two counts is up to the reader, so that one could hide the other
            raise InputError(f"{path}: duplicate key {key!r:.60}")
        seen.add(key)
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
        at = _skip(text, at + 1)
        if key in lists and text[at : at + 1] == "[":
            at = yield from _entries(text, at, key)
        else:
            value, end = _value(text, at)
            yield Piece(key, None, value, at, end, key_start)
            at = end
        at, more = _next(text, at, "}")
        if not more:
            return at


def _entries(text: str, start: int, key: str) -> Generator[Piece, None, int]:
    at = _skip(text, start + 1)
    position = 0
    more = text[at : at + 1] != "]"
    if not more:
        at += 1
    while more:
        value, end = _value(text, at)
        yield Piece(key, position, value, at, end)
        position += 1
        at, more = _next(text, end, "]")
    yield Piece(key, None, [], start, at)
    return at


def _next(text: str, at: int, close: str) -> tuple[int, bool]:
    """The start of the next value, or the end of what ``close`` closes; and whether there is a next."""
    found = text[at : at + 1]
    if found != ",":
        at = _skip(text, at)
        found = text[at : at + 1]
    if found == close:
        return at + 1, False
    if found != ",":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    return _skip(text, at + 1), True


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string too


_SCAN = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # typeshed leaves it out too


def _value(text: str, at: int) -> tuple[Any, int]:
    try:
        return _SCAN(text, at)
    except StopIteration as stop:  # which inside a generator would be its end
        raise json.JSONDecodeError("Expecting value", text, stop.value) from None
