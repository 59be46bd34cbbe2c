"""Entries of a JSON object that is not an instances file: lists by split, or entries by image name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from refdet.data.image_evidence import coco_numbers_in
from refdet.splits.json_stream import JsonValue, iter_values_at
from refdet.structures.coco_ids import bare_number, has_other_numbering, is_image_file, numbers_in_name

_NOT_IMAGES = ("info", "metainfo", "license", "licenses", "categories")
_MAX_DEPTH = 4  # nested objects; {"refcoco": {"train": {"000000000009.jpg": ...}}} has three


class Entry(NamedTuple):
    """An entry ``text[start:end]``: its value, and its key if it is a member of an object, else ""."""

    key: str
    value: Any
    start: int
    end: int


@dataclass
class Node:
    """A node of a JSON text: an entry, or a list or object of entries.

    Attributes:
        start: offset of its start in the text, including its key if it has one.
        value_start: offset of its value.
        end: offset of its end.
        entry: index of the entry; None for a list or object of entries, and for a value that is no entry.
        children: nodes of that list or object.
    """

    start: int
    value_start: int
    end: int
    entry: int | None = None
    children: list[Node] = field(default_factory=list)

    def render(self, text: str, keep: Sequence[bool]) -> str:
        """Return the text of the node without the entries that are not kept, otherwise unchanged.

        Args:
            text: the whole JSON text.
            keep: whether to keep each entry, by its index.
        """
        if not self.children:
            return text[self.start : self.end]
        kept = [child for child in self.children if child.entry is None or keep[child.entry]]
        inner = ", ".join(child.render(text, keep) for child in kept)
        return text[self.start : self.value_start + 1] + inner + text[self.end - 1]


def object_entries(path: Path, text: str) -> tuple[Node, list[Entry]]:
    """Find the entries of the top-level object of a JSON text.

    An entry is a member whose key is an image name, an item of a list, or an object that holds other values than
    lists and objects. Numbers and strings that do not name an image are ignored, and so are lists of only fractions,
    booleans and nulls.

    Args:
        path: the file, for error messages.
        text: its contents.

    Returns:
        The root of the tree, and the entries in order.

    Raises:
        InputError: malformed text or a duplicate key.
    """
    entries: list[Entry] = []
    start = len(text) - len(text.lstrip(" \t\r\n"))
    root = Node(start, start, len(text.rstrip(" \t\r\n")))
    _add_children(path, text, root, entries, _MAX_DEPTH)
    return root, entries


def _add_children(path: Path, text: str, node: Node, entries: list[Entry], depth: int) -> None:
    """Add the children of a node, at most ``depth`` levels deep, and their entries."""
    is_list = text[node.value_start] == "["
    for item in iter_values_at(path, text, node.value_start):
        child = Node(item.start if is_list else item.key_start, item.start, item.end)
        node.children.append(child)
        if not is_list and _holds_entries(item, depth):
            _add_children(path, text, child, entries, depth - 1)
        elif is_list or _is_entry(item):
            child.entry = len(entries)
            entries.append(Entry("" if is_list else item.key, item.value, child.start, child.end))


def _holds_entries(item: JsonValue, depth: int) -> bool:
    """Whether a member is a list or object of entries, rather than an entry itself."""
    if depth == 0 or item.key in _NOT_IMAGES or _names_an_image(item.key):
        return False
    if isinstance(item.value, list):
        return _may_hold_images(item.value)
    if not isinstance(item.value, dict) or not item.value:
        return False
    return any(map(_names_an_image, item.value)) or all(isinstance(v, list | dict) for v in item.value.values())


def _may_hold_images(values: list[Any]) -> bool:
    """Whether a list has an item other than fractions, booleans and nulls; pandas writes ids as floats such as 9.0."""
    return any(v.is_integer() if isinstance(v, float) else not isinstance(v, bool | None) for v in values)


def _is_entry(item: JsonValue) -> bool:
    """Whether a member that holds no entries is one itself."""
    if item.key in _NOT_IMAGES:
        return bool(coco_numbers_in(item.value))
    if _names_an_image(item.key) or isinstance(item.value, dict):
        return True
    if isinstance(item.value, list):
        return _may_hold_images(item.value)
    return isinstance(item.value, str) and (bool(numbers_in_name(item.value)) or is_image_file(item.value))


def _names_an_image(key: str) -> bool:
    return bool(numbers_in_name(key)) or is_image_file(key) or bare_number(key) is not None or has_other_numbering(key)
