"""Read a list of images in any of the formats of `refdet.splits.image_list`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from refdet.data.coco_validation import json_type, parse_id
from refdet.data.image_evidence import (
    COCO_ID_KEYS,
    ID_KEYS,
    NAME_KEYS,
    coco_numbers_in,
    evidence_of,
    evidence_of_image,
    id_matches_file_name,
)
from refdet.errors import InputError
from refdet.files.json_files import json_errors
from refdet.files.short_text import format_count
from refdet.splits.image_list import (
    INSTANCES,
    JSON_LINES,
    JSON_LIST,
    JSON_OBJECT,
    LINES,
    ImageEntry,
    ImageListFile,
    ListedAnnotation,
    TopLevelValue,
    identify_images,
)
from refdet.splits.json_stream import JsonValue, iter_values, read_text
from refdet.splits.object_entries import Entry, object_entries
from refdet.structures.coco_ids import bare_number, is_image_file, is_visual_genome, numbers_in_name
from refer.plain_files import no_garbage_collection

_LISTS = ("images", "annotations", "categories")  # keys of an instances file whose values are lists
_SPACE = " \t\r\n\ufeff"  # including the byte order mark


def read_image_list(
    path: str | Path, check: Callable[[JsonValue], None] | None = None, allow_unknown: bool = False
) -> ImageListFile:
    """Read a list of images.

    Args:
        path: the file.
        check: called with every entry of an instances file, in file order.
        allow_unknown: whether to accept a list in which no entry can be identified, which may be no list of images.

    Returns:
        The list and its text.

    Raises:
        InputError: a one-line message with the file and what is wrong with it.
    """
    path = Path(path)
    with no_garbage_collection():
        image_list = _read(path, read_text(path), check)
        if not image_list.images:
            raise InputError(f"{path}: no images in it; give an instances JSON or a list of images")
        images = identify_images(image_list.images)
        is_checked = image_list.format != INSTANCES and not allow_unknown
        if is_checked and not any(i.coco_ids or i.evidence.is_non_coco for i in images):
            raise InputError(
                f"{path}: its {format_count(len(images), 'entry', 'has')} no COCO image id (first: "
                f"{images[0].name or images[0].label!r:.60}); {_fix(images)}"
            )
        return replace(image_list, images=images)


def _read(path: Path, text: str, check: Callable[[JsonValue], None] | None) -> ImageListFile:
    """Choose the format by the suffix and the first characters, and read the entries."""
    first_character = text.lstrip(_SPACE)[:1]
    if path.suffix.lower() in (".jsonl", ".ndjson") or _is_json_lines(text):
        return ImageListFile(path, JSON_LINES, text, list(_json_lines(path, text)))
    if path.suffix.lower() != ".json" and first_character not in ("{", "["):
        return ImageListFile(path, LINES, text, list(_lines(text)))
    if first_character == "[":
        images = [
            _list_entry(path, f"entry {item.position}", item.value, item.start, item.end)
            for item in iter_values(path, text, ())
            if item.position is not None
        ]
        return ImageListFile(path, JSON_LIST, text, images)
    image_list = _instances(path, text, check)
    if image_list is not None:
        return image_list
    tree, entries = object_entries(path, text)
    images = [
        _object_entry(path, entry)
        if entry.key  # else it is in a list within the object
        else _list_entry(path, f"entry {number}", entry.value, entry.start, entry.end)
        for number, entry in enumerate(entries)
    ]
    return ImageListFile(path, JSON_OBJECT, text, images, tree=tree)


def _instances(path: Path, text: str, check: Callable[[JsonValue], None] | None) -> ImageListFile | None:
    """Read a JSON object with the key ``images``; None if it has no such key."""
    image_list = ImageListFile(path, INSTANCES, text, [])
    ids: set[int] = set()
    first_error: InputError | None = None
    is_instances = False
    for item in iter_values(path, text, _LISTS):
        is_instances |= item.key == "images"
        if first_error is None:
            try:
                _add_item(image_list, ids, item)
                if check is not None and item.position is not None:
                    check(item)
            except InputError as error:  # raised at the end, so that a truncated file is reported as such
                first_error = error
    if not is_instances:
        return None
    if first_error is not None:
        raise first_error
    if image_list.annotations and len(ids) < len(image_list.images):
        without_id = next(n for n, image in enumerate(image_list.images) if image.evidence.id is None)
        raise InputError(f"{path}: images[{without_id}]: no 'id'; its annotations need one")
    return image_list


def _add_item(image_list: ImageListFile, ids: set[int], item: JsonValue) -> None:
    """Add a top-level member of an instances file, or an entry of one of its `_LISTS`, to ``image_list``.

    Args:
        image_list: the list so far.
        ids: the image ids so far.
        item: the member or entry.

    Raises:
        InputError: it is invalid, or its image id is a duplicate.
    """
    path, key, value = image_list.path, item.key, item.value
    if item.position is None:
        image_list.members.append(TopLevelValue(key, item.start, item.end))
        if key == "info" and isinstance(value, dict):
            image_list.info.update(value)
        elif key in _LISTS and not isinstance(value, list):
            raise InputError(f"{path}: {key!r} has type {json_type(value)}; it must be a list")
        elif key not in _LISTS and (coco_ids := coco_numbers_in(value)):
            image_list.ids_in_other_keys[key] = coco_ids
        return
    if not isinstance(value, dict):
        raise InputError(f"{path}: {key}[{item.position}] has type {json_type(value)}; it must be an object")
    if key == "images":
        image_list.images.append(_image_entry(path, item.position, item, ids))
    elif key == "annotations":
        image_id = parse_id(path, value, "image_id", f"annotations[{item.position}]")
        image_list.annotations.append(ListedAnnotation(image_id, item.start, item.end))


def _image_entry(path: Path, position: int, item: JsonValue, ids: set[int]) -> ImageEntry:
    """The entry ``images[position]`` of an instances file; its id, if it has one, is added to ``ids``."""
    value, what, image_id = item.value, f"images[{position}]", None
    if value.get("id") is not None or not _is_named(value):
        image_id = parse_id(path, value, "id", what)
        what = f"image {image_id}"
        if image_id in ids:
            raise InputError(f"{path}: duplicate image id {image_id}; keep one entry per image")
        ids.add(image_id)
    _check_coco_ids(path, value, what)
    evidence = evidence_of_image(value, image_id)
    matches = id_matches_file_name(value, image_id, evidence)
    label = position if image_id is None else image_id
    return ImageEntry(image_id, _name(value), label, evidence, matches, item.start, item.end)


def _list_entry(path: Path, what: str, value: Any, start: int, end: int) -> ImageEntry:
    """An entry of a list that is not an instances file; ``what`` names it in error messages."""
    if type(value) is int or isinstance(value, str):
        return _bare_entry(value, start, end)
    if not isinstance(value, dict | list):
        raise InputError(f"{path}: {what} is {value!r:.40}; it must be an image id, a file name or an object with one")
    _check_ids(path, value, what)
    evidence = evidence_of(value)
    name = _name(value) if isinstance(value, dict) else ""
    matches = isinstance(value, dict) and id_matches_file_name(value, evidence.id, evidence)
    label = (name or what) if evidence.id is None else evidence.id
    return ImageEntry(evidence.id, name, label, evidence, matches, start, end)


def _object_entry(path: Path, member: Entry) -> ImageEntry:
    """A member of an object, whose key may be the name or number of its image."""
    _check_ids(path, member.value, f"{member.key!r:.60}")
    evidence = evidence_of(member.value, key=member.key)
    matches = isinstance(member.value, dict) and id_matches_file_name(member.value, evidence.id, evidence)
    label = member.key if evidence.id is None else evidence.id
    return ImageEntry(evidence.id, member.key, label, evidence, matches, member.start, member.end)


def _bare_entry(value: int | str, start: int, end: int) -> ImageEntry:
    """The entry of a bare id or name."""
    evidence = evidence_of(value)
    matches = len(evidence.coco_numbers | evidence.bare_numbers) == 1
    return ImageEntry(evidence.id, value if isinstance(value, str) else "", value, evidence, matches, start, end)


def _name(value: dict) -> str:
    """The file name, URL or textual id of an entry, "" if it has none."""
    return next((value[key] for key in (*NAME_KEYS, *ID_KEYS) if isinstance(value.get(key), str)), "")


def _is_named(value: dict) -> bool:
    """Whether an entry without an id can be identified otherwise, as in Karpathy's lists."""
    return any(value.get(key) is not None for key in COCO_ID_KEYS) or any(
        isinstance(value.get(key), str) for key in NAME_KEYS
    )


