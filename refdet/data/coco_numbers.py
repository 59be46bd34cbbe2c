"""Under which numbers COCO knows an image, whatever list it stands in and whatever its file is called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# COCO writes an id with twelve digits: COCO_train2014_000000000009.jpg, 000000000009.jpg, and REFER's own
# COCO_train2014_000000000009_4.jpg. Its ids are below a million: twelve digits without six zeros are a date.
_TWELVE = re.compile(r"(?<![0-9])0{6}([0-9]{6})(?![0-9])")
_BARE = re.compile(r"(0{0,6}[0-9]{1,6})(?:\.[A-Za-z]+)?")
# Visual Genome's images lie in VG_100K and VG_100K_2 under numbers of its own.
_VISUAL_GENOME = re.compile(r"(?:^|[/\\])VG_100K(?:_2)?[/\\]")
# Its other files have no name of an image, but lists of entries that have these.
_GENOME_LISTS = {
    "regions": None, "relationships": None, "qas": None, "objects": "object_id", "attributes": "object_id",
}  # fmt: skip

NAMES = ("file_name", "filename", "coco_url", "url", "image_url", "image", "img", "path")
IDS = ("image_id", "id", "img_id")
COCO_IDS = ("coco_id", "cocoid")


def numbers_in_name(name: str) -> frozenset[int]:
    """The numbers of twelve digits, six zeros first, anywhere in a path or address."""
    return frozenset(int(digits) for digits in _TWELVE.findall(name))


def number_of_file_name(name: str) -> int | None:
    """The COCO number that the last part of a file name has in twelve digits; None for none or several.

    Where no file has the name itself, the image of that number may be read for it under COCO's other names, since REFER
    names the files of 2014 and many keep those of 2017.
    """
    numbers = numbers_in_name(_last_part(name))
    return next(iter(numbers)) if len(numbers) == 1 else None


def bare_number(name: str) -> int | None:
    """The number that is all of a name but its suffix ("9.jpg" and "9": 9), unless it is Visual Genome's own.

    COCO's ids have six digits at most, so that a longer number is none.
    """
    if is_visual_genome(name):
        return None
    match = _BARE.fullmatch(_last_part(name))
    return int(match[1]) if match else None


def is_visual_genome(name: str) -> bool:
    """Whether a path or address is of a file in Visual Genome's own folders."""
    return _VISUAL_GENOME.search(name) is not None


def coco_numbers(entry: Mapping[str, Any], image_id: int | None) -> frozenset[int]:
    """The numbers under which COCO may know the image of an entry in a list: any of them is enough.

    They are those in its names and addresses, and ``image_id``; where the entry has a ``coco_id`` (or ``cocoid``)
    that counts instead of ``image_id``, and null says that the image is not COCO's (Visual Genome has it so). In an
    entry of Visual Genome's without it ``image_id`` is a number of its own and counts for nothing.

    Arguments:
        entry: an object of an instances file or a list.
        image_id: the id under which that file knows the image, None for none.
    """
    numbers = _numbers_in_names(entry)
    for name in _names(entry):
        if (number := bare_number(name)) is not None:
            numbers.add(number)
    given = [entry[key] for key in COCO_IDS if key in entry]
    if given:
        return frozenset(numbers | {number for number in given if number is not None})
    if image_id is None or _is_genome_entry(entry):
        return frozenset(numbers)
    return frozenset(numbers | {image_id})


def is_confirmed(entry: Mapping[str, Any]) -> bool:
    """Whether a name or address in COCO's own form, or a ``coco_id``, says what image of COCO an entry is of."""
    if any(key in entry for key in COCO_IDS) or _numbers_in_names(entry):
        return True
    address = entry.get("coco_url")  # http://mscoco.org/images/9 in the files of 2014
    return isinstance(address, str) and bare_number(address) is not None


def is_known_by_id(entry: Mapping[str, Any], image_id: int | None) -> bool:
    """Whether the id of an entry alone tells which file training reads for it.

    Training seeks an image by its ``file_name``, and by its id only where that is not there. So a hash of ids says
    which images they were only if each file name is that of its id, and nothing else in the entry contradicts.
    """
    if coco_numbers(entry, image_id) != {image_id}:
        return False
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        return True
    return image_id in numbers_in_name(name) or image_id == bare_number(name)


def _names(entry: Mapping[str, Any]) -> list[str]:
    """LXMERT's lists have a name for an id: COCO_train2014_000000000009."""
    return [entry[key] for key in (*NAMES, *IDS) if isinstance(entry.get(key), str)]


def _numbers_in_names(entry: Mapping[str, Any]) -> set[int]:
    return set().union(*map(numbers_in_name, _names(entry)))


def _is_genome_entry(entry: Mapping[str, Any]) -> bool:
    if any(map(is_visual_genome, _names(entry))):
        return True
    for key, own in _GENOME_LISTS.items():
        value = entry.get(key)
        if isinstance(value, list) and (own is None or any(isinstance(part, dict) and own in part for part in value)):
            return True
    return False


def _last_part(name: str) -> str:
    return name.partition("?")[0].rstrip("/\\").replace("\\", "/").rpartition("/")[2]
