"""Whatever lists training images: instances files, JSON lists and lines of text, read alike and written filtered.

- an object with ``images`` (and ``annotations``): COCO 2014 and 2017, minival, LVIS, captions, key points, panoptic;
- a JSON list of ids, of file names or of objects (Visual Genome's ``image_data.json``, Detectron2's dicts);
- text with an id or a file name a line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from refdet.data.coco_entries import checked_id, kind
from refdet.data.coco_numbers import (
    COCO_IDS,
    IDS,
    NAMES,
    bare_number,
    coco_numbers,
    is_confirmed,
    is_known_by_id,
    is_visual_genome,
    numbers_in_name,
)
from refdet.data.json_pieces import Piece, pieces, read_text
from refdet.errors import InputError
from refer.plain_files import no_garbage_collection

INSTANCES, JSON_LIST, LINES = "instances", "JSON list", "lines of text"
_LISTS = ("images", "annotations", "categories")


class Listed(NamedTuple):
    """One image of a list.

    Attributes:
        id: the number under which the list knows it, else the smallest of ``numbers``, else None.
        name: its file name or address, "" for none.
        numbers: see `coco_numbers`; empty where nothing says whether it is COCO's.
        not_coco: whether the list says that it is none of COCO's.
        confirmed: see `is_confirmed`; known_by_id: see `is_known_by_id`.
        start, end: its entry is ``text[start:end]``.
    """

    id: int | None
    name: str
    numbers: frozenset[int]
    not_coco: bool
    confirmed: bool
    known_by_id: bool
    start: int
    end: int

    @property
    def label(self) -> int | str:
        """What people know it by."""
        return self.name if self.id is None else self.id


class Owned(NamedTuple):
    """One annotation: its image, and its entry ``text[start:end]``."""

    image_id: int
    start: int
    end: int


class Member(NamedTuple):
    """A key at the top of an instances file; its value is ``text[start:end]``."""

    key: str
    start: int
    end: int


@dataclass(frozen=True)
class ImageList:
    """A list of images as it stands in a file.

    Attributes:
        form: INSTANCES, JSON_LIST or LINES.
        text: all of the file.
        images: in the order of the file.
        annotations, members, info: of an instances file; empty for others.
    """

    path: Path
    form: str
    text: str
    images: list[Listed]
    annotations: list[Owned]
    members: list[Member]
    info: dict[str, Any]

    @property
    def ids(self) -> set[int]:
        """The ids of all images that have one."""
        return {image.id for image in self.images if image.id is not None}

    def write(self, file: IO[str], keep: Sequence[bool], info: object) -> None:
        """Write the list in its own form, its entries as they stand in the file.

        Arguments:
            keep: whether each image stays; the annotations of those that go go with them.
            info: takes the place of ``info`` in an instances file.
        """
        images = [image for image, stays in zip(self.images, keep, strict=True) if stays]
        entries = (self.text[image.start : image.end] for image in images)
        if self.form == LINES:
            file.writelines(f"{entry}\n" for entry in entries)
            return
        if self.form == JSON_LIST:
            _write_entries(file, entries, ",\n")
            file.write("\n")
            return
        ids = {image.id for image in images}
        owned = (self.text[entry.start : entry.end] for entry in self.annotations if entry.image_id in ids)
        if all(member.key != "info" for member in self.members):
            file.write(f'{{"info": {json.dumps(info)}, ')
        else:
            file.write("{")
        for number, (key, start, end) in enumerate(self.members):
            file.write(f"{', ' if number else ''}{json.dumps(key)}: ")
            if key == "images":
                _write_entries(file, entries, ", ")
            elif key == "annotations":
                _write_entries(file, owned, ", ")
            else:
                file.write(json.dumps(info) if key == "info" else self.text[start:end])
        file.write("}\n")


def read_image_list(path: str | Path, check: Callable[[Piece], None] | None = None) -> ImageList:
    """Read a list of images in any of the forms above.

    Arguments:
        check: called with every entry of an instances file, in the order of the file.

    Raises:
        InputError: one line that names the file and what is wrong in it.
    """
    path = Path(path)
    with no_garbage_collection():
        return _read(path, check)


def _read(path: Path, check: Callable[[Piece], None] | None) -> ImageList:
    text = read_text(path)
    start = text.lstrip(" \t\r\n\ufeff")[:1]
    if path.suffix.lower() != ".json" and start not in ("{", "["):
        images = list(_lines(text))
        form, found = LINES, ImageList(path, LINES, text, images, [], [], {})
    elif start == "[":
        entries = [piece for piece in pieces(path, text, ()) if piece.position is not None]
        images = [_listed(path, piece) for piece in entries]
        form, found = JSON_LIST, ImageList(path, JSON_LIST, text, images, [], [], {})
    else:
        form, found = INSTANCES, _instances(path, text, check)
    if not found.images:
        raise InputError(f"{path}: no image in it; give an instances JSON or a list of images")
    if form != INSTANCES and not any(image.numbers or image.not_coco for image in found.images):
        raise InputError(
            f"{path}: none of its {len(found.images)} entries has a COCO image id, the first is "
            f"{found.images[0].name or found.images[0].label!r:.60}; {_mend(found.images)}"
        )
    return found


def _instances(path: Path, text: str, check: Callable[[Piece], None] | None) -> ImageList:
    found = ImageList(path, INSTANCES, text, [], [], [], {})
    ids: set[int] = set()
    fault: InputError | None = None
    for piece in pieces(path, text, _LISTS):
        if fault is None:
            try:
                _add(found, ids, piece)
                if check is not None and piece.position is not None:
                    check(piece)
            except InputError as error:  # raised at the end, since a file that is cut short is to be told first
                fault = error
    if fault is not None:
        raise fault
    if all(member.key != "images" for member in found.members):
        raise InputError(f"{path}: no list 'images' in it; is it a COCO instances JSON?")
    return found


def _add(found: ImageList, ids: set[int], piece: Piece) -> None:
    path, (key, position, value, start, end) = found.path, piece
    if position is None:
        found.members.append(Member(key, start, end))
        if key == "info" and isinstance(value, dict):
            found.info.update(value)
        elif key in _LISTS and not isinstance(value, list):
            raise InputError(f"{path}: {key!r} is a {kind(value)}, it must be a list")
        return
    if not isinstance(value, dict):
        raise InputError(f"{path}: {key}[{position}] is a {kind(value)}, not an object")
    if key == "images":
        image_id = checked_id(path, value, "id", f"images[{position}]")
        if image_id in ids:  # one could hide the other
            raise InputError(f"{path}: image id {image_id} is there twice; give each image one entry")
        ids.add(image_id)
        found.images.append(_image(path, value, image_id, f"image {image_id}", start, end))
    elif key == "annotations":
        found.annotations.append(Owned(checked_id(path, value, "image_id", f"annotations[{position}]"), start, end))


def _listed(path: Path, piece: Piece) -> Listed:
    value, what = piece.value, f"entry {piece.position}"
    if type(value) is int:
        return Listed(value, "", frozenset([value]), False, False, True, piece.start, piece.end)
    if isinstance(value, str):
        return _named(value, piece.start, piece.end)
    if not isinstance(value, dict):
        raise InputError(f"{path}: {what} is {value!r:.40}; it must be an image id, a file name or an object of one")
    key = next((key for key in IDS if value.get(key) is not None), None)
    image_id: int | None = None
    if key is not None:
        number = bare_number(value[key]) if isinstance(value[key], str) else value[key]
        image_id = checked_id(path, {key: number}, key, what) if number is not None else None
    elif not any(key in value for key in COCO_IDS) and not any(isinstance(value.get(name), str) for name in NAMES):
        raise InputError(f"{path}: {what} has neither of {', '.join((*IDS, *COCO_IDS, *NAMES))}; what image is it?")
    return _image(path, value, image_id, what, piece.start, piece.end)


def _image(path: Path, value: dict, image_id: int | None, what: str, start: int, end: int) -> Listed:
    for key in COCO_IDS:
        if value.get(key) is not None:
            checked_id(path, value, key, what)
    name = next((value[key] for key in (*NAMES, *IDS) if isinstance(value.get(key), str)), "")
    numbers = coco_numbers(value, image_id)
    if image_id is None:
        image_id = min(numbers, default=None)
    not_coco = not numbers and any(key in value for key in COCO_IDS)
    known = is_known_by_id(value, image_id)
    return Listed(image_id, name, numbers, not_coco, is_confirmed(value), known, start, end)


def _named(name: str, start: int, end: int) -> Listed:
    confirmed = numbers_in_name(name)
    bare = bare_number(name)
    numbers = confirmed if bare is None else confirmed | {bare}
    return Listed(min(numbers, default=None), name, numbers, False, bool(confirmed), len(numbers) == 1, start, end)


def _line(text: str, start: int, end: int) -> Listed:
    """A line is a name, or a table's row that begins with one."""
    listed = _named(text, start, end)
    field = re.split(r"[,\t ]", text, maxsplit=1)[0]
    if listed.numbers or field == text:
        return listed
    row = _named(field, start, end)
    return row if row.numbers else listed


def _lines(text: str) -> Iterator[Listed]:
    start = 0
    for line in text.splitlines(keepends=True):
        name = line.strip(" \t\r\n\ufeff")
        if name and not name.startswith("#"):
            first = start + line.index(name)
            yield _line(name, first, first + len(name))
        start += len(line)


def _mend(images: Iterable[Listed]) -> str:
    if any(is_visual_genome(image.name) for image in images):
        return "these are Visual Genome's own names: give its image_data.json, which has their COCO ids"
    return "give COCO's ids, or names such as 000000000009.jpg"


def _write_entries(file: IO[str], entries: Iterable[str], separator: str) -> None:
    file.write("[")
    for number, entry in enumerate(entries):
        file.write(separator + entry if number else entry)
    file.write("]")