def _check_ids(path: Path, value: Any, what: str) -> None:
    """Raise an InputError if an entry, in a list or an object, has an id or COCO id that cannot be read."""
    if not isinstance(value, dict):
        return
    _check_coco_ids(path, value, what)
    for key in ID_KEYS:
        # `evidence_of` accepts strings, lists and objects too: names, or ids at any depth
        if value.get(key) is not None and not isinstance(value[key], str | list | dict):
            parse_id(path, value, key, what)


def _check_coco_ids(path: Path, value: dict, what: str) -> None:
    """Raise an InputError if a COCO id of an entry cannot be read; ``what`` names the entry."""
    for key in COCO_ID_KEYS:
        if value.get(key) is not None:
            parse_id(path, value, key, what)


class _Line(NamedTuple):
    """A line ``contents[start:end]`` of a text, without surrounding whitespace; ``number`` counts from 1."""

    number: int
    text: str
    start: int
    end: int


def _nonblank_lines(contents: str) -> Iterator[_Line]:
    """The lines of a text, which end in LF, CR or CRLF, without the blank ones."""
    line_start = 0
    for number, line in enumerate(re.split(r"(?<=\n)|(?<=\r)(?!\n)", contents), start=1):
        text = line.strip(_SPACE)
        if text:
            start = line_start + line.index(text)
            yield _Line(number, text, start, start + len(text))
        line_start += len(line)


