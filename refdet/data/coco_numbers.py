"""Under which numbers COCO knows an image, whatever list it stands in and whatever its file is called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# COCO writes an id with twelve digits: COCO_train2014_000000000009.jpg, 000000000009.jpg, and REFER's own
# COCO_train2014_000000000009_4.jpg. Six of the digits are zeros, so that a date or a Flickr number is none.
_TWELVE = re.compile(r"(?<![0-9])([0-9]{12})(?![0-9])")
_BARE = re.compile(r"([0-9]{1,12})(?:\.[A-Za-z]+)?")
# Visual Genome's images lie in VG_100K and VG_100K_2 under numbers of its own.
_VISUAL_GENOME = re.compile(r"(?:^|[/\\])VG_100K(?:_2)?[/\\]")

NAMES = ("file_name", "filename", "coco_url", "url", "image", "img", "path")


def numbers_in_name(name: str) -> frozenset[int]:
    """The numbers of twelve digits in the last part of a path or address."""
    return frozenset(int(digits) for digits in _TWELVE.findall(_last_part(name)))


def bare_number(name: str) -> int | None:
    """The number that is all of a name but its suffix ("9.jpg" and "9": 9), unless it is Visual Genome's own."""
    if is_visual_genome(name):
        return None
    match = _BARE.fullmatch(_last_part(name))
    return int(match[1]) if match else None


def is_visual_genome(name: str) -> bool:
    """Whether a path or address is of a file in Visual Genome's own folders."""
    return _VISUAL_GENOME.search(name) is not None


def coco_numbers(entry: Mapping[str, Any], image_id: int | None) -> frozenset[int]:
    """The numbers under which COCO may know the image of an entry in a list: any of them is enough.

    They are those in its names and addresses, and ``image_id``; where the entry has a ``coco_id`` that counts
    instead of ``image_id``, and null says that the image is not COCO's (Visual Genome has it so).

    Arguments:
        entry: an object of an instances file or a list.
        image_id: the id under which that file knows the image, None for none.
    """
    names = [entry[key] for key in NAMES if isinstance(entry.get(key), str)]
    numbers = set().union(*map(numbers_in_name, names))
    address = entry.get("coco_url")  # http://mscoco.org/images/9 in the files of 2014
    if isinstance(address, str) and (number := bare_number(address)) is not None:
        numbers.add(number)
    own = entry.get("coco_id", image_id)
    return frozenset(numbers if own is None else numbers | {own})


def _last_part(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].partition("?")[0]