def _lines(text: str) -> Iterator[ImageEntry]:
    """The entries of the lines of a text; those that start with "#" are comments."""
    for line in _nonblank_lines(text):
        if not line.text.startswith("#"):
            yield _line_entry(line)


def _line_entry(line: _Line) -> ImageEntry:
    """The entry of a line: an id or a name, or a table row."""
    entry = _bare_entry(line.text, line.start, line.end)
    columns = re.split(r"[,;\t]", line.text)
    fields = [field for column in columns for field in _fields(column)]
    file_fields = [field for field in fields if is_image_file(field)]
    # A row of several files ends like a name too: "a/9.jpg,b/10.jpg" would be 10.
    if len(fields) < 2 or (entry.evidence.bare_numbers and len(file_fields) < 2):  # the whole line is one id or name
        return entry
    # Without a COCO name, bare numbers identify the image: those of the file names, or of all fields if there are none.
    candidates = [] if entry.evidence.coco_numbers else file_fields or fields
    numbers = [number for field in candidates if (number := bare_number(field)) is not None]
    names = [name for column in columns for name in _file_names(column)]
    names = [name for name in names if "://" not in name] or names  # a URL is just another address of a file
    return _row_entry(entry, numbers, names, default_name=fields[0])


def _row_entry(entry: ImageEntry, numbers: Sequence[int], names: Sequence[str], default_name: str) -> ImageEntry:
    """The entry of a table row, identified by its file names or else by its numbers.

    Args:
        entry: the entry that the row would be if it were one name.
        numbers: bare numbers in the row; none if it has a COCO name.
        names: file names in the row, or its URLs if it has no other.
        default_name: name of the image if the row has none.
    """
    coco_numbers = entry.evidence.coco_numbers
    if not names:
        unnumbered = not coco_numbers and len(set(numbers)) != 1
    elif coco_numbers and "://" in names[0]:  # only URLs, one of which has a COCO name: all are addresses of that image
        unnumbered = False
    else:
        unnumbered = any(not numbers_in_name(name) and bare_number(name) is None for name in names)
    evidence = replace(
        entry.evidence,
        bare_numbers=frozenset(numbers),
        has_unnumbered_name=unnumbered,
        addresses=tuple(dict.fromkeys(names)),
    )
    return entry._replace(
        id=numbers[0] if numbers else None,
        evidence=evidence,
        name=names[0] if names else default_name,
        id_matches_file_name=not unnumbered and len(coco_numbers | set(numbers)) == 1,
    )


def _fields(column: str) -> list[str]:
    """The words of a column, without quotes."""
    return [word for part in column.split(" ") if (word := part.strip("\"' "))]


def _file_names(column: str) -> list[str]:
    """The file names in a column: one, which may have spaces, or several words that are each a name."""
    words = [word for word in _fields(column) if is_image_file(word)]
    whole = column.strip("\"' ")
    return [whole] if len(words) == 1 and is_image_file(whole) else words


def _is_json_lines(text: str) -> bool:
    """Whether the first line that is not blank is a complete object, and more lines that are not blank follow."""
    start = len(text) - len(text.lstrip(_SPACE))
    end = text.find("\n", start)
    if text[start : start + 1] != "{" or end < 0 or not re.compile(r"\S").search(text, end):
        return False
    try:
        return isinstance(json.loads(text[start:end]), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path, text: str) -> Iterator[ImageEntry]:
    """The entries of JSON lines."""
    for line in _nonblank_lines(text):
        with json_errors(path):
            try:
                value = json.loads(line.text)
            except json.JSONDecodeError as error:  # its position is relative to the line; make it that in the file
                raise json.JSONDecodeError(error.msg, text, line.start + error.pos) from None
        yield _list_entry(path, f"line {line.number}", value, line.start, line.end)


def _fix(images: Iterable[ImageEntry]) -> str:
    """The advice to end the error message with, for a list without COCO ids."""
    if any(is_visual_genome(image.name) for image in images):
        return "these are Visual Genome's names: give its image_data.json, which has their COCO ids"
    return "give COCO ids, or names such as 000000000009.jpg"
